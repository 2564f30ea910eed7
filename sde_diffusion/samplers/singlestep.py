r"""DPM-Solver++ of single steps: several predictions of x₀ within a step, and none from the steps before it.

Over λ = log(α/σ) the ODE from t to s is an integral of the prediction of x₀ alone, h = λ_s − λ_t:

    x_s = (σ_s/σ_t) x_t + σ_s ∫ e^λ x̂₀ dλ = A x_t + W · mean of x̂₀        W = α_s − A α_t = α_s (1 − e^{−h})

with e^λ as the weight of the mean. For the line through x̂₀ at t and x̂₀ a part r of the way from λ_t to λ_s it is

    (1 − q) x̂₀(λ_t) + q x̂₀(λ_t + r h)        q = (1/(1 − e^{−h}) − 1/h)/r

(1S) takes x̂₀(λ_t) for the mean: it is DDIM. (2S) goes by (1S) to r = ½ and takes x̂₀ there for the mean, as q is 1
there but for higher orders of h. (3S) goes by (1S) to r₁ = ⅓, by the line through t and r₁ to r₂ = ⅔, and by the line
through t and r₂ to s. Where λ is infinite at either end there are no such parts, and the step is (1S).

Sources: Lu et al. 2022 (arXiv:2211.01095), algorithm 1 for (2S); Lu et al. 2022 (arXiv:2206.00927), algorithm 2 for the
stages of (3S), there of ε̂.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.samplers.multistep import FORMS, Multistep, weighted_sum
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE

_DATA = FORMS["data"]


class DPMSolver1(Multistep):
    """DPM-Solver++ of first order, which is DDIM: deterministic, one evaluation a step."""

    def __init__(self) -> None:
        """Take the prediction of x₀ at one time."""
        super().__init__("data", 1, (1,), lower_order_final=False)


class DPMSolver2S(StepSolver):
    """DPM-Solver++(2S): second order, deterministic, two evaluations a step, the second halfway in log-SNR."""

    default_steps: ClassVar[int] = 25
    model_times: ClassVar[tuple[str, ...]] = ("t", "middle")
    convergence_order = 2

    def evaluations_per_step(self) -> int:
        """Two: at the start and in the middle."""
        return 2

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """A and W from t to the middle, and from t to s."""
        start, end = times[:-1], times[1:]
        middle = _part_way(sde, start, end, 1 / 2)
        scale_half, weight_half = _scale_and_weight(sde, start, middle)
        scale, weight = _scale_and_weight(sde, start, end)
        coefficients = {"scale_half": scale_half, "weight_half": weight_half, "scale": scale, "weight": weight}
        return {"t": start, "middle": middle} | coefficients

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """The whole step with the x̂₀ of the middle, which the x̂₀ of the start leads to."""
        data = predict.combine(x, c.t, *_DATA.target)
        halfway = weighted_sum(c.scale_half, x, [c.weight_half], [data])
        return weighted_sum(c.scale, x, [c.weight], [predict.combine(halfway, c.middle, *_DATA.target)])


class DPMSolver3S(StepSolver):
    """DPM-Solver++(3S): third order, deterministic, three evaluations a step, at thirds of it in log-SNR."""

    default_steps: ClassVar[int] = 17
    model_times: ClassVar[tuple[str, ...]] = ("t", "third", "two_thirds")
    convergence_order = 3

    def evaluations_per_step(self) -> int:
        """Three: at the start, and at either third."""
        return 3

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """A from t to the thirds and to s, W to the first, and the weights (N, 2) of the line to the others."""
        start, end = times[:-1], times[1:]
        third, two_thirds = (_part_way(sde, start, end, part) for part in (1 / 3, 2 / 3))
        scale_third, weight_third = _scale_and_weight(sde, start, third)
        # A third is half of two thirds.
        scale_two_thirds, weights_two_thirds = _scale_and_line(sde, start, two_thirds, 1 / 2)
        scale, weights = _scale_and_line(sde, start, end, 2 / 3)
        return {
            "t": start,
            "third": third,
            "two_thirds": two_thirds,
            "scale_third": scale_third,
            "weight_third": weight_third,
            "scale_two_thirds": scale_two_thirds,
            "weights_two_thirds": weights_two_thirds,
            "scale": scale,
            "weights": weights,
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """To a third, to two thirds and to the end, each from the start."""
        data = predict.combine(x, c.t, *_DATA.target)
        third = weighted_sum(c.scale_third, x, [c.weight_third], [data])
        line = [data, predict.combine(third, c.third, *_DATA.target)]
        two_thirds = weighted_sum(c.scale_two_thirds, x, c.weights_two_thirds, line)
        line = [data, predict.combine(two_thirds, c.two_thirds, *_DATA.target)]
        return weighted_sum(c.scale, x, c.weights, line)


def _part_way(sde: SDE, start: Tensor, end: Tensor, part: float) -> Tensor:
    """The times (N,) at a part of the way in λ; the start, where λ is infinite at either end."""
    log_snr = torch.lerp(sde.log_snr(start), sde.log_snr(end), part)
    return torch.where(log_snr.isfinite(), sde.t_from_log_snr(log_snr), start)


def _scale_and_weight(sde: SDE, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """A and W (N,)."""
    scale, weight = _DATA(sde, torch.stack([start, end])).steps()
    return scale[0], weight[0]


def _scale_and_line(sde: SDE, start: Tensor, end: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """A (N,), and W q and W (1 − q) (N, 2), of the line through t and a part of the way."""
    scale, weight = _scale_and_weight(sde, start, end)
    h = (sde.log_snr(end) - sde.log_snr(start)) / 2
    share = (-1 / torch.expm1(-h) - 1 / h) / part
    # To a part that is not there W is 0.
    share = torch.where(end == start, 1.0, share)
    return scale, weight[:, None] * torch.stack([share, 1 - share], 1)
