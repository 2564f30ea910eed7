r"""Euler-Maruyama on the reverse SDE: x_s = x_t + drift(x_t, t) (s − t) + η g(t) √(t − s) z.

Song et al. 2021 (arXiv:2011.13456), section 4.1; η scales the noise, and η = 0 is Euler's method on the
probability-flow ODE. A noise level w(t) may stand for η g(t), finite where g is not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, TimeFunction, check_eta


class EulerMaruyama(StepSolver):
    """First order in law, one evaluation a step."""

    default_steps: ClassVar[int] = 1000
    convergence_order = 1

    def __init__(self, eta: float | TimeFunction = 1.0):
        """Set η >= 0, or the noise level w(t) >= 0; every choice has the same marginals in the limit of small steps."""
        self.eta = check_eta(eta)

    @property
    def is_stochastic(self) -> bool:
        """Unless η = 0."""
        return bool(self.eta)

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """The drift over a step, as factors of x̂₀ and ε̂, and the standard deviation of its noise."""
        t, dt = times[:-1], times.diff()
        data_rate, noise_rate = sde.reverse_rates(t, self.eta)
        std = sde.reverse_diffusion(t, self.eta) * torch.sqrt(-dt)
        return {"t": t, "data": data_rate * dt, "noise": noise_rate * dt, "std": std}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Drift, then noise."""
        x = x + predict.combine(x, c.t, c.data, c.noise)
        return x + c.std * noise() if self.eta else x


class Euler(EulerMaruyama):
    """Euler's method on the probability-flow ODE dx/dt: first order, one evaluation a step."""

    def __init__(self) -> None:
        """Leave out the noise."""
        super().__init__(eta=0.0)
