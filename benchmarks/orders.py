"""Order of convergence of every registered solver: python benchmarks/orders.py.

* ODE: error of the end point (root mean square over samples, float64) on a smooth exact mixture, against the same ODE
  solved to 1e-12; from t_max to where the log-SNR is 4.
* Weak: of a Gaussian target every step is an affine map of the state and its noise. The state that no noise moves is
  the mean; one draw of noise at a time, each entry alone, adds up to the covariance: both without sampling. The error
  is the norm of mean and covariance together, from exact ones at the start.
* Strong: root mean square distance between the end points of two step sizes along the same Brownian paths, for the
  solvers that are driven by one.

Steps are doubled from ``FEWEST`` on, until the error is close to the rounding floor or they are very many; the slope is
that of the least-squares line through the last three errors, in logarithms of both. Where it is off the nominal order
by more than ``TOLERANCE`` the measurement is repeated with the first step cut in halves, down to 2⁻¹² of it: if that
restores the order, the cause was the first step of a multistep method, which is of first order.

From t_max that step hardly counts, as x̂₀ does not change there yet. The second table starts where it does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.ode import ProbabilityFlow
from sde_diffusion.samplers.brownian import METHODS
from sde_diffusion.samplers.grids import time_grid
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.samplers.registry import SOLVERS
from sde_diffusion.samplers.solver import Predict, Problem, Solver, StepSolver

TOLERANCE = 0.2
FEWEST = 40
MOST = 1280
# A mean and a covariance are propagated for every draw of noise: as many rows as draws.
MOST_WEAK = 640
# Errors below this are not fitted: that of the reference, and of rounding, is some hundred times smaller.
FLOOR = 1e-10
END = 4.0
SDES: dict[str, sd.SDE] = {"VP": sd.VPSDE(), "EDM": sd.EDMSDE(), "flow": sd.FlowSDE()}

# What is measured of a solver besides its defaults, {}; or in place of them, if they have no order.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ode": [{"method": method} for method in ("euler", "midpoint", "heun2", "heun3", "rk4")],
    "em": [{}, {"eta": 0.5}],
    "ddim": [{}, {"eta": 0.5}, {"eta": 1.0}],
    "ddpm": [{}, {"variance": "noising"}],
    "deis": [{"order": order, "form": form} for form in ("velocity", "data", "noise") for order in (1, 2, 3, 4)],
    "unipc": [{"order": order, "variant": variant} for order in (1, 2, 3) for variant in ("bh1", "bh2")],
    "lms": [{"order": order} for order in (1, 2, 3, 4)],
    "pndm": [{"order": order} for order in (1, 2, 4)],
    "exponential": [{"eta": eta} for eta in (0.0, 0.5, 1.0)],
    "sde_dpmpp_2m": [{"eta": eta} for eta in (0.0, 0.5, 1.0)],
    "sde_dpmpp_3m": [{"eta": eta} for eta in (0.0, 1.0)],
    "sde_adams": [{"eta": eta, "order": order} for eta in (0.0, 1.0) for order in (1, 2, 3)],
    # A corrector's own error does not vanish with the step.
    "pc": [{"predictor": predictor, "corrector": "none"} for predictor in ("reverse_diffusion", "ancestral", "em")],
    "edm": [{"churn": 0.0}, {"churn": 10.0}],
    # "srk" takes powers of its noise, which has no law of one draw at a time.
    "torchsde": [{"method": method} for method in METHODS if method != "srk"],
}
# Orders along a path, of noise that does not depend on x.
STRONG: list[tuple[str, dict[str, Any], float]] = [
    ("em", {}, 1.0),
    *[("torchsde", {"method": method}, 1.5 if method == "srk" else 1.0) for method in METHODS],
]


@dataclass(frozen=True)
class Case:
    """A solver with its options.

    Attributes:
        name: in ``SOLVERS``.
        options: of its class.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def solver(self) -> Solver:
        """A new one."""
        return SOLVERS[self.name](**self.options)

    @property
    def is_multistep(self) -> bool:
        """Whether it uses predictions of the steps before."""
        return getattr(self.solver, "memory", 0) > 1

    def __str__(self) -> str:
        """As a user would give it."""
        return ", ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Convergence:
    """Errors at numbers of steps, above the floor, and the slope of the last three."""

    steps: list[int]
    errors: list[float]

    @property
    def slope(self) -> float:
        """Least squares, in logarithms; 0 if no two errors are above the floor."""
        x = torch.tensor(self.steps[-3:], dtype=torch.float64).log()
        y = torch.tensor(self.errors[-3:], dtype=torch.float64).log()
        return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()) if len(x) > 1 else 0.0

    def __str__(self) -> str:
        """Slope, steps, and errors at both ends of the fit."""
        first = -min(3, len(self.steps))
        steps, errors = f"{self.steps[first]}-{self.steps[-1]}", f"{self.errors[first]:.0e} to {self.errors[-1]:.0e}"
        return f"{self.slope:.2f} ({steps}: {errors})"


