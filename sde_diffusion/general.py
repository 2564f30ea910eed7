r"""An SDE from any functions of time: its marginal, its log-SNR, its noise rate, or its drift and diffusion.

    MarginalSDE    α, σ           f = α̇/α                         g² = 2 σ (σ̇ − f σ)
    LogSNRSDE      ℓ = log-SNR    α² = 1/(1 + e^{−ℓ})             σ² = 1/(1 + e^ℓ)             g² = −2f = −σ² ℓ̇
    BetaSDE        β              log α = −½ ∫₀ᵗ β                σ² = 1 − α²                  g² = −2f = β
    RateSDE        f, g           log α = ∫₀ᵗ f                   σ² = ∫₀ᵗ (α(t)/α(s))² g(s)² ds

The integrals of the last two are tabulated once, in float64, at the ends of equal cells; from the start t_k of its
cell, a time is one step of Gauss-Legendre quadrature with the user's own f and g away:

    log α(t) = log α(t_k) + ∫_{t_k}^t f          σ²(t) = (α(t)/α(t_k))² σ²(t_k) + ∫_{t_k}^t (α(t)/α(s))² g(s)² ds

Every term of σ² is positive, so that σ keeps its relative accuracy down to t = 0 whatever the power of t it starts
with. Smooth f and g are integrated to rounding. A kink of f or g² moves log α or σ² by under 1/100 of its change of
slope times the width of a cell squared; β ~ √t, which is not smooth at 0, moves σ by 1.3e-4 of it near 0, and by under
4e-6 from T/100 on.

These take functions, which a config cannot name: for that, write a subclass whose arguments are numbers, and add
it to ``sde_diffusion.sde.SDES``.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor
from torch.nn.functional import logsigmoid

from sde_diffusion.sde import SDE, TimeFunction, derivative

_CELLS = 1024
# Points of quadrature a cell, exact for polynomials of degree 15.
_POINTS = 8
# Five reach rounding from the end of a cell on which g hardly changes; the others are for one where it comes near 0.
_NEWTON_STEPS = 12


class MarginalSDE(SDE):
    """The diffusion with mean α(t) x₀ and standard deviation σ(t), its rates by differentiation."""

    def __init__(self, alpha: TimeFunction, sigma: TimeFunction, T: float = 1.0):
        """Give the two functions.

        Args:
            alpha: α of times of any shape, a tensor of the same shape and dtype; differentiable by torch.
            sigma: σ, likewise.
            T: end of time.

        Raises:
            ValueError: if T is not positive, or a function returns another shape or dtype, a value that is negative or
                not finite, or σ/α does not rise.
        """
        self._alpha, self._sigma, self.T = alpha, sigma, _end_of_time(T)
        t = _cell_ends(self.T)
        _check_values("alpha", alpha(t), t, least=0)
        _check_values("sigma", sigma(t), t, least=0)
        _check_fall("alpha, sigma: the log-SNR log(α²/σ²)", self.log_snr(t), t)

    def alpha(self, t: Tensor) -> Tensor:
        """The function given."""
        return self._alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The function given."""
        return self._sigma(t)

    def __repr__(self) -> str:
        """The arguments, functions by name."""
        return _written(self, alpha=self._alpha, sigma=self._sigma)


