"""torchdiffeq's methods on the probability-flow ODE."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.ode import ADAPTIVE_METHODS, FIXED_METHODS

ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


@pytest.fixture
def flow(pointwise):
    """flow(sde): a model of N(0, c), starts, and where the ODE takes them: x √(α² c + σ²) at the end and start."""

    def build(sde, variance=0.5):
        x = sde.prior_std * torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
        std = torch.sqrt(sde.alpha(ends) ** 2 * variance + sde.sigma(ends) ** 2)
        return pointwise(sde, variance), x, x * std[1] / std[0]

    return build


def error(flow, **options):
    model, x, exact = flow
    out = sd.sample(model, len(x), solver="ode", x_start=x, dtype=torch.float64, **options)
    return float((out.samples - exact).abs().max())


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_an_adaptive_method_keeps_to_its_tolerance(method, flow):
    # Those of second order take some thousand steps, and add up the errors of them all.
    assert error(flow(sd.VPSDE()), method=method, rtol=1e-7, atol=1e-7) < 1000 * 1e-7


def test_the_default_takes_every_sde_to_its_data(any_sde, flow):
    assert error(flow(any_sde), rtol=1e-7, atol=1e-7) < 1e-4


@pytest.mark.parametrize("method", ORDERS)
def test_a_method_of_fixed_steps_has_its_order(method, flow):
    problem = flow(sd.VPSDE())
    errors = [error(problem, method=method, steps=n) for n in (320, 640)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.2)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_every_method_of_fixed_steps_is_taken_by_name(method, flow):
    problem = flow(sd.VPSDE())
    assert error(problem, method=method, steps=160) < error(problem, method=method, steps=20) < 0.5


def test_a_trajectory_lies_on_the_flow(flow):
    sde = sd.VPSDE()
    model, x, _ = flow(sde)
    out = sd.sample(model, len(x), x_start=x, rtol=1e-8, atol=1e-8, steps=10, trajectory=True, dtype=torch.float64)
    t = torch.tensor(out.times, dtype=torch.float64)
    std = torch.sqrt(0.5 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
    exact = x * (std / std[0])[:, None, None]
    torch.testing.assert_close(out.trajectory, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk45"}, "method = 'rk45': must be one of dopri5, "),
        ({"rtol": 0.0}, "rtol = 0.0, atol = 0.0001: must be positive"),
        ({"atol": -1.0}, "atol = -1.0: must be positive"),
        ({"nfe": 10}, "nfe = 10: this solver chooses its own evaluations; set steps or tolerances"),
    ],
)
def test_wrong_options_are_named(options, message, pointwise):
    with pytest.raises(ValueError, match=message):
        sd.sample(pointwise(sd.VPSDE()), 2, solver="ode", **options)


def test_a_model_that_breaks_down_is_reported(pointwise):
    class Broken(pointwise):
        def predict(self, x, t):
            x0, eps = super().predict(x, t)
            return sd.Prediction(x0 / (t > 0.5), eps)

    with pytest.raises(sd.SolverError, match="dopri5"):
        sd.sample(Broken(sd.VPSDE()), 2, solver="ode")


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_no_method_jumps_over_the_problem(method, tolerance):
    """The ODE is flat at both ends, so that a step from one to the other would look free of error."""
    model = sd.Gaussian(torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([0.25, 1.0]).double())).under(
        sd.VPSDE()
    )
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sd.sample(model, 50, x_start=x, method=method, rtol=tolerance, atol=tolerance).samples
    # A Gaussian's flow scales each axis by the ratio of its standard deviations.
    start, end = (
        torch.sqrt(model.sde.alpha(t) ** 2 * torch.tensor([0.25, 1.0]) + model.sde.sigma(t) ** 2)
        for t in torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64)[:, None]
    )
    # fehlberg2 estimates its error with a weight of 1/512 and may err by that much more.
    allowed = (500 if method == "fehlberg2" else 50) * tolerance
    assert float((out - x * end / start).abs().max()) < allowed
