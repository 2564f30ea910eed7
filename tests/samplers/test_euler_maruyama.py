"""Euler-Maruyama: its step, its law for every η, and its order."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.euler_maruyama import Euler, EulerMaruyama
from sde_diffusion.samplers.noise import StepNoise, Streams


def test_a_step_is_the_published_one(any_sde, pointwise):
    """x + [f x − ½ (1 + η²) g² s] Δ + η g √−Δ z, from the SDE's drift and the model's score."""
    model, eta = pointwise(any_sde), 0.7
    t, s = 0.6 * any_sde.t_max, 0.55 * any_sde.t_max
    x = any_sde.prior_std * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sd.sample(model, 4, solver="em", eta=eta, grid=[t, s], x_start=x, dtype=torch.float64, seed=5)
    at_t = torch.tensor(t, dtype=torch.float64)
    g, score = any_sde.diffusion(at_t), model.score(x, at_t)
    drift = any_sde.drift(x, t) - 0.5 * (1 + eta**2) * g**2 * score
    noise = StepNoise(Streams(5, range(4)), (3,), torch.float64)()
    expected = x + drift * (s - t) + eta * g * math.sqrt(t - s) * noise
    torch.testing.assert_close(out.samples, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_every_eta_converges_to_the_variance_of_p_at_first_order(any_sde, eta, pointwise):
    """For N(0, c) a step is linear, x' = k x + r z, and so is what it does to the variance: v' = k² v + r²."""
    variance = 0.5
    model = pointwise(any_sde, variance)

    def relative_error(steps):
        times = any_sde.t_from_log_snr(torch.linspace(-7, 6, steps + 1, dtype=torch.float64))
        c = EulerMaruyama(eta).prepare(any_sde, times)
        x0, eps = model.predict(torch.ones(steps, dtype=torch.float64), c["t"])
        k = 1 + c["data"] * x0 + c["noise"] * eps
        exact = any_sde.alpha(times).square() * variance + any_sde.sigma(times).square()
        v = float(exact[0])
        for factor, std in zip(k.tolist(), c["std"].tolist(), strict=True):
            v = factor**2 * v + std**2
        return abs(v / float(exact[-1]) - 1)

    errors = [relative_error(steps) for steps in (3200, 6400)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
    # 13 in log-SNR in 6400 steps: the leading error is that step times a number of the order of one.
    assert errors[1] < 5 * 13 / 6400


def test_without_noise_it_is_eulers_method_on_the_ode(any_sde, pointwise):
    model = pointwise(any_sde)
    end = float(any_sde.t_from_log_snr(torch.tensor(2.0, dtype=torch.float64)))
    x = any_sde.prior_std * torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solve(solver, **options):
        return sd.sample(model, 8, solver=solver, x_start=x, t_end=end, dtype=torch.float64, **options).samples

    exact = solve("ode", rtol=1e-10, atol=1e-10)
    errors = [float((solve("euler", steps=n) - exact).square().mean().sqrt()) for n in (400, 800)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
    assert torch.equal(solve("em", eta=0.0, steps=5, seed=1), solve("euler", steps=5, seed=2))


def test_a_step_of_euler_is_along_the_velocity(any_sde, pointwise):
    model, t, s = pointwise(any_sde), 0.6 * any_sde.t_max, 0.55 * any_sde.t_max
    x = any_sde.prior_std * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sd.sample(model, 4, solver="euler", grid=[t, s], x_start=x, dtype=torch.float64)
    torch.testing.assert_close(out.samples, x + model.velocity(x, t) * (s - t), rtol=1e-10, atol=1e-10)


def test_it_is_stochastic_unless_it_has_no_noise():
    assert EulerMaruyama().is_stochastic
    assert EulerMaruyama(lambda t: 0.1 * t).is_stochastic
    assert not EulerMaruyama(0.0).is_stochastic
    assert not Euler().is_stochastic
    assert EulerMaruyama().convergence_order == Euler().convergence_order == 1


@pytest.mark.parametrize("eta", [-0.5, math.nan, math.inf])
def test_eta_must_be_finite_and_at_least_0(eta, pointwise):
    with pytest.raises(ValueError, match=f"eta = {eta}: must be finite and at least 0"):
        sd.sample(pointwise(sd.VPSDE()), 1, solver="em", eta=eta)
