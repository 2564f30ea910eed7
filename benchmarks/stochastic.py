"""Law of the stochastic solvers' samples at 10 to 1,000 evaluations: python benchmarks/stochastic.py.

VP SDE from t = 1 to 1e-3, 20,000 points in float32, the two exact mixtures of ``family.targets``:

* 2-D: standard deviation within the modes over the exact one, less 1;
* 64-D: mean log p of the samples less that of exact ones, in nats a dimension.

Of every solver the grid is chosen with fewer points and another seed, so that the figures are not the best of many
draws; at 1,000 evaluations, where only some are run, it is that of the largest count before. A standard error of
sampling is printed with every table. Peers (k-diffusion, azula, diffusers) take part where they can be imported; they
get the same model, exact times, the same grids and their own stochastic options.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from family import T_END, T_START, rotated_target
from mixtures import ring
from peers import k_diffusion_sampling
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.exact import ExactModel
from sde_diffusion.samplers.grids import time_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SDE = sd.VPSDE()
EVALUATIONS = (10, 20, 50, 100, 1000)
GRIDS = ("log_snr", "karras", "angle", "quadratic", "t")
POINTS = 20_000
# What a network's batch would be: the mixture's tensors stay in the cache.
BATCH = 500
MANY = 1000
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "solvers_stochastic.png"
# The best of about 200 configurations of the peers, measured once before: what is to be reached.
BEST_PEER = {
    "2-D": {10: 0.115, 20: 0.005, 50: 0.000, 100: 0.001},
    "64-D": {10: 0.043, 20: 0.026, 50: 0.005, 100: 0.002},
}

# (model, evaluations, times, points, seed) -> samples (points, D)
Draw = Callable[[ExactModel, int, list[float], int, int], Tensor]


@dataclass(frozen=True)
class Target:
    """A mixture with what is measured of its samples.

    Attributes:
        name: of it.
        model: in float32.
        error: of samples (n, D).
        noise: standard deviation of the error of exact samples, times √n.
        screening: points with which grids are chosen.
    """

    name: str
    model: ExactModel
    error: Callable[[Tensor], float]
    noise: float
    screening: int


@dataclass(frozen=True)
class Candidate:
    """A solver with its options.

    Attributes:
        name: of it.
        draw: its samples.
        evaluations_per_step: of the model.
        grids: those to choose from.
        runs_long: whether it is run with very many evaluations too.
        is_peer: whether it is another library's.
    """

    name: str
    draw: Draw
    evaluations_per_step: int = 1
    grids: tuple[str, ...] = GRIDS
    runs_long: bool = False
    is_peer: bool = False

    def sample(self, target: Target, evaluations: int, grid: str, points: int, seed: int) -> Tensor:
        """Samples (points, D)."""
        times = time_grid(SDE, grid, T_START, T_END, evaluations // self.evaluations_per_step)
        return self.draw(target.model, evaluations, times, points, seed)


def run(
    evaluations: Sequence[int] = EVALUATIONS,
    points: int = POINTS,
    names: Sequence[str] = ("2-D", "64-D"),
    solvers: Sequence[str] = ("",),
    image: Path = IMAGE,
) -> None:
    """Print the tables of the solvers with one of ``solvers`` in their names, and draw the figure."""
    candidates = [one for one in OURS + _peers() if any(part in one.name for part in solvers)]
    with torch.no_grad():
        targets = [target for target in _targets() if target.name in names]
        results = {target.name: _table(target, candidates, evaluations, points) for target in targets}
    _draw(results, points, image)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, nargs="+", default=list(EVALUATIONS))
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--targets", nargs="+", default=["2-D", "64-D"], choices=["2-D", "64-D"])
    parser.add_argument("--solvers", nargs="+", default=[""], help="parts of their names")
    parser.add_argument("--image", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.evaluations, arguments.points, arguments.targets, arguments.solvers, arguments.image)


# Targets.


def _targets() -> list[Target]:
    sigma = float(SDE.sigma(torch.tensor(T_END, dtype=torch.float64)))
    alpha = float(SDE.alpha(torch.tensor(T_END, dtype=torch.float64)))
    circle, blobs = ring(), rotated_target()
    exact = blobs.under(SDE)
    log_prob = _log_prob(exact, exact.sample(10 * POINTS, T_END, seed=1)) / 64
    mean = float(log_prob.mean())

    def ratio(x: Tensor) -> float:
        return _within_modes(x, alpha * circle.means) / math.sqrt(alpha**2 * 0.1**2 + sigma**2) - 1

    def log_error(x: Tensor) -> float:
        return float(_log_prob(exact, x.double()).mean()) / 64 - mean

    return [
        Target("2-D", _single(circle), ratio, 0.5, POINTS // 4),
        Target("64-D", _single(blobs), log_error, float(log_prob.std()), POINTS // 20),
    ]


def _single(mixture: sd.GaussianMixture) -> ExactModel:
    covariances = mixture.eigenvectors @ torch.diag_embed(mixture.eigenvalues) @ mixture.eigenvectors.mT
    return sd.GaussianMixture(mixture.means.float(), covariances.float(), mixture.weights.float()).under(SDE)


def _within_modes(x: Tensor, centres: Tensor) -> float:
    """Standard deviation a dimension about the mean of the nearest centre's samples."""
    x = x.double()
    nearest = torch.cdist(x, centres).argmin(1)
    count = torch.bincount(nearest, minlength=len(centres))[:, None].clamp(min=1)
    mean = torch.zeros_like(centres).index_add_(0, nearest, x) / count
    return float((x - mean[nearest]).square().mean().sqrt())


