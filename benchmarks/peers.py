"""Samplers of diffusers, azula and k-diffusion on our exact models, and beside them ours of the same name.

    python benchmarks/peers.py

needs the three packages, none of which the library depends on; one that is missing is said and left out.

A peer is given what suits it best. azula and k-diffusion take the float64 times of a grid, or the noise levels there.
A scheduler of diffusers works on integer timesteps: its table of noise levels is made of the grid's times themselves,
so that timestep j of N is the grid's (N − j)th and none is rounded; it keeps its coefficients in float32. Every
evaluation of the model is counted where the model is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from family import T_END, T_START, Case, targets
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.samplers.grids import time_grid

# From a model, a start (B, D) and decreasing times to the solution at the last of them.
Run = Callable[[sd.Model, Tensor, list[float]], Tensor]


class Recorded(sd.Model):
    """A model that keeps the states (B, D) that it was asked about; their number is that of its evaluations."""

    def __init__(self, model: sd.Model):
        """Ask ``model``."""
        self.model, self.sde, self.data_shape = model, model.sde, model.data_shape
        self.states: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return self.model.device

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> sd.Prediction:
        """Keep x, and ask."""
        self.states.append(x)
        return self.model.predict(x, t, **cond)


@dataclass(frozen=True)
class Sampler:
    """A peer's sampler with its options.

    Attributes:
        name: package, sampler and options.
        run: the sampler.
        each: evaluations of a step.
        extra: evaluations a run takes beside those of its steps, less than 0 where it saves some.
    """

    name: str
    run: Run
    each: int = 1
    extra: int = 0

    def solve(self, case: Case, grid: str, nfe: int) -> Tensor:
        """The end point by as many steps as ``nfe`` evaluations allow.

        Raises:
            RuntimeError: if more evaluations were made.
        """
        steps = (nfe - self.extra) // self.each
        model = Recorded(case.model)
        end = self.run(model, case.start, time_grid(model.sde, grid, T_START, T_END, steps))
        if len(model.states) > nfe:
            raise RuntimeError(f"{self.name} took {len(model.states)} evaluations of {nfe}")
        return end


def samplers() -> list[Sampler]:
    """Those of all peers that are installed."""
    found = []
    for package, listed in (("azula", _azula), ("k_diffusion", _k_diffusion), ("diffusers", _diffusers)):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out", flush=True)
            continue
        with warnings.catch_warnings():
            # Of their own imports.
            warnings.simplefilter("ignore")
            found += listed()
    return found


def _azula() -> list[Sampler]:
    from azula import sample as azula
    from azula.denoise import Denoiser, DiracPosterior

    class Exact(Denoiser):
        def __init__(self, model: sd.Model):
            super().__init__()
            self.model = model

        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.sde.alpha(t), self.model.sde.sigma(t)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return DiracPosterior(mean=self.model.predict(x, t).x0)

    def sampler(kind: type, **options: Any) -> Run:
        def run(model: sd.Model, x: Tensor, times: list[float]) -> Tensor:
            grid = property(lambda self: torch.tensor(times, dtype=torch.float64))
            on_grid = type(kind.__name__, (kind,), {"timesteps": grid})
            result: Tensor = on_grid(Exact(model), steps=len(times) - 1, silent=True, **options)(x)
            return result

        return run

    one_step = [
        Sampler("azula DDIM", sampler(azula.DDIMSampler)),
        Sampler("azula Euler", sampler(azula.EulerSampler)),
        Sampler("azula Heun", sampler(azula.HeunSampler), each=2),
    ]
    return one_step + [
        Sampler(f"azula {name}{order}", sampler(getattr(azula, f"{name}Sampler"), order=order))
        for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB")
        for order in (2, 3, 4)
    ]


def _k_diffusion() -> list[Sampler]:
    sampling = k_diffusion_sampling()

    def sampler(function: Callable[..., Tensor], **options: Any) -> Run:
        def run(model: sd.Model, x: Tensor, times: list[float]) -> Tensor:
            # Its variables are x/α and σ/α.
            t = torch.tensor(times, dtype=torch.float64)
            alpha, sigmas = model.sde.alpha(t), torch.exp(-0.5 * model.sde.log_snr(t))

            def denoise(scaled: Tensor, sigma: Tensor) -> Tensor:
                time = model.sde.t_from_log_snr(-2 * sigma[0].log())
                return model.predict(model.sde.alpha(time) * scaled, time).x0

            return alpha[-1] * function(denoise, x / alpha[0], sigmas, disable=True, **options)

        return run

    # Their noise is multiplied by 0.
    no_noise = {"eta": 0.0, "noise_sampler": lambda *times: 0.0}
    return [
        Sampler("k-diffusion euler", sampler(sampling.sample_euler)),
        Sampler("k-diffusion heun", sampler(sampling.sample_heun), each=2),
        Sampler("k-diffusion dpm_2", sampler(sampling.sample_dpm_2), each=2),
        Sampler("k-diffusion lms", sampler(sampling.sample_lms)),
        Sampler("k-diffusion dpmpp_2m", sampler(sampling.sample_dpmpp_2m)),
        Sampler("k-diffusion dpmpp_2s", sampler(sampling.sample_dpmpp_2s_ancestral, **no_noise), each=2),
        Sampler("k-diffusion dpmpp_3m", sampler(sampling.sample_dpmpp_3m_sde, **no_noise)),
    ]


@cache
def k_diffusion_sampling() -> Any:
    """The module of k-diffusion's samplers without the rest of the package, which wants much that they do not.

    It imports CLIP, which is not to be had without an old setuptools; and torchvision, whose import fails where it was
    built for another torch, for want of operators that no sampler uses.
    """
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", arguments)
    package = ModuleType("k_diffusion")
    specification = importlib.util.find_spec("k_diffusion")
    package.__path__ = list(specification.submodule_search_locations or []) if specification else []
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def _diffusers() -> list[Sampler]:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()

    def sampler(kind: Any, **options: Any) -> Run:
        parameters = inspect.signature(kind).parameters
        # Where it can be told, it neither clips nor goes on to noise 0, which is beyond the last time.
        wanted = {"clip_sample": False, "final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}
        wanted = {name: value for name, value in wanted.items() if name in parameters} | options

        def run(model: sd.Model, x: Tensor, times: list[float]) -> Tensor:
            # In its order: from little noise to much.
            levels = model.sde.alpha(torch.tensor(times[::-1], dtype=torch.float64)).square()
            betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
            scheduler = kind(num_train_timesteps=len(times), trained_betas=betas.tolist(), **wanted)
            # Its own product is of float32.
            scheduler.alphas_cumprod = levels
            scheduler.set_timesteps(len(times) - 1)
            for j in scheduler.timesteps:
                noise = model.predict(x, times[len(times) - 1 - int(j)]).eps
                x = scheduler.step(noise, j, x).prev_sample
            return x

        return run

    def heun(model: sd.Model, x: Tensor, times: list[float]) -> Tensor:
        # It ends at noise 0; its last level is set to that of the last time, to which its last step is Euler's.
        t = torch.tensor(times, dtype=torch.float64)
        alpha, sigmas = model.sde.alpha(t), torch.exp(-0.5 * model.sde.log_snr(t))
        betas = 1 - alpha.square() / torch.cat([alpha[1:], alpha.new_ones(1)]).square()
        scheduler: Any = diffusers.HeunDiscreteScheduler(len(times), trained_betas=betas.flip(0).tolist())
        scheduler.set_timesteps(timesteps=list(range(len(times) - 1, 0, -1)))
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        x = x / alpha[0]
        for j in scheduler.timesteps:
            place = len(times) - 1 - int(j)
            noise = model.predict(alpha[place] * x, times[place]).eps
            x = scheduler.step(noise, j, x).prev_sample
        return alpha[-1] * x

    multistep, singlestep = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
    unipc, deis = diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler
    ancestral = {"timestep_spacing": "leading", "steps_offset": 1}
    found = [
        Sampler("diffusers DDIM", sampler(diffusers.DDIMScheduler, **ancestral)),
        Sampler("diffusers Heun", heun, each=2, extra=-1),
        # It takes its first step twice.
        Sampler("diffusers PNDM", sampler(diffusers.PNDMScheduler, skip_prk_steps=True, **ancestral), extra=1),
    ]
    # In few steps they end at a lower order, unless they are told not to.
    for suffix, full in (("", {}), (" full", {"lower_order_final": False})):
        found += [
            *(Sampler(f"diffusers DPM++{n}M{suffix}", sampler(multistep, solver_order=n, **full)) for n in (2, 3)),
            *(Sampler(f"diffusers DPM++{n}S{suffix}", sampler(singlestep, solver_order=n, **full)) for n in (2, 3)),
            *(Sampler(f"diffusers UniPC{n}{suffix}", sampler(unipc, solver_order=n, **full)) for n in (1, 2, 3)),
            *(Sampler(f"diffusers DEIS{n}{suffix}", sampler(deis, solver_order=n, **full)) for n in (2, 3)),
        ]
    found += [
        Sampler("diffusers UniPC2 bh1", sampler(unipc, solver_order=2, solver_type="bh1")),
        *(
            Sampler(f"diffusers DPM{n}M", sampler(multistep, solver_order=n, algorithm_type="dpmsolver"))
            for n in (2, 3)
        ),
    ]
    return found


@dataclass(frozen=True)
class Pair:
    """A solver of ours and a peer's sampler of the same name.

    Attributes:
        solver: ours.
        options: of ours.
        peer: name of the peer's.
        every: ours takes each ``every``-th time of the grid, where the peer counts the parts of a step as steps.
        cause: of the difference, if there is one.
    """

    solver: str
    options: dict[str, Any]
    peer: str
    every: int = 1
    cause: str = ""


_HALF = "theirs has half of the last term of third order; twice it makes them equal"
_FIRST_STEPS = (
    "ours starts by Runge-Kutta steps or lower orders; theirs takes its first step twice, and is one state late"
)
_HALF_SLOPE = "theirs goes to two thirds by half a slope; its exact share makes them equal"
_PARTS = "parts of a step are where the grid's times are; ours are equal in log-SNR"

SAME_NAME = [
    Pair("ddim", {}, "azula DDIM"),
    Pair("ddim", {}, "diffusers DDIM"),
    Pair("ddim", {}, "k-diffusion euler"),
    Pair("euler", {}, "azula Euler", cause="Euler's method over t; theirs, over σ/α, is DDIM"),
    Pair("heun", {}, "azula Heun", cause="Heun's method over atan(σ/α); theirs is over σ/α"),
    Pair("heun", {}, "k-diffusion heun", cause="Heun's method over atan(σ/α); theirs is over σ/α"),
    Pair("lms", {}, "azula zAB4"),
    Pair("lms", {}, "k-diffusion lms"),
    Pair("pndm", {}, "diffusers PNDM", cause=_FIRST_STEPS),
    Pair("pndm", {"warmup": "multistep"}, "diffusers PNDM", cause=_FIRST_STEPS),
    Pair("dpmpp_2s", {}, "k-diffusion dpmpp_2s"),
    Pair("dpmpp_2s", {}, "diffusers DPM++2S full", every=2, cause=_PARTS),
    Pair("dpmpp_3s", {}, "diffusers DPM++3S full", every=3, cause=f"{_HALF_SLOPE}; {_PARTS}"),
    Pair("dpmpp_2m", {"lower_order_final": False}, "k-diffusion dpmpp_2m"),
    Pair("dpmpp_2m", {}, "diffusers DPM++2M"),
    Pair("dpmpp_3m", {}, "diffusers DPM++3M", cause=_HALF),
    Pair("dpmpp_3m", {"lower_order_final": False}, "k-diffusion dpmpp_3m", cause=_HALF),
    Pair("unipc", {"order": 1}, "diffusers UniPC1"),
    Pair("unipc", {"order": 2}, "diffusers UniPC2"),
    Pair("unipc", {"order": 3}, "diffusers UniPC3"),
    Pair("unipc", {"order": 2, "variant": "bh1"}, "diffusers UniPC2 bh1"),
    Pair("deis", {"order": 2, "form": "noise"}, "diffusers DEIS2 full"),
    Pair("deis", {"order": 3, "form": "noise"}, "diffusers DEIS3 full"),
    *(Pair("deis", {"order": n, "form": "velocity"}, f"azula vAB{n}") for n in (2, 3, 4)),
    *(Pair("deis", {"order": n, "form": "noise"}, f"azula zEAB{n}") for n in (2, 3, 4)),
    *(Pair("deis", {"order": n, "form": "data"}, f"azula xEAB{n}") for n in (2, 3, 4)),
]


def difference(pair: Pair, peer: Sampler, case: Case, grid: str, steps: int) -> float:
    """How far ours and the peer's are apart on the same grid, from the same start.

    Of the states that the model is asked about, and of the end point: the largest difference in any sample, relative to
    the root mean square of the state.
    """
    times = time_grid(case.model.sde, grid, T_START, T_END, steps)
    theirs, ours = Recorded(case.model), Recorded(case.model)
    end = peer.run(theirs, case.start, times)
    grid_of_ours = times[:: pair.every]
    out = sd.sample(ours, len(case.start), solver=pair.solver, grid=grid_of_ours, x_start=case.start, **pair.options)
    states = zip([*ours.states, out.samples], [*theirs.states, end], strict=False)
    return max(float((x - y).abs().max() / y.square().mean().sqrt()) for x, y in states)


def run(steps: int = 12, samples: int = 256) -> None:
    """Print the table of ``SAME_NAME`` on two grids."""
    peers = {peer.name: peer for peer in samplers()}
    case = targets(samples, 64)[0]
    grids = ("log_snr", "quadratic")
    print("Largest relative difference of any state from the peer's on the same grid.\n")
    print(f"| ours | the peer's | {' | '.join(grids)} | cause |\n|---|---|---|---|---|")
    for pair in SAME_NAME:
        if pair.peer not in peers or pair.solver not in sd.solvers():
            continue
        found = [difference(pair, peers[pair.peer], case, grid, steps) for grid in grids]
        ours = ", ".join([pair.solver, *(f"{name} {value}" for name, value in pair.options.items())])
        cells = " | ".join(f"{value:.1e}" for value in found)
        print(f"| {ours} | {pair.peer} | {cells} | {pair.cause if max(found) > 1e-4 else ''} |", flush=True)


def main() -> None:
    """Print it."""
    run()


if __name__ == "__main__":
    main()
