r"""Distances between the distributions of samples and of data, from n samples x and m reference points y.

The Fréchet distance is the squared 2-Wasserstein distance of the Gaussians fitted to features of both,

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^{1/2} Σ₂ Σ₁^{1/2})^{1/2}

With Σ = A Aᵀ, A = V λ^{1/2} from the eigenvectors, the last trace is the sum of the singular values of A₁ᵀ A₂: no
square root of a product that is not symmetric, and singular covariances are as good as others.

It is a number of one feature space and of n: estimated moments make it too large by about C/n. The bootstrap repeats
that step, from the samples to samples of the samples, and so estimates bias and spread; with d²* that of a resample,

    bias = E d²* − d²,    interval = [2 d² − q*(1 − a), 2 d² − q*(a)],    q* quantiles of d²*, a = (1 − confidence)/2

which is an interval for what d² tends to as n grows, and may lie below d² itself. The reference is held fixed.

The kernel and the energy distance have unbiased estimates, whatever n, which can be negative:

    D = E k(x, x') + E k(y, y') − 2 E k(x, y)        k = (xᵀy/d + 1)³: kernel;  k = −|x − y|: energy

Both sets are cut into B blocks, whose estimates are independent, so that their spread is the mean's standard error.

Sources: Fréchet distance, Dowson & Landau 1982 (J. Multivariate Analysis 12), Heusel et al. 2017 (arXiv:1706.08500),
its bias, Chong & Forsyth 2020 (arXiv:1911.07023); singular values, Bhatia et al. 2019 (arXiv:1712.01504); bootstrap,
Davison & Hinkley 1997, section 5.2; kernel distance, Bińkowski et al. 2018 (arXiv:1801.01401); energy distance, Székely
& Rizzo 2013 (J. Statistical Planning and Inference 143); both as one, Sejdinovic et al. 2013 (arXiv:1207.6076); merged
moments, Chan et al. 1983 (The American Statistician 37).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sde_diffusion.evaluation.features import extract_features
from sde_diffusion.model import check_finite

Features = Callable[[Tensor], Tensor]
# Rows of a kernel matrix held at a time: 32 MB for blocks of 4,000 points.
_ROWS = 1000


@dataclass(frozen=True)
class FrechetDistance:
    """What ``frechet_distance`` returns.

    Attributes:
        distance: d², as estimated from this number of samples; too large by about a constant over their number.
        corrected: the same less the bootstrap's estimate of that bias; can be negative.
        interval: (lower, upper) for the value in the limit of many samples; does not always hold ``distance``.
        confidence: of the interval.
        samples, reference: how many there were of each.
        features: the name of the feature space.
    """

    distance: float
    corrected: float
    interval: tuple[float, float]
    confidence: float
    samples: int
    reference: int
    features: str

    def __str__(self) -> str:
        """All of it on one line."""
        lower, upper = self.interval
        return (
            f"Fréchet distance in the feature space of {self.features}: {self.distance:.4g} "
            f"from {self.samples} samples and {self.reference} of the reference; "
            f"without its bias {self.corrected:.4g}, {100 * self.confidence:g} % interval [{lower:.4g}, {upper:.4g}]"
        )


@dataclass(frozen=True)
class UnbiasedDistance:
    """What ``kernel_distance`` and ``energy_distance`` return.

    Attributes:
        distance: an unbiased estimate, which can be negative.
        std_error: its standard error, over samples and reference.
        samples, reference: how many there were of each.
        features: the name of the feature space.
    """

    distance: float
    std_error: float
    samples: int
    reference: int
    features: str


class Moments:
    """Mean and covariance of vectors that come in batches, or from several ranks.

    Attributes:
        count: how many vectors so far.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of (x − mean)(x − mean)ᵀ.
    """

    def __init__(self, dimension: int, device: torch.device | str | None = None) -> None:
        """Moments of nothing yet."""
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, vectors: Tensor) -> Self:
        """Moments of vectors (N, D), N >= 1; errors as for ``update``."""
        _check_vectors("vectors", vectors)
        moments = cls(vectors.shape[1], vectors.device)
        vectors = vectors.double()
        moments.count, moments.mean = len(vectors), vectors.mean(dim=0)
        centred = vectors - moments.mean
        moments.scatter = centred.mT @ centred
        return moments

    @property
    def covariance(self) -> Tensor:
        """(D, D), the unbiased estimate; ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, vectors: Tensor) -> Self:
        """Add vectors (N, D), N >= 1, and return itself.

        Raises:
            ValueError: for another shape, or values that are not finite.
        """
        return self.merge(type(self).of(vectors))

    def merge(self, other: Moments) -> Self:
        """Add what another one has seen, such as a rank's, and return itself.

        Raises:
            ValueError: if it is of another dimension.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(other.mean)} dimensions do not merge into those of {len(self.mean)}")
        if other.count:
            fraction = other.count / (self.count + other.count)
            step = other.mean - self.mean
            self.mean = self.mean + fraction * step
            self.scatter = self.scatter + other.scatter + (self.count * fraction) * torch.outer(step, step)
            self.count += other.count
        return self


def gaussian_frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Fréchet distance d² of two Gaussians, a scalar float64 tensor.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric and positive semi-definite, possibly singular.

    Raises:
        ValueError: for shapes that do not fit, or values that are not finite.
    """
    dimension = mean1.shape[-1] if mean1.ndim else 0
    for name, value, shape in (
        ("mean1", mean1, (dimension,)),
        ("covariance1", covariance1, (dimension, dimension)),
        ("mean2", mean2, (dimension,)),
        ("covariance2", covariance2, (dimension, dimension)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for a mean1 of {dimension}; got {tuple(value.shape)}")
        check_finite(name, value[None])
    return _frechet(mean1.double(), _root(covariance1.double()), mean2.double(), _root(covariance2.double()))


@torch.no_grad()
def frechet_distance(
    samples: Tensor,
    reference: Tensor | Moments,
    features: Features | None = None,
    *,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> FrechetDistance:
    """Fréchet distance of samples to a reference, with a bootstrap interval.

    Compare numbers of one feature space, one reference and one number of samples only.

    Args:
        samples: (N, *data_shape); 2,000 and more for 64 features.
        reference: (M, *data_shape), such as the training images; or the moments of their features.
        features: from (B, *data_shape) to (B, D), such as ``load_features()``; the vectors themselves by default.
        bootstrap: number of resamples of the samples, at least 20.
        confidence: of the interval.
        seed: of the resampling.

    Raises:
        ValueError: for fewer than D + 1 samples or reference points in D dimensions, values that are not finite,
            shapes that do not fit, or numbers out of range.
    """
    if bootstrap < 20:
        raise ValueError(f"bootstrap = {bootstrap}: must be at least 20")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: must be between 0 and 1")
    vectors = _vectors("samples", samples, features)
    known = reference if isinstance(reference, Moments) else Moments.of(_vectors("reference", reference, features))
    dimension = vectors.shape[1]
    if len(known.mean) != dimension:
        raise ValueError(f"samples have {dimension} features, the reference {len(known.mean)}")
    for name, count in (("samples", len(vectors)), ("reference", known.count)):
        if count <= dimension:
            raise ValueError(f"{name} must be at least {dimension + 1} for {dimension} features, got {count}")
    root = _root(known.covariance)

    def distance_of(chosen: Tensor) -> Tensor:
        moments = Moments.of(chosen)
        return _frechet(moments.mean, _root(moments.covariance), known.mean, root)

    generator = torch.Generator().manual_seed(seed)
    indices = (torch.randint(len(vectors), (len(vectors),), generator=generator) for _ in range(bootstrap))
    resampled = torch.stack([distance_of(vectors[chosen.to(vectors.device)]) for chosen in indices])
    distance = distance_of(vectors)
    tails = torch.tensor([(1 + confidence) / 2, (1 - confidence) / 2], dtype=torch.float64, device=vectors.device)
    lower, upper = (2 * distance - resampled.quantile(tails)).tolist()
    return FrechetDistance(
        distance=float(distance),
        corrected=float(2 * distance - resampled.mean()),
        interval=(lower, upper),
        confidence=confidence,
        samples=len(vectors),
        reference=known.count,
        features=_name(features),
    )


def kernel_distance(
    samples: Tensor, reference: Tensor, features: Features | None = None, *, blocks: int = 10, seed: int = 0
) -> UnbiasedDistance:
    """Squared maximum mean discrepancy with the kernel (xᵀy/D + 1)³: zero if the first three moments agree.

    Args:
        samples: (N, *data_shape).
        reference: (M, *data_shape).
        features: from (B, *data_shape) to (B, D), such as ``load_features()``; the vectors themselves by default.
        blocks: independent estimates to average, at least 2; fewer are more accurate, more tell the error better.
        seed: of the division into blocks.

    Raises:
        ValueError: for fewer than 2 samples or reference points a block, values that are not finite, or shapes that
            do not fit.
    """
    return _in_blocks(lambda x, y: (x @ y.mT / x.shape[-1] + 1) ** 3, samples, reference, features, blocks, seed)


def energy_distance(
    samples: Tensor, reference: Tensor, features: Features | None = None, *, blocks: int = 10, seed: int = 0
) -> UnbiasedDistance:
    """2 E|x − y| − E|x − x'| − E|y − y'|, zero only for equal distributions: for points in the plane, without features.

    Arguments and errors as for ``kernel_distance``.
    """

    def negative_distance(x: Tensor, y: Tensor) -> Tensor:
        # By differences: |x|² + |y|² − 2 xᵀy would leave √eps |x| between a point and itself.
        return -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    return _in_blocks(negative_distance, samples, reference, features, blocks, seed)


def _root(covariance: Tensor) -> Tensor:
    """(D, D) A with A Aᵀ = covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _frechet(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> Tensor:
    traces = root1.square().sum() + root2.square().sum()
    distance = (mean1 - mean2).square().sum() + traces - 2 * torch.linalg.svdvals(root1.mT @ root2).sum()
    return distance.clamp(min=0)


@torch.no_grad()
def _in_blocks(
    kernel: Callable[[Tensor, Tensor], Tensor],
    samples: Tensor,
    reference: Tensor,
    features: Features | None,
    blocks: int,
    seed: int,
) -> UnbiasedDistance:
    x, y = _vectors("samples", samples, features), _vectors("reference", reference, features)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples have {x.shape[1]} features, the reference {y.shape[1]}")
    if blocks < 2 or min(len(x), len(y)) < 2 * blocks:
        raise ValueError(
            f"blocks = {blocks}: must be at least 2, with 2 points of each in a block; "
            f"got {len(x)} samples and {len(y)} of the reference"
        )
    generator = torch.Generator().manual_seed(seed)
    x, y = (z[torch.randperm(len(z), generator=generator).to(z.device)] for z in (x, y))
    parts = zip(x.tensor_split(blocks), y.tensor_split(blocks), strict=True)
    estimates = torch.stack([_discrepancy(kernel, *part) for part in parts])
    return UnbiasedDistance(
        distance=float(estimates.mean()),
        std_error=float(estimates.std() / blocks**0.5),
        samples=len(x),
        reference=len(y),
        features=_name(features),
    )


def _discrepancy(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """E k(x, x') + E k(y, y') − 2 E k(x, y) over pairs of different points."""

    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([kernel(rows, b).sum() for rows in a.split(_ROWS)]).sum()

    def within(a: Tensor) -> Tensor:
        itself = kernel(a[:, None], a[:, None]).sum()
        return (total(a, a) - itself) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


def _vectors(name: str, values: Tensor, features: Features | None) -> Tensor:
    """The features (N, D) of values, float64; errors name the argument."""
    if features is not None and len(values):
        values = extract_features(values, features)
    _check_vectors(name, values)
    return values.double()


def _check_vectors(name: str, vectors: Tensor) -> None:
    if vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point():
        raise ValueError(
            f"{name} must be float vectors (N, D), not empty, or images with a feature network; "
            f"got {vectors.dtype}, shape {tuple(vectors.shape)}"
        )
    check_finite(name, vectors)


def _name(features: Features | None) -> str:
    if features is None:
        return "the vectors as given"
    return str(getattr(features, "name", getattr(features, "__name__", type(features).__name__)))
