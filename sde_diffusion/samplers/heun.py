r"""Heun's method on the probability-flow ODE, in variance-preserving variables over θ = atan(σ/α).

With n² = α² + σ², the scaled state y = x/n = cos θ x̂₀ + sin θ ε̂ moves by

    dy/dθ = cos θ ε̂ − sin θ x̂₀

which is bounded at both ends for every SDE. Over a step from t to s, x = n y goes to (n_s/n_t) x + n_s Δθ dy/dθ.
The step is that of Karras et al. 2022 (arXiv:2206.00364), algorithm 1, in these variables.

Their algorithm 2 raises the noise level before a step, which takes p_t to the p of a later time t̂ exactly:

    σ̂/α̂ = (1 + γ) σ/α        x̂ = (α̂/α) x + S_noise √(σ̂² − (α̂/α)² σ²) z
    γ = min(S_churn/N, √2 − 1) where S_tmin ≤ σ/α ≤ S_tmax, else 0
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.model import combination
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, non_negative


class Heun(StepSolver):
    """Second order, deterministic, two evaluations a step."""

    default_steps: ClassVar[int] = 25
    evaluates_end: ClassVar[bool] = True
    model_times: ClassVar[tuple[str, ...]] = ("t", "s")
    convergence_order = 2

    def evaluations_per_step(self) -> int:
        """Two: at either end of the step."""
        return 2

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """n_s/n_t, cos θ and sin θ at both ends, and n_s Δθ."""
        return self._between(sde, times[:-1], times[1:])

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Euler to s, then the average of the slopes at t and s."""
        slope_t = predict.combine(x, c.t, -c.sin_t, c.cos_t)
        x_s = combination((c.scale, x), (c.step, slope_t))
        slope_s = predict.combine(x_s, c.s, -c.sin_s, c.cos_s)
        return combination((c.scale, x), (0.5 * c.step, slope_t), (0.5 * c.step, slope_s))

    @staticmethod
    def _between(sde: SDE, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        c = {"t": t, "s": s}
        angle, norm = {}, {}
        for name, time in list(c.items()):
            alpha, sigma = sde.alpha(time), sde.sigma(time)
            angle[name], norm[name] = torch.atan2(sigma, alpha), torch.sqrt(alpha.square() + sigma.square())
            c[f"cos_{name}"], c[f"sin_{name}"] = angle[name].cos(), angle[name].sin()
        return c | {"scale": norm["s"] / norm["t"], "step": norm["s"] * (angle["s"] - angle["t"])}


class EDM(Heun):
    """Heun's steps, each from a raised noise level: stochastic, two evaluations a step.

    Without churn it is ``Heun``, which steps in θ and x/n where the paper steps in σ/α and x/α. The churn does not
    depend on these variables.
    """

    default_steps: ClassVar[int] = 100

    def __init__(self, churn: float = 40.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0):
        """Set how much the noise is raised.

        Args:
            churn: S_churn, shared by all steps, 0 for none; the paper's are 30 to 80.
            s_tmin: lowest noise level σ/α to be raised.
            s_tmax: highest; no level is raised above that of t_max.
            s_noise: factor on the noise that is added: above 1 it makes up for detail that a network's x̂₀ loses, but
                for an exact model is an error.

        Raises:
            ValueError: for a negative or infinite churn or s_noise, or unless 0 <= s_tmin <= s_tmax.
        """
        self.churn, self.s_noise = non_negative("churn", churn), non_negative("s_noise", s_noise)
        if not 0 <= s_tmin <= s_tmax:
            raise ValueError(f"s_tmin = {s_tmin}, s_tmax = {s_tmax}: need 0 <= s_tmin <= s_tmax")
        self.s_tmin, self.s_tmax = float(s_tmin), float(s_tmax)

    @property
    def is_stochastic(self) -> bool:
        """Unless there is no churn."""
        return self.churn > 0

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """α̂/α and the standard deviation of the noise that raises t to t̂; then Heun's from t̂ to s."""
        t, s = times[:-1], times[1:]
        log_snr = sde.log_snr(t)
        level = torch.exp(-0.5 * log_snr)
        gamma = min(self.churn / len(t), math.sqrt(2) - 1)
        raised = sde.t_from_log_snr(log_snr - 2 * math.log1p(gamma)).clamp(max=sde.t_max)
        is_raised = (gamma > 0) & (self.s_tmin <= level) & (level <= self.s_tmax) & (raised > t)
        t_hat = torch.where(is_raised, raised, t)
        scale = torch.where(is_raised, sde.alpha(t_hat) / sde.alpha(t), 1.0)
        std = torch.where(is_raised, sde.sigma(t_hat) * torch.sqrt(sde.added_share(t, t_hat)), 0.0)
        return self._between(sde, t_hat, s) | {"churn_scale": scale, "churn_std": self.s_noise * std}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Raise the noise, then Heun's step."""
        if self.churn:
            x = combination((c.churn_scale, x), (c.churn_std, noise()))
        return super().step(predict, x, c, noise)
