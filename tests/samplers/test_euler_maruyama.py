"""Euler-Maruyama: its step, its law for every η, and its order."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.noise import StepNoise, Streams


def test_a_step_is_the_published_one(any_sde, pointwise):
    """x + [f x − ½ (1 + η²) g² s] Δ + η g √−Δ z, from the SDE's drift and the model's score."""
    model, eta = pointwise(any_sde), 0.7
    t, s = 0.6 * any_sde.t_max, 0.55 * any_sde.t_max
    x = any_sde.prior_std * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sd.sample(model, 4, solver="em", eta=eta, grid=[t, s], x_start=x, dtype=torch.float64, seed=5)
    g, score = any_sde.diffusion(torch.tensor(t, dtype=torch.float64)), model.score(x, t)
    drift = any_sde.drift(x, t) - 0.5 * (1 + eta**2) * g**2 * score
    noise = StepNoise(Streams(5, range(4)), (3,), torch.float64)()
    expected = x + drift * (s - t) + eta * g * math.sqrt(t - s) * noise
    torch.testing.assert_close(out.samples, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_every_eta_has_the_variance_of_p(any_sde, eta, pointwise):
    """For N(0, c), a step is linear: the variance at the end follows in closed form, and converges to that of p."""
    variance = 0.5
    model = pointwise(any_sde, variance)

    def final_variance(steps):
        grid = any_sde.t_from_log_snr(torch.linspace(-8, 6, steps + 1, dtype=torch.float64)).tolist()
        ones = torch.ones(1, 3, dtype=torch.float64)
        c = sd.samplers.SOLVERS["em"](eta=eta).prepare(any_sde, torch.tensor(grid, dtype=torch.float64))
        alpha, sigma = (f(torch.tensor(grid[0], dtype=torch.float64)) for f in (any_sde.alpha, any_sde.sigma))
        v = float(alpha**2 * variance + sigma**2)
        for i in range(steps):
            x0, eps = model.predict(ones, c["t"][i])
            factor = 1 + float((c["data_rate"][i] * x0 + c["noise_rate"][i] * eps)[0, 0] * c["dt"][i])
            v = factor**2 * v + float(c["std"][i]) ** 2
        end = torch.tensor(grid[-1], dtype=torch.float64)
        return v / float(any_sde.alpha(end) ** 2 * variance + any_sde.sigma(end) ** 2)

    errors = [abs(final_variance(steps) - 1) for steps in (400, 800, 1600)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.2)
    assert errors[2] < 0.02


def test_without_noise_it_is_eulers_method_on_the_ode(any_sde, pointwise):
    model = pointwise(any_sde)
    end = float(any_sde.t_from_log_snr(torch.tensor(2.0, dtype=torch.float64)))
    x = any_sde.prior_std * torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solve(solver, **options):
        return sd.sample(model, 8, solver=solver, x_start=x, t_end=end, dtype=torch.float64, **options).samples

    exact = solve("ode", rtol=1e-10, atol=1e-10)
    errors = [float((solve("em", eta=0.0, steps=n) - exact).square().mean().sqrt()) for n in (400, 800)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
    assert torch.equal(solve("em", eta=0.0, steps=5, seed=1), solve("em", eta=0.0, steps=5, seed=2))


@pytest.mark.parametrize("eta", [-0.5, math.nan, math.inf])
def test_eta_must_be_finite_and_at_least_0(eta, pointwise):
    with pytest.raises(ValueError, match=f"eta = {eta}: must be finite and at least 0"):
        sd.sample(pointwise(sd.VPSDE()), 1, solver="em", eta=eta)
