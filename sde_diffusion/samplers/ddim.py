r"""DDIM and DDPM: steps that would be exact if the prediction of x₀ were.

DDIM, from t to s < t (Song et al. 2021, arXiv:2010.02502, eq. 12, for any α and σ):

    x_s = α_s x̂₀ + √(σ_s² − ς²) ε̂ + ς z           ς² = η² (σ_s²/σ_t²) (σ_t² − (α_t/α_s)² σ_s²)

DDPM, ancestral sampling of the discrete chain (Ho et al. 2020, arXiv:2006.11239, algorithm 2), with its
posterior a, b, v:

    x_s = a x̂₀ + b x_t + √v z

η = 1 is DDPM with the posterior variance; η = 0 is the first-order exponential integrator of the
probability-flow ODE.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.chain import GaussianChain
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, non_negative

VARIANCES = ("posterior", "noising")


class DDIM(StepSolver):
    """One evaluation a step; deterministic and of first order at η = 0."""

    def __init__(self, eta: float = 0.0):
        """Set η.

        Raises:
            ValueError: unless 0 <= eta <= 1, beyond which ς could exceed σ_s.
        """
        if non_negative("eta", eta) > 1:
            raise ValueError(f"eta = {eta}: must be in [0, 1]")
        self.eta = float(eta)

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """α_s, √(σ_s² − ς²) and ς."""
        alpha_t, alpha_s = sde.alpha(times[:-1]), sde.alpha(times[1:])
        variance_t, variance_s = sde.sigma(times[:-1]).square(), sde.sigma(times[1:]).square()
        gained = variance_t - (alpha_t / alpha_s).square() * variance_s
        added = self.eta**2 * variance_s / variance_t * gained
        return {
            "t": times[:-1],
            "alpha_s": alpha_s,
            "direction": torch.sqrt((variance_s - added).clamp(min=0)),
            "std": torch.sqrt(added.clamp(min=0)),
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Towards x̂₀, along ε̂, and noise."""
        x0, eps = predict(x, c.t)
        x = c.alpha_s * x0 + c.direction * eps
        return x + c.std * noise() if self.eta else x


class DDPM(StepSolver):
    """The reverse chain: one evaluation a step."""

    default_steps: ClassVar[int] = 1000

    def __init__(self, variance: str = "posterior"):
        """Choose the variance of a reverse step: "posterior" (v_t) or "noising" (σ²_{t+1}).

        Raises:
            ValueError: for any other.
        """
        if variance not in VARIANCES:
            raise ValueError(f"variance = {variance!r}: must be one of {', '.join(VARIANCES)}")
        self.variance = variance

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """a, b and √variance of the chain whose states are the times."""
        increasing = times.flip(0)
        # A grid that ends where there is no noise ends at the chain's own x₀, which is not one of its steps.
        has_noise = bool(sde.sigma(increasing[:1]) > 0)
        chain = GaussianChain.from_sde(sde, increasing.tolist() if has_noise else increasing[1:].tolist())
        first = 1 if has_noise else 0
        a, b, v = (value[first:].flip(0) for value in chain.posterior())
        if self.variance == "noising":
            # Algorithm 2 adds no noise on the way to x₀, where v is 0.
            v = torch.where(v > 0, chain.stds[first:].square().flip(0), v)
        return {"t": times[:-1], "a": a, "b": b, "std": torch.sqrt(v)}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Sample q(x_s | x_t, x̂₀)."""
        return c.a * predict(x, c.t).x0 + c.b * x + c.std * noise()
