"""SDE-DPM-Solver++: exact for a constant prediction, its two ends DDIM and DDPM, and its orders."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.ddim import DDIM, DDPM
from sde_diffusion.samplers.exponential import Exponential, SDEDPMSolver2M, SDEDPMSolver3M
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.samplers.solver import Problem

SOLVERS = [Exponential, SDEDPMSolver2M, SDEDPMSolver3M]


def equal_in_log_snr(sde, start, end, steps):
    return sde.t_from_log_snr(torch.linspace(start, end, steps + 1, dtype=torch.float64))


def solve(solver, model, x, times, seed=5):
    problem = Problem(
        model.sde, model.predict, times.tolist(), Streams(seed, range(len(x))), lambda i, x: None, lambda i: None
    )
    return solver.solve(problem, x)


def start(sde, n=4):
    return sde.prior_std * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 1.0, 1.7])
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
def test_a_quadratic_prediction_is_integrated_exactly(eta):
    """At third order, once three predictions are known, on unequal steps; against quadrature of the integral."""
    sde, rate = sd.VPSDE(), 1 + eta**2
    log_ratio = torch.tensor([-2.0, -1.2, -0.7, 0.6], dtype=torch.float64)
    times = sde.t_from_log_snr(2 * log_ratio)

    def data(at):
        return 0.3 + at - 0.8 * at**2

    weights = SDEDPMSolver3M(eta).prepare(sde, times)["weights"][-1]
    nodes, roots = torch.linspace(-0.7, 0.6, 20001, dtype=torch.float64), data(log_ratio[:3].flip(0))
    integrand = rate * torch.exp(-rate * (0.6 - nodes)) * data(nodes)
    # The trapezoidal rule's error is h² of 6.5e-5 times numbers of the order of one.
    expected = sde.alpha(times[-1]) * torch.trapezoid(integrand, nodes)
    assert float(weights @ roots) == pytest.approx(float(expected), abs=1e-7)


@pytest.mark.parametrize(
    ("solver", "eta", "order"),
    [
        (Exponential, 0.0, 1),
        (Exponential, 0.5, 1),
        (Exponential, 1.0, 1),
        (SDEDPMSolver2M, 0.0, 2),
        (SDEDPMSolver2M, 1.0, 2),
        (SDEDPMSolver2M, 1.5, 2),
        (SDEDPMSolver3M, 0.0, 3),
        (SDEDPMSolver3M, 1.0, 2),
    ],
)
def test_the_variance_converges_at_the_order_claimed(any_sde, solver, eta, order, variance_error):
    # From where x̂₀ hardly changes yet, so that the first steps, of lower order, count for little. At the end the
    # leading error must have outgrown the next, and that of third order not vanish by a change of sign.
    end = 2.0 if order == 3 else 4.0
    times = (equal_in_log_snr(any_sde, -7.8, end, steps) for steps in (200, 400))
    coarse, fine = (variance_error(any_sde, solver(eta), grid) for grid in times)
    assert math.log2(abs(coarse / fine)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_noise_ends_with_the_data_where_the_log_snr_is_infinite(solver, pointwise):
    """From α = 0 to σ = 0 on the straight path: the last step is to x̂₀, and a step after an infinite one is finite."""
    sde = sd.FlowSDE()
    model, x = pointwise(sde), start(sde)
    seen = []

    def predict(x, t):
        seen.append(model.predict(x, t).x0)
        return model.predict(x, t)

    for eta in (0.0, 1.0):
        times = [1.0, 0.7, 0.4, 0.1, 0.0]
        problem = Problem(sde, predict, times, Streams(0, range(4)), lambda i, x: None, lambda i: None)
        torch.testing.assert_close(solver(eta).solve(problem, x), seen[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_eta_must_be_finite_and_at_least_0(solver):
    for eta in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eta = {eta}: must be finite and at least 0"):
            solver(eta)
