r"""Linear multistep methods over the noise-to-data ratio ρ = σ/α, of the noise prediction.

There the probability-flow ODE is an integral of ε̂ and nothing else,

    x_s/α_s = x_t/α_t + ∫ ε̂ dρ        so that        x_s = (α_s/α_t) x_t + (σ_s − (α_s/α_t) σ_t) Σ_j w_j ε̂_j

is DDIM with a mean of the last predictions in place of the last one. The two methods differ in their weights w_j.

LMS, as known from k-diffusion, integrates the polynomial in ρ through the last predictions exactly, over steps of any
size: Adams-Bashforth of variable steps, and of its order.

PNDM (Liu et al. 2022, arXiv:2202.09778, section 3) takes the weights of Adams-Bashforth of equal steps, whatever the
steps are:

    order 1: 1        order 2: (3, −1)/2        order 3: (23, −16, 5)/12        order 4: (55, −59, 37, −9)/24

They give the mean of ε̂ over the step in the variable in which the grid's steps are equal, not over ρ. Hence PNDM is of
second order on every smooth grid, as the paper says, and of its weights' order only on one of equal steps in ρ; and ρ
must not change many times over in a step, as it does in grid="angle" where α is almost 0. Its first steps take ε̂ four
times each, as the classical Runge-Kutta method does, with DDIM for a move:

    ε̂₁ at t        ε̂₂, ε̂₃ at (t + s)/2, moved there by ε̂₁ and ε̂₂        ε̂₄ at s, moved there by ε̂₃
    (ε̂₁ + 2 ε̂₂ + 2 ε̂₃ + ε̂₄)/6 moves x to s

Neither can start where α = 0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_diffusion.samplers.multistep import Form, Multistep, weighted_sum
from sde_diffusion.samplers.solver import Noise, Predict, Problem
from sde_diffusion.sde import SDE

_ADAMS_BASHFORTH = torch.tensor(
    [
        [1, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ],
    dtype=torch.float64,
)
_RUNGE_KUTTA = (1 / 6, 2 / 6, 2 / 6, 1 / 6)


class _Ratio(Form):
    """The noise prediction as a polynomial in ρ itself."""

    target = (0.0, 1.0)
    rate = 0.0

    @staticmethod
    def variable_at(log_ratio: Tensor) -> Tensor:
        return torch.exp(-log_ratio)

    def steps(self) -> tuple[Tensor, Tensor]:
        return self.alpha[1:] / self.alpha[:-1], self.alpha[1:] * self.variable.diff(dim=0)


class LMS(Multistep):
    """Adams-Bashforth over σ/α: order 1 to 4, deterministic, one evaluation a step; order 1 is DDIM."""

    def __init__(self, order: int = 4):
        """Choose the order.

        Raises:
            ValueError: unless it is 1 to 4.
        """
        super().__init__("noise", order, range(1, 5), lower_order_final=False)
        self.form = _Ratio


class PNDM(Multistep):
    """Pseudo numerical method: deterministic, one evaluation a step after the first; order 1 is DDIM."""

    model_times: ClassVar[tuple[str, ...]] = ("t", "middle", "s")

    def __init__(self, order: int = 4, warmup: str = "runge_kutta"):
        """Choose weights and beginning.

        Args:
            order: of the weights, 1 to 4; the paper's F-PNDM has 4, and S-PNDM 2.
            warmup: "runge_kutta", for four evaluations in each of the first ``order`` − 1 steps, but not in the last of
                all; or "multistep", for the weights of lower orders.

        Raises:
            ValueError: for any other.
        """
        super().__init__("noise", order, range(1, 5), lower_order_final=False)
        if warmup not in ("runge_kutta", "multistep"):
            raise ValueError(f"warmup = {warmup!r}: must be one of runge_kutta, multistep")
        self.form, self.warmup = _Ratio, warmup

    @property
    def convergence_order(self) -> int:
        """Second at most, but where the steps are equal in σ/α."""
        return min(self.order, 2)

    def steps_for(self, nfe: int) -> int:
        """Steps that ``nfe`` evaluations allow: each of the first, by Runge-Kutta, takes three more than the others."""
        if self.warmup == "multistep":
            return super().steps_for(nfe)
        return max((nfe + 3) // 4, nfe - 3 * (self.order - 1))

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """A and the weights; and for Runge-Kutta A and W halfway, and W."""
        start, end = times[:-1], times[1:]
        middle = (start + end) / 2
        scale_half, weight_half = self.form(sde, torch.stack([start, middle])).steps()
        _, weight = self.form(sde, times).steps()
        halves = {"middle": middle, "scale_half": scale_half[0], "weight_half": weight_half[0]}
        return super().prepare(sde, times) | halves | {"s": end, "weight": weight}

    def shares(self, form: Form, nodes: Tensor, used: Tensor) -> Tensor:
        """Those of equal steps."""
        return _ADAMS_BASHFORTH[used.sum(1) - 1, : self.order]

    def rows(self, problem: Problem, x: Tensor) -> list[dict[str, Any]]:
        """Coefficients, and which of the steps are Runge-Kutta's: never the last, that the end is not evaluated."""
        rows = super().rows(problem, x)
        first = min(self.order, len(rows)) - 1 if self.warmup == "runge_kutta" else 0
        return [row | {"is_runge_kutta": i < first} for i, row in enumerate(rows)]

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """The weighted sum, or one of the first steps."""
        if not c.is_runge_kutta:
            return super().step(predict, x, c, noise)
        first = predict.combine(x, c.t, *self.form.target)
        y = weighted_sum(c.scale_half, x, [c.weight_half], [first])
        second = predict.combine(y, c.middle, *self.form.target)
        y = weighted_sum(c.scale_half, x, [c.weight_half], [second])
        third = predict.combine(y, c.middle, *self.form.target)
        y = weighted_sum(c.scale, x, [c.weight], [third])
        fourth = predict.combine(y, c.s, *self.form.target)
        c.past.append(first)
        weights = [c.weight * share for share in _RUNGE_KUTTA]
        return weighted_sum(c.scale, x, weights, [first, second, third, fourth])
