r"""Heun's method on the probability-flow ODE, in variance-preserving variables over θ = atan(σ/α).

With n² = α² + σ², the scaled state y = x/n = cos θ x̂₀ + sin θ ε̂ moves by

    dy/dθ = cos θ ε̂ − sin θ x̂₀

which is bounded at both ends for every SDE.
The step is that of Karras et al. 2022, algorithm 1, in these variables.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE


class Heun(StepSolver):
    """Second order, deterministic, two evaluations a step."""

    default_steps: ClassVar[int] = 25
    evaluates_end: ClassVar[bool] = True

    def evaluations_per_step(self) -> int:
        """Two: at either end of the step."""
        return 2

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """n, cos θ and sin θ at both ends, and the step in θ."""
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        norm, angle = torch.sqrt(alpha.square() + sigma.square()), torch.atan2(sigma, alpha)
        return {
            "t": times[:-1],
            "s": times[1:],
            "norm_t": norm[:-1],
            "norm_s": norm[1:],
            "cos_t": angle.cos()[:-1],
            "cos_s": angle.cos()[1:],
            "sin_t": angle.sin()[:-1],
            "sin_s": angle.sin()[1:],
            "step": angle.diff(),
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Euler to s, then the average of the slopes at t and s."""
        y = x / c.norm_t
        x0, eps = predict(x, c.t)
        slope_t = c.cos_t * eps - c.sin_t * x0
        x0, eps = predict(c.norm_s * (y + c.step * slope_t), c.s)
        slope_s = c.cos_s * eps - c.sin_s * x0
        return c.norm_s * (y + 0.5 * c.step * (slope_t + slope_s))
