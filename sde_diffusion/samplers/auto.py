r"""``solver="auto"``: which solver, of which order, on which times, for a number of evaluations or a tolerance.

Over u = log(σ/α), and in x/√(α² + σ²), the probability-flow ODE is one and the same for all SDEs, so a rule in u is a
rule for each of them. All rules interpolate the velocity ε̂ − x̂₀ (see ``multistep``), and take steps that are equal in

    w = log(1 + e^{d (u − c)})^p

which is e^{pd (u − c)} where there is little noise, so that steps in u grow towards the data, and (d (u − c))^p where
there is much. (d, p, c) = (2, ¼, 0) is √t of the VP SDE with linear β, the "quadratic" grid of DDIM; other d and p move
steps between the start, where the order is still low, and the middle, where modes part.

| from | data of | solver                                               | d   | p    | c   |
|------|---------|------------------------------------------------------|-----|------|-----|
| 1    |         | DEIS of order 2, each state corrected as UniPC's are | 3   | 0.16 | 0.2 |
| 8    |         | DEIS of order 4                                      | 2.4 | 0.21 | 0.1 |
| 11   |         | DEIS of order 3, each state corrected as UniPC's are | 4   | 0.12 | 0.4 |
| 1    | images  | DEIS of order 2, each state corrected as UniPC's are | 3   | 0.25 | 0.2 |
| 8    | images  | DEIS of order 2, each state corrected as UniPC's are | 2   | 0.35 | 0.5 |
| 14   |         | DEIS of order 4, each state corrected as UniPC's are | 4   | 0.12 | 0.4 |

The last row that applies is taken. Images are data of 256 dimensions or more: much of them is settled while there is
still much noise, and few steps are better spent there.

The others were chosen for the geometric mean of the end-point errors on 48 Gaussian mixtures of 2 to 64 dimensions
(``python benchmarks/auto.py --rules``); but from 8 to 10 evaluations, where the corrector gains on that mean by
mixtures of one or few broad modes alone, for those of many narrow ones. What they come to on other mixtures, beside
everything else that could be chosen, is printed by ``python benchmarks/auto.py``. u is that of data of about unit
variance. Those for images were chosen among twenty on the model that ships with the package, on which they are measured
too (``python benchmarks/image_solvers.py``). The model is not probed first: of so few evaluations two more are worth
more than a better grid.

With a tolerance in place of a number it is the adaptive solver of ``ode``.

Sources: Zhang & Chen 2022 (arXiv:2204.13902) for DEIS; Zhao et al. 2023 (arXiv:2302.04867) for the corrector; Song et
al. 2021 (arXiv:2010.02502), appendix D.2, for the grid in √t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sde_diffusion.samplers.multistep import DEIS, UniPC
from sde_diffusion.samplers.ode import ODE
from sde_diffusion.samplers.solver import Solver
from sde_diffusion.sde import SDE

# |u| that stands for infinity, where all is noise or all data: the weaker is a thousandth of the stronger.
_FAR = math.log(1e3)
# Numbers in the smallest image.
_IMAGE = 256


# DEIS with UniPC's corrector.
CORRECTED_DEIS = partial(UniPC, form="velocity", lower_order_final=False)


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        fewest: evaluations from which it holds.
        solver: makes the solver.
        sharpness: d.
        power: p.
        centre: c.
        dimensions: of data that it holds for, at the least.
    """

    fewest: int
    solver: Callable[[], Solver]
    sharpness: float
    power: float
    centre: float
    dimensions: int = 1

    def times(self, sde: SDE, start: float, end: float, steps: int) -> list[float]:
        """Decreasing times, ``steps`` + 1 of them, from ``start`` to ``end`` exactly, equal in w between them."""
        ends = torch.tensor([sde.log_noise(start), sde.log_noise(end)], dtype=torch.float64)
        first, last = self._place(torch.nan_to_num(ends, posinf=_FAR, neginf=-_FAR)).tolist()
        place = torch.linspace(first, last, steps + 1, dtype=torch.float64)[1:-1]
        u = self.centre + torch.log(torch.expm1(place ** (1 / self.power))) / self.sharpness
        return [start, *sde.t_from_log_snr(-2 * u).tolist(), end]

    def _place(self, u: Tensor) -> Tensor:
        """The w of u."""
        return torch.nn.functional.softplus(self.sharpness * (u - self.centre), threshold=50) ** self.power


RULES = (
    Rule(1, partial(CORRECTED_DEIS, order=2), sharpness=3.0, power=0.16, centre=0.2),
    Rule(8, partial(DEIS, order=4), sharpness=2.4, power=0.21, centre=0.1),
    Rule(11, partial(CORRECTED_DEIS, order=3), sharpness=4.0, power=0.12, centre=0.4),
    Rule(1, partial(CORRECTED_DEIS, order=2), sharpness=3.0, power=0.25, centre=0.2, dimensions=_IMAGE),
    Rule(8, partial(CORRECTED_DEIS, order=2), sharpness=2.0, power=0.35, centre=0.5, dimensions=_IMAGE),
    Rule(14, partial(CORRECTED_DEIS, order=4), sharpness=4.0, power=0.12, centre=0.4),
)


def choose(
    sde: SDE,
    nfe: int | None = None,
    start: float | None = None,
    end: float | None = None,
    dimensions: int | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Solver:
    """The solver for a number of evaluations, with its ``times``; or without a number the adaptive one.

    Nothing in it is random, and it evaluates no model.

    Args:
        sde: the diffusion to be reversed.
        nfe: evaluations of the model, as many as there are steps; None to meet the tolerances instead.
        start: the first time; t_max by default.
        end: the last; t_min by default.
        dimensions: of the data; few by default.
        rtol: relative tolerance of the adaptive solver.
        atol: its absolute tolerance.

    Raises:
        ValueError: for an nfe below 1, times outside [0, T], or a start that is not after the end.
    """
    if nfe is None:
        return ODE(rtol=rtol, atol=atol)
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: must be at least 1")
    start = sde.t_max if start is None else sde.check_time("t_start", start)
    end = sde.t_min if end is None else sde.check_time("t_end", end)
    if not start > end:
        raise ValueError(f"t_start = {start}, t_end = {end}: t_start must be the larger")
    rule = [rule for rule in RULES if rule.fewest <= nfe and rule.dimensions <= (dimensions or 1)][-1]
    solver = rule.solver()
    solver.times = rule.times(sde, start, end, nfe)
    return solver
