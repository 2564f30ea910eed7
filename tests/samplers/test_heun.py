"""Heun's method: its order for every SDE, and its stability in few steps; the same with churn."""

import math
from itertools import pairwise

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.heun import EDM, Heun
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.samplers.solver import Predict, Problem


def solve(model, x, solver, **options):
    end = float(model.sde.t_from_log_snr(torch.tensor(8.0, dtype=torch.float64)))
    return sd.sample(model, len(x), solver=solver, x_start=x, t_end=end, dtype=x.dtype, **options).samples


@pytest.fixture
def problem(any_sde, two_modes):
    """A mixture under every SDE, starts, and the end points of the ODE."""
    model = two_modes(dtype=torch.float64).distribution.under(any_sde)
    x = any_sde.prior_std * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, solve(model, x, "ode", method="dopri8", rtol=1e-10, atol=1e-10)


def test_it_converges_at_second_order(problem):
    model, x, exact = problem
    errors = [float((solve(model, x, "heun", steps=n) - exact).square().mean().sqrt()) for n in (80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_few_steps_do_not_blow_up(any_sde, steps, pointwise):
    """In scaled variables the slope is bounded, where in σ itself few steps diverge."""
    x = any_sde.prior_std * torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sd.sample(pointwise(any_sde, variance=0.5), 64, solver="heun", steps=steps, x_start=x, dtype=torch.float64)
    start, end = (
        torch.sqrt(any_sde.alpha(t) ** 2 + any_sde.sigma(t) ** 2)
        for t in torch.tensor([out.times[0], out.times[-1]], dtype=torch.float64)
    )
    # Of N(0, ½), dy/dθ = k y with k = cos θ sin θ/(1 + sin² θ) <= 0.36, and all steps add up to under π/2: each
    # multiplies y by 1 − (k₁ + k₂ − h k₁ k₂) h/2, between 0.4 and 1.
    assert ((out.samples / end).abs() <= (x / start).abs()).all()


def test_a_step_is_the_average_of_the_slopes_at_its_ends(any_sde, pointwise):
    """y + ½ Δθ (k₁ + k₂), y = x/n, with the slopes by differentiating cos θ x̂₀ + sin θ ε̂."""
    model = pointwise(any_sde)
    grid = any_sde.t_from_log_snr(torch.tensor([-2.0, 0.5], dtype=torch.float64)).tolist()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def norm(t):
        t = torch.tensor(t, dtype=torch.float64)
        return torch.sqrt(any_sde.alpha(t) ** 2 + any_sde.sigma(t) ** 2)

    def angle(t):
        return math.atan(math.exp(any_sde.log_noise(t)))

    def slope(y, t):
        x0, eps = model.predict(norm(t) * y, torch.tensor(t, dtype=torch.float64))
        return math.cos(angle(t)) * eps - math.sin(angle(t)) * x0

    y, step = x / norm(grid[0]), angle(grid[1]) - angle(grid[0])
    first = slope(y, grid[0])
    expected = norm(grid[1]) * (y + 0.5 * step * (first + slope(y + step * first, grid[1])))
    out = sd.sample(model, 4, solver="heun", grid=grid, x_start=x, dtype=torch.float64)
    torch.testing.assert_close(out.samples, expected, rtol=1e-10, atol=1e-12)
    assert out.nfe == 2


# Churn.


def solve_on(times, solver, model, x, seed=5):
    problem = Problem(model.sde, Predict(model), times, Streams(seed, range(len(x))))
    return solver.solve(problem, x)


@pytest.fixture
def grid():
    """grid(sde, start, end, steps): times of equal steps in log-SNR."""
    return lambda sde, *ends: sde.t_from_log_snr(torch.linspace(*ends[:2], ends[2] + 1, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"churn": 0.0}, {"s_tmin": 1e5}, {"s_tmax": 1e-5}], ids=str)
def test_without_churn_it_is_heuns_method(any_sde, options, pointwise):
    """In the scaled variables, over θ: the same numbers, as no level is raised."""
    times = torch.linspace(any_sde.t_max, any_sde.t_min, 6, dtype=torch.float64).tolist()
    x = any_sde.prior_std * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = pointwise(any_sde)
    assert torch.equal(solve_on(times, EDM(**options), model, x), solve_on(times, Heun(), model, x))


@pytest.mark.parametrize(("churn", "gamma"), [(0.2, 0.1), (40.0, math.sqrt(2) - 1)])
def test_churn_is_the_published_one(any_sde, churn, gamma, grid, pointwise):
    """x'̂ = x' + S_noise √(σ'̂² − σ'²) z with σ'̂ = (1 + γ) σ', in x' = x/α and σ' = σ/α; then Heun's step from there."""
    model, s_noise = pointwise(any_sde), 1.1
    # Of two steps, so that γ = S_churn/2; the second is below S_tmin.
    times = grid(any_sde, -1.0, 2.0, 2)
    level = torch.exp(-0.5 * any_sde.log_snr(times[0]))
    x, noise = torch.ones(4, 3, dtype=torch.float64), StepNoise(Streams(5, range(4)), (3,), torch.float64)
    raised = level * (1 + gamma)
    t_hat = any_sde.t_from_log_snr(-2 * torch.log(raised))
    scaled = x / any_sde.alpha(times[0]) + s_noise * torch.sqrt(raised**2 - level**2) * noise()
    expected = solve_on([float(t_hat), *times[1:].tolist()], Heun(), model, any_sde.alpha(t_hat) * scaled)
    solver = EDM(churn, s_tmin=float(level) - 1e-6, s_noise=s_noise)
    torch.testing.assert_close(solve_on(times.tolist(), solver, model, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("churn", [0.0, 1.0, 10.0])
def test_with_churn_the_variance_converges_at_second_order(any_sde, churn, grid, variance_error):
    coarse, fine = (variance_error(any_sde, EDM(churn), grid(any_sde, -7.0, 6.0, n)) for n in (100, 200))
    assert math.log2(abs(coarse / fine)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_churn_in_few_steps_does_not_blow_up(any_sde, steps, pointwise):
    """Nor is any level raised above that of t_max, where the model may know nothing."""
    times = torch.linspace(any_sde.t_max, any_sde.t_min, steps + 1, dtype=torch.float64)
    c = EDM().prepare(any_sde, times)
    assert (c["t"] <= any_sde.t_max).all()
    assert (c["t"] >= times[:-1]).all()
    x = any_sde.prior_std * torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = solve_on(times.tolist(), EDM(), pointwise(any_sde), x)
    # Heun's steps contract the scaled state (see above) and churn at most adds noise of its own size each time.
    assert out.abs().max() < 5 * (1 + steps) * any_sde.prior_std


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"churn": -1.0}, "churn = -1.0: must be finite and at least 0"),
        ({"churn": math.inf}, "churn = inf: must be finite and at least 0"),
        ({"s_noise": -0.1}, "s_noise = -0.1: must be finite and at least 0"),
        ({"s_tmin": -1.0}, "s_tmin = -1.0, s_tmax = inf: need 0 <= s_tmin <= s_tmax"),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin = 2.0, s_tmax = 1.0: need 0 <= s_tmin <= s_tmax"),
        ({"s_tmax": math.nan}, "s_tmin = 0.0, s_tmax = nan: need 0 <= s_tmin <= s_tmax"),
    ],
    ids=str,
)
def test_churns_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        EDM(**options)