class LogSNRSDE(SDE):
    """The variance-preserving diffusion of a log-SNR ℓ(t). Its rates are not defined where ℓ is infinite."""

    prior_std = 1.0

    def __init__(self, log_snr: TimeFunction, T: float = 1.0):
        """Give the function.

        Args:
            log_snr: log(α²/σ²) of times of any shape, a tensor of the same shape and dtype; differentiable by torch. It
                may be infinite at 0 and T.
            T: end of time.

        Raises:
            ValueError: if T is not positive, or the function returns another shape or dtype, or does not fall.
        """
        self._log_snr, self.T = log_snr, _end_of_time(T)
        t = _cell_ends(self.T)
        values = log_snr(t)
        _check_values("log_snr", values, t, finite_ends=False)
        _check_fall("log_snr", values, t)

    def log_snr(self, t: Tensor) -> Tensor:
        """The function given."""
        return self._log_snr(t)

    def alpha(self, t: Tensor) -> Tensor:
        """1/√(1 + e^{−ℓ}), in the form whose derivative does not cancel for large ℓ."""
        return torch.exp(0.5 * logsigmoid(self.log_snr(t)))

    def sigma(self, t: Tensor) -> Tensor:
        """1/√(1 + e^ℓ), likewise for large −ℓ."""
        return torch.exp(0.5 * logsigmoid(-self.log_snr(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """½ α σ² ℓ̇."""
        return self.drift_coefficient(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """−½ σ α² ℓ̇."""
        return -0.5 * self.sigma(t) * self.alpha(t).square() * derivative(self.log_snr, t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """½ σ² ℓ̇."""
        return 0.5 * torch.sigmoid(-self.log_snr(t)) * derivative(self.log_snr, t)

    def diffusion(self, t: Tensor) -> Tensor:
        """√(−σ² ℓ̇)."""
        return torch.sqrt(-2 * self.drift_coefficient(t))

    def __repr__(self) -> str:
        """The arguments, functions by name."""
        return _written(self, log_snr=self._log_snr)


class RateSDE(SDE):
    """The diffusion dx = f(t) x dt + g(t) dW from x₀ at t = 0, its marginal by quadrature.

    Give f and g as functions; or subclass, and define ``drift_coefficient(t)`` and ``diffusion(t)``, and ``T`` unless
    it is 1: the table is then made, and checked, when it is first used, which must be outside a compiled graph.
    """

    _drift_coefficient: TimeFunction | None = None
    _diffusion: TimeFunction | None = None

    def __init__(
        self,
        drift_coefficient: TimeFunction | None = None,
        diffusion: TimeFunction | None = None,
        T: float | None = None,
    ):
        """Give the two functions; a subclass that has the methods gives none.

        Args:
            drift_coefficient: f of times of any shape, a tensor of the same shape and dtype.
            diffusion: g >= 0, likewise.
            T: end of time; the class's by default, which is 1.

        Raises:
            ValueError: if T is not positive; if a function returns another shape or dtype, or a value that is not
                finite; if g is negative, or 0 over a whole cell; or if σ overflows.
        """
        self._drift_coefficient, self._diffusion = drift_coefficient, diffusion
        self.T = _end_of_time(self.T if T is None else T)
        if drift_coefficient is not None or diffusion is not None:
            _ = self._tables

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """f(t), as given."""
        if self._drift_coefficient is None:
            raise NotImplementedError(f"{type(self).__name__} must be given, or define, drift_coefficient(t)")
        return self._drift_coefficient(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), as given."""
        if self._diffusion is None:
            raise NotImplementedError(f"{type(self).__name__} must be given, or define, diffusion(t)")
        return self._diffusion(t)

    def alpha(self, t: Tensor) -> Tensor:
        """e^{∫f}."""
        return torch.exp(self._log_alpha_and_variance(t)[0]).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """√∫(α(t)/α(s))² g²."""
        return torch.sqrt(self._log_alpha_and_variance(t)[1]).to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """f α."""
        return self.drift_coefficient(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """f σ + g²/2σ."""
        # In float64: the two terms cancel where f pulls x back as fast as g spreads it.
        exact = t.double()
        sigma = self.sigma(exact)
        return (self.drift_coefficient(exact) * sigma + 0.5 * self.diffusion(exact).square() / sigma).to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log α − log σ²."""
        log_alpha, variance = self._log_alpha_and_variance(t)
        return (2 * log_alpha - torch.log(variance)).to(t.dtype)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Look the cell up, then Newton's method over log t, kept in brackets; d log-SNR/dt = −g²/σ²."""
        target, table = log_snr.double().contiguous(), self._table(log_snr.device)
        cell = (torch.searchsorted(-table.log_snr, -target) - 1).clamp(0, _CELLS - 1)
        low, high = cell * (self.T / _CELLS), (cell + 1) * (self.T / _CELLS)
        t = high
        for _ in range(_NEWTON_STEPS):
            log_alpha, variance = self._log_alpha_and_variance(t)
            miss = 2 * log_alpha - torch.log(variance) - target
            low, high = torch.where(miss > 0, t, low), torch.where(miss > 0, high, t)
            slope = t * self.diffusion(t).square() / variance
            # So close to 0 that σ² underflows, t is as good as 0.
            moved = torch.where(torch.isfinite(miss), t * torch.exp(miss / slope), t)
            is_outside = (moved < low) | (moved > high) | (slope == 0)
            t = torch.where(is_outside, (low + high) / 2, moved)
        t = torch.where(target >= table.log_snr[0], 0.0, torch.where(target <= table.log_snr[-1], self.T, t))
        return t.to(log_snr.dtype)

    def __repr__(self) -> str:
        """The arguments, functions by name; those of a subclass that defines the methods are its own."""
        if self._drift_coefficient is None or self._diffusion is None:
            return super().__repr__()
        return _written(self, drift_coefficient=self._drift_coefficient, diffusion=self._diffusion)

    def _log_alpha_and_variance(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log α and σ² at t, of its shape, in float64: from the start of its cell by quadrature."""
        table, exact = self._table(t.device), t.double()
        cell = (exact * (_CELLS / self.T)).long().clamp(0, _CELLS - 1)
        start = cell * (self.T / _CELLS)
        growth, added = self._advance(start, exact - start, table)
        return table.log_alpha[cell] + growth, torch.exp(2 * growth) * table.variance[cell] + added

    def _advance(self, start: Tensor, width: Tensor, rule: _Rule | _Table) -> tuple[Tensor, Tensor]:
        """∫f from ``start`` over ``width``, and the variance that g adds on the way, both of their shape."""
        s = start[..., None] + width[..., None] * rule.points
        f, g = self.drift_coefficient(s), self.diffusion(s)
        growth = width * (f @ rule.weights)
        still_to_grow = growth[..., None] - width[..., None] * (f @ rule.partial)
        return growth, width * ((torch.exp(2 * still_to_grow) * g.square()) @ rule.weights)

    def _table(self, device: torch.device) -> _Table:
        """The table on a device, moved there once."""
        if device not in self._tables:
            self._tables[device] = _Table(*(values.to(device) for values in next(iter(self._tables.values()))))
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, _Table]:
        """Quadrature of every cell, then their sums; by device, of which the first is torch's default."""
        rule = _gauss_legendre()
        ends = _cell_ends(self.T)
        start, width = ends[:-1], torch.full((_CELLS,), self.T / _CELLS, dtype=torch.float64)
        points = torch.cat([(start[:, None] + width[:, None] * rule.points).flatten(), ends[[0, -1]]]).sort().values
        self._check_rates(points)
        growth, added = self._advance(start, width, rule)
        variance = [0.0]
        for factor, more in zip(torch.exp(2 * growth).tolist(), added.tolist(), strict=True):
            variance.append(factor * variance[-1] + more)
        table = torch.tensor(variance, dtype=torch.float64)
        log_alpha = torch.cat([growth.new_zeros(1), growth.cumsum(0)])
        log_snr = 2 * log_alpha - table.log()
        _check_values("drift_coefficient, diffusion: σ²", table, ends)
        _check_fall("drift_coefficient, diffusion: the log-SNR log(α²/σ²)", log_snr, ends)
        return {ends.device: _Table(*rule, log_alpha, table, log_snr)}

    def _check_rates(self, t: Tensor) -> None:
        hint = "; where a rate is infinite, give alpha and sigma to MarginalSDE instead"
        _check_values("drift_coefficient", self.drift_coefficient(t), t, hint=hint)
        _check_values("diffusion", self.diffusion(t), t, least=0, hint=hint)


class BetaSDE(RateSDE):
    """The variance-preserving diffusion of any noise rate β(t): f = −½ β, g² = β, as VPSDE's for a linear one."""

    prior_std = 1.0

    def __init__(self, beta: TimeFunction, T: float = 1.0):
        """Give the function.

        Args:
            beta: β >= 0 of times of any shape, a tensor of the same shape and dtype.
            T: end of time.

        Raises:
            ValueError: if T is not positive, or the function returns another shape or dtype, or a value that is
                negative or not finite, or is 0 over a whole cell.
        """
        self._beta, self.T = beta, _end_of_time(T)
        _ = self._tables

    def beta(self, t: Tensor) -> Tensor:
        """β(t), as given."""
        return self._beta(t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """−½ β."""
        return -0.5 * self.beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """√β."""
        return torch.sqrt(self.beta(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        """½ β α²/σ."""
        return 0.5 * self.beta(t) * self.alpha(t).square() / self.sigma(t)

    def __repr__(self) -> str:
        """The arguments, functions by name."""
        return _written(self, beta=self._beta)

    def _check_rates(self, t: Tensor) -> None:
        hint = "; where it is infinite, give alpha and sigma to MarginalSDE instead"
        _check_values("beta", self.beta(t), t, least=0, hint=hint)


class _Rule(NamedTuple):
    """Quadrature on [0, 1]: points c (P,), weights (P,), and [j, i] the weight of point j in ∫ from 0 to c_i (P, P)."""

    points: Tensor
    weights: Tensor
    partial: Tensor


class _Table(NamedTuple):
    """A rule, and what it gives at the ends of the cells (N + 1,)."""

    points: Tensor
    weights: Tensor
    partial: Tensor
    log_alpha: Tensor
    variance: Tensor
    log_snr: Tensor


def _gauss_legendre() -> _Rule:
    points, weights = legendre.leggauss(_POINTS)
    # The polynomial through values at the points has the Legendre coefficients basis⁻¹ @ values.
    basis = legendre.legvander(points, _POINTS - 1)
    integrals = legendre.legval(points, legendre.legint(np.eye(_POINTS), lbnd=-1)).T
    arrays = (points + 1) / 2, weights / 2, np.linalg.solve(basis.T, integrals.T) / 2
    return _Rule(*(torch.tensor(array) for array in arrays))


def _cell_ends(T: float) -> Tensor:
    return torch.arange(_CELLS + 1, dtype=torch.float64) * (T / _CELLS)


def _end_of_time(T: float) -> float:
    if not 0 < T < math.inf:
        raise ValueError(f"T = {T}: must be positive and finite")
    return float(T)


def _check_values(
    name: str, values: Tensor, t: Tensor, *, least: float = -math.inf, finite_ends: bool = True, hint: str = ""
) -> None:
    """Raise a ValueError unless a function's values at t (N,) have its shape and dtype, are finite and >= ``least``."""
    if not isinstance(values, Tensor) or values.shape != t.shape or values.dtype != t.dtype:
        got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise ValueError(f"{name} returned {got} for {t.dtype} times of shape {tuple(t.shape)}: must be the same")
    allowed = torch.isfinite(values) & (values >= least)
    if not finite_ends:
        allowed[[0, -1]] = ~values[[0, -1]].isnan()
    if not bool(allowed.all()):
        i = int((~allowed).nonzero()[0])
        bound = f" and at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name}({float(t[i]):.6g}) = {float(values[i]):.6g}: must be finite{bound}{hint}")


def _check_fall(name: str, log_snr: Tensor, t: Tensor) -> None:
    """Raise a ValueError that names where a log-SNR (N,) at increasing times does not fall."""
    falls = log_snr.diff() < 0
    if not bool(falls.all()):
        i = int((~falls).nonzero()[0])
        before, after = log_snr[i : i + 2].tolist()
        where = f"from {before:.6g} at t = {float(t[i]):.6g} to {after:.6g} at t = {float(t[i + 1]):.6g}"
        raise ValueError(f"{name} goes {where}: must fall with t")


def _written(sde: SDE, **functions: TimeFunction) -> str:
    arguments = [f"{name}={getattr(function, '__name__', function)}" for name, function in functions.items()]
    return f"{type(sde).__name__}({', '.join([*arguments, f'T={sde.T}'])})"