def cases() -> list[Case]:
    """Every registered solver, with its defaults or the options above."""
    return [Case(name, options) for name in SOLVERS for options in OPTIONS.get(name, [{}])]


def run(solvers: Sequence[str] = tuple(SOLVERS)) -> None:
    """Print all tables."""
    with torch.no_grad():
        off = run_from_the_prior(solvers=solvers)
        run_from_the_middle(solvers=solvers)
    print(f"\nOff by more than {TOLERANCE}: {off or 'none'}")


def run_from_the_prior(sdes: dict[str, sd.SDE] = SDES, solvers: Sequence[str] = tuple(SOLVERS)) -> dict[str, float]:
    """Print the table; the slopes that are off, by solver and SDE."""
    off: dict[str, float] = {}
    print("| solver | kind | order |", " | ".join(sdes), "| |")
    print("|---|---|---|" + "---|" * (len(sdes) + 1), flush=True)
    for case in cases():
        order = case.solver.convergence_order
        if case.name not in solvers:
            continue
        if order is None:
            reason = "it chooses its own steps" if case.solver.is_adaptive else "it states none; see the strong orders"
            print(f"| {case} | | |" + " |" * len(sdes), f"no order: {reason} |", flush=True)
            continue
        kind = "weak" if case.solver.is_stochastic else "ODE"
        cells, notes = [], []
        for label, sde in sdes.items():
            result, note = with_cause(case, sde, order)
            cells.append(str(result))
            notes += [f"{label}: {note}"] if note else []
            if abs(result.slope - order) > TOLERANCE:
                off[f"{case} {label}"] = result.slope
        print(f"| {case} | {kind} | {order} |", " | ".join(cells), f"| {'; '.join(notes)} |", flush=True)
    for name, options, strong_order in [row for row in STRONG if row[0] in solvers]:
        case = Case(name, options)
        strong = [strong_convergence(case, sde) for sde in sdes.values()]
        print(f"| {case} | strong | {strong_order} |", " | ".join(map(str, strong)), "| |", flush=True)
        off |= {
            f"{case} {label}, strong": result.slope
            for label, result in zip(sdes, strong, strict=True)
            if abs(result.slope - strong_order) > TOLERANCE
        }
    return off


