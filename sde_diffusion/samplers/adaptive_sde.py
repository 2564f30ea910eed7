r"""The reverse SDE with steps that every sample chooses for itself: Jolicoeur-Martineau et al. 2021, algorithm 1.

Over s = −log(σ/α), which rises, the reverse SDE is dx = a(x, s) ds + b(s) dW with b = η √2 σ. A step of h to s' takes
Euler-Maruyama's x' and the stochastic improved Euler's x'', with the same increment ΔW of W,

    x' = x + h a(x, s) + b(s) ΔW        x'' = x + ½ h (a(x, s) + a(x', s')) + ½ (b(s) + b(s')) ΔW

whose difference is the error, in the mean over the entries of a sample:

    E = RMS( (x' − x'')/δ )        δ = max(atol, rtol max(|x'|, |x' of the step before|))

If E ≤ 1 it goes on from x'', else it tries again; h becomes θ h E^{−r} in either case.

The paper draws ΔW anew at every attempt. That discards the increments with large errors, and with them a part of the
law. Here an increment that was rejected stays known, and W is drawn between the points at which it is known already:
from W(s₀) to W(s₁) it is a Brownian bridge, so that

    W(s₀ + h) = W(s₀) + f (W(s₁) − W(s₀)) + √(h (1 − f)) z        f = h/(s₁ − s₀)

with f = 0 where nothing is known ahead. No step goes past a known point, so that each counts when it is reached, and
every sample follows one Brownian path; as in RSwM1 of Rackauckas & Nie 2017 (doi:10.3934/dcdsb.2017133), which also
takes the next step to be one to the next known point. The noise is additive: both methods are of strong order 1 and
converge along each path, whatever chooses their steps (Gaines & Lyons 1997, SIAM J. Appl. Math. 57).

Source: arXiv:2105.14080.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.runge_kutta import SolverError, power, rms_of_rows
from sde_diffusion.samplers.noise import StepNoise
from sde_diffusion.samplers.solver import Predict, Problem, Solver
from sde_diffusion.sde import SDE, drift_in_log_noise, expand_to, non_negative, row_by_row

# Of the whole way.
_FIRST_STEP = 0.01
# The error of a sample with few entries may be small by chance, and that of a step into the unstable is of no measure.
_LARGEST_CHANGE = 5.0


class AdaptiveSDE(Solver):
    """Stochastic; two evaluations an attempt at a step, of the samples that have not arrived."""

    in_log_snr: ClassVar[bool] = True
    evaluates_end: ClassVar[bool] = True
    is_stochastic = True
    is_adaptive = True

    def __init__(
        self,
        eta: float = 1.0,
        rtol: float = 0.05,
        atol: float = 0.01,
        safety: float = 0.9,
        exponent: float = 0.9,
        max_attempts: int = 10_000,
    ):
        """Set η and what controls the steps.

        Args:
            eta: η > 0, the scale of the noise.
            rtol: error allowed in a step, relative to the state.
            atol: the same in the units of the data.
            safety: θ, below 1.
            exponent: r, at least ½; an error grows with h to the power of 1.5.
            max_attempts: at steps, that a sample may make.

        Raises:
            ValueError: for any other.
        """
        if not (rtol > 0 and atol > 0 and non_negative("eta", eta) > 0):
            raise ValueError(f"eta = {eta}, rtol = {rtol}, atol = {atol}: must be positive")
        if not (0 < safety < 1 and 0.5 <= exponent < math.inf):
            raise ValueError(f"safety = {safety}, exponent = {exponent}: need 0 < safety < 1 and exponent >= 0.5")
        if max_attempts < 1:
            raise ValueError(f"max_attempts = {max_attempts}: must be at least 1")
        self.eta, self.rtol, self.atol = float(eta), float(rtol), float(atol)
        self.safety, self.exponent, self.max_attempts = float(safety), float(exponent), max_attempts

    def evaluations_per_step(self) -> int | None:
        """Not fixed."""
        return None

    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Integrate from grid[0] to grid[-1], with a stop at all points between.

        Raises:
            SolverError: if a sample's step size underflows, its state is not finite, or it makes too many attempts.
        """
        # Where each sample is, and how far it goes, is kept on the host: it decides which of them go on.
        stops = torch.tensor([-problem.sde.log_noise(t) for t in problem.grid], dtype=torch.float64)
        s, next_stop = stops[:1].repeat(len(x)), torch.ones(len(x), dtype=torch.int64)
        h = torch.full_like(s, _FIRST_STEP * float(stops[-1] - stops[0]))
        states = x.expand(len(stops), *x.shape).clone()
        x, before = x.clone(), x.clone()
        path = _BrownianPath(StepNoise(problem.streams, x.shape[1:], x.dtype), x)
        rows = torch.arange(len(x))
        predict = problem.predict_rows(rows)
        attempts = 0
        while len(rows):
            attempts += 1
            start = s[rows]
            end = torch.minimum(start + h[rows], torch.minimum(stops[next_stop[rows]], path.known_until(rows)))
            increment = path.increment(rows, start, end)
            euler, improved = self._attempt(problem.sde, predict, x[rows], start, end, increment)
            error = self._error(euler, improved, before[rows])
            self._check(problem.sde, rows, start, end, error, attempts)
            accepted = error <= 1
            path.settle(rows, end, increment, accepted)
            h[rows] = self._next_step(h[rows], start, end, error)
            moved = rows[accepted]
            x[moved], before[moved], s[moved] = improved[accepted], euler[accepted], end[accepted]
            arrived = moved[s[moved] == stops[next_stop[moved]]]
            states[next_stop[arrived], arrived] = x[arrived]
            next_stop[arrived] += 1
            is_under_way = next_stop[rows] < len(stops)
            if not bool(is_under_way.all()):
                rows = rows[is_under_way]
                predict = problem.predict_rows(rows)
        for i in range(1, len(stops)):
            problem.observe(i, states[i])
        return x

    def _attempt(
        self, sde: SDE, predict: Predict, x: Tensor, start: Tensor, end: Tensor, increment: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x' and x'' of steps (B',) from x (B', ...)."""

        def move(x: Tensor, s: Tensor) -> Tensor:
            u = -s.to(x.device)
            (sigma,) = row_by_row(lambda u: (sde.sigma(sde.t_from_log_snr(-2 * u)),), u)
            step, std = (expand_to(factor.to(x), x) for factor in (start - end, self.eta * math.sqrt(2) * sigma))
            return step * drift_in_log_noise(sde, predict, x, u, self.eta) + std * increment

        first = move(x, start)
        return x + first, x + 0.5 * (first + move(x + first, end))

    def _error(self, euler: Tensor, improved: Tensor, before: Tensor) -> Tensor:
        """E (B',), on the host."""
        tolerance = (self.rtol * torch.maximum(euler.abs(), before.abs())).clamp(min=self.atol)
        return rms_of_rows((euler - improved) / tolerance).cpu()

    def _next_step(self, h: Tensor, start: Tensor, end: Tensor, error: Tensor) -> Tensor:
        """h (B',) after an attempt with it, or with less, for a stop or a known point."""
        factor = (self.safety * power(error, -self.exponent)).clamp(1 / _LARGEST_CHANGE, _LARGEST_CHANGE)
        # That a step cut short is accepted says nothing of the whole one.
        h = torch.where((error <= 1) & (end < start + h), h, factor * (end - start))
        # Where x̂₀ is constant x goes to it at the rate 1 + η²: a longer step of Euler's overshoots.
        return h.clamp(max=1 / (1 + self.eta**2))

    def _check(self, sde: SDE, rows: Tensor, start: Tensor, end: Tensor, error: Tensor, attempts: int) -> None:
        """Raise a SolverError for the first of the samples that cannot go on."""
        for reason, failed in (
            ("the state is not finite", ~error.isfinite()),
            ("the step size underflows", end <= start),
            (f"max_attempts = {self.max_attempts} is reached", torch.full_like(end, attempts) > self.max_attempts),
        ):
            if bool(failed.any()):
                i = int(failed.nonzero()[0])
                raise SolverError(
                    f"adaptive_sde stopped at t = {sde.t_from_log_noise(-float(start[i])):.6g}, sample {int(rows[i])} "
                    f"of its batch, after {2 * attempts} evaluations: {reason}"
                )


class _BrownianPath:
    """One path W for each sample of a batch, with W = 0 where they start, drawn point by point."""

    def __init__(self, noise: StepNoise, x: Tensor):
        """Draw for states like x (B, ...)."""
        self._noise, self._value = noise, torch.zeros_like(x)
        # Points ahead (B, K) and W there (B, K, ...), the nearest last. At infinity it is not known, and need not be.
        self._points, self._values = (
            torch.full((len(x), 1), math.inf, dtype=torch.float64),
            torch.zeros_like(x)[:, None],
        )
        self._nearest = torch.zeros(len(x), dtype=torch.int64)

    def known_until(self, rows: Tensor) -> Tensor:
        """The nearest known point (B',) ahead of samples ``rows`` (B',)."""
        return self._points[rows, self._nearest[rows]]

    def increment(self, rows: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """W(end) − W(start) (B', ...), from where they are to a point (B',) that is not beyond what is known.

        Takes one draw of every sample, those that are left out as well, so that their number is that of the calls.
        """
        fraction = (end - start) / (self.known_until(rows) - start)
        std = torch.sqrt((end - start) * (1 - fraction))
        ahead = self._values[rows, self._nearest[rows]] - self._value[rows]
        return expand_to(fraction.to(ahead), ahead) * ahead + expand_to(std.to(ahead), ahead) * self._noise()[rows]

    def settle(self, rows: Tensor, end: Tensor, increment: Tensor, accepted: Tensor) -> None:
        """Move samples to ``end`` if they are accepted (B',), and else keep the increment there."""
        value = self._value[rows] + increment
        is_new = end < self.known_until(rows)
        self._value[rows[accepted]] = value[accepted]
        self._nearest[rows[accepted & ~is_new]] -= 1
        kept = ~accepted & is_new
        self._nearest[rows[kept]] += 1
        if int(self._nearest.max()) == self._points.shape[1]:
            self._points = torch.cat([self._points, torch.empty_like(self._points[:, :1])], 1)
            self._values = torch.cat([self._values, torch.empty_like(self._values[:, :1])], 1)
        self._points[rows[kept], self._nearest[rows[kept]]] = end[kept]
        self._values[rows[kept], self._nearest[rows[kept]]] = value[kept]
