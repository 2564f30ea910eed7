r"""Predictor-corrector sampling: a step of a reverse-time solver, then Langevin steps at the time it reached.

Song et al. 2021 (arXiv:2011.13456), algorithm 1 and appendices E to G. Predictors, from t to s < t with score −ε̂/σ_t:

| name              | step                                                                        |
|-------------------|-----------------------------------------------------------------------------|
| reverse_diffusion | x_s = (2 − λ) x_t − v ε̂/σ_t + √v z,  λ = α_t/α_s,  v = σ_t² − λ² σ_s²       |
| ancestral         | DDPM's, with the posterior's variance                                       |
| em                | Euler-Maruyama                                                              |

x_t = λ x_s + √v z is the forward step, so that these are finite for any step. Correctors, ε the step size at s:

    x ← x + ε score + √(2ε) z = x − (ε/σ_s) ε̂ + √(2ε) z

| name              | ε                                                                           |
|-------------------|-----------------------------------------------------------------------------|
| langevin          | 2 λ² (r ‖z‖/‖score‖)², with √D for ‖z‖ and every sample's own ‖score‖       |
| annealed_langevin | 2 λ² (r σ_s)², the same for every sample                                    |
| none              |                                                                             |

No ε is above σ_s², up to which a step cannot overshoot: no p_s is more curved than its noise. A step size that depends
on x is biased, by some 2/D of the variance in D dimensions: "langevin" is for data of many dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.model import combination
from sde_diffusion.samplers.ddim import DDPM
from sde_diffusion.samplers.euler_maruyama import EulerMaruyama
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, expand_to


class ReverseDiffusion(StepSolver):
    """The forward step discretised, then reversed: one evaluation a step; first order in law."""

    convergence_order = 1
    is_stochastic = True

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """2 − λ, v/σ_t and √v."""
        t, s = times[:-1], times[1:]
        sigma, share = sde.sigma(t), sde.added_share(s, t)
        return {"t": t, "scale": 2 - sde.alpha(t) / sde.alpha(s), "drift": sigma * share, "std": sigma * share.sqrt()}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Against the forward drift, along the score, and noise."""
        along_score = predict.combine(x, c.t, 0.0, -c.drift)
        return combination((c.scale, x), (1.0, along_score), (c.std, noise()))


PREDICTORS: dict[str, Callable[[], StepSolver]] = {
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": DDPM,
    "em": EulerMaruyama,
}


def _of_the_sample(eps: Tensor) -> Tensor:
    # Finite, as ε̂ is 0 where there is no noise.
    size = eps.flatten(1).square().mean(1).clamp(min=torch.finfo(eps.dtype).tiny)
    return expand_to(1 / size, eps)


def _of_the_noise_level(eps: Tensor) -> Tensor:
    return eps.new_ones(())


# ε/(2 λ² r² σ²) from ε̂ (B, ...): () or (B, 1, ...).
CORRECTORS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "langevin": _of_the_sample,
    "annealed_langevin": _of_the_noise_level,
    "none": None,
}


class PredictorCorrector(StepSolver):
    """Any predictor with any corrector; first order in law, up to the corrector's error, which vanishes with r²."""

    default_steps: ClassVar[int] = 1000
    evaluates_end: ClassVar[bool] = True
    model_times: ClassVar[tuple[str, ...]] = ("t", "s")
    convergence_order = 1
    is_stochastic = True

    def __init__(
        self,
        predictor: str = "reverse_diffusion",
        corrector: str = "annealed_langevin",
        corrector_steps: int = 1,
        snr: float = 0.16,
    ):
        """Choose predictor and corrector.

        Args:
            predictor: a key of ``PREDICTORS``: "reverse_diffusion", "ancestral" or "em".
            corrector: a key of ``CORRECTORS``: "langevin", "annealed_langevin" or "none".
            corrector_steps: Langevin steps after each of the predictor's, one evaluation each.
            snr: r, the ratio of score to noise in a Langevin step.

        Raises:
            ValueError: for an unknown name, fewer than 1 corrector step, or an snr that is not positive.
        """
        for name, value, known in (("predictor", predictor, PREDICTORS), ("corrector", corrector, CORRECTORS)):
            if value not in known:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(known)}")
        if corrector_steps < 1:
            raise ValueError(f"corrector_steps = {corrector_steps}: must be at least 1; for none, corrector='none'")
        if not 0 < snr < float("inf"):
            raise ValueError(f"snr = {snr}: must be positive and finite")
        self.predictor, self.corrector, self.snr = PREDICTORS[predictor](), CORRECTORS[corrector], float(snr)
        self.corrector_steps = corrector_steps if self.corrector else 0

    def evaluations_per_step(self) -> int:
        """One, and one for every corrector step."""
        return 1 + self.corrector_steps

    @property
    def draws_per_step(self) -> int:
        """As many as evaluations."""
        return self.evaluations_per_step()

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """What the predictor needs; σ_s, and ε/σ_s² where ‖score‖ is √D/σ_s."""
        t, s = times[:-1], times[1:]
        step_size = 2 * (self.snr * sde.alpha(t) / sde.alpha(s)).square()
        return self.predictor.prepare(sde, times) | {"s": s, "sigma_s": sde.sigma(s), "step_size": step_size}

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Predict, then correct."""
        x = self.predictor.step(predict, x, c, noise)
        for _ in range(self.corrector_steps):
            x = self._correct(predict, x, c, noise)
        return x

    def _correct(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        assert self.corrector is not None
        eps = predict(x, c.s).eps
        step_size = (c.step_size * self.corrector(eps)).clamp(max=1)
        return x + c.sigma_s * (torch.sqrt(2 * step_size) * noise() - step_size * eps)