def run_from_the_middle(start: float = -1.0, solvers: Sequence[str] = tuple(SOLVERS)) -> None:
    """Print how the order of the first step shows where x̂₀ changes at once, for the multistep methods."""
    print(
        f"\n| solver, VP from log-SNR {start:g} | order | equal steps | first step cut in halves |\n|---|---|---|---|"
    )
    for case in cases():
        order = case.solver.convergence_order
        if case.name in solvers and case.is_multistep and order is not None and order > 1:
            equal, graded = (measure(case, SDES["VP"], graded=graded, start=start) for graded in (False, True))
            print(f"| {case} | {order} | {equal} | {graded} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    solvers = parser.parse_args().solvers
    torch.set_num_threads(1)
    run(solvers)


def with_cause(case: Case, sde: sd.SDE, order: float) -> tuple[Convergence, str]:
    """The convergence on equal steps if it is of the order, else with the first step cut; and what that says."""
    equal = measure(case, sde)
    if abs(equal.slope - order) <= TOLERANCE:
        return equal, ""
    if not case.is_multistep:
        return equal, "OFF"
    graded = measure(case, sde, graded=True)
    if abs(graded.slope - order) <= TOLERANCE:
        return graded, f"{equal.slope:.2f} on equal steps, of which the first is of first order; here it is cut"
    return equal, f"OFF, and {graded.slope:.2f} with the first step cut"


# The problems.


def smooth_mixture() -> sd.GaussianMixture:
    """2-D: two wide modes, unequally likely and correlated."""
    means = torch.tensor([[1.2, -0.9], [-0.8, 0.6]], dtype=torch.float64)
    spread = torch.tensor([[0.26, 0.06], [0.06, 0.18]], dtype=torch.float64)
    return sd.GaussianMixture(means, torch.stack([spread, 0.7 * spread]), torch.tensor([0.4, 0.6], dtype=torch.float64))


def gaussian() -> sd.Gaussian:
    """2-D: of a mean that is not 0, and correlated."""
    covariance = torch.tensor([[0.7, 0.2], [0.2, 0.3]], dtype=torch.float64)
    return sd.Gaussian(torch.tensor([0.6, -0.4], dtype=torch.float64), covariance)


def time_at(sde: sd.SDE, log_snr: float) -> float:
    """The time with this log-SNR."""
    return float(sde.t_from_log_snr(torch.tensor(log_snr, dtype=torch.float64)))


def grid(sde: sd.SDE, kind: str, start: float, end: float, steps: int, graded: bool) -> list[float]:
    """Times of equal steps; with a graded start the first, in log-SNR, is cut in halves down to 2⁻¹² of it."""
    times = time_grid(sde, kind, start, end, steps)
    if not graded:
        return times
    first, second = sde.log_snr(torch.tensor(times[:2], dtype=torch.float64)).tolist()
    cuts = [time_at(sde, first + (second - first) * 2.0**-i) for i in range(12, 0, -1)]
    return [times[0], *cuts, *times[1:]]


def measure(
    case: Case,
    sde: sd.SDE,
    *,
    graded: bool = False,
    start: float | None = None,
    fewest: int = FEWEST,
    most: int | None = None,
) -> Convergence:
    """Convergence to the ODE, or in law; ``start`` is a log-SNR, by default that of t_max."""
    t_start = sde.t_max if start is None else time_at(sde, start)
    solver, t_end = case.solver, time_at(sde, END)
    problem = _Law(sde, t_start, t_end) if solver.is_stochastic else _Flow(sde, t_start, t_end)
    most = most or (MOST_WEAK if solver.is_stochastic else MOST)

    def error(steps: int) -> float:
        return problem.error(case.solver, grid(sde, solver.default_grid, t_start, t_end, steps, graded))

    steps, errors = [], []
    while fewest <= most and (value := error(fewest)) > FLOOR:
        steps.append(fewest)
        errors.append(value)
        fewest *= 2
    return Convergence(steps, errors)


class _Flow:
    """The probability-flow ODE of the mixture."""

    def __init__(self, sde: sd.SDE, start: float, end: float):
        self.model = smooth_mixture().under(sde)
        self.start, self.end = _solution(sde, start, end)

    def error(self, solver: Solver, times: list[float]) -> float:
        problem = Problem(self.model.sde, Predict(self.model), times, Streams(0, range(len(self.start))))
        with torch.no_grad():
            return float((solver.solve(problem, self.start) - self.end).square().mean().sqrt())


@cache
def _solution(sde: sd.SDE, start: float, end: float) -> tuple[Tensor, Tensor]:
    """States (8, 2) at both ends of the flow."""
    model = smooth_mixture().under(sde)
    x = model.sample(8, start, seed=1)
    flow = ProbabilityFlow(sde, model.predict)
    return x, flow.solve(x, [start, end], method="dopri8", rtol=1e-12, atol=1e-12)


class _Law:
    """Mean and covariance of the Gaussian."""

    def __init__(self, sde: sd.SDE, start: float, end: float):
        self.model = gaussian().under(sde)
        self.start, self.end = self._moments(start), self._moments(end)

    def _moments(self, t: float) -> tuple[Tensor, Tensor]:
        distribution, time = gaussian(), torch.tensor(t, dtype=torch.float64)
        covariance = distribution.eigenvectors[0] @ distribution.eigenvalues[0].diag() @ distribution.eigenvectors[0].T
        alpha, sigma = self.model.sde.alpha(time), self.model.sde.sigma(time)
        return alpha * distribution.means[0], alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)

    def error(self, solver: Solver, times: list[float]) -> float:
        """Norm of the errors of both, relative to the covariance."""
        mean, covariance = self.start
        # torchsde draws an increment and, for some methods, an area under the path.
        draws = (len(times) - 1) * (solver.draws_per_step if isinstance(solver, StepSolver) else 2)
        # The mean alone; the mean with a column of the covariance's root; the mean with one draw of noise.
        x = mean.repeat(1 + 2 + 2 * draws, 1)
        x[1:3] += torch.linalg.cholesky(covariance).T
        with torch.no_grad():
            problem = Problem(self.model.sde, Predict(self.model), times, _OneEntryEach(draws))  # type: ignore[arg-type]
            end = solver.solve(problem, x)
        moved = end[1:] - end[0]
        of_mean, of_covariance = end[0] - self.end[0], moved.T @ moved - self.end[1]
        return float(torch.sqrt(of_mean.square().sum() + of_covariance.square().sum()) / self.end[1].norm())


