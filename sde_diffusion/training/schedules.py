"""Learning-rate schedules: the share of ``optim.lr`` of a step, as a function of how many were taken, and of all.

    constant        1
    linear          1 − step/steps                              falls to 0 after the last step
    cosine          ½ (1 + cos(π step/steps))                   Loshchilov & Hutter 2017, arXiv:1608.03983
    inverse_sqrt    1/√max(1, step/reference)                   Karras et al. 2024, arXiv:2312.02696, appendix B
    trapezoid       1, and over the last ``cooldown`` of the steps a straight fall to 0; Hägele et al. 2024,
                    arXiv:2405.18392

Before the schedule comes a linear rise over ``optim.warmup`` steps. A schedule is a class that is called with two
numbers and one line in ``SCHEDULES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Constant:
    """1."""

    def __call__(self, step: int, steps: int) -> float:
        """The share of the learning rate at a step."""
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Falls to 0 in a straight line."""

    def __call__(self, step: int, steps: int) -> float:
        """The share of the learning rate at a step."""
        return 1 - step / steps


@dataclass(frozen=True)
class Cosine:
    """Falls to 0 along half a wave."""

    def __call__(self, step: int, steps: int) -> float:
        """The share of the learning rate at a step."""
        return 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class InverseSqrt:
    """Falls as 1/√step from the step ``reference`` on, whatever the number of steps."""

    reference: int = 10_000

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: unless reference is positive.
        """
        if self.reference <= 0:
            raise ValueError(f"reference = {self.reference}: must be positive")

    def __call__(self, step: int, steps: int) -> float:
        """The share of the learning rate at a step."""
        return max(1.0, step / self.reference) ** -0.5


@dataclass(frozen=True)
class Trapezoid:
    """Constant, and at the end a straight fall to 0 over a share ``cooldown`` of the steps."""

    cooldown: float = 0.2

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: unless 0 < cooldown <= 1.
        """
        if not 0 < self.cooldown <= 1:
            raise ValueError(f"cooldown = {self.cooldown}: must be above 0 and at most 1")

    def __call__(self, step: int, steps: int) -> float:
        """The share of the learning rate at a step."""
        return min(1.0, (steps - step) / (self.cooldown * steps))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "inverse_sqrt": InverseSqrt,
    "trapezoid": Trapezoid,
}
