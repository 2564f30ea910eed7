"""Heun's method: its order for every SDE, and its stability in few steps."""

import math
from itertools import pairwise

import pytest
import torch

import sde_diffusion as sd


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
