r"""Exponential integrators of the probability-flow ODE, which reuse the predictions of earlier steps.

In each of these forms the ODE is an integral of one prediction D and nothing else,

    x_s = (m_s/m_t) x_t + m_s ∫ D dρ                 over ρ from ρ_t to ρ_s

| form     | D       | m     | ρ         | polynomial in κ        |
|----------|---------|-------|-----------|------------------------|
| data     | x̂₀      | σ     | α/σ       | λ = log(α/σ)           |
| noise    | ε̂       | α     | σ/α       | −λ                     |
| velocity | ε̂ − x̂₀  | α + σ | σ/(α + σ) | ρ, finite at all times |

so that a constant D is solved exactly, by a step of DDIM. A method of order p puts the polynomial through D at p times
in its place. With the Lagrange basis ℓ_j of those times, its step is one weighted sum,

    x_s = A x_t + W Σ_j w_j D_j        A = m_s/m_t        W = m_s (ρ_s − ρ_t)        w_j = ∫ ℓ_j dρ / ∫ dρ

whose shares w_j add up to 1. The first steps, which have fewer times behind them, are of lower order. Where λ is
infinite, at α = 0 or σ = 0, a polynomial in it must be constant: such a time is left out, and a step to it is of first
order; that of data prediction to σ = 0 is x_s = α_s x̂₀.

DEIS takes these shares; DPM-Solver++ takes them but at order 2, where with the step ratio r = h_{i−1}/h_i

    w = (1 + 1/2r, −1/2r)

UniPC predicts x_s like this, and once D_s is known, with which the next step begins, takes the polynomial through that
too: one evaluation a step, and one order more. Its sums of two terms are B(h)/2 (D_j − D_t)/r_j for the slope, r_j the
place of time j in steps from t, with B(h) = h ("bh1") or, of data, 1 − e^{−h} ("bh2").

Sources: Zhang & Chen 2022 (arXiv:2204.13902), section 3; Lu et al. 2022 (arXiv:2211.01095), section 4 and appendix B,
for DPM-Solver++(2M); Zhao et al. 2023 (arXiv:2302.04867), section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Reversible, Sequence
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.model import combination
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE

# Exact to rounding for a cubic times an exponential over a step in log-SNR of any length between t_max and t_min.
_POINTS, _QUADRATURE = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(32))

# From this many steps on, the published solvers keep their order up to the end.
_MANY_STEPS = 15


class Form(ABC):
    """D, m and ρ between times, and the variable κ of the polynomial, in which dρ is proportional to e^{rate κ} dκ."""

    rate: ClassVar[float] = 1.0
    # D, as factors of x̂₀ and ε̂.
    target: ClassVar[tuple[float, float]]

    def __init__(self, sde: SDE, times: Tensor):
        """Set α, σ and κ, all of the shape of the decreasing times (N + 1, ...)."""
        self.alpha, self.sigma = sde.alpha(times), sde.sigma(times)
        self.variable = self.variable_at(sde.log_snr(times) / 2)

    @staticmethod
    @abstractmethod
    def variable_at(log_ratio: Tensor) -> Tensor:
        """κ at λ."""

    @abstractmethod
    def steps(self) -> tuple[Tensor, Tensor]:
        """A and W of the N steps."""


class _Data(Form):
    target = (1.0, 0.0)

    @staticmethod
    def variable_at(log_ratio: Tensor) -> Tensor:
        return log_ratio

    def steps(self) -> tuple[Tensor, Tensor]:
        scale = self.sigma[1:] / self.sigma[:-1]
        return scale, self.alpha[1:] - scale * self.alpha[:-1]


class _Noise(Form):
    target = (0.0, 1.0)

    @staticmethod
    def variable_at(log_ratio: Tensor) -> Tensor:
        return -log_ratio

    def steps(self) -> tuple[Tensor, Tensor]:
        scale = self.alpha[1:] / self.alpha[:-1]
        return scale, self.sigma[1:] - scale * self.sigma[:-1]


class _Velocity(Form):
    target = (-1.0, 1.0)
    rate = 0.0

    @staticmethod
    def variable_at(log_ratio: Tensor) -> Tensor:
        return torch.sigmoid(-log_ratio)

    def steps(self) -> tuple[Tensor, Tensor]:
        norm = self.alpha + self.sigma
        return norm[1:] / norm[:-1], norm[1:] * self.variable.diff(dim=0)


FORMS: dict[str, type[Form]] = {"data": _Data, "noise": _Noise, "velocity": _Velocity}


class Multistep(StepSolver):
    """The predictor A x_t + W Σ_j w_j D_j; a subclass chooses the form, the order and the shares w_j."""

    def __init__(self, form: str, order: int, allowed: Sequence[int], lower_order_final: bool):
        """Set what all have.

        Raises:
            ValueError: for an unknown form, or an order that is not allowed.
        """
        if form not in FORMS:
            raise ValueError(f"form = {form!r}: must be one of {', '.join(FORMS)}")
        if order not in allowed:
            raise ValueError(f"order = {order}: must be one of {', '.join(map(str, allowed))}")
        self.form, self.order, self.lower_order_final = FORMS[form], order, lower_order_final
        self.memory = order

    @property
    def convergence_order(self) -> int:
        """That of the polynomial; DPM-Solver++ and UniPC end at a lower one in few steps only."""
        return self.order

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """A (N,) and the weights W w_j (N, order), the present time's first."""
        form = self.form(sde, times)
        scale, total = form.steps()
        shares = self.shares(form, *self.nodes(form.variable))
        return {"t": times[:-1], "scale": scale, "weights": total[:, None] * shares}

    def nodes(self, variable: Tensor) -> tuple[Tensor, Tensor]:
        """κ (N, order) at the last times, the present one first, and which of them are used."""
        steps = torch.arange(len(variable) - 1)[:, None]
        earlier = torch.arange(self.order)
        nodes = variable[(steps - earlier).clamp(min=0)]
        used = (earlier <= steps) & nodes.isfinite() & variable[1:, None].isfinite()
        if self.lower_order_final and len(steps) < _MANY_STEPS:
            used &= earlier < len(steps) - steps
        used[:, 0] = True
        return nodes, used

    def shares(self, form: Form, nodes: Tensor, used: Tensor) -> Tensor:
        """w_j (N, K) of the times at κ (N, K)."""
        return lagrange_shares(form, nodes, used)

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """The weighted sum."""
        c.past.append(predict.combine(x, c.t, *self.form.target))
        return weighted_sum(c.scale, x, c.weights, c.past)


