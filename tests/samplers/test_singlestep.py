"""DPM-Solver++ of single steps: orders, the published steps, and the limits at either end."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.grids import time_grid

VP = sd.VPSDE()
SOLVERS = {"dpmpp_1": 1, "dpmpp_2s": 2, "dpmpp_3s": 3}


def start(sde, n=8, size=2):
    return sde.prior_std * torch.randn(n, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solve(model, x, solver, **options):
    return sd.sample(model, len(x), solver=solver, x_start=x, dtype=x.dtype, **options)


class OfTime(sd.Model):
    """Predicts t times a pair, or the pair, whatever the state."""

    def __init__(self, sde, pair, slope=False):
        self.sde, self.pair, self.slope, self.data_shape = sde, pair, slope, (2,)

    def predict(self, x, t):
        # t is () or (B,).
        return sd.Prediction(*(t.reshape(-1, 1) * self.pair if self.slope else self.pair))


@pytest.fixture(scope="module")
def random_pair():
    return torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_solver_has_its_order_for_every_sde(any_sde, two_modes):
    model, x = two_modes(dtype=torch.float64).distribution.under(any_sde), start(any_sde)
    # Where the log-SNR is 8: the exact ODE is then found in little time.
    end = float(any_sde.t_from_log_snr(torch.tensor(8.0, dtype=torch.float64)))
    exact = solve(model, x, "ode", t_end=end, method="dopri8", rtol=1e-9, atol=1e-9).samples
    for solver, order in SOLVERS.items():
        grids = (time_grid(any_sde, "log_snr", any_sde.t_max, end, steps) for steps in (80, 160))
        errors = [float((solve(model, x, solver, grid=grid).samples - exact).square().mean().sqrt()) for grid in grids]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), solver
        assert sd.samplers.SOLVERS[solver]().convergence_order == order


def test_the_first_is_ddim(any_sde, two_modes):
    model, x = two_modes(dtype=torch.float64).distribution.under(any_sde), start(any_sde)
    ours, ddim = (solve(model, x, solver, steps=20, trajectory=True).trajectory for solver in ("dpmpp_1", "ddim"))
    # Up to 1e3 between signal and noise, which cancel in both, over 20 steps.
    torch.testing.assert_close(ours, ddim, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_constant_predictions_are_solved_exactly(any_sde, solver, random_pair):
    ends = torch.tensor([any_sde.t_max, any_sde.t_min], dtype=torch.float64)
    x, exact = (any_sde.alpha(t) * random_pair[0] + any_sde.sigma(t) * random_pair[1] for t in ends)
    for steps in (1, 6):
        out = solve(OfTime(any_sde, random_pair), x, solver, steps=steps, grid="t")
        # Signal and noise, which are a thousandth of one another at the ends, are rounded in each step.
        torch.testing.assert_close(out.samples, exact, rtol=1e-9, atol=1e-9)


def test_2s_is_the_published(any_sde, pointwise):
    """Lu et al. 2022, algorithm 1 with r = ½."""
    model, x = pointwise(any_sde), start(any_sde, size=3)
    times = any_sde.t_from_log_snr(torch.tensor([-1.0, 0.25, 1.5], dtype=torch.float64))
    t, middle, s = times
    alpha, sigma, h = any_sde.alpha(times), any_sde.sigma(times), 1.25
    u = sigma[1] / sigma[0] * x - alpha[1] * math.expm1(-h / 2) * model.predict(x, t).x0
    expected = sigma[2] / sigma[0] * x - alpha[2] * math.expm1(-h) * model.predict(u, middle).x0
    out = solve(model, x, "dpmpp_2s", grid=[float(t), float(s)])
    torch.testing.assert_close(out.samples, expected, rtol=1e-10, atol=1e-10)


def test_3s_is_the_published_for_data(any_sde, pointwise):
    """Lu et al. 2022 (DPM-Solver), algorithm 2, with x̂₀, α and −h where it has ε̂, σ and h."""
    model, x = pointwise(any_sde), start(any_sde, size=3)
    times = any_sde.t_from_log_snr(torch.tensor([-1.0, -0.25, 0.5, 1.25], dtype=torch.float64))
    alpha, sigma, h = any_sde.alpha(times), any_sde.sigma(times), 1.125
    data = model.predict(x, times[0]).x0
    y = sigma[1] / sigma[0] * x - alpha[1] * math.expm1(-h / 3) * data
    slope = model.predict(y, times[1]).x0 - data
    y = sigma[2] / sigma[0] * x - alpha[2] * math.expm1(-h * 2 / 3) * data
    y = y + 2 * alpha[2] * (math.expm1(-h * 2 / 3) / (h * 2 / 3) + 1) * slope
    slope = model.predict(y, times[2]).x0 - data
    expected = sigma[3] / sigma[0] * x - alpha[3] * math.expm1(-h) * data
    expected = expected + 3 / 2 * alpha[3] * (math.expm1(-h) / h + 1) * slope
    out = solve(model, x, "dpmpp_3s", grid=[float(times[0]), float(times[3])])
    torch.testing.assert_close(out.samples, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sde", [VP, sd.EDMSDE(), sd.FlowSDE()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_step_to_no_noise_is_the_data_predicted(sde, solver, random_pair):
    """From t, as there is no part of the way at which to ask."""
    grid = [sde.t_max, *(sde.T * f for f in (0.8, 0.5, 0.3)), 0.0]
    out = solve(OfTime(sde, random_pair, slope=True), start(sde), solver, grid=grid)
    torch.testing.assert_close(out.samples, grid[-2] * random_pair[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_from_no_data_the_first_step_is_ddims(solver, pointwise):
    model, x = pointwise(sd.FlowSDE()), start(VP, size=3)
    options = {"grid": [1.0, 0.9, 0.8], "trajectory": True}
    out, ddim = solve(model, x, solver, **options), solve(model, x, "ddim", **options)
    torch.testing.assert_close(out.trajectory[1], ddim.trajectory[1], rtol=1e-12, atol=1e-12)
    assert out.samples.isfinite().all()


@pytest.mark.parametrize(("solver", "nfe", "steps"), [("dpmpp_1", 7, 7), ("dpmpp_2s", 7, 3), ("dpmpp_3s", 8, 2)])
def test_evaluations_are_turned_into_steps(solver, nfe, steps, pointwise):
    out = sd.sample(pointwise(VP), 2, solver=solver, nfe=nfe)
    assert len(out.times) == steps + 1
    assert out.nfe == steps * SOLVERS[solver]
