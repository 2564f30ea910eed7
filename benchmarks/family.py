"""Mixtures that the rules of solver="auto" are drawn from, others that they are judged on, and the end points.

Every problem is the probability-flow ODE of the VP SDE from t = 1 to 1e-3, in float64, from starts of a fixed seed; the
error of a solver is its root mean square distance to the end point of the same ODE solved at 1e-10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from mixtures import ring
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.exact import ExactModel
from sde_diffusion.ode import ProbabilityFlow

T_START, T_END = 1.0, 1e-3
_START_SEED = 7


def mixture(
    dimension: int, modes: int, stiffness: float, between: float, uneven: bool = False, seed: int = 0
) -> sd.GaussianMixture:
    """Normal means, random rotations, and eigenvalues log-uniform over a factor; of unit variance a dimension.

    Args:
        dimension: of the data.
        modes: number of components.
        stiffness: largest possible eigenvalue of a covariance over the smallest.
        between: share of the variance that is the means', in (0, 1); 0 with one mode.
        uneven: weights in proportion to 1, 1/2, 1/3, ... rather than equal ones.
        seed: of means, rotations and eigenvalues.
    """
    generator = torch.Generator().manual_seed(1000 * dimension + seed)
    means = torch.randn(modes, dimension, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(modes, dimension, dimension, generator=generator, dtype=torch.float64)).Q
    eigenvalues = stiffness ** torch.rand(modes, dimension, generator=generator, dtype=torch.float64)
    ranks = torch.arange(1, modes + 1, dtype=torch.float64)
    weights = 1 / ranks if uneven else torch.ones_like(ranks)
    weights = weights / weights.sum()
    means -= weights @ means
    if modes > 1:
        means *= (between / (weights @ means.square()).mean()).sqrt()
    eigenvalues *= (1 - between) / (weights @ eigenvalues).mean()
    covariances = axes @ torch.diag_embed(eigenvalues) @ axes.mT
    return sd.GaussianMixture(means, (covariances + covariances.mT) / 2, weights)


def rotated_target() -> sd.GaussianMixture:
    """Ten components in 64-D: normal means, eigenvalues log-uniform in [0.01, 2], scaled to unit variance."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, 64, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(10, 64, 64, generator=generator, dtype=torch.float64)).Q
    low, high = math.log(0.01), math.log(2.0)
    eigenvalues = torch.exp(torch.rand(10, 64, generator=generator, dtype=torch.float64) * (high - low) + low)
    means -= means.mean(0)
    variance = means.square().mean() + eigenvalues.mean()
    covariances = axes @ torch.diag_embed(eigenvalues / variance) @ axes.mT
    return sd.GaussianMixture(means / variance.sqrt(), (covariances + covariances.mT) / 2)


# dimension, modes, stiffness, share of the variance between modes, uneven weights
TRAINING: dict[str, tuple[int, int, float, float, bool]] = {
    "2-D, 3 modes": (2, 3, 1.0, 0.9, False),
    "2-D, 12 modes, uneven": (2, 12, 10.0, 0.97, True),
    "3-D, 6 narrow modes": (3, 6, 3.0, 0.995, False),
    "4-D, 5 modes, stiff": (4, 5, 100.0, 0.7, True),
    "8-D, 1 mode, stiff": (8, 1, 1000.0, 0.0, False),
    "8-D, 20 modes": (8, 20, 30.0, 0.9, False),
    "16-D, 4 modes": (16, 4, 10.0, 0.5, True),
    "16-D, 30 modes, stiff": (16, 30, 300.0, 0.8, False),
    "32-D, 8 modes, stiff": (32, 8, 1000.0, 0.6, True),
    "48-D, 15 modes, stiff": (48, 15, 150.0, 0.75, False),
    "2-D, 7 narrow modes": (2, 7, 1.0, 0.99, False),
    "5-D, 10 modes, uneven": (5, 10, 20.0, 0.95, True),
    "6-D, 3 modes, stiff": (6, 3, 300.0, 0.8, False),
    "10-D, 2 modes, stiff": (10, 2, 100.0, 0.3, True),
    "24-D, 12 modes": (24, 12, 5.0, 0.9, False),
    "64-D, 6 modes, stiff": (64, 6, 300.0, 0.7, True),
}
HELD_OUT: dict[str, tuple[int, int, float, float, bool]] = {
    "2-D, 5 modes, uneven": (2, 5, 5.0, 0.98, True),
    "3-D, 15 modes": (3, 15, 20.0, 0.85, False),
    "6-D, 4 modes, stiff": (6, 4, 500.0, 0.6, False),
    "12-D, 10 modes": (12, 10, 50.0, 0.9, True),
    "24-D, 3 modes, stiff": (24, 3, 200.0, 0.4, False),
    "40-D, 20 modes, stiff": (40, 20, 100.0, 0.8, True),
}


@dataclass(frozen=True)
class Case:
    """A model, where its ODE starts, and where it ends.

    Attributes:
        name: of the mixture.
        model: the mixture under the VP SDE.
        start: x at t = 1, (samples, dimension).
        end: the solution at t = 1e-3, of that shape.
    """

    name: str
    model: ExactModel
    start: Tensor
    end: Tensor

    def first(self, samples: int) -> Case:
        """The same from its first starts alone."""
        return replace(self, start=self.start[:samples], end=self.end[:samples])

    def error(self, x: Tensor) -> float:
        """Root mean square distance of x from the end point."""
        return float((x - self.end).square().mean().sqrt())


def case(name: str, distribution: sd.GaussianMixture, samples: int) -> Case:
    """Solve a mixture's ODE from ``samples`` starts."""
    model = distribution.under(sd.VPSDE())
    generator = torch.Generator().manual_seed(_START_SEED)
    start = torch.randn(samples, *model.data_shape, generator=generator, dtype=torch.float64)
    flow = ProbabilityFlow(model.sde, model.predict)
    return Case(name, model, start, flow.solve(start, [T_START, T_END], method="dopri8", rtol=1e-10, atol=1e-10))


@cache
def training(samples: int = 64) -> list[Case]:
    """The mixtures that rules are drawn from, three of each shape."""
    return [
        case(f"{name} ({seed})", mixture(*shape, seed=seed), samples)
        for seed in (0, 2, 3)
        for name, shape in TRAINING.items()
    ]


@cache
def held_out(samples: int = 128) -> list[Case]:
    """The mixtures that rules are judged on, besides the targets."""
    return [case(name, mixture(*shape, seed=1), samples) for name, shape in HELD_OUT.items()]


@cache
def targets(samples_2d: int = 4096, samples_64d: int = 512) -> list[Case]:
    """Eight modes of standard deviation 0.1 on a circle, and ten rotated components in 64-D."""
    return [case("2-D target", ring(), samples_2d), case("64-D target", rotated_target(), samples_64d)]


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm; infinite if a value is."""
    return math.exp(sum(math.log(value) for value in values) / len(values))
