"""Every method on the probability-flow ODE: of steps for each sample, of shared and of fixed steps."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.networks import UNet
from sde_diffusion.ode import ADAPTIVE_METHODS, FIXED_METHODS, PER_SAMPLE_METHODS
from sde_diffusion.samplers.ode import ODE
from sde_diffusion.sde import expand_to

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


@pytest.mark.parametrize("method", PER_SAMPLE_METHODS + ADAPTIVE_METHODS)
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
    options = {"rtol": 1e-8, "atol": 1e-8, "steps": 10, "trajectory": True, "dtype": torch.float64}
    out = sd.sample(model, len(x), solver="ode", x_start=x, **options)
    t = torch.tensor(out.times, dtype=torch.float64)
    std = torch.sqrt(0.5 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
    exact = x * (std / std[0])[:, None, None]
    torch.testing.assert_close(out.trajectory, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk45"}, "method = 'rk45': must be one of dormand_prince, dopri5, .*, euler, "),
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
            return sd.Prediction(x0 / (expand_to(t, x) > 0.5), eps)

    message = r"dormand_prince stopped at t = 0\.5 after \d+ evaluations of sample \d: its velocity is not finite"
    with pytest.raises(sd.SolverError, match=message):
        sd.sample(Broken(sd.VPSDE()), 2, solver="ode")
    with pytest.raises(sd.SolverError, match="dopri5 stopped"):
        sd.sample(Broken(sd.VPSDE()), 2, solver="ode", method="dopri5")


def test_orders():
    for method in PER_SAMPLE_METHODS + ADAPTIVE_METHODS:
        assert ODE(method).is_adaptive
        assert ODE(method).convergence_order is None
    for method in FIXED_METHODS:
        assert not ODE(method).is_adaptive
        assert ODE(method).convergence_order == ODE(method).evaluations_per_step() == ORDERS.get(method)


def alone_and_together(model, x, indices=(0, 100, 255), **options):
    """Each of these samples, solved alone and among all, and the evaluations of both."""
    together = sd.sample(model, len(x), solver="ode", x_start=x, batch_size=len(x), **options)
    for i in indices:
        alone = sd.sample(model, 1, solver="ode", x_start=x[i : i + 1], **options)
        yield alone.samples[0], together.samples[i], alone.nfe, together.nfe_per_sample[i]


def test_a_sample_is_bitwise_the_same_alone_and_among_256(any_sde, pointwise):
    x = any_sde.prior_std * torch.randn(256, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alone, together, nfe, nfe_together in alone_and_together(pointwise(any_sde), x, dtype=torch.float64):
        assert torch.equal(alone, together)
        assert nfe == nfe_together


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_mixture_s_sample_is_the_same_alone_and_among_256_to_the_tolerance(direction, two_modes):
    model, tolerance = two_modes((2,), torch.float64).distribution.under(sd.VPSDE()), 1e-4
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if direction == "up":
        together = sd.encode(model, x, rtol=tolerance, atol=tolerance)
        pairs = [
            (sd.encode(model, x[i : i + 1], rtol=tolerance, atol=tolerance)[0], together[i]) for i in (0, 100, 255)
        ]
    else:
        solved = list(alone_and_together(model, x, rtol=tolerance, atol=tolerance))
        pairs = [(alone, together) for alone, together, _, _ in solved]
        assert all(nfe == nfe_together for _, _, nfe, nfe_together in solved)
    for alone, together in pairs:
        assert ((alone - together).abs() <= 10 * (tolerance * alone.abs() + tolerance)).all()


def test_a_network_s_sample_is_the_same_alone_and_among_256_to_the_tolerance():
    torch.manual_seed(0)
    network = UNet((1, 4, 4), base_channels=4, channel_multipliers=(1, 2), attention_resolutions=(2,))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = sd.DiffusionModel(network, sd.VPSDE(), "v", data_shape=(1, 4, 4))
    x = torch.randn(256, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for alone, together, _, _ in alone_and_together(model, x, indices=(0, 255), rtol=1e-3, atol=1e-3):
        assert ((alone - together).abs() <= 10 * (1e-3 * alone.abs() + 1e-3)).all()


def test_samples_take_steps_of_their_own(ring, counting):
    model = counting(ring.under(sd.VPSDE()))
    out = sd.sample(model, 256, solver="ode", dtype=torch.float64)
    assert model.rows == out.nfe_per_sample.sum()
    assert model.calls == out.nfe == out.nfe_per_sample.max()
    # No hard sample makes the others wait.
    assert model.rows < 0.8 * 256 * out.nfe


def test_conditioning_stays_with_its_sample(pointwise):
    class Conditional(pointwise):
        def predict(self, x, t, scale, shift):
            # The easier the wider: samples arrive in another order than they come in.
            alpha, sigma = expand_to(self.sde.alpha(t), x), expand_to(self.sde.sigma(t), x)
            variance = expand_to(scale, x).square()
            whitened = (x - alpha * shift) / (alpha * alpha * variance + sigma * sigma)
            return sd.Prediction(alpha * variance * whitened + shift, sigma * whitened)

    sde, scale, shift = sd.VPSDE(), torch.tensor([0.03, 1.0, 0.1, 0.5], dtype=torch.float64), torch.tensor(0.3)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"rtol": 1e-7, "atol": 1e-7}
    cond = {"scale": scale, "shift": shift}
    out = sd.sample(Conditional(sde), 4, solver="ode", x_start=x, cond=cond, **options)
    assert len(out.nfe_per_sample.unique()) > 1
    alpha, sigma = (
        value(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)) for value in (sde.alpha, sde.sigma)
    )
    start, end = (torch.sqrt((a * scale) ** 2 + s**2)[:, None] for a, s in zip(alpha, sigma, strict=True))
    exact = alpha[1] * shift + (x - alpha[0] * shift) * end / start
    assert (out.samples - exact).abs().max() < 1e-5


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("method", PER_SAMPLE_METHODS + ADAPTIVE_METHODS)
def test_no_method_jumps_over_the_problem(method, tolerance):
    """The ODE is flat at both ends, so that a step from one to the other would look free of error."""
    model = sd.Gaussian(torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([0.25, 1.0]).double())).under(
        sd.VPSDE()
    )
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sd.sample(model, 50, solver="ode", x_start=x, method=method, rtol=tolerance, atol=tolerance).samples
    # A Gaussian's flow scales each axis by the ratio of its standard deviations.
    start, end = (
        torch.sqrt(model.sde.alpha(t) ** 2 * torch.tensor([0.25, 1.0]) + model.sde.sigma(t) ** 2)
        for t in torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64)[:, None]
    )
    # fehlberg2 estimates its error with a weight of 1/512 and may err by that much more.
    allowed = (500 if method == "fehlberg2" else 50) * tolerance
    assert float((out - x * end / start).abs().max()) < allowed
