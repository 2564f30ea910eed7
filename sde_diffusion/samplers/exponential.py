r"""SDE-DPM-Solver++: the linear part and the noise of the reverse SDE exactly, x̂₀ as a polynomial.

Over λ = log(α/σ) the reverse SDE with a number η is linear in x but for x̂₀. From t to s < t, with h = λ_s − λ_t and
z = (1 + η²) h (Lu et al. 2022, arXiv:2211.01095, section 5, for η = 1; Xue et al. 2023, arXiv:2309.05019, for any):

    x_s = (σ_s/σ_t) e^{−η²h} x_t + α_s ∫₀¹ z e^{−z(1−τ)} x̂₀(τ) dτ + σ_s √(1 − e^{−2η²h}) ξ,    ξ ~ N(0, I)

x̂₀(τ), τ = 0 at t and 1 at s, is the polynomial through the predictions at t and at the times before. That of τᵏ gives

    m₀ = 1 − e^{−z}        m_k = 1 − (k/z) m_{k−1}

and at order 2 the paper's ½ m₀ in place of m₁. At order 1 the law is exact if x̂₀ is: η = 1 is DDPM with the posterior's
variance and η = 0 is DDIM.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, non_negative


class Exponential(StepSolver):
    """x̂₀ constant over a step. One evaluation a step; of first order in law for any η."""

    order: ClassVar[int] = 1
    memory = 1

    def __init__(self, eta: float = 1.0):
        """Set η.

        Raises:
            ValueError: if it is negative or not finite.
        """
        self.eta = non_negative("eta", eta)

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """What multiplies x_t, the predictions of x₀ (N, order), this step's first, and the noise."""
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        h = 0.5 * sde.log_snr(times).diff()
        # Infinite from a time without data, or to one without noise; 0 · h must then be 0.
        h = h.clamp(max=torch.finfo(h.dtype).max)
        ends = range(1, len(times))
        return {
            "t": times[:-1],
            "scale": sigma[1:] / sigma[:-1] * torch.exp(-(self.eta**2) * h),
            "weights": alpha[1:, None] * torch.stack([self._weights(h[max(0, i - self.order) : i]) for i in ends]),
            "std": sigma[1:] * torch.sqrt(-torch.expm1(-2 * self.eta**2 * h)),
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Shrink x, add the weighted predictions, and noise."""
        c.past.append(predict(x, c.t).x0)
        x = c.scale * x + sum(weight * x0 for weight, x0 in zip(c.weights, reversed(c.past), strict=False))
        return x + c.std * noise() if self.eta else x

    def _weights(self, h: Tensor) -> Tensor:
        """The integral as weights (order,) on the predictions, of the last of the steps h (at most order).

        They integrate every polynomial of a lower degree than their number: Σ_j w_j τ_jᵏ = m_k.
        """
        if bool((h == torch.finfo(h.dtype).max).any()):
            h = h[-1:]  # no polynomial spans an infinite step
        z = (1 + self.eta**2) * h[-1]
        moments = [-torch.expm1(-z)]
        for k in range(1, len(h)):
            moments.append(0.5 * moments[0] if self.order == 2 else 1 - k / z * moments[-1])
        # Newest first: τ = 0, then minus the steps since, in units of this one.
        nodes = torch.cat([h.new_zeros(1), -h[:-1].flip(0).cumsum(0) / h[-1]])
        powers = nodes ** torch.arange(len(h))[:, None]
        weights = torch.linalg.solve(powers, torch.stack(moments))
        return torch.nn.functional.pad(weights, (0, self.order - len(h)))


class SDEDPMSolver2M(Exponential):
    """x̂₀ linear over a step. One evaluation a step; of second order in law for any η."""

    order: ClassVar[int] = 2
    memory = 2


class SDEDPMSolver3M(Exponential):
    """x̂₀ quadratic over a step. One evaluation a step; of third order at η = 0, else of second in law.

    The first steps are of lower order: they count little only where x̂₀ hardly changes, as near t_max.
    """

    order: ClassVar[int] = 3
    memory = 3
