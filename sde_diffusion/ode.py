r"""Initial value problems dx/ds = v(x, s), solved by torchdiffeq.

Adaptive methods keep the estimated error e of every step below tolerance in the norm

    max over samples of  RMS( e / (atol + rtol max(|x|, |x'|)) )

so that no sample's error hides among those of the batch. Their last step ends at the end of the interval, so that the
result is a solver's and not an interpolant's; only the guess of the first step may look beyond, and s is clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
ONE_STEP_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS_METHODS = ("explicit_adams", "implicit_adams")
FIXED_METHODS = ONE_STEP_METHODS + ADAMS_METHODS
# A flow from noise to data is flat at both ends: to an adaptive method a single step from one to the other can look
# free of error, so the steps are kept shorter.
_FEWEST_STEPS = 8
# The order that torchdiffeq takes by default, 12, is past what these methods are stable for.
_ADAMS_ORDER = 5


class SolverError(RuntimeError):
    """A solver could not reach the end of its interval; says where it stopped, after how many evaluations."""


def integrate(
    velocity: Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    grid: Sequence[float],
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    to_time: Callable[[float], float] = float,
    observe: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, ...]:
    """Solve from grid[0] to grid[-1].

    Args:
        velocity: maps (state, s) to the derivatives of the state; s is a () float64 tensor.
        state: tensors (B, ...) each.
        grid: strictly monotone points; a fixed-step method steps from each to the next, an adaptive one is free
            between the first and the last.
        method: one of ``ADAPTIVE_METHODS`` or ``FIXED_METHODS``.
        rtol: relative tolerance of an adaptive step.
        atol: absolute tolerance of an adaptive step.
        to_time: turns s into the time t that an error names.
        max_steps: after this many steps between two points of the grid an adaptive method gives up.
        observe: called with (i, first tensor of the state) at grid point i > 0.

    Returns:
        The state at grid[-1].

    Raises:
        ValueError: for an unknown method, a tolerance that is not positive, or a grid that is not strictly monotone, or
            for an Adams method not of equal steps.
        SolverError: if the step size underflows, the state stops being finite, or ``max_steps`` is reached.
    """
    if method not in ADAPTIVE_METHODS + FIXED_METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(ADAPTIVE_METHODS + FIXED_METHODS)}")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol = {rtol}, atol = {atol}: must be positive")
    steps = [after - before for before, after in pairwise(grid)]
    if not steps or not min(steps) * max(steps) > 0:
        raise ValueError(f"grid = {list(grid)}: needs at least two points, all rising or all falling")
    if method in ADAMS_METHODS and max(steps) - min(steps) > 1e-6 * max(abs(step) for step in steps):
        raise ValueError(f"grid = {list(grid)}: {method} needs equal steps")
    first, last = min(grid[0], grid[-1]), max(grid[0], grid[-1])
    reached: Tensor | float = grid[0]
    calls = 0

    def clamped(s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal reached, calls
        calls += 1
        reached = s
        # torchdiffeq casts s to the dtype of the state.
        return velocity(state, s.double().clamp(first, last))

    points = torch.tensor(grid, dtype=torch.float64, device=state[0].device)
    options: dict[str, Any] = {"max_order": _ADAMS_ORDER} if method in ADAMS_METHODS else {}
    if method in ADAPTIVE_METHODS:
        options = {
            "norm": _largest_rms,
            "max_num_steps": max_steps,
            "dtype": torch.float64,
            "step_t": points[-1:],
            "max_step": (last - first) / _FEWEST_STEPS,
        }
    try:
        path = torchdiffeq.odeint(clamped, state, points, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:
        t = to_time(float(reached))
        raise SolverError(f"{method} stopped at t = {t:.6g} after {calls} evaluations: {error}") from error
    result = tuple(tensor[-1] for tensor in path)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in result):
        t = to_time(grid[-1])
        raise SolverError(f"{method} left the finite numbers before t = {t:.6g}, in {calls} evaluations")
    if observe is not None:
        for i in range(1, len(grid)):
            observe(i, path[0][i])
    return result


def _largest_rms(error: tuple[Tensor, ...]) -> Tensor:
    """Largest over samples, and over the tensors of the state, of each one's root mean square."""
    return torch.stack([tensor.reshape(len(tensor), -1).square().mean(1).max() for tensor in error]).max().sqrt()
