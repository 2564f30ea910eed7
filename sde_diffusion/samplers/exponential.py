r"""Exponential integrators of the reverse SDE: its linear part and its noise exactly, x̂₀ as a polynomial.

Over λ = log(α/σ) the reverse SDE is linear in x but for x̂₀. From t to s < t, with h = λ_s − λ_t, z = (1 + η²) h and η
constant over the step (Lu et al. 2022, arXiv:2211.01095, section 5, for η = 1; Xue et al. 2023, arXiv:2309.05019):

    x_s = (σ_s/σ_t) e^{−η²h} x_t + α_s ∫₀¹ z e^{−z(1−τ)} x̂₀(τ) dτ + σ_s √(1 − e^{−2η²h}) ξ,    ξ ~ N(0, I)

x̂₀(τ), at λ_t + τh, is the polynomial through the predictions at t and at the times before, in a variable κ that is 0 at
t and 1 at s. The integral of κᵏ is

    m₀ = 1 − e^{−z}        m_k = m₀ ∫₀¹ e^{−z(1−τ)} κ(τ)ᵏ dτ / ∫₀¹ e^{−z(1−τ)} dτ

| solver               | order  | κ is linear in |                                  |
|----------------------|--------|----------------|----------------------------------|
| SDE-DPM-Solver++(2M) | 2      | λ              | with ½ m₀ for m₁, as published   |
| SDE-DPM-Solver++(3M) | 3      | λ              |                                  |
| stochastic Adams     | 1 to 3 | σ/(α + σ)      | a predictor alone, no corrector  |

Near the data x̂₀ settles with σ/α while λ runs on: a polynomial in σ/(α + σ) does not extrapolate what has settled.

At order 1 the law is exact if x̂₀ is: η = 1 is DDPM with the posterior's variance and η = 0 is DDIM. A noise level w(t)
in place of η g gives η = w/g, taken in the middle of a step. That too is exact in law if x̂₀ is, whatever w.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.model import combination
from sde_diffusion.samplers.multistep import FORMS
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, TimeFunction, check_eta

# On [−½, ½]; exact to rounding for a cubic times e^{−z(1−τ)} up to z = 30.
_POINTS, _QUADRATURE = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(32))


class Exponential(StepSolver):
    """x̂₀ constant over a step. One evaluation a step; of first order in law for any η."""

    order: int = 1
    memory = 1
    # The variable that κ is linear in, from λ.
    variable_at = staticmethod(FORMS["data"].variable_at)

    def __init__(self, eta: float | TimeFunction = 1.0):
        """Set η, or the noise level w(t).

        Raises:
            ValueError: if the number is negative or not finite.
        """
        self.eta = check_eta(eta)

    @property
    def convergence_order(self) -> int:
        """That of the polynomial, but at most 2 with noise."""
        return min(self.order, 2) if self.is_stochastic else self.order

    @property
    def is_stochastic(self) -> bool:
        """Unless η = 0."""
        return callable(self.eta) or self.eta > 0

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """What multiplies x_t, the predictions of x₀ (N, order), this step's first, and the noise."""
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        log_ratio, noise = 0.5 * sde.log_snr(times), self._eta_squared(sde, times)
        # Infinite from a time without data, or to one without noise; 0 · h must then be 0.
        h = log_ratio.diff().clamp(max=torch.finfo(log_ratio.dtype).max)
        steps = range(len(h))
        weights = [self._weights(log_ratio[max(0, i + 1 - self.order) : i + 2], (1 + noise[i]) * h[i]) for i in steps]
        return {
            "t": times[:-1],
            "scale": sigma[1:] / sigma[:-1] * torch.exp(-noise * h),
            "weights": alpha[1:, None] * torch.stack(weights),
            "std": sigma[1:] * torch.sqrt(-torch.expm1(-2 * noise * h)),
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Shrink x, add the weighted predictions, and noise."""
        c.past.append(predict.combine(x, c.t, 1.0, 0.0))
        terms = [(c.scale, x), *zip(c.weights, reversed(c.past), strict=False)]
        return combination(*terms, (c.std, noise())) if self.is_stochastic else combination(*terms)

    def _eta_squared(self, sde: SDE, times: Tensor) -> Tensor:
        """η² (N,) of the steps."""
        middle = (times[:-1] + times[1:]) / 2
        if not callable(self.eta):
            return torch.full_like(middle, self.eta**2)
        return (sde.reverse_diffusion(middle, self.eta) / sde.diffusion(middle)).square()

    def _weights(self, log_ratio: Tensor, z: Tensor) -> Tensor:
        """The integral as weights (order,) on the predictions at the λ of ``log_ratio`` but the last, which is the end.

        They integrate every polynomial of a lower degree than their number: Σ_j w_j κ_jᵏ = m_k.
        """
        if not bool(log_ratio.isfinite().all()):
            log_ratio = log_ratio[-2:]  # no polynomial spans an infinite step
        count = len(log_ratio) - 1
        weights = -torch.expm1(-z)[None]
        if count > 1:
            start, end = self.variable_at(log_ratio[-2:])
            # κ, newest first: 0, and what lies before it.
            nodes = (self.variable_at(log_ratio[:-1]).flip(0) - start) / (end - start)
            powers = nodes ** torch.arange(count)[:, None]
            weights = weights * torch.linalg.solve(powers, self._mean_powers(log_ratio[-2:], z, count))
        return torch.nn.functional.pad(weights, (0, self.order - count))

    def _mean_powers(self, ends: Tensor, z: Tensor, count: int) -> Tensor:
        """m_k/m₀ (count,) of the step between the λ of ``ends``."""
        tau = 0.5 + _POINTS
        density = _QUADRATURE * torch.exp(-z * (1 - tau))
        start, end = self.variable_at(ends)
        kappa = (self.variable_at(ends[0] + tau * (ends[1] - ends[0])) - start) / (end - start)
        return (kappa ** torch.arange(count)[:, None] * density).sum(1) / density.sum()


class SDEDPMSolver2M(Exponential):
    """x̂₀ linear over a step in λ. One evaluation a step; of second order in law for any η."""

    order = 2
    memory = 2

    def _mean_powers(self, ends: Tensor, z: Tensor, count: int) -> Tensor:
        return ends.new_tensor([1.0, 0.5])


class SDEDPMSolver3M(Exponential):
    """x̂₀ quadratic over a step in λ. One evaluation a step; of third order at η = 0, else of second in law.

    The first steps are of lower order: they count little only where x̂₀ hardly changes, as near t_max.
    """

    order = 3
    memory = 3


class SDEAdams(Exponential):
    """x̂₀ a polynomial in σ/(α + σ) over a step. One evaluation a step; of up to second order in law with noise."""

    variable_at = staticmethod(FORMS["velocity"].variable_at)

    def __init__(self, eta: float | TimeFunction = 1.0, order: int = 2):
        """Set η, or the noise level w(t), and how many predictions the polynomial goes through.

        Raises:
            ValueError: if the number η is negative or not finite, or the order is not 1, 2 or 3.
        """
        super().__init__(eta)
        if order not in (1, 2, 3):
            raise ValueError(f"order = {order}: must be one of 1, 2, 3")
        self.order = self.memory = order
