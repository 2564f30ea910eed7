"""What the tests of the samplers share: targets with known moments, and models that watch their calls."""

import math
from types import SimpleNamespace

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.solver import Predict, Problem
from sde_diffusion.sde import expand_to

# What solvers see of these they see of the others too, but a look-up costs more.
_SLOW = (sd.RateSDE, sd.LogSNRSDE)
_MANY_STEPS = ("adaptive_sde", "euler")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave to the slow tests, here alone: SDEs from functions; images and long runs of all SDEs but one."""
    for item in items:
        if item.path.parent.name != "samplers" or not hasattr(item, "callspec"):
            continue
        sde, shape, solver = (item.callspec.params.get(name) for name in ("any_sde", "shape", "solver"))
        is_image = isinstance(shape, tuple) and len(shape) > 1
        is_other = sde is not None and not isinstance(sde, sd.VPSDE)
        if isinstance(sde, _SLOW) or (is_other and (is_image or solver in _MANY_STEPS)):
            item.add_marker(pytest.mark.slow)


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
            alpha, sigma = expand_to(self.sde.alpha(t), x), expand_to(self.sde.sigma(t), x)
            whitened = x / (alpha * alpha * self.variance + sigma * sigma)
            return sd.Prediction(alpha * self.variance * whitened, sigma * whitened)

    return Pointwise


@pytest.fixture(scope="session")
def asked():
    """asked(function): a function (x, t) -> (x̂₀, ε̂) as a step asks a model."""

    class Asked:
        def __init__(self, function):
            self.function = function

        def __call__(self, x, t):
            return self.function(x, t)

        def combine(self, x, t, data, noise):
            x0, eps = self.function(x, t)
            return data * x0 + noise * eps

    return Asked


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


class _OneDrawEach:
    """Streams of which number j > 0 holds 1 at the j-th draw and 0 at all others, and number 0 only 0."""

    def __init__(self, n):
        self.draws = torch.eye(n, dtype=torch.float64)

    def normal(self, shape, dtype):
        calls, *rest = shape
        # StepNoise draws more than it hands out.
        drawn, self.draws = self.draws[:, 1 : calls + 1], self.draws[:, calls:]
        drawn = torch.nn.functional.pad(drawn, (0, calls - drawn.shape[1]))
        return drawn.reshape(*drawn.shape, *[1] * len(rest)).expand(-1, -1, *rest).to(dtype)


@pytest.fixture(scope="session")
def variance_error(pointwise):
    """variance_error(sde, solver, times): of a solver that is affine for N(0, ½), from p at times[0], relative.

    x is then linear in the start and in every draw of noise: each is followed alone, and their squares add up.
    """

    def error(sde, solver, times, variance=0.5):
        model = pointwise(sde, variance)
        exact = sde.alpha(times).square() * variance + sde.sigma(times).square()
        # At most as many draws a step as evaluations, and one at least.
        n = 1 + (len(times) - 1) * solver.evaluations_per_step()
        x = torch.zeros(n, 1, dtype=torch.float64)
        x[0] = exact[0].sqrt()
        problem = Problem(sde, Predict(model), times.tolist(), _OneDrawEach(n))
        return float(solver.solve(problem, x).square().sum() / exact[-1]) - 1

    return error