class _OneEntryEach:
    """In place of random streams: rows of which one holds 1 in one entry of one draw, after three that hold 0."""

    def __init__(self, draws: int):
        self.draws = torch.nn.functional.pad(torch.eye(2 * draws, dtype=torch.float64), (0, 0, 3, 0))

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next draws (rows, count, 2)."""
        count = 2 * shape[0]
        # More are asked for than used.
        drawn, self.draws = self.draws[:, :count], self.draws[:, count:]
        return torch.nn.functional.pad(drawn, (0, count - drawn.shape[1])).reshape(-1, shape[0], 2).to(dtype)


# Along a path.


def strong_convergence(case: Case, sde: sd.SDE, paths: int = 2000, fewest: int = 50, most: int = 400) -> Convergence:
    """Distances between the end points of N and 2N steps along the same Brownian paths, by N."""
    model = smooth_mixture().under(sde)
    # Equal steps in the solver's own variable, over which W is one; its drift is of a size all along.
    kind, solver = ("log_snr" if case.solver.in_log_snr else "t"), case.solver
    start, end = time_at(sde, -4.0), time_at(sde, 2.0)
    x = model.sample(paths, start, seed=1)
    finest = torch.randn(2 * most, 2, paths, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    has_area = case.options.get("method") == "srk"
    ends = {}
    count, draws = 2 * most, finest
    with torch.no_grad():
        while count >= fewest:
            streams = _Given(draws if has_area else draws[:, :1])
            times = time_grid(sde, kind, start, end, count)
            problem = Problem(sde, Predict(model), times, streams)  # type: ignore[arg-type]
            ends[count] = solver.solve(problem, x)
            draws, count = _joined(draws), count // 2
    steps = sorted(ends)[:-1]
    return Convergence(steps, [float((ends[n] - ends[2 * n]).square().mean().sqrt()) for n in steps])


def _joined(draws: Tensor) -> Tensor:
    """(w, z) of steps twice as long, from (N, 2, paths, D): √h w is the increment, and z the area's own part of it.

    Of a step the area under W is ½ h^{3/2} (w + z/√3); that of two is the sum, and h times the first increment.
    """
    (w1, z1), (w2, z2) = draws[::2].unbind(1), draws[1::2].unbind(1)
    return torch.stack([(w1 + w2) / math.sqrt(2), (math.sqrt(3) * (w1 - w2) + z1 + z2) / math.sqrt(8)], 1)


class _Given:
    """In place of random streams: draws (N, K, paths, D), K a step."""

    def __init__(self, draws: Tensor):
        self.draws = draws.flatten(0, 1)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next draws (paths, count, D)."""
        drawn, self.draws = self.draws[: shape[0]], self.draws[shape[0] :]
        return torch.nn.functional.pad(drawn.transpose(0, 1), (0, 0, 0, shape[0] - len(drawn))).to(dtype)


if __name__ == "__main__":
    main()
