r"""The probability-flow ODE over the angle between data and noise, solved sample by sample or by torchdiffeq.

With n² = α² + σ² and θ = atan(σ/α), the scaled state y = x/n = cos θ x̂₀ + sin θ ε̂ moves by

    dy/dθ = cos θ ε̂ − sin θ x̂₀

(the "v" of Salimans & Ho 2022, arXiv:2202.00512), which is bounded at both ends of every SDE, σ = 0 and α = 0 among
them. Its divergence gives the change of density between two times s and t,

    log p_s(x_s) = log p_t(x_t) + D log(n_t/n_s) + ∫ ∇·(dy/dθ) dθ        from θ_s to θ_t

"dormand_prince" is ``sde_diffusion.runge_kutta``: every sample takes the steps that it would take alone. The adaptive
methods of torchdiffeq share their steps within a batch; they keep the estimated error e of each below tolerance in

    max over samples of  RMS( e / (atol + rtol max(|x|, |x'|)) )

so that no sample's error hides among those of the batch. Their last step ends at the end of the interval, so that the
result is a solver's and not an interpolant's; only the guess of the first step may look beyond, and s is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from sde_diffusion import runge_kutta
from sde_diffusion.runge_kutta import SolverError, check_arguments
from sde_diffusion.sde import SDE, expand_to, row_by_row

PER_SAMPLE_METHODS = (runge_kutta.NAME,)
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
ONE_STEP_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS_METHODS = ("explicit_adams", "implicit_adams")
FIXED_METHODS = ONE_STEP_METHODS + ADAMS_METHODS
# A flow from noise to data is flat at both ends: to torchdiffeq's methods a single step from one to the other can look
# free of error, so the steps are kept shorter.
_FEWEST_STEPS = 8
# The order that torchdiffeq takes by default, 12, is past what these methods are stable for.
_ADAMS_ORDER = 5


Predictor = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Velocity = Callable[[Tensor], Tensor]
Divergence = Callable[[Velocity, Tensor], tuple[Tensor, Tensor]]


class ProbabilityFlow:
    """The flow dy/dθ of an SDE and a predict(x, t) -> (x̂₀, ε̂), to be solved from one time to another."""

    def __init__(self, sde: SDE, predict: Predictor, predict_rows: Callable[[Tensor], Predictor] | None = None):
        """Join them.

        Args:
            sde: the diffusion.
            predict: (x, t) -> (x̂₀, ε̂) for the whole batch.
            predict_rows: maps rows (B',) of the batch to the predict of those samples, for t (B',); ``predict`` itself
                by default, which then must not hold anything that belongs to single samples.
        """
        self.sde, self.predict = sde, predict
        self.predict_rows = predict_rows or (lambda rows: predict)

    def solve(
        self,
        x: Tensor,
        times: Sequence[float],
        observe: Callable[[int, Tensor], None] | None = None,
        *,
        method: str = "dopri5",
        **options: Any,
    ) -> Tensor:
        """Carry x (B, ...) from times[0] to times[-1], in either direction.

        Args:
            x: the state at times[0].
            times: strictly monotone numbers in [0, T].
            observe: called with (i, x) at times[i], i > 0.
            method: one of ``PER_SAMPLE_METHODS``, or those of ``integrate``.
            **options: ``rtol`` and ``atol``.
        """
        norms, angles = self.norms(times), self._angles(times)
        options |= {"to_time": self._time_at}
        if method in PER_SAMPLE_METHODS:
            path = runge_kutta.solve(self._slope_of, x / norms[0], angles, **options)
            if observe is not None:
                for i in range(1, len(times)):
                    observe(i, norms[i] * path[i])
            return norms[-1] * path[-1]
        watch = None if observe is None else lambda i, y: observe(i, norms[i] * y)

        def rates(state: tuple[Tensor, ...], angle: Tensor) -> tuple[Tensor, ...]:
            return (self._velocity(self.predict, angle, x.dtype)(state[0]),)

        (y,) = integrate(rates, (x / norms[0],), angles, method=method, observe=watch, **options)
        return norms[-1] * y

    def walk(self, y: Tensor, log_noises: Sequence[float]) -> Iterator[runge_kutta.Step]:
        """Dormand-Prince steps over u = log(σ/α), in which a density is smooth at either end.

        Args:
            y: the scaled state (B, ...) at the first u.
            log_noises: u, monotone; a step from each to the next.
        """
        over_angle = self._slope_of(torch.arange(len(y), device=y.device))

        def slope(y: Tensor, u: Tensor) -> Tensor:
            _, _, angle = self.at_log_noise(u)
            return expand_to((torch.sin(angle) * torch.cos(angle)).to(y.dtype), y) * over_angle(y, angle)

        return runge_kutta.walk(slope, y, log_noises)

    def solve_with_density(
        self, x: Tensor, times: tuple[float, float], divergence: Divergence, estimates: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Carry x from one time to another, together with its log density.

        Args:
            x: the state (B, ...) at times[0].
            times: both ends, each in [0, T].
            divergence: maps (dy/dθ, y) to its value at y and the estimates (B, K) of its divergence there.
            estimates: K.
            **options: ``method``, ``rtol`` and ``atol`` of ``integrate``; of y, and of the log density a dimension.

        Returns:
            x at times[1], and log p(x at times[0]) − log p(x at times[1]) by each estimate, (B, K).
        """
        dimension, (start, end) = x[0].numel(), self.norms(times)

        def rates(state: tuple[Tensor, ...], angle: Tensor) -> tuple[Tensor, ...]:
            value, divergences = divergence(self._velocity(self.predict, angle, x.dtype), state[0])
            return value, divergences / dimension

        state = (x / start, x.new_zeros(len(x), estimates))
        y, change = integrate(rates, state, self._angles(times), to_time=self._time_at, **options)
        return end * y, dimension * (change + math.log(end / start))

    def _slope_of(self, rows: Tensor) -> runge_kutta.Slope:
        predict = self.predict_rows(rows)
        return lambda y, angle: self._velocity(predict, angle, y.dtype)(y)

    def _velocity(self, predict: Predictor, angle: Tensor, dtype: torch.dtype) -> Velocity:
        """y (B, ...) -> dy/dθ at an angle, () or (B,) in float64."""
        t, norm = self._time_and_norm(torch.log(torch.tan(angle)))
        cos, sin, scale, t = (value.to(dtype) for value in (torch.cos(angle), torch.sin(angle), norm, t))

        def velocity(y: Tensor) -> Tensor:
            x0, eps = predict(expand_to(scale, y) * y, t)
            return expand_to(cos, y) * eps - expand_to(sin, y) * x0

        return velocity

    def at_log_noise(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, n and θ at u = log(σ/α), of its shape () or (B,)."""
        (angle,) = row_by_row(lambda u: (torch.atan(torch.exp(u)),), u)
        return *self._time_and_norm(u), angle

    def _time_and_norm(self, u: Tensor) -> tuple[Tensor, Tensor]:
        (t,) = row_by_row(lambda log_snr: (self.sde.t_from_log_snr(log_snr),), -2 * u)
        return t, torch.sqrt(self.sde.alpha(t).square() + self.sde.sigma(t).square())

    def norms(self, times: Sequence[float]) -> list[float]:
        """n at times."""
        t = torch.tensor(times, dtype=torch.float64)
        return torch.sqrt(self.sde.alpha(t).square() + self.sde.sigma(t).square()).tolist()

    def _angles(self, times: Sequence[float]) -> list[float]:
        t = torch.tensor(times, dtype=torch.float64)
        return torch.atan2(self.sde.sigma(t), self.sde.alpha(t)).tolist()

    def _time_at(self, angle: float) -> float:
        return self.sde.t_from_log_noise(math.log(math.tan(angle)) if angle > 0 else -math.inf)


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
    check_arguments(grid, rtol, atol)
    steps = [after - before for before, after in pairwise(grid)]
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
