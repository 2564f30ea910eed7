r"""DDIM and DDPM: steps that would be exact if the prediction of x₀ were.

DDIM, from t to s < t (Song et al. 2021, arXiv:2010.02502, eq. 12, for any α and σ):

    x_s = α_s x̂₀ + √(σ_s² − ς²) ε̂ + ς z           ς² = η² (σ_s²/σ_t²) (σ_t² − (α_t/α_s)² σ_s²)

DDPM, ancestral sampling of the discrete chain (Ho et al. 2020, arXiv:2006.11239, algorithm 2), with its
posterior a, b and a variance σ̃² that is v, σ²_{t+1} or between (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15):

    x_s = a x̂₀ + b x_t + σ̃ z,    z = 0 if s has no noise

η = 1 is DDPM with the posterior variance; η = 0 is the first-order exponential integrator of the
probability-flow ODE. The coefficients are those of the chain whose states are the solver's times.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.chain import GaussianChain, check_variance, interpolate_variance, unit_interval
from sde_diffusion.model import Prediction, combination
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE


class DDIM(StepSolver):
    """One evaluation a step; deterministic at η = 0; of first order, else in law."""

    convergence_order = 1

    def __init__(self, eta: float = 0.0):
        """Set η.

        Raises:
            ValueError: unless 0 <= eta <= 1, beyond which ς could exceed σ_s.
        """
        self.eta = unit_interval("eta", eta)

    @property
    def is_stochastic(self) -> bool:
        """Unless η = 0."""
        return self.eta > 0

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """α_s, √(σ_s² − ς²) and ς."""
        chain, steps = _chain(sde, times)
        direction, std = chain.ddim(self.eta)
        columns = {"alpha_s": chain.marginal_scales[:-1], "direction": direction, "std": std}
        return {"t": times[:-1]} | {name: value[steps].flip(0) for name, value in columns.items()}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Towards x̂₀, along ε̂, and noise."""
        x = predict.combine(x, c.t, c.alpha_s, c.direction)
        return combination((1.0, x), (c.std, noise())) if self.eta else x


class DDPM(StepSolver):
    """The reverse chain: one evaluation a step."""

    default_steps: ClassVar[int] = 1000
    convergence_order = 1
    is_stochastic = True

    def __init__(self, variance: str | float | Sequence[float] | Tensor = "posterior"):
        """Choose the variance of a reverse step.

        Args:
            variance: "posterior" (v) or "noising" (σ²_{t+1}); a number in [0, 1], which interpolates from the first to
                the second in the logarithm; "learned", which does so by the ``fraction`` that a model with
                learned_variance=True predicts for every entry; or the variances themselves, one a step in the chain's
                order, data first, such as those of ``GaussianChain.optimal_variance``. The step to x₀ adds no noise.

        Raises:
            ValueError: for any other.
        """
        self.is_learned = isinstance(variance, str) and variance == "learned"
        self.variance: float | Tensor = 0.0
        if isinstance(variance, Sequence | np.ndarray | Tensor) and not isinstance(variance, str):
            self.variance = torch.as_tensor(variance, dtype=torch.float64)
        elif not self.is_learned:
            self.variance = check_variance(variance)

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """a, b and σ̃ of the chain whose states are the times; of a learned σ̃, the variances that it is between."""
        chain, steps = _chain(sde, times)
        a, b, v = chain.posterior()
        is_noisy = (v > 0).to(v)
        columns = {"a": a, "b": b}
        if self.is_learned:
            posterior, noising = (chain.reverse_variance(name, decoder=True) for name in ("posterior", "noising"))
            columns |= {"is_noisy": is_noisy, "posterior": posterior, "noising": noising}
        else:
            columns["std"] = is_noisy * chain.reverse_variance(self._variance(chain, steps)).sqrt()
        return {"t": times[:-1]} | {name: value[steps].flip(0) for name, value in columns.items()}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Sample q(x_s | x_t, x̂₀), with the variance chosen."""
        if not self.is_learned:
            return combination((c.b, x), (1.0, predict.combine(x, c.t, c.a, 0.0)), (c.std, noise()))
        prediction = predict(x, c.t)
        return c.a * prediction.x0 + c.b * x + self._learned_std(prediction, c) * noise()

    def _variance(self, chain: GaussianChain, steps: slice) -> float | Tensor:
        """What the chain is asked for; given variances are those of the steps that are run."""
        if not isinstance(self.variance, Tensor):
            return self.variance
        variance = torch.zeros_like(chain.stds)
        if self.variance.shape != variance[steps].shape:
            given, needed = tuple(self.variance.shape), tuple(variance[steps].shape)
            raise ValueError(f"variance has shape {given}: need {needed}, one for each step, data first")
        variance[steps] = self.variance
        return variance

    def _learned_std(self, prediction: Prediction, c: SimpleNamespace) -> Tensor:
        fraction = getattr(prediction, "fraction", None)
        if fraction is None:
            raise ValueError("variance = 'learned': the model predicts none; it must have learned_variance=True")
        return c.is_noisy * interpolate_variance(c.posterior, c.noising, fraction).sqrt()


def _chain(sde: SDE, times: Tensor) -> tuple[GaussianChain, slice]:
    """The chain whose states are the decreasing times, and which of its steps are run backwards."""
    increasing = times.flip(0)
    # A time without noise is the chain's own x₀; to one with noise leads a first step, which is not undone.
    has_noise = bool(sde.sigma(increasing[:1]) > 0)
    states = increasing if has_noise else increasing[1:]
    return GaussianChain.from_sde(sde, states.tolist()), slice(int(has_noise), None)
