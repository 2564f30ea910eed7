"""What the tests of the samplers share: targets with known moments, and models that watch their calls."""

import math
from types import SimpleNamespace

import pytest
import torch

import sde_diffusion as sd


@pytest.fixture(scope="session")
def two_modes():
    """two_modes(shape, dtype): a mixture of mean 0, with its covariance (D, D) in float64.

    The modes are unequally likely and correlated. Their mean is 0 so that a prior of mean 0 is close to p_T.
    """

    def build(shape=(2,), dtype=torch.float32):
        size = math.prod(shape)
        centre = torch.tensor([1.2, -0.9, 0.6, -1.0], dtype=torch.float64)[:size]
        means, weights = torch.stack([centre, -centre * 2 / 3]), torch.tensor([0.4, 0.6], dtype=torch.float64)
        spread = torch.diag(torch.tensor([0.2, 0.12, 0.16, 0.24], dtype=torch.float64)[:size]) + 0.06
        covariances = torch.stack([spread, 0.7 * spread])
        distribution = sd.GaussianMixture(means.reshape(2, *shape).to(dtype), covariances.to(dtype), weights.to(dtype))
        within = torch.einsum("k,kij->ij", weights, covariances)
        between = torch.einsum("k,ki,kj->ij", weights, means, means)
        return SimpleNamespace(distribution=distribution, covariance=within + between)

    return build


@pytest.fixture(scope="session")
def moments():
    """moments(samples): mean and covariance entries of (n, ...) in one vector, and their standard errors."""

    def estimate(samples):
        x = samples.flatten(1).double()
        centred = x - x.mean(0)
        row, column = torch.triu_indices(x.shape[1], x.shape[1])
        terms = torch.cat([x, centred[:, row] * centred[:, column]], dim=1)
        return terms.mean(0), terms.std(0) / math.sqrt(len(x))

    return estimate


@pytest.fixture(scope="session")
def deviations(moments):
    """deviations(samples, covariance): of the moments from mean 0 and that covariance, in standard errors."""

    def score(samples, covariance):
        row, column = torch.triu_indices(*covariance.shape)
        exact = torch.cat([torch.zeros(len(covariance), dtype=torch.float64), covariance[row, column]])
        estimate, error = moments(samples)
        return (estimate - exact) / error

    return score


@pytest.fixture(scope="session")
def pointwise():
    """pointwise(sde, variance): N(0, variance I), elementwise, so that no row affects another's rounding."""

    class Pointwise(sd.Model):
        def __init__(self, sde, variance=0.5):
            self.sde, self.variance, self.data_shape = sde, variance, (3,)

        def predict(self, x, t):
            alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
            whitened = x / (alpha * alpha * self.variance + sigma * sigma)
            return sd.Prediction(alpha * self.variance * whitened, sigma * whitened)

    return Pointwise


@pytest.fixture
def counting():
    """counting(model): the same model, with ``calls`` and the number of ``rows`` in them."""

    class Counting(sd.Model):
        def __init__(self, model):
            self.model, self.sde, self.data_shape, self.calls, self.rows = (
                model,
                model.sde,
                model.data_shape,
                0,
                0,
            )

        def predict(self, x, t, **cond):
            self.calls += 1
            self.rows += len(x)
            return self.model.predict(x, t, **cond)

    return Counting