def _log_prob(model: ExactModel, x: Tensor) -> Tensor:
    return torch.cat([model.log_prob(batch, T_END) for batch in x.split(BATCH)])


# Candidates.


def _ours(solver: str, evaluations_per_step: int = 1, runs_long: bool = False, **options: Any) -> Candidate:
    def draw(model: ExactModel, evaluations: int, times: list[float], points: int, seed: int) -> Tensor:
        out = sd.sample(model, points, solver=solver, grid=times, seed=seed, batch_size=BATCH, **options)
        assert out.nfe <= evaluations
        return out.samples

    label = ", ".join([solver, *(f"{name}={value}" for name, value in options.items())])
    # torchsde takes steps that are equal in log-SNR.
    grids = ("log_snr",) if solver == "torchsde" else GRIDS
    return Candidate(label, draw, evaluations_per_step, grids, runs_long)


OURS = [
    _ours("em"),
    _ours("ddpm", runs_long=True),
    _ours("exponential", eta=0.5),
    _ours("sde_dpmpp_2m"),
    _ours("sde_dpmpp_3m"),
    _ours("sde_adams", runs_long=True),
    _ours("sde_adams", eta=0.5),
    _ours("sde_adams", eta=0.5, order=3),
    _ours("pc", corrector="none"),
    _ours("pc", evaluations_per_step=2),
    _ours("edm", evaluations_per_step=2, churn=10.0),
    _ours("torchsde", method="euler"),
]


def _peers() -> list[Candidate]:
    """Those that can be imported; a line for each that cannot."""
    found = []
    for package, candidates in (("k_diffusion", _k_diffusion), ("azula", _azula), ("diffusers", _diffusers)):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out", flush=True)
        else:
            found += candidates()
    return found


def _peer(name: str, solve: Callable[[ExactModel, list[float], Tensor], Tensor], **options: Any) -> Candidate:
    """A candidate from a function of the model, the times and a batch of starts; its noise is torch's global."""

    def draw(model: ExactModel, evaluations: int, times: list[float], points: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        starts = torch.randn(points, *model.data_shape)
        return torch.cat([solve(model, times, x) for x in starts.split(BATCH)])

    return Candidate(name, draw, grids=("log_snr", "karras", "quadratic"), is_peer=True, **options)


def _k_diffusion() -> list[Candidate]:
    sampling = k_diffusion_sampling()

    def solve(sampler: str) -> Callable[[ExactModel, list[float], Tensor], Tensor]:
        def with_model(model: ExactModel, times: list[float], x: Tensor) -> Tensor:
            t = torch.tensor(times, dtype=torch.float64)
            alpha, levels = SDE.alpha(t), SDE.sigma(t) / SDE.alpha(t)

            def denoise(scaled: Tensor, level: Tensor) -> Tensor:
                time = SDE.t_from_log_snr(-2 * level[0].double().log()).float()
                return model.denoise(scaled * SDE.alpha(time), time)

            scaled = getattr(sampling, f"sample_{sampler}")(
                denoise, x / float(alpha[0]), levels.float(), disable=True, **noise(x)
            )
            return scaled * float(alpha[-1])

        # The default of those of several steps is a Brownian tree, slow and not of another law.
        def noise(x: Tensor) -> dict[str, Any]:
            return {"noise_sampler": lambda *levels: torch.randn_like(x)}

        return with_model

    return [
        _peer("k-diffusion dpmpp_2m_sde", solve("dpmpp_2m_sde"), runs_long=True),
        _peer("k-diffusion dpmpp_3m_sde", solve("dpmpp_3m_sde")),
        _peer("k-diffusion euler_ancestral", solve("euler_ancestral")),
        _peer("k-diffusion dpmpp_2s_ancestral", solve("dpmpp_2s_ancestral"), evaluations_per_step=2),
    ]


def _azula() -> list[Candidate]:
    azula = importlib.import_module("azula.sample")

    class Denoiser:
        def __init__(self, model: ExactModel):
            self.model = model

        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return SDE.alpha(t), SDE.sigma(t)

        def __call__(self, x: Tensor, t: Tensor) -> types.SimpleNamespace:
            return types.SimpleNamespace(mean=self.model.denoise(x, t))

    def solve(kind: str, **options: Any) -> Callable[[ExactModel, list[float], Tensor], Tensor]:
        def with_model(model: ExactModel, times: list[float], x: Tensor) -> Tensor:
            on_times = type(kind, (getattr(azula, kind),), {"timesteps": torch.tensor(times)})
            return on_times(Denoiser(model), silent=True, **options)(x)

        return with_model

    return [
        _peer("azula DDPM", solve("DDPMSampler")),
        _peer("azula DDIM, eta=0.5", solve("DDIMSampler", eta=0.5)),
    ]


def _diffusers() -> list[Candidate]:
    diffusers = importlib.import_module("diffusers")
    trained = SDE.alpha(torch.arange(0, 1001, dtype=torch.float64) / 1000).square()
    betas = (1 - trained[1:] / trained[:-1]).numpy()

    def solve(kind: str, **options: Any) -> Callable[[ExactModel, list[float], Tensor], Tensor]:
        def with_model(model: ExactModel, times: list[float], x: Tensor) -> Tensor:
            scheduler = getattr(diffusers, kind)(trained_betas=betas, prediction_type="sample", **options)
            scheduler.set_timesteps(len(times) - 1)
            t = torch.tensor(times, dtype=torch.float64)
            # Its own times are whole thousandths, which costs accuracy.
            scheduler.sigmas, scheduler.timesteps = (SDE.sigma(t) / SDE.alpha(t)).float(), 1000 * t[:-1]
            for step in scheduler.timesteps:
                data = model.denoise(x, (step / 1000).float())
                x = scheduler.step(data, step, x).prev_sample
            return x

        return with_model

    multistep = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}
    return [
        _peer("diffusers SASolver", solve("SASolverScheduler")),
        _peer("diffusers sde-dpmsolver++", solve("DPMSolverMultistepScheduler", **multistep)),
    ]


