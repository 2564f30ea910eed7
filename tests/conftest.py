"""What the tests share: the SDEs that every claim is held for, and the benchmark mixtures."""

import math

import pytest
import torch
from hypothesis import settings

from sde_diffusion import EDMSDE, SDE, VESDE, VPSDE, GaussianMixture, SubVPSDE

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


class UserSDE(SDE):
    """All that a user need write; its drift and g² diverge at t = 1, where alpha is 0."""

    def alpha(self, t):
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)


EVERY_SDE: dict[str, SDE] = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(), "edm": EDMSDE(), "user": UserSDE()}


@pytest.fixture(scope="session", params=list(EVERY_SDE.values()), ids=list(EVERY_SDE))
def any_sde(request):
    return request.param


@pytest.fixture(scope="session")
def user_sde():
    """An SDE that defines only alpha and sigma."""
    return EVERY_SDE["user"]


@pytest.fixture(scope="session", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def times():
    """times(sde, n, dtype): (2n,) over [t_min, t_max], equally spaced and, close to t_min, by factors."""

    def spread(sde, n=50, dtype=torch.float64):
        fraction = torch.cat(
            [torch.linspace(0, 1, n, dtype=torch.float64), torch.logspace(-8, -1, n, dtype=torch.float64)]
        )
        # Rounded towards the inside of the range.
        low, high = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
        low, high = low.to(dtype), high.to(dtype)
        return (low.double() + (high.double() - low.double()) * fraction).to(dtype)

    return spread


@pytest.fixture(scope="session")
def ring():
    """Eight narrow modes on a circle, 2-D, of unit variance a dimension."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = math.sqrt(2 * (1 - 0.1**2)) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(means, 0.1**2 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2))


@pytest.fixture(scope="session")
def rotated():
    """rotated(dimension): ten components of random axes, eigenvalues over a factor of 200, unit variance."""

    def build(dimension, components=10):
        generator = torch.Generator().manual_seed(dimension)

        def draw(function, *shape):
            return function(components, *shape, generator=generator, dtype=torch.float64)

        means = draw(torch.randn, dimension)
        means -= means.mean(0)
        axes = torch.linalg.qr(draw(torch.randn, dimension, dimension)).Q
        eigenvalues = 0.01 * 200 ** draw(torch.rand, dimension)
        variance = means.square().mean() + eigenvalues.mean()
        covariances = axes @ torch.diag_embed(eigenvalues / variance) @ axes.mT
        return GaussianMixture(means / variance.sqrt(), (covariances + covariances.mT) / 2)

    return build


@pytest.fixture(scope="session", params=[2, 16, 64], ids="{}d".format)
def mixture(request, ring, rotated):
    """The benchmark mixtures, float64."""
    return ring if request.param == 2 else rotated(request.param)
