"""Four distributions in the plane, each a few lines, scaled to E |x|² = 2: about unit variance a dimension.

They are the standard toy targets of the literature: spiral (Nakkiran et al., "Step-by-step diffusion", 2024),
eight Gaussians, checkerboard and moons (Grathwohl et al., "FFJORD", 2019).
"""

import math

import torch

from sde_diffusion.data.datasets import ArrayDataset, check_split
from sde_diffusion.data.info import DataInfo


def spiral(n: int, seed: int) -> torch.Tensor:
    """A spiral of one and a half turns: r = 2 sqrt(u), angle 3 pi sqrt(u), u ~ U[0, 1), blurred by 0.05.

    E r² = 4 E u = 2, one a dimension. Returns (n, 2) float32.
    """
    generator = _generator(n, seed)
    root = torch.rand(n, generator=generator).sqrt()
    curve = 2 * root[:, None] * _on_circle(3 * math.pi * root)
    return curve + 0.05 * torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, seed: int) -> torch.Tensor:
    """Eight equal Gaussians of standard deviation 0.1, their means on a circle of radius sqrt(2 (1 - 0.1²)).

    Half the squared radius and the within-mode variance add to 1. Returns (n, 2) float32.
    """
    generator = _generator(n, seed)
    std = 0.1
    mode = torch.randint(8, (n,), generator=generator)
    means = math.sqrt(2 * (1 - std**2)) * _on_circle(mode * (2 * math.pi / 8))
    return means + std * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, seed: int) -> torch.Tensor:
    """Uniform on the eight dark squares of a 4 x 4 board of side sqrt(12), centred on 0.

    Both marginals are uniform on the side, of variance 12 / 12. Returns (n, 2) float32.
    """
    generator = _generator(n, seed)
    x = 4 * torch.rand(n, generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + x.floor() % 2
    y = row + torch.rand(n, generator=generator)
    return (torch.stack([x, y], dim=1) - 2) * (math.sqrt(12) / 4)


def moons(n: int, seed: int) -> torch.Tensor:
    """Two half circles, ±sqrt(2) (cos a - 1/2, sin a - 1/4) with a ~ U[0, pi), blurred by 0.05.

    The variances of the scaled arcs, 3/2 and 9/8 - 2/pi, add to 2 within 1 %. Returns (n, 2) float32.
    """
    generator = _generator(n, seed)
    arc = _on_circle(math.pi * torch.rand(n, generator=generator)) - torch.tensor([0.5, 0.25])
    side = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    return math.sqrt(2) * side * arc + 0.05 * torch.randn(n, 2, generator=generator)


TOYS = {toy.__name__: toy for toy in (spiral, eight_gaussians, checkerboard, moons)}
_SEEDS = {"train": 0, "test": 1}


def toy(name: str, split: str = "train", size: int = 10_000) -> ArrayDataset:
    """A fixed sample of one of the distributions as a data set, another for training than for testing.

    Args:
        name: "spiral", "eight_gaussians", "checkerboard" or "moons".
        split: "train" or "test".
        size: The number of points.

    Raises:
        ValueError: for an unknown name or split, or a size below 1.
    """
    if name not in TOYS:
        raise ValueError(f"name must be one of {', '.join(TOYS)}; got {name!r}")
    check_split(split)
    return ArrayDataset(TOYS[name](size, _SEEDS[split]), data=DataInfo(bits=None), name=name)


def _generator(n: int, seed: int) -> torch.Generator:
    if n < 1:
        raise ValueError(f"the number of points must be at least 1, got {n}")
    return torch.Generator().manual_seed(seed)


def _on_circle(angle: torch.Tensor) -> torch.Tensor:
    """(n,) angles to (n, 2) points of the unit circle."""
    return torch.stack([angle.cos(), angle.sin()], dim=1)