# Tables.


def _table(
    target: Target, candidates: Sequence[Candidate], evaluations: Sequence[int], points: int
) -> dict[Candidate, dict[int, float]]:
    noise = target.noise / math.sqrt(points)
    print(f"\n{target.name}: {points} points, standard error of exact samples {noise:.4f}\n")
    print("| solver |", " | ".join(str(count) for count in evaluations), "|")
    print("|---" * (1 + len(evaluations)) + "|", flush=True)
    results = {candidate: _row(candidate, target, evaluations, points) for candidate in candidates}
    for label, is_peer in (("best of ours", False), ("best peer here", True)):
        best = _best(results, is_peer)
        print(f"| **{label}** |", " | ".join(f"{best[n]:.4f}" if n in best else "" for n in evaluations), "|")
    reached = BEST_PEER[target.name]
    print("| best peer before |", " | ".join(f"{reached[n]:.3f}" if n in reached else "" for n in evaluations), "|")
    return results


def _row(candidate: Candidate, target: Target, evaluations: Sequence[int], points: int) -> dict[int, float]:
    errors, cells, grid = {}, [], candidate.grids[0]
    for count in evaluations:
        if count >= MANY and not candidate.runs_long:
            cells.append("")
            continue
        if count < MANY and len(candidate.grids) > 1:
            screened = {
                grid: target.error(candidate.sample(target, count, grid, target.screening, seed=1))
                for grid in candidate.grids
            }
            grid = min(screened, key=lambda grid: abs(screened[grid]) if math.isfinite(screened[grid]) else math.inf)
        errors[count] = target.error(candidate.sample(target, count, grid, points, seed=0))
        cells.append(f"{errors[count]:+.4f} {grid}")
    print(f"| {candidate.name} |", " | ".join(cells), "|", flush=True)
    return errors


def _best(results: dict[Candidate, dict[int, float]], is_peer: bool) -> dict[int, float]:
    """Smallest magnitude at every count."""
    best: dict[int, float] = {}
    for candidate, errors in results.items():
        for count, error in errors.items():
            if candidate.is_peer == is_peer and math.isfinite(error):
                best[count] = min(abs(error), best.get(count, math.inf))
    return best


def _draw(results: dict[str, dict[Candidate, dict[int, float]]], points: int, image: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    noise = {target.name: target.noise / math.sqrt(points) for target in _targets()}
    for axis, (name, errors) in zip(axes[0], results.items(), strict=True):
        for candidate, row in errors.items():
            counts = [count for count in row if math.isfinite(row[count])]
            style = "--" if candidate.is_peer else "-"
            axis.plot(counts, [max(abs(row[n]), 1e-5) for n in counts], style, marker=".", label=candidate.name)
        axis.axhspan(0, 2 * noise[name], color="0.9", label="two standard errors")
        axis.set(xscale="log", yscale="log", ylim=(1e-4, 3), title=name, xlabel="evaluations", ylabel="|error|")
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150)


if __name__ == "__main__":
    main()
