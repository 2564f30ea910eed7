"""Likelihoods against what is known, and against the estimator that everyone copies: python benchmarks/likelihood.py.

Prints, in float32 and in one run:

* cost: mean squared error times seconds on the 64-D mixture and on the shipped image model, beside the usual estimator
  (SciPy's RK45 at 1e-5 on the host, one frozen probe, a forward pass for the drift and another for its derivative);
* bias of every estimator on mixtures under every SDE, and the part of it that is the solver's;
* calibration of the 95 % interval over repeats;
* bits/dim of 8-bit data whose dequantised density has a closed form.

--only=cost runs one of these. The image model's reference is that of benchmarks/likelihood_reference.py, which is made
first, in about an hour, if it is not there yet.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from likelihood_reference import reference
from mixtures import ring, rotated
from scipy.integrate import solve_ivp
from torch import Tensor

import sde_diffusion as sd

SDES = {
    "VP": sd.VPSDE(),
    "sub-VP": sd.SubVPSDE(),
    "VE": sd.VESDE(),
    "EDM": sd.EDMSDE(),
    "cosine": sd.CosineVPSDE(),
    "constant VE": sd.ConstantVESDE(),
    "flow": sd.FlowSDE(),
}
BITS = math.log(2)


def usual_estimator(model: sd.Model, x: Tensor, seed: int) -> Tensor:
    """Log density (B,) as research code computes it; Song et al. 2021, appendix D.2."""
    sde, shape = model.sde, x.shape
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1

    def rates(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat[: x.numel()].reshape(shape)).to(x)
        time_ = torch.full((len(x),), t, dtype=x.dtype)
        with torch.no_grad():
            drift = model.velocity(state, time_)
        with torch.enable_grad():
            state.requires_grad_(True)
            (gradient,) = torch.autograd.grad((model.velocity(state, time_) * signs).sum(), state)
        divergence = (gradient * signs).flatten(1).sum(1)
        return np.concatenate([drift.flatten().double().numpy(), divergence.double().numpy()])

    start = np.concatenate([x.flatten().double().numpy(), np.zeros(len(x))])
    result = solve_ivp(rates, (sde.t_min, sde.t_max), start, method="RK45", rtol=1e-5, atol=1e-5)
    end = torch.from_numpy(result.y[:, -1])
    return sde.prior_log_prob(end[: x.numel()].reshape(shape)) + end[x.numel() :]


def cost(arguments: argparse.Namespace) -> None:
    """Mean squared error times seconds, as a ratio to the usual estimator's."""
    mixture = rotated(64).under(sd.VPSDE())
    x = mixture.sample(256, seed=1).float()
    exact = mixture.log_prob(x.double(), mixture.sde.t_min)
    _compare("64-D mixture, 256 points", mixture, x, exact, 64.0, "nats/dim", repeats=4, usual_repeats=4)
    model, images, log_prob, _ = reference(16)
    name = "shipped model, 16 images"
    _compare(name, model, images, log_prob.double(), 784 * BITS, "bits/dim", repeats=2, usual_repeats=2)


