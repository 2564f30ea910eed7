"""DDIM and DDPM against the ODE, each other, and the published update."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.ddim import DDIM, DDPM


def slope(errors):
    """Order of convergence when the number of steps doubles: the last of the local slopes."""
    return math.log2(errors[-2] / errors[-1])


def end_points(model, x, solver, steps, **options):
    return sd.sample(
        model, len(x), x_start=x, solver=solver, steps=steps, t_end=options.pop("t_end", 1e-2), dtype=x.dtype, **options
    ).samples


@pytest.fixture(scope="module")
def problem():
    """A mixture of wide modes under VP, starts, and the end points of the ODE at 1e-10."""
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.8]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=torch.float64))
    model = sd.GaussianMixture(means, covariances).under(sd.VPSDE())
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, end_points(model, x, "ode", None, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_deterministic_solvers_converge_to_the_ode_at_their_order(problem, solver, order):
    model, x, exact = problem
    errors = [float((end_points(model, x, solver, n) - exact).square().mean().sqrt()) for n in (64, 128, 256)]
    assert slope(errors) == pytest.approx(order, abs=0.2)
    assert slope(errors[:2]) == pytest.approx(order, abs=0.2)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(any_sde):
    times = torch.linspace(any_sde.t_max, any_sde.t_max / 50, 20, dtype=torch.float64)
    ddim, ddpm = DDIM(eta=1.0).prepare(any_sde, times), DDPM().prepare(any_sde, times)
    torch.testing.assert_close(ddim["std"], ddpm["std"], rtol=1e-6, atol=1e-9)
    # x_s = α_s x̂₀ + direction (x_t − α_t x̂₀)/σ_t, by its coefficients of x_t and of x̂₀.
    alpha, sigma = any_sde.alpha(times[:-1]), any_sde.sigma(times[:-1])
    torch.testing.assert_close(ddim["direction"] / sigma, ddpm["b"], rtol=1e-6, atol=1e-9)
    of_data = ddim["alpha_s"] - ddim["direction"] * alpha / sigma
    torch.testing.assert_close(of_data, ddpm["a"], rtol=1e-6, atol=1e-9)


def test_ddpm_is_the_published_update(problem):
    """Ho et al. 2020, algorithm 2, from the betas of the chain alone."""
    sde, steps = sd.VPSDE(), 50
    times = torch.linspace(sde.t_max, 0, steps + 1, dtype=torch.float64)
    c = DDPM().prepare(sde, times)
    alpha_bar = sde.alpha(times.flip(0)).square()
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    for i in range(steps):
        t = steps - 1 - i  # beta[t] leads from state t to t + 1, and this step back
        expected = (x - beta[t] * eps / torch.sqrt(1 - alpha_bar[t + 1])) / torch.sqrt(1 - beta[t])
        x0 = (x - torch.sqrt(1 - alpha_bar[t + 1]) * eps) / torch.sqrt(alpha_bar[t + 1])
        torch.testing.assert_close(c["a"][i] * x0 + c["b"][i] * x, expected, rtol=1e-9, atol=1e-9)
        variance = beta[t] * (1 - alpha_bar[t]) / (1 - alpha_bar[t + 1])
        torch.testing.assert_close(c["std"][i].square(), variance, rtol=1e-9, atol=1e-12)
    assert float(c["std"][-1]) == 0.0
    noising = DDPM(variance="noising").prepare(sde, times)
    torch.testing.assert_close(noising["std"].square().flip(0)[1:], beta[1:])
    assert float(noising["std"][-1]) == 0.0


def test_ddpm_and_em_agree_in_a_thousand_steps(problem):
    model, n = problem[0], 5000
    moments = []
    for solver in ("ddpm", "em"):
        x = sd.sample(model, n, solver=solver, steps=1000, seed=len(moments), dtype=torch.float64).samples
        products = torch.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)
        moments.append((products.mean(0), products.var(0) / n))
    (first, first_variance), (second, second_variance) = moments
    assert bool(((first - second).abs() < 4 * torch.sqrt(first_variance + second_variance)).all())


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ddim_refuses_an_eta_outside_its_range(eta):
    with pytest.raises(ValueError, match="eta = "):
        DDIM(eta=eta)


def test_ddpm_refuses_an_unknown_variance():
    with pytest.raises(ValueError, match="variance = 'learned': must be one of posterior, noising"):
        DDPM(variance="learned")
