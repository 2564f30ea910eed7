"""Time a network call beyond the network, ours beside the peers': python benchmarks/overhead.py.

The network hands back its input, and a stochastic solver is handed its noise: what is left is the arithmetic of a step
and what is around it. Runs of ours and the peers' take turns, and the fastest of each is kept, as what else the machine
does only adds to a time. Below, what the noise itself takes: a stream a sample, beside one ``torch.randn``.
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.samplers.grids import time_grid
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.samplers.registry import SOLVERS
from sde_diffusion.samplers.solver import Predict, Problem

STEPS = 100
SOLVERS_TIMED = ("ddim", "dpmpp_2m", "heun", "ddpm")
Run = Callable[[], object]


def hand_back(x: Tensor, t: Tensor) -> Tensor:
    """The network."""
    return x


class _Given(Streams):
    """Streams of a noise that is there already."""

    def __init__(self, x: Tensor):
        super().__init__(0, [])
        self.noise = torch.randn_like(x)[:, None]

    def normal(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return self.noise


def ours(x: Tensor) -> dict[str, tuple[Run, int]]:
    """A run of each solver, and its network calls."""
    model = sd.DiffusionModel(hand_back, sd.VPSDE(), "eps", data_shape=x.shape[1:])
    times = time_grid(model.sde, "log_snr", model.sde.t_max, model.sde.t_min, STEPS)
    runs: dict[str, tuple[Run, int]] = {}
    for name in SOLVERS_TIMED:
        solver = SOLVERS[name]()
        problem = Problem(model.sde, Predict(model), times, _Given(x))
        runs[name] = (partial(solver.solve, problem, x), STEPS * (solver.evaluations_per_step() or 1))
    return runs


def diffusers_runs(x: Tensor) -> dict[str, tuple[Run, int]]:
    """The same of diffusers."""
    import diffusers
    from diffusers.schedulers import scheduling_ddpm

    noise = torch.randn_like(x)
    scheduling_ddpm.randn_tensor = lambda *arguments, **options: noise

    def run(scheduler: Any) -> None:
        # A schedule counts its steps: it is set anew for every run.
        scheduler.set_timesteps(STEPS)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(hand_back(state, t), t, state).prev_sample

    kinds: dict[str, Any] = {
        "ddim": diffusers.DDIMScheduler(clip_sample=False),
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(),
        "heun": diffusers.HeunDiscreteScheduler(),
        "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    }
    return {
        name: (partial(run, scheduler), 2 * STEPS - 1 if name == "heun" else STEPS) for name, scheduler in kinds.items()
    }


def k_diffusion_runs(x: Tensor) -> dict[str, tuple[Run, int]]:
    """The same of k-diffusion."""
    from peers import k_diffusion_sampling

    sampling = k_diffusion_sampling()
    sigmas = torch.linspace(5.0, -5.0, STEPS + 1).exp()
    noise = torch.randn_like(x)
    given = {"noise_sampler": lambda *levels: noise}
    kinds: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "ddim": (sampling.sample_euler, 1, {}),
        "dpmpp_2m": (sampling.sample_dpmpp_2m, 1, {}),
        "heun": (sampling.sample_heun, 2, {}),
        "ddpm": (sampling.sample_euler_ancestral, 1, given),
    }
    return {
        name: (partial(function, hand_back, x, sigmas, disable=True, **options), each * STEPS)
        for name, (function, each, options) in kinds.items()
    }


def azula_runs(x: Tensor) -> dict[str, tuple[Run, int]]:
    """The same of azula."""
    from azula import sample as azula
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VPSchedule

    class HandBack(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VPSchedule()

        def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
            return DiracPosterior(mean=x)

    kinds: dict[str, tuple[type, int, dict[str, Any]]] = {
        "ddim": (azula.DDIMSampler, 1, {}),
        "dpmpp_2m": (azula.xEABSampler, 1, {"order": 2}),
        "heun": (azula.HeunSampler, 2, {}),
        "ddpm": (azula.DDPMSampler, 1, {}),
    }
    return {
        name: (partial(kind(HandBack(), steps=STEPS, silent=True, **options), x), each * STEPS)
        for name, (kind, each, options) in kinds.items()
    }


PEERS = {"diffusers": diffusers_runs, "k_diffusion": k_diffusion_runs, "azula": azula_runs}


def fastest(runs: dict[Any, tuple[Run, int]], repeats: int) -> dict[Any, float]:
    """Seconds a call of each run, the runs taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, (run, calls) in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - started) / calls)
    return best


@torch.no_grad()
def run(repeats: int = 40) -> None:
    """Print a table of microseconds, and that of the noise."""
    found = {"ours": ours}
    for package, runs in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out", flush=True)
        else:
            found[package] = runs
    print(f"| µs a network call | batch | {' | '.join(found)} | ours / fastest peer |")
    print("|---" * (3 + len(found)) + "|")
    for batch in (1, 64):
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timed = {(name, package): one for package, make in found.items() for name, one in make(x).items()}
        best = fastest(timed, repeats)
        for name in SOLVERS_TIMED:
            times = [1e6 * best[name, package] for package in found]
            ratio = f"{times[0] / min(times[1:]):.2f}" if len(times) > 1 else ""
            print(f"| {name} | {batch} | {' | '.join(f'{value:.0f}' for value in times)} | {ratio} |", flush=True)
    print("\n| µs of noise (B, 3, 32, 32) | a stream a sample | torch.randn | ratio |\n|---|---|---|---|")
    for batch in (1, 64):
        draw = StepNoise(Streams(0, range(batch)), (3, 32, 32), torch.float32)
        both = fastest({"streams": (draw, 1), "randn": (partial(torch.randn, batch, 3, 32, 32), 1)}, 5 * repeats)
        streams, randn = 1e6 * both["streams"], 1e6 * both["randn"]
        print(f"| {batch} | {streams:.0f} | {randn:.0f} | {streams / randn:.2f} |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    run(parser.parse_args().repeats)


if __name__ == "__main__":
    main()
