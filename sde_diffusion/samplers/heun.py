r"""Heun's method on the probability-flow ODE, in variance-preserving variables over u = log(σ/α).

With n² = α² + σ², a = α/n, s = σ/n, the scaled state y = x/n = a x̂₀ + s ε̂ moves by

    dy/du = a s (a ε̂ − s x̂₀)

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
    in_log_snr: ClassVar[bool] = True

    def evaluations_per_step(self) -> int:
        """Two: at either end of the step."""
        return 2

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """n and what multiplies x̂₀ and ε̂ in dy/du, at both ends, and the step in u."""
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        norm = torch.sqrt(alpha.square() + sigma.square())
        data_rate, noise_rate = -alpha * sigma.square() / norm**3, alpha.square() * sigma / norm**3
        u = -0.5 * sde.log_snr(times)
        return {
            "t": times[:-1],
            "s": times[1:],
            "norm_t": norm[:-1],
            "norm_s": norm[1:],
            "data_rate_t": data_rate[:-1],
            "data_rate_s": data_rate[1:],
            "noise_rate_t": noise_rate[:-1],
            "noise_rate_s": noise_rate[1:],
            "du": u[1:] - u[:-1],
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Euler to s, then the average of the slopes at t and s."""
        y = x / c.norm_t
        x0, eps = predict(x, c.t)
        slope_t = c.data_rate_t * x0 + c.noise_rate_t * eps
        x0, eps = predict(c.norm_s * (y + c.du * slope_t), c.s)
        slope_s = c.data_rate_s * x0 + c.noise_rate_s * eps
        return c.norm_s * (y + 0.5 * c.du * (slope_t + slope_s))