def _compare(
    name: str, model: sd.Model, x: Tensor, exact: Tensor, scale: float, unit: str, repeats: int, usual_repeats: int
) -> None:
    print(f"\n{name}; errors in {unit}\n")
    print(
        "| estimator | bias | standard deviation | root mean square | seconds | products | error² x seconds | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    # What dopri5 is mostly run at; the default is tighter.
    library, loose = partial_likelihood(model, x), {"rtol": 1e-4, "atol": 1e-4}
    estimators: dict[str, tuple[Callable[[int], tuple[Tensor, float]], int]] = {
        "usual: RK45 1e-5, one probe": (lambda seed: (usual_estimator(model, x, seed), math.nan), usual_repeats),
        "adaptive 1e-4, probes=1": (library(method="adaptive", probes=1, probe="rademacher", **loose), repeats),
        "adaptive 1e-4, probes=8": (library(method="adaptive", **loose), max(1, repeats // 2)),
        "decoupled, probes=2": (library(probes=2), repeats),
        "decoupled, probes=8, rademacher": (library(probe="rademacher"), repeats),
        "**decoupled** (the default, probes=8)": (library(), repeats),
    }
    usual = math.nan
    for label, (estimate, times) in estimators.items():
        errors, products, started = [], math.nan, time.perf_counter()
        for seed in range(times):
            log_prob, products = estimate(seed)
            errors.append((log_prob.double() - exact) / scale)
        seconds = (time.perf_counter() - started) / times
        error = torch.stack(errors)
        bias, square = float(error.mean()), float(error.square().mean())
        spread = math.sqrt(square - bias**2)
        std_error = float(error.mean(0).std() / math.sqrt(len(exact)))
        usual = square * seconds if math.isnan(usual) else usual
        count = "" if math.isnan(products) else f"{products:.0f}"
        print(
            f"| {label} | {bias:.1e} ± {std_error:.0e} | {spread:.2e} | {math.sqrt(square):.2e} | {seconds:.2f} | "
            f"{count} | {square * seconds:.2e} | {usual / (square * seconds):.1f} |",
            flush=True,
        )


def partial_likelihood(model: sd.Model, x: Tensor) -> Callable[..., Callable[[int], tuple[Tensor, float]]]:
    """Of options, the function of a seed that gives log densities and the mean number of products."""

    def with_options(**options: Any) -> Callable[[int], tuple[Tensor, float]]:
        def estimate(seed: int) -> tuple[Tensor, float]:
            result = sd.log_likelihood(model, x, seed=seed, **options)
            return result.log_prob, float(result.derivative_evaluations.double().mean())

        return estimate

    return with_options


def bias(arguments: argparse.Namespace) -> None:
    """Mean error of every estimator on exact models, in standard errors, and the solver's part."""
    print("\nnats/dim; ± one standard error; solver: mean absolute error with the exact trace\n")
    kinds: dict[str, dict[str, Any]] = {
        "orthogonal": {},
        "rademacher": {"probe": "rademacher"},
        "gaussian": {"probe": "gaussian"},
        "adaptive": {"method": "adaptive", "probes": 2, "probe": "rademacher"},
    }
    print("| mixture | SDE | solver | its estimate | " + " | ".join(kinds) + " |")
    print("|---" * (4 + len(kinds)) + "|")
    worst, largest = 0.0, 0.0
    for dimension, count, exact_count, repeats in ((2, 256, 256, 4), (64, 64, 64, 4), (784, 8, 1, 1)):
        distribution = ring() if dimension == 2 else rotated(dimension, 10 if dimension == 64 else 2)
        x = distribution.sample(count, seed=1).float()
        for name, sde in SDES.items():
            model = distribution.under(sde)
            truth = model.log_prob(x.double(), sde.t_min)
            solved = sd.log_likelihood(model, x[:exact_count], trace="exact")
            solver = float((solved.log_prob.double() - truth[:exact_count]).abs().mean()) / dimension
            estimate = float(solved.solver_error.double().mean()) / dimension
            cells = []
            for options in kinds.values():
                draws = [sd.log_likelihood(model, x, seed=seed, **options).log_prob for seed in range(repeats)]
                error = (torch.stack(draws).double().mean(0) - truth) / dimension
                mean, std_error = float(error.mean()), float(error.std() / math.sqrt(count))
                worst = max(worst, abs(mean) / std_error)
                cells.append(f"{mean:.1e} ± {std_error:.0e}")
            largest = max(largest, solver)
            cells = [f"{solver:.1e}", f"{estimate:.1e}", *cells]
            print(f"| {dimension}-D | {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nlargest bias {worst:.2f} standard errors; largest error of the solver {largest:.1e} nats/dim")


def calibration(arguments: argparse.Namespace) -> None:
    """How often the 95 % interval holds the closed form."""
    repeats = arguments.repeats
    print(f"\n{repeats} repeats for each of 2 points; 64-D mixture, VP\n")
    print("| estimator | coverage of each point | of all | degrees of freedom | bias in standard errors |")
    print("|---|---|---|---|---|")
    model = rotated(64).under(sd.VPSDE())
    x = model.distribution.sample(2, seed=3).float()
    truth = model.log_prob(x.double(), model.sde.t_min).repeat(repeats)
    kinds: dict[str, dict[str, Any]] = {
        "decoupled, probes=2": {"probes": 2},
        "decoupled, probes=8": {},
        "decoupled, target_std_error=1": {"target_std_error": 1.0},
        "adaptive, probes=8": {"method": "adaptive", "probe": "rademacher"},
    }
    for name, options in kinds.items():
        result = sd.log_likelihood(model, x.repeat(repeats, 1), atol=1e-3 if "target" in name else None, **options)
        low, high = result.interval()
        holds = ((low <= truth) & (truth <= high)).double().reshape(repeats, 2).mean(0)
        deviation = result.log_prob.double() - truth
        bias = float(deviation.mean() / deviation.std()) * math.sqrt(len(truth))
        each = ", ".join(f"{value:.3f}" for value in holds.tolist())
        degrees = float(result.degrees_of_freedom.median())
        print(f"| {name} | {each} | {float(holds.mean()):.3f} | {degrees:.1f} | {bias:.2f} |", flush=True)


def codes(arguments: argparse.Namespace) -> None:
    """Bits/dim of 8-bit codes under a correlated Gaussian, against the mean over the bin in closed form."""
    dimension, count, draws = 16, 1000, 4
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / math.sqrt(dimension)
    covariance = 0.05 * factor @ factor.T + 0.01 * torch.eye(dimension, dtype=torch.float64)
    model = sd.Gaussian(torch.zeros(dimension, dtype=torch.float64), covariance).under(sd.VPSDE())
    model.data = sd.DataInfo(low=-1.0, high=1.0, bits=8)
    images = model.data.quantize(model.sample(count).clamp(-1, 0.999))
    t = torch.tensor(model.sde.t_min, dtype=torch.float64)
    precision = torch.linalg.inv(
        model.sde.alpha(t) ** 2 * covariance + model.sde.sigma(t) ** 2 * torch.eye(dimension, dtype=torch.float64)
    )
    centres, width = model.data.points(images, dtype=torch.float64), 2 / 256
    # The quadratic form averaged over the bin has tr P w²/12 besides its value at the centre.
    log_prob = model.log_prob(centres, model.sde.t_min) - precision.trace() * width**2 / 24
    expected = -(log_prob / dimension + math.log(width)) / BITS
    print(f"\n{count} examples of {dimension} dimensions, {draws} draws of the dequantisation\n")
    print("| estimator | bits/dim | closed form | difference | its standard error |")
    print("|---|---|---|---|---|")
    kinds: dict[str, dict[str, Any]] = {"exact trace": {"trace": "exact"}, "probes=8": {}, "probes=2": {"probes": 2}}
    for name, options in kinds.items():
        result = sd.bits_per_dim(model, images, draws=draws, **options)
        difference = result.per_example.double() - expected
        mean, std_error = float(difference.mean()), float(difference.std()) / math.sqrt(count)
        print(
            f"| {name} | {result.mean:.5f} | {float(expected.mean()):.5f} | {mean:.5f} | {std_error:.5f} |", flush=True
        )


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "cost": cost,
    "bias": bias,
    "calibration": calibration,
    "codes": codes,
}


def main(sections: Sequence[str] | None = None) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="a section; all by default")
    parser.add_argument("--repeats", type=int, default=1000, help="of the calibration")
    arguments = parser.parse_args(sections)
    for name in arguments.only or SECTIONS:
        SECTIONS[name](arguments)


if __name__ == "__main__":
    main()