def weighted_sum(scale: float, x: Tensor, weights: Iterable[float], past: Reversible[Tensor]) -> Tensor:
    """scale x + Σ_j weights_j D_j, for D from the last of ``past`` on backwards, as many as there are weights."""
    return combination((scale, x), *zip(weights, reversed(past), strict=False))


def lagrange_shares(form: Form, nodes: Tensor, used: Tensor) -> Tensor:
    """∫ ℓ_j dρ / ∫ dρ (N, K) over each step, ℓ_j the polynomial that is 1 at node j and 0 at the others that are used.

    Args:
        form: with the variable κ.
        nodes: κ (N, K).
        used: which of them are; those that are not get 0.
    """
    start, end = form.variable[:-1, None], form.variable[1:, None]
    # With an end at infinity only one node is used, and any points will do for its constant.
    is_finite = (end - start).isfinite()
    start, end = torch.where(is_finite, start, 0.0), torch.where(is_finite, end, 1.0)
    points = (start + end) / 2 + (end - start) * _POINTS
    density = _QUADRATURE * torch.exp(form.rate * (points - torch.maximum(start, end)))
    ratio = (points[:, :, None, None] - nodes[:, None, None, :]) / (nodes[:, :, None] - nodes[:, None, :])[:, None]
    factors = used[:, None, :] & ~torch.eye(nodes.shape[1], dtype=torch.bool)
    basis = torch.where(factors[:, None], ratio, 1.0).prod(-1)
    average = (density[:, :, None] * basis).sum(1) / density.sum(1, keepdim=True)
    return torch.where(used, average, 0.0)


def slope_shares(form: Form, nodes: Tensor, slope: Tensor | float, present: int) -> Tensor:
    """Shares of two times (N, 2): D_t, and ``slope`` (D_j − D_t)/r_j; node ``present`` is t, the other is j."""
    place = (nodes[:, 1 - present] - nodes[:, present]) / form.variable.diff()
    other = slope / place
    shares = [1 - other, other]
    return torch.stack([shares[present], shares[1 - present]], 1)


