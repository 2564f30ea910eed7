r"""Runge-Kutta steps whose size every sample of a batch chooses for itself.

A step of length h for dx/ds = v(x, s), by the pair of orders 5 and 4 of Dormand & Prince:

    k_i = v(x + h Σ_j a_ij k_j, s + c_i h)        x' = x + h Σ_j b_j k_j        e = h Σ_j d_j k_j

e is what x' differs by from the solution of order 4. The last stage is v(x', s + h), and so the first of the next step.
Between the ends, a polynomial of order 4 takes the same stages:  x(s + ϑh) = x + h Σ_j b_j(ϑ) k_j.

The step is accepted where the error is at most 1, measured over the entries of one sample, and both decide on the next
step: a proportional-integral controller, or where the step was rejected its integral part alone,

    ε = RMS( e / (atol + rtol max(|x|, |x'|)) )
    h' = 0.8 h ε^(−0.7/5) ε_before^(0.4/5)        h' = 0.8 h ε^(−1/5) if rejected        h/5 <= h' <= 5 h

A sample has its own s, h and ε, and leaves the batch when it arrives: v is asked for nobody who is there already. Its
entries only meet in the mean above, which adds them in an order that their number decides. So, where v treats a sample
bitwise alike in all batches, the solution does too.

Sources: Dormand & Prince 1980 (J. Comput. Appl. Math. 6); Shampine 1986 (Math. Comp. 46) for the polynomials;
Gustafsson 1991 (ACM TOMS 17) for the controller; Hairer, Nørsett & Wanner 1993, section II.4, for the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sde_diffusion.sde import expand_to

NAME = "dormand_prince"

# (x, s) -> dx/ds, of x's shape (B', ...), with a time (B',) in float64 for each sample.
Slope = Callable[[Tensor, Tensor], Tensor]


class SolverError(RuntimeError):
    """A solver could not reach the end of its interval; says where it stopped, after how many evaluations."""


def _fractions(*rows: str) -> tuple[tuple[Fraction, ...], ...]:
    return tuple(tuple(map(Fraction, row.split())) for row in rows)


# a_ij of the stages after the first; the last of them is b.
STAGES = _fractions(
    "1/5",
    "3/40 9/40",
    "44/45 -56/15 32/9",
    "19372/6561 -25360/2187 64448/6561 -212/729",
    "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
    "35/384 0 500/1113 125/192 -2187/6784 11/84",
)
NODES = tuple(sum(row) for row in STAGES)
(ERROR,) = _fractions("71/57600 0 -71/16695 71/1920 -17253/339200 22/525 -1/40")
# b_j(ϑ), from the coefficient of ϑ to that of ϑ⁴.
INTERPOLANT = _fractions(
    "1 -8048581381/2820520608 8663915743/2820520608 -12715105075/11282082432",
    "0 0 0 0",
    "0 131558114200/32700410799 -68118460800/10900136933 87487479700/32700410799",
    "0 -1754552775/470086768 14199869525/1410260304 -10690763975/1880347072",
    "0 127303824393/49829197408 -318862633887/49829197408 701980252875/199316789632",
    "0 -282668133/205662961 2019193451/616988883 -1453857185/822651844",
    "0 40617522/29380423 -110615467/29380423 69997945/29380423",
)

# How much shorter or longer the next step may be. A flow from noise to data is flat at both ends: steps that grow
# faster may pass over the bend between them, and find no error.
_LARGEST_CHANGE = 5.0
# An error far below the tolerance, as that of a cautious first step, would hold back the step after the next.
_LEAST_LOG_ERROR = math.log(1e-4)


class _Samples(NamedTuple):
    """Those under way: their rows in the batch and, for each, where it is and what it does next."""

    rows: Tensor
    x: Tensor
    s: Tensor
    slope: Tensor
    step: Tensor
    # Of the last step that was accepted.
    log_error: Tensor


class Step(NamedTuple):
    """Of some samples: its ends (B',), in float64, x (B', ...) at the first of them, and its stages."""

    s: Tensor
    s_next: Tensor
    x: Tensor
    stages: list[Tensor]

    def at(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """x and dx/ds (B', ...) of the polynomial, at shares ϑ (B',) of the step, in float64."""
        length, change, rate = self.s_next - self.s, torch.zeros_like(self.x), torch.zeros_like(self.x)
        for coefficients, stage in zip(INTERPOLANT, self.stages, strict=True):
            weight, slope = torch.zeros_like(share), torch.zeros_like(share)
            for order, coefficient in reversed(list(enumerate(coefficients, 1))):
                weight = (weight + float(coefficient)) * share
                slope = slope * share + order * float(coefficient)
            change = change + expand_to((length * weight).to(change.dtype), change) * stage
            rate = rate + expand_to(slope.to(rate.dtype), rate) * stage
        return self.x + change, rate


def rms_of_rows(values: Tensor) -> Tensor:
    """Root mean squares (B,) in float64 of values (B, ...), to the same bits in any batch."""
    squares = values.reshape(len(values), -1).square()
    size = squares.shape[1]
    # A reduction of torch's own may add in another order in a batch of another size.
    while squares.shape[1] > 1:
        left, right = pad(squares, (0, squares.shape[1] % 2)).chunk(2, dim=1)
        squares = left + right
    return torch.sqrt(squares[:, 0].double() / size)


class _Tolerance(NamedTuple):
    rtol: float
    atol: float

    def ratio(self, error: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """RMS of each sample's error (B', ...) in units of what is tolerated; (B',), in float64."""
        return rms_of_rows(error / (self.atol + self.rtol * torch.maximum(x.abs(), x_next.abs())))


def solve(
    slope_of: Callable[[Tensor], Slope],
    x: Tensor,
    grid: Sequence[float],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    to_time: Callable[[float], float] = float,
) -> Tensor:
    """Solve dx/ds = v(x, s) from grid[0] to grid[-1].

    Args:
        slope_of: maps rows (B',) of the batch to v for those samples.
        x: the state (B, ...) at grid[0].
        grid: strictly monotone points at which the solution is wanted; they do not change the steps.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        max_steps: how many steps a sample may take, rejected ones included.
        to_time: turns s into the time t that an error names.

    Returns:
        The states (len(grid), B, ...) at the points of the grid.

    Raises:
        ValueError: for a tolerance that is not positive, or a grid that is not strictly monotone.
        SolverError: naming t, the sample and its evaluations, if its step size underflows, as where v is not finite, or
            ``max_steps`` are not enough.
    """
    check_arguments(grid, rtol, atol)
    tolerance = _Tolerance(rtol, atol)
    points = torch.tensor(grid, dtype=torch.float64, device=x.device)
    states = x.new_empty(len(grid), *x.shape)
    states[0] = x
    slope = slope_of(torch.arange(len(x), device=x.device))
    samples = _start(slope, x, grid, tolerance)
    for steps in range(1, max_steps + 1):
        before, (samples, stages) = samples, _step(slope, samples, grid[-1], tolerance)
        if len(grid) > 2:
            _interpolate(states, points, before, samples, stages)
        has_arrived = samples.s == grid[-1]
        is_stuck = ~has_arrived & ~((samples.s + samples.step - samples.s).abs() > 0)
        # All that a step waits for the device for, if the grid has no points between its ends.
        if bool((has_arrived | is_stuck).any()):
            if bool(is_stuck.any()):
                is_finite = bool(stages[-1][is_stuck][0].isfinite().all())
                reason = "its step size underflows" if is_finite else "its velocity is not finite"
                raise _failure(reason, _select(samples, is_stuck), steps, to_time)
            states[-1, samples.rows[has_arrived]] = samples.x[has_arrived]
            samples = _select(samples, ~has_arrived)
            if len(samples.rows) == 0:
                return states
            slope = slope_of(samples.rows)
    raise _failure(f"max_steps = {max_steps} are not enough", samples, max_steps, to_time)


def check_arguments(grid: Sequence[float], rtol: float, atol: float) -> None:
    """Raise a ValueError for a tolerance that is not positive, or a grid that is not strictly monotone."""
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol = {rtol}, atol = {atol}: must be positive")
    steps = [after - before for before, after in pairwise(grid)]
    if not steps or not min(steps) * max(steps) > 0:
        raise ValueError(f"grid = {list(grid)}: needs at least two points, all rising or all falling")


def _start(slope: Slope, x: Tensor, grid: Sequence[float], tolerance: _Tolerance) -> _Samples:
    """First steps, from the size of x, its slope, and how that changes along a short step of Euler's."""
    length, direction = abs(grid[-1] - grid[0]), math.copysign(1, grid[-1] - grid[0])
    s = torch.full((len(x),), grid[0], dtype=torch.float64, device=x.device)
    first = slope(x, s)
    size, rate = tolerance.ratio(x, x, x), tolerance.ratio(first, x, x)
    short = torch.where((size < 1e-5) | (rate < 1e-5), 1e-6, 0.01 * size / rate).clamp(max=length)
    moved = x + expand_to((direction * short).to(x.dtype), x) * first
    second = slope(moved, (s + direction * short).clamp(min(grid), max(grid)))
    # The short step is a guess, and may have been too long for v to be finite at its end.
    change = (tolerance.ratio(second - first, x, x) / short).nan_to_num(nan=0.0, posinf=0.0)
    fastest = torch.maximum(rate, change)
    step = torch.where(fastest <= 1e-15, (1e-3 * short).clamp(min=1e-6), power(0.01 / fastest, 1 / 5))
    step = direction * torch.minimum(step, 100 * short).clamp(max=length)
    return _Samples(torch.arange(len(x), device=x.device), x, s, first, step, torch.zeros_like(s))


def _step(slope: Slope, samples: _Samples, end: float, tolerance: _Tolerance) -> tuple[_Samples, list[Tensor]]:
    """The samples after a step of each, or where they were if it was rejected; and its seven stages."""
    _, x, s, first, step, log_error_before = samples
    # What is left is one step or two equal ones, if it is not more: a tiny last one would cost as much.
    left = torch.ceil((end - s) / step).clamp(min=1)
    step = torch.where(left <= 2, (end - s) / left, step)
    s_next = torch.where(left <= 1, end, s + step)
    x_next, stages = _advance(slope, x, s, step, s_next, first)
    error = tolerance.ratio(expand_to(step.to(x.dtype), x) * _weighted_sum(ERROR, stages), x, x_next)
    log_error = torch.where(error.isnan(), math.inf, error).log()
    is_accepted = log_error <= 0
    exponent = torch.where(is_accepted, (0.4 * log_error_before - 0.7 * log_error) / 5, -log_error / 5)
    step = step * (0.8 * torch.exp(exponent)).clamp(1 / _LARGEST_CHANGE, _LARGEST_CHANGE)
    keeps = expand_to(is_accepted, x)
    samples = _Samples(
        samples.rows,
        torch.where(keeps, x_next, x),
        torch.where(is_accepted, s_next, s),
        torch.where(keeps, stages[-1], first),
        step,
        torch.where(is_accepted, log_error.clamp(min=_LEAST_LOG_ERROR), log_error_before),
    )
    return samples, stages


def _advance(
    slope: Slope, x: Tensor, s: Tensor, step: Tensor, s_next: Tensor, first: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """x at the end of a step, and its seven stages, of which the first is known."""
    h, stages, x_next = expand_to(step.to(x.dtype), x), [first], x
    for node, weights in zip(NODES, STAGES, strict=True):
        x_next = x + h * _weighted_sum(weights, stages)
        stages.append(slope(x_next, s + float(node) * step if node < 1 else s_next))
    return x_next, stages


def walk(slope: Slope, x: Tensor, grid: Sequence[float]) -> Iterator[Step]:
    """The steps of all samples x (B, ...) from each point of a grid to the next, whatever their error."""
    s = torch.full((len(x),), grid[0], dtype=torch.float64, device=x.device)
    first = slope(x, s)
    for end in grid[1:]:
        s_next = torch.full_like(s, end)
        x_next, stages = _advance(slope, x, s, s_next - s, s_next, first)
        yield Step(s, s_next, x, stages)
        s, x, first = s_next, x_next, stages[-1]


def _interpolate(states: Tensor, points: Tensor, before: _Samples, after: _Samples, stages: list[Tensor]) -> None:
    """Write the states at the points of the grid, its ends aside, that a step has reached or passed."""
    inner, direction = points[1:-1], torch.sign(points[-1] - points[0])
    ahead_before, ahead_after = (direction * (inner - samples.s[:, None]) > 0 for samples in (before, after))
    sample, point = (ahead_before & ~ahead_after).nonzero(as_tuple=True)
    ends = before.s[sample], after.s[sample]
    step = Step(*ends, before.x[sample], [stage[sample] for stage in stages])
    states[point + 1, after.rows[sample]], _ = step.at((inner[point] - ends[0]) / (ends[1] - ends[0]))


def _weighted_sum(weights: Sequence[Fraction], stages: list[Tensor]) -> Tensor:
    total = float(weights[0]) * stages[0]
    for weight, stage in zip(weights[1:], stages[1:], strict=True):
        if weight:
            total = total + float(weight) * stage
    return total


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent by functions of one argument: torch's own power may round by where in a batch a number is."""
    return torch.exp(exponent * torch.log(x))


def _select(samples: _Samples, which: Tensor) -> _Samples:
    return _Samples(*(value[which] for value in samples))


def _failure(reason: str, samples: _Samples, steps: int, to_time: Callable[[float], float]) -> SolverError:
    """The error of the first of these samples."""
    t, evaluations = to_time(float(samples.s[0])), 2 + len(STAGES) * steps
    return SolverError(
        f"{NAME} stopped at t = {t:.6g} after {evaluations} evaluations of sample {int(samples.rows[0])}: {reason}"
    )
