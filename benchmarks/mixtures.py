"""The two mixtures that the benchmarks and the tests measure on, in float64, of unit variance a dimension."""

import math

import torch

from sde_diffusion import GaussianMixture


def ring(modes: int = 8, std: float = 0.1) -> GaussianMixture:
    """2-D: narrow modes on a circle."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = math.sqrt(2 * (1 - std**2)) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(means, std**2 * torch.eye(2, dtype=torch.float64).expand(modes, 2, 2))


def rotated(dimension: int, components: int = 10) -> GaussianMixture:
    """Normal means, random rotations, and eigenvalues log-uniform over a factor of 200."""
    generator = torch.Generator().manual_seed(dimension)
    means = torch.randn(components, dimension, generator=generator, dtype=torch.float64)
    means -= means.mean(0)
    gaussian = torch.randn(components, dimension, dimension, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(gaussian).Q
    eigenvalues = 0.01 * 200 ** torch.rand(components, dimension, generator=generator, dtype=torch.float64)
    variance = means.square().mean() + eigenvalues.mean()
    covariances = axes @ torch.diag_embed(eigenvalues / variance) @ axes.mT
    return GaussianMixture(means / variance.sqrt(), (covariances + covariances.mT) / 2)