class DEIS(Multistep):
    """Exponential Adams-Bashforth: order 1 to 4, deterministic, one evaluation a step; order 1 is DDIM."""

    def __init__(self, order: int = 3, form: str = "velocity"):
        """Choose the order, and the prediction that is interpolated.

        Args:
            order: 1 to 4.
            form: "data", "noise" or "velocity".

        Raises:
            ValueError: for any other.
        """
        super().__init__(form, order, range(1, 5), lower_order_final=False)


class _DPMSolverPlusPlus(Multistep):
    """DPM-Solver++ of data prediction; of two times it takes its own shares."""

    order: int

    def __init__(self, lower_order_final: bool = True):
        """Choose how it ends.

        Args:
            lower_order_final: of fewer than 15 steps, let the last be of first order, and that before it of second.
        """
        super().__init__("data", self.order, (2, 3), lower_order_final)

    def shares(self, form: Form, nodes: Tensor, used: Tensor) -> Tensor:
        """w_j: with the slope at half the weight W of two times."""
        shares = super().shares(form, nodes, used)
        two = used.sum(1) == 2
        shares[two, :2] = slope_shares(form, nodes[:, :2], 0.5, present=0)[two]
        return shares


class DPMSolver2M(_DPMSolverPlusPlus):
    """DPM-Solver++(2M): second order, deterministic, one evaluation a step."""

    order = 2


class DPMSolver3M(_DPMSolverPlusPlus):
    """DPM-Solver++(3M): third order, deterministic, one evaluation a step."""

    order = 3


class UniPC(Multistep):
    """Unified predictor-corrector: order p + 1, deterministic, one evaluation a step.

    The states that it hands on are its predictions of them; the correction is part of the next step.
    """

    def __init__(self, order: int = 2, variant: str = "bh2", form: str = "data", lower_order_final: bool = True):
        """Choose order, B(h) and form.

        Args:
            order: p of the predictor, 1 to 4; the corrected state has one more.
            variant: "bh1" or "bh2".
            form: "data", "noise" or "velocity"; the published one is of data.
            lower_order_final: as for DPM-Solver++, the corrector with the predictor.

        Raises:
            ValueError: for any other.
        """
        super().__init__(form, order, range(1, 5), lower_order_final)
        if variant not in ("bh1", "bh2"):
            raise ValueError(f"variant = {variant!r}: must be one of bh1, bh2")
        self.variant = variant
        # The predictions of ``order`` times, and the state corrected last.
        self.memory = order + 1

    @property
    def convergence_order(self) -> int:
        """One more than the predictor's."""
        return self.order + 1

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """The predictor's coefficients, and those of the corrector of the step before it: (N,) and (N, order + 1)."""
        predictor = super().prepare(sde, times)
        form = self.form(sde, times)
        scale, total = form.steps()
        nodes, used = self.nodes(form.variable)
        nodes = torch.cat([form.variable[1:, None], nodes], 1)
        used = nodes.isfinite() & torch.cat([torch.ones_like(used[:, :1]), used], 1)
        shares = self.shares(form, nodes, used, present=1)
        weights = (total[:, None] * shares).roll(1, 0)
        # There is none before the first step; what rolled there belongs to the last, which is not corrected.
        weights[0], scale = 0, scale.roll(1)
        scale[0] = 1
        return predictor | {"scale_back": scale, "weights_back": weights}

    def shares(self, form: Form, nodes: Tensor, used: Tensor, present: int = 0) -> Tensor:
        """w_j; of two times with B(h), of which ``present`` is t."""
        shares = lagrange_shares(form, nodes, used)
        two = used.sum(1) == 2
        step = form.rate * form.variable.diff()
        # In a form without an exponential B(h) is h.
        slope = 0.5 * (step / -torch.expm1(-step) if self.variant == "bh1" and form.rate else torch.ones_like(step))
        if nodes.shape[1] > 1:
            shares[two, :2] = slope_shares(form, nodes[:, :2], slope, present)[two]
        return shares

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """Correct x by the prediction there, and predict from it."""
        data = predict.combine(x, c.t, *self.form.target)
        state = c.past.pop()
        x = weighted_sum(c.scale_back, state, c.weights_back, [*c.past, data])
        c.past.append(data)
        predicted = weighted_sum(c.scale, x, c.weights, c.past)
        c.past.append(x)
        return predicted
