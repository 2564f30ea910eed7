"""torchsde on the reverse SDE: every method, its law, and its independence of the batch."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.brownian import METHODS, TorchSDE
from sde_diffusion.samplers.solver import Predict, Problem
from sde_diffusion.sde import expand_to


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_moments_of_p(method, two_modes, deviations):
    target = two_modes()
    model = target.distribution.under(sd.VPSDE())
    out = sd.sample(model, 5000, solver="torchsde", method=method, steps=200, t_end=0.3)
    t = torch.tensor(0.3, dtype=torch.float64)
    covariance = sd.VPSDE().alpha(t) ** 2 * target.covariance + sd.VPSDE().sigma(t) ** 2 * torch.eye(2)
    assert float(deviations(out.samples, covariance).abs().max()) < 4


def test_adaptive_steps_follow_the_path_of_small_steps(two_modes):
    """The tighter the tolerance, the nearer to the limit on the same Brownian path."""
    model = two_modes(dtype=torch.float64).distribution.under(sd.VPSDE())
    options = {"solver": "torchsde", "adaptive": True, "steps": 10, "t_end": 0.1}

    def solve(tolerance):
        return sd.sample(model, 2, rtol=tolerance, atol=tolerance, dtype=torch.float64, **options).samples

    loose, tight, limit = solve(3e-1), solve(1e-2), solve(1e-3)
    assert float((tight - limit).abs().max()) < float((loose - limit).abs().max())


def test_adaptive_samples_do_not_depend_on_their_batch(two_modes):
    model = two_modes(dtype=torch.float64).distribution.under(sd.VPSDE())
    options = {"solver": "torchsde", "adaptive": True, "steps": 10, "rtol": 0.05, "atol": 0.05, "dtype": torch.float64}
    together = sd.sample(model, 3, **options).samples
    torch.testing.assert_close(sd.sample(model, 3, batch_size=2, **options).samples, together, rtol=0, atol=1e-10)


# One Brownian path for all numbers of steps.


class TwoModes(sd.Model):
    """Modes at ±1 of variance 0.3 in every dimension by itself, whose drift is smooth and not linear."""

    def __init__(self):
        self.sde, self.data_shape = sd.VPSDE(), (256,)

    def predict(self, x, t):
        alpha, sigma = (expand_to(value, x) for value in (self.sde.alpha(t), self.sde.sigma(t)))
        variance = 0.3 * alpha.square() + sigma.square()
        mean = torch.tanh(alpha * x / variance)
        whitened = (x - alpha * mean) / variance
        return sd.Prediction(mean + 0.3 * alpha * whitened, sigma * whitened)


def along_a_path(steps, n=2, **options):
    model = TwoModes()
    start, end = model.sde.t_from_log_snr(torch.tensor([-4.0, 2.0], dtype=torch.float64)).tolist()
    options = {"t_start": start, "t_end": end, "dtype": torch.float64, "reproducible_path": True} | options
    x = torch.randn(n, *model.data_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sd.sample(model, n, solver="torchsde", x_start=x, steps=steps, **options).samples


@pytest.mark.parametrize(("method", "order"), [("euler", 1.0), ("midpoint", 1.0), ("srk", 1.5)])
def test_halving_the_steps_along_a_path_shows_the_strong_order(method, order):
    ends = [along_a_path(steps, method=method) for steps in (32, 64, 128, 256)]
    moves = [float((coarse - fine).square().mean().sqrt()) for coarse, fine in pairwise(ends)]
    # 512 terms of a sum of squares: their roots are known to 3 %, and the slope between them to 0.03.
    assert math.log2(moves[0] / moves[2]) / 2 == pytest.approx(order, abs=0.2)


def test_paths_are_one_whatever_the_steps_but_not_by_default():
    """Steps that are not halves of one another, too: each is a fiftieth of the state from it, or a whole state."""
    fine, other = along_a_path(64, method="srk", n=1), along_a_path(25, method="srk", n=1)
    assert float((fine - other).square().mean().sqrt()) < 0.02
    assert torch.equal(along_a_path(25, method="srk", n=1), other)
    unlike = along_a_path(64, method="srk", n=1, reproducible_path=False)
    assert float((fine - unlike).square().mean().sqrt()) > 0.5


def test_an_adaptive_run_is_on_the_same_path():
    options = {"method": "srk", "n": 1}
    adaptive = along_a_path(8, adaptive=True, rtol=0.02, atol=0.02, **options)
    assert float((adaptive - along_a_path(64, **options)).square().mean().sqrt()) < 0.02


def test_a_path_does_not_depend_on_the_batch(pointwise):
    options = {"solver": "torchsde", "steps": 8, "reproducible_path": True, "dtype": torch.float64}
    whole = sd.sample(pointwise(sd.VPSDE()), 5, **options).samples
    assert torch.equal(sd.sample(pointwise(sd.VPSDE()), 5, batch_size=2, **options).samples, whole)
    assert len(whole.unique(dim=0)) == 5
    other = sd.sample(pointwise(sd.VPSDE()), 5, seed=1, **options).samples
    assert not (other == whole).any()


def test_paths_have_the_law_of_p(deviations):
    """A thousandth of whose variance is missing from the start, and half a hundredth added by the steps."""
    samples = along_a_path(32, n=16, method="heun")
    # Where the log-SNR is 2.
    exact = 1.3 * torch.sigmoid(torch.tensor([[2.0]], dtype=torch.float64)) + 1 / (1 + math.exp(2))
    assert float(deviations(samples.reshape(-1, 1), exact).abs().max()) < 4


# Its order in law.


class _Nodes:
    """Streams of the nodes of Gauss-Hermite quadrature in place of two draws, and one of zeros."""

    def __init__(self):
        nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(8))
        self.draws = torch.cat([torch.cartesian_prod(nodes, nodes), torch.zeros(1, 2, dtype=torch.float64)])
        self.weights = torch.outer(weights, weights).flatten() / weights.sum() ** 2

    def normal(self, shape, dtype):
        drawn = torch.nn.functional.pad(self.draws, (0, shape[0] - 2))
        return drawn[:, :, None].expand(-1, -1, shape[1]).to(dtype)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_order_in_law(method, pointwise):
    """For N(0, ½) a step is k x + φ of two normal numbers; "srk" takes their squares and cubes."""
    sde, solver, nodes = sd.VPSDE(), TorchSDE(method), _Nodes()
    model = pointwise(sde)

    def relative_error(steps):
        times = sde.t_from_log_snr(torch.linspace(-6, 3, steps + 1, dtype=torch.float64))
        exact = 0.5 * sde.alpha(times).square() + sde.sigma(times).square()
        variance = exact[0]
        for grid in times.unfold(0, 2, 1).tolist():
            x = torch.zeros(65, 2, dtype=torch.float64)
            x[:, 1] = 1
            with torch.no_grad():
                out = solver.solve(Problem(sde, Predict(model), grid, nodes), x)
            noise, factor = out[:-1, 0], out[-1, 1] - out[-1, 0]
            variance = factor**2 * variance + nodes.weights @ noise.square() - (nodes.weights @ noise) ** 2
        return abs(float(variance / exact[-1]) - 1)

    coarse, fine = relative_error(12), relative_error(24)
    assert math.log2(coarse / fine) == pytest.approx(solver.convergence_order, abs=0.2)


def test_an_adaptive_one_has_none():
    assert TorchSDE(adaptive=True).convergence_order is None
    assert TorchSDE().is_stochastic


def test_a_stage_is_evaluated_once(two_modes):
    """srk has four stages, but asks for their drifts nine times a step."""
    model = two_modes().distribution.under(sd.VPSDE())
    assert sd.sample(model, 2, solver="torchsde", method="srk", steps=10).nfe <= 4 * 10
    assert sd.sample(model, 2, solver="torchsde", method="euler", steps=10).nfe == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk"}, "method = 'rk': must be one of euler, "),
        ({"eta": 0.0}, "eta = 0.0"),
        ({"rtol": 0.0}, "rtol = 0.0"),
        ({"grid": "t"}, "equal steps in log-SNR"),
        ({"nfe": 10}, "nfe"),
    ],
)
def test_wrong_options_are_named(options, message, two_modes):
    with pytest.raises(ValueError, match=message):
        sd.sample(two_modes().distribution.under(sd.VPSDE()), 2, solver="torchsde", **options)
