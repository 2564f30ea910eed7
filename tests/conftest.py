"""What the tests share: the SDEs that every claim is held for, and the benchmark mixtures."""

import math

import mixtures
import pytest
import torch
from hypothesis import settings

from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    BetaSDE,
    ConstantVESDE,
    CosineVPSDE,
    FlowSDE,
    LogSNRSDE,
    RateSDE,
    SubVPSDE,
)

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


class UserSDE(SDE):
    """All that a user need write; its drift and g² diverge at t = 1, where alpha is 0."""

    def alpha(self, t):
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)


EVERY_SDE: dict[str, SDE] = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDMSDE(),
    "cosine": CosineVPSDE(),
    "constant_ve": ConstantVESDE(),
    "flow": FlowSDE(),
    "beta": BetaSDE(lambda t: 0.1 + 30 * t.square()),
    # No closed form; the noise ends at 600 times the data.
    "rate": RateSDE(lambda t: -1.6 * (1 + t), lambda t: torch.sqrt(2 + 3 * t), T=2.0),
    "log_snr": LogSNRSDE(lambda t: 13 - 23 * t),
    "user": UserSDE(),
}


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
    return mixtures.ring()


@pytest.fixture(scope="session")
def rotated():
    """rotated(dimension): ten components of random rotation, eigenvalues over a factor of 200, unit variance."""
    return mixtures.rotated


@pytest.fixture(scope="session", params=[2, 16, 64], ids="{}d".format)
def mixture(request, ring, rotated):
    """The benchmark mixtures, float64."""
    return ring if request.param == 2 else rotated(request.param)
