"""Exponential integrators of the SDE: exact for what they take x̂₀ for, DDIM and DDPM at their ends, and of order."""

import math

import pytest
import torch
from scipy.integrate import quad

import sde_diffusion as sd
from sde_diffusion.samplers.ddim import DDIM, DDPM
from sde_diffusion.samplers.exponential import Exponential, SDEAdams, SDEDPMSolver2M, SDEDPMSolver3M
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.samplers.solver import Predict, Problem

SOLVERS = [Exponential, SDEDPMSolver2M, SDEDPMSolver3M, SDEAdams]


def in_a_band(t):
    """A noise level w(t) that is 0 at both ends of [0, 1], and nowhere in proportion to any g."""
    return torch.sin(math.pi * t.clamp(max=1)) ** 2


def equal_in_log_snr(sde, start, end, steps):
    return sde.t_from_log_snr(torch.linspace(start, end, steps + 1, dtype=torch.float64))


def solve(solver, model, x, times, seed=5):
    problem = Problem(model.sde, Predict(model), times.tolist(), Streams(seed, range(len(x))))
    return solver.solve(problem, x)


def start(sde, n=4):
    return sde.prior_std * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 1.0, 1.7, in_a_band])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_constant_prediction_is_solved_exactly_in_law(any_sde, solver, eta, steps):
    """N(α_t x₀, σ_t² I) is taken to N(α_s x₀, σ_s² I), by a step of any length."""
    times = torch.linspace(any_sde.t_max, any_sde.t_min, steps + 1, dtype=torch.float64)
    c = solver(eta).prepare(any_sde, times)
    alpha, sigma = any_sde.alpha(times), any_sde.sigma(times)
    torch.testing.assert_close(c["scale"] * alpha[:-1] + c["weights"].sum(1), alpha[1:], rtol=1e-12, atol=0)
    variance = (c["scale"] * sigma[:-1]).square() + c["std"].square()
    # σ is a difference of numbers of the size of α: its square is known to rounding times α²/σ² <= 10⁶.
    torch.testing.assert_close(variance, sigma[1:].square(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("eta", "other"), [(0.0, DDIM(0.0)), (1.0, DDIM(1.0)), (1.0, DDPM("posterior"))])
def test_at_its_ends_it_is_ddim_and_ddpm(any_sde, eta, other, pointwise):
    model, times = pointwise(any_sde), equal_in_log_snr(any_sde, -6, 5, 12)
    x = start(any_sde)
    torch.testing.assert_close(
        solve(Exponential(eta), model, x, times), solve(other, model, x, times), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_a_step_between_is_ddim_with_as_much_noise(any_sde, eta, pointwise):
    """DDIM's ς² = η'² σ_s² (1 − e^{−2h}), so that η'² = (1 − e^{−2η²h})/(1 − e^{−2h}) for a step h."""
    model, times = pointwise(any_sde), equal_in_log_snr(any_sde, -1, 1, 1)
    h = 1.0  # λ is half the log-SNR
    as_much = math.sqrt(math.expm1(-2 * eta**2 * h) / math.expm1(-2 * h))
    x = start(any_sde)
    torch.testing.assert_close(
        solve(Exponential(eta), model, x, times), solve(DDIM(as_much), model, x, times), rtol=1e-9, atol=1e-9
    )


def test_the_second_order_step_is_the_published_one(any_sde, pointwise):
    """D = x̂₀ + (x̂₀ − x̂₀ of the step before)/2r with r the ratio of the steps; Lu et al., SDE-DPM-Solver++(2M)."""
    model = pointwise(any_sde)
    times = any_sde.t_from_log_snr(torch.tensor([-3.0, -1.0, 2.0], dtype=torch.float64))
    alpha, sigma = any_sde.alpha(times), any_sde.sigma(times)
    x, h = start(any_sde), (1.0, 1.5)
    noise = StepNoise(Streams(5, range(4)), (3,), torch.float64)

    def move(x, data, i):
        mean = sigma[i + 1] / sigma[i] * math.exp(-h[i]) * x + alpha[i + 1] * -math.expm1(-2 * h[i]) * data
        return mean + sigma[i + 1] * math.sqrt(-math.expm1(-2 * h[i])) * noise()

    first = model.predict(x, times[0]).x0
    middle = move(x, first, 0)
    second = model.predict(middle, times[1]).x0
    expected = move(middle, second + (second - first) / (2 * h[0] / h[1]), 1)
    torch.testing.assert_close(solve(SDEDPMSolver2M(), model, x, times), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    ("solver", "degree"), [(SDEDPMSolver3M, 2), (lambda eta: SDEAdams(eta, 2), 1), (lambda eta: SDEAdams(eta, 3), 2)]
)
def test_a_polynomial_prediction_is_integrated_exactly(solver, degree, eta):
    """Once as many predictions are known, on unequal steps; in σ/(α + σ) for Adams; against quadrature by others."""
    sde, rate = sd.VPSDE(), 1 + eta**2
    log_ratio = torch.tensor([-2.0, -1.2, -0.7, 0.6], dtype=torch.float64)
    times = sde.t_from_log_snr(2 * log_ratio)
    is_adams = solver is not SDEDPMSolver3M

    def data(at):
        kappa = 1 / (1 + math.exp(at)) if is_adams else at
        return 0.3 + kappa - (0.8 * kappa**2 if degree == 2 else 0)

    weights = solver(eta).prepare(sde, times)["weights"][-1]
    roots = torch.tensor([data(at) for at in log_ratio[:3].flip(0).tolist()], dtype=torch.float64)
    expected, _ = quad(lambda at: rate * math.exp(-rate * (0.6 - at)) * data(at), -0.7, 0.6, epsabs=1e-13)
    # λ is found again from t, to rounding times some hundred.
    assert float(weights @ roots[: len(weights)] / sde.alpha(times[-1])) == pytest.approx(expected, abs=1e-11)


def test_adams_of_first_order_is_the_exponential_step(any_sde, pointwise):
    model, times = pointwise(any_sde), equal_in_log_snr(any_sde, -6, 5, 12)
    x = start(any_sde)
    one, other = (solve(solver, model, x, times) for solver in (SDEAdams(0.7, order=1), Exponential(0.7)))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_noise_level_in_proportion_to_g_is_a_number(any_sde, solver, pointwise):
    model, times = pointwise(any_sde), equal_in_log_snr(any_sde, -6, 5, 12)
    x = start(any_sde)
    level, number = (solver(eta) for eta in (lambda t: 0.7 * any_sde.diffusion(t), 0.7))
    one, other = (solve(solver, model, x, times) for solver in (level, number))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_noise_level_of_0_draws_none(pointwise):
    """In the part of time where w is 0 the states are those of the ODE."""
    sde = sd.VPSDE()
    model, x = pointwise(sde), start(sde)
    times = torch.linspace(1, 0.5, 6, dtype=torch.float64)
    level = SDEAdams(lambda t: (t < 0.5).to(t))
    assert torch.equal(solve(level, model, x, times), solve(SDEAdams(0.0), model, x, times))
    below = torch.linspace(1, 0.3, 6, dtype=torch.float64)
    assert not torch.allclose(solve(level, model, x, below), solve(SDEAdams(0.0), model, x, below))


@pytest.mark.parametrize(
    ("solver", "eta", "order"),
    [
        (Exponential, 0.0, 1),
        (Exponential, 0.5, 1),
        (Exponential, 1.0, 1),
        (Exponential, in_a_band, 1),
        (SDEDPMSolver2M, 0.0, 2),
        (SDEDPMSolver2M, 1.0, 2),
        (SDEDPMSolver2M, 1.5, 2),
        (SDEDPMSolver2M, in_a_band, 2),
        (SDEDPMSolver3M, 0.0, 3),
        (SDEDPMSolver3M, 1.0, 2),
        (SDEAdams, 0.0, 2),
        (SDEAdams, 1.0, 2),
        (SDEAdams, in_a_band, 2),
        (lambda eta: SDEAdams(eta, 3), 0.0, 3),
        (lambda eta: SDEAdams(eta, 3), 1.0, 2),
    ],
)
def test_the_variance_converges_at_the_order_claimed(any_sde, solver, eta, order, variance_error):
    # From where x̂₀ hardly changes yet, so that the first steps, of lower order, count for little. At the end the
    # leading error must have outgrown the next, and that of third order not vanish by a change of sign.
    end = 2.0 if order == 3 else 4.0
    times = (equal_in_log_snr(any_sde, -7.8, end, steps) for steps in (200, 400))
    coarse, fine = (variance_error(any_sde, solver(eta), grid) for grid in times)
    assert solver(eta).convergence_order == order
    assert math.log2(abs(coarse / fine)) == pytest.approx(order, abs=0.2)


class Watched(sd.Model):
    """A model that remembers its predictions of x₀."""

    def __init__(self, model):
        self.model, self.sde, self.data_shape, self.seen = model, model.sde, model.data_shape, []

    def predict(self, x, t):
        self.seen.append(self.model.predict(x, t).x0)
        return self.model.predict(x, t)


@pytest.mark.parametrize("eta", [0.0, 1.0, lambda t: torch.sqrt(2 * t)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_noise_ends_with_the_data_where_the_log_snr_is_infinite(solver, eta, pointwise):
    """From α = 0 to σ = 0 on the straight path: the last step is to x̂₀, and a step after an infinite one is finite."""
    sde = sd.FlowSDE()
    model, x = Watched(pointwise(sde)), start(sde)
    times = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(solve(solver(eta), model, x, times), model.seen[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_few_steps_with_a_noise_level_are_finite(any_sde, solver, pointwise):
    """With a number η: see test_orders."""
    x = start(any_sde).float()
    for steps in range(1, 21):
        times = torch.linspace(any_sde.t_max, any_sde.t_min, steps + 1, dtype=torch.float64)
        assert solve(solver(in_a_band), pointwise(any_sde), x, times).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_eta_must_be_finite_and_at_least_0(solver):
    for eta in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eta = {eta}: must be finite and at least 0"):
            solver(eta)


def test_the_order_of_adams_is_at_most_three():
    for order in (0, 4):
        with pytest.raises(ValueError, match=f"order = {order}: must be one of 1, 2, 3"):
            SDEAdams(order=order)


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_is_drawn_unless_eta_is_0(solver):
    assert not solver(0.0).is_stochastic
    assert solver(0.1).is_stochastic
    assert solver(in_a_band).is_stochastic
