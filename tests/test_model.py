import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sde_diffusion import VPSDE, DataInfo, DiffusionModel, GaussianMixture, Prediction
from sde_diffusion.model import PREDICTIONS, Model

SIGMA_DATA = 0.7
UNIT = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}


def output_of(prediction, x0, eps, alpha, sigma):
    """What a network should put out for E[x₀ | x] and E[ε | x]."""
    return {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        # In x' = x/α and σ' = σ/α: the target (x₀ − c_skip x')/c_out, without the difference.
        "edm": (sigma / SIGMA_DATA * x0 - alpha * SIGMA_DATA * eps) / torch.hypot(sigma, alpha * SIGMA_DATA),
    }[prediction]


def sensitivities(prediction, alpha, sigma):
    """How x̂₀ and ε̂ each move with x and with the output: |∂x̂₀/∂x|, |∂x̂₀/∂F|, |∂ε̂/∂x|, |∂ε̂/∂F|."""
    square, norm = alpha**2 + sigma**2, torch.hypot(sigma, alpha * SIGMA_DATA)
    one, none = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "eps": (1 / alpha, sigma / alpha, none, one),
        "x0": (none, one, 1 / sigma, alpha / sigma),
        "v": (alpha / square, sigma / square, sigma / square, alpha / square),
        "score": (1 / alpha, sigma**2 / alpha, none, sigma),
        "edm": (
            alpha * SIGMA_DATA**2 / norm**2,
            sigma * SIGMA_DATA / norm,
            sigma / norm**2,
            alpha * SIGMA_DATA / norm,
        ),
    }[prediction]


def rounding(prediction, sde, x, t, output):
    """Rounding errors of x̂₀ and ε̂, in units of eps: of each term, and of α and σ, which move with t's."""
    t = t.double().reshape(-1, *(1,) * (x.ndim - 1))
    x0_x, x0_f, eps_x, eps_f = sensitivities(prediction, sde.alpha(t), sde.sigma(t))
    scale = 8 + 4 * t * (sde.sigma_dot(t) / sde.sigma(t) - sde.drift_coefficient(t))
    x, output = x.double().abs(), output.double().abs()
    return scale * (x0_x * x + x0_f * output), scale * (eps_x * x + eps_f * output)


def states(exact, dtype, n=12):
    """x_t (n, D) and times from t_min to t_max equally spaced in log(σ/α)."""
    sde = exact.sde
    u = torch.linspace(sde.log_noise(sde.t_min), sde.log_noise(sde.t_max), n, dtype=torch.float64)
    t = sde.t_from_log_snr(-2 * u).clamp(sde.t_min, sde.t_max)
    noise = torch.randn(n, *exact.data_shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return sde.perturb(exact.sample(n, seed=1), t, noise).to(dtype), t.to(dtype)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(fraction=st.floats(0, 1), power=st.floats(0, 9), seed=st.integers(0, 2**31))
def test_any_output_adds_up_to_the_state(any_sde, dtype, prediction, fraction, power, seed):
    generator = torch.Generator().manual_seed(seed)
    x, output = (torch.randn(4, 3, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.tensor(any_sde.t_min + (any_sde.t_max - any_sde.t_min) * fraction * 10**-power, dtype=dtype)
    model = DiffusionModel(lambda x, t: output, any_sde, prediction, data_shape=(3,), sigma_data=SIGMA_DATA)
    x0, eps = model.predict(x, t)
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    x0_x, x0_f, eps_x, eps_f = sensitivities(prediction, alpha, sigma)
    # A few roundings of each of the terms that are added.
    terms = (1 + alpha * x0_x + sigma * eps_x) * x.abs() + (alpha * x0_f + sigma * eps_f) * output.abs()
    assert ((alpha * x0 + sigma * eps - x).abs() <= 8 * UNIT[dtype] * terms).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_the_exact_prediction(any_sde, dtype, ring, prediction):
    exact = ring.under(any_sde)
    x, t = states(exact, dtype)
    alpha, sigma = any_sde.alpha(t.double())[:, None], any_sde.sigma(t.double())[:, None]
    expected = exact.predict(x.double(), t.double())
    output = output_of(prediction, expected.x0, expected.eps, alpha, sigma).to(dtype)
    model = DiffusionModel(lambda x, t: output, any_sde, prediction, data_shape=(2,), sigma_data=SIGMA_DATA)
    result, bounds = model.predict(x, t), rounding(prediction, any_sde, x, t, output)
    for value, exact_value, bound in zip(result, expected, bounds, strict=True):
        assert value.dtype == dtype
        assert ((value - exact_value).abs() <= UNIT[dtype] * bound).all()
    if prediction in ("v", "edm"):
        # What they are for: at no time does either lose more than a few roundings of unit-variance data's.
        scale = 1 + x.abs() / torch.hypot(alpha, sigma)
        assert ((result.x0 - expected.x0).abs() <= 64 * UNIT[dtype] * scale).all()
        assert ((result.eps - expected.eps).abs() <= 64 * UNIT[dtype] * scale).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_knows_the_answer_is_the_exact_model(any_sde, ring, prediction):
    exact = ring.under(any_sde)

    def network(x, t):
        if prediction == "edm":
            t = any_sde.t_from_log_snr(-8 * t)
        alpha, sigma = any_sde.alpha(t)[:, None], any_sde.sigma(t)[:, None]
        if prediction == "edm":
            x = x * torch.hypot(sigma, alpha * SIGMA_DATA)
        return output_of(prediction, exact.denoise(x, t), exact.eps(x, t), alpha, sigma)

    model = DiffusionModel(network, any_sde, prediction, data_shape=(2,), sigma_data=SIGMA_DATA)
    x, t = (value[3:-3] for value in states(exact, torch.float64))
    # At these times 0.006 < σ/α < 200: a few roundings of x, and 14 of t found back from log(σ/α), move what
    # a mixture answers by less than (α/σ)² < 3e4 times as much, which is 1e-10.
    for name in ("denoise", "eps", "score", "velocity"):
        result, expected = getattr(model, name)(x, t), getattr(exact, name)(x, t)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_views_of_the_prediction(any_sde, dtype):
    model = DiffusionModel(lambda x, t: torch.sin(x), any_sde, "v", data_shape=(1, 2, 2))
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=dtype) * any_sde.T
    prediction = model.predict(x, t)
    assert isinstance(prediction, Prediction)
    assert torch.equal(model.denoise(x, t), prediction.x0)
    assert torch.equal(model.eps(x, t), prediction.eps)
    sigma, alpha_dot, sigma_dot = (
        function(t).reshape(3, 1, 1, 1) for function in (any_sde.sigma, any_sde.alpha_dot, any_sde.sigma_dot)
    )
    torch.testing.assert_close(model.score(x, t), -prediction.eps / sigma)
    torch.testing.assert_close(model.velocity(x, t), alpha_dot * prediction.x0 + sigma_dot * prediction.eps)
    for name in ("denoise", "eps", "score", "velocity"):
        assert getattr(model, name)(x, t).dtype == dtype
        assert torch.equal(getattr(model, name)(x, float(t[1])), getattr(model, name)(x, t[1]))
        torch.testing.assert_close(getattr(model, name)(x, t)[1:2], getattr(model, name)(x[1:2], t[1]))


def test_edm_is_the_papers_preconditioning(any_sde):
    """Karras et al. 2022, equation 7 and table 1, in x' = x/α and σ' = σ/α."""
    seen = []

    def network(x, t):
        seen.append((x, t))
        return torch.cos(3 * x)

    model = DiffusionModel(network, any_sde, "edm", data_shape=(3,), sigma_data=SIGMA_DATA)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(any_sde.t_min, any_sde.t_max, 20, dtype=torch.float64)
    denoised = model.denoise(x, t)
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    x_scaled, noise = x / alpha[:, None], sigma / alpha
    total = noise**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, noise * SIGMA_DATA / total.sqrt()
    c_in, c_noise = 1 / total.sqrt(), 0.25 * torch.log(noise)
    torch.testing.assert_close(seen[0][0], c_in[:, None] * x_scaled, rtol=1e-13, atol=0)
    torch.testing.assert_close(seen[0][1], c_noise, rtol=1e-13, atol=1e-14)
    expected = c_skip[:, None] * x_scaled + c_out[:, None] * torch.cos(3 * seen[0][0])
    torch.testing.assert_close(denoised, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_float32_network_takes_a_float64_state(any_sde, prediction):
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.dtypes = []

        def forward(self, x, t):
            self.dtypes.append((x.dtype, t.dtype, t.shape))
            return self.layer(x)

    torch.manual_seed(0)
    network = Recorder()
    model = DiffusionModel(network, any_sde, prediction, data_shape=(3,), sigma_data=SIGMA_DATA)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = 0.4 * any_sde.T
    x0, eps = model.predict(x, t)
    assert network.dtypes == [(torch.float32, torch.float32, (5,))]
    assert x0.dtype == eps.dtype == torch.float64
    alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (any_sde.alpha, any_sde.sigma))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-13, atol=1e-13)


def test_conditioning_reaches_the_network(any_sde):
    def network(x, t, label, strength=1.0):
        return strength * label[:, None] * x

    model = DiffusionModel(network, any_sde, "x0", data_shape=(2,))
    x, label = torch.ones(3, 2), torch.tensor([0.0, 1.0, 2.0])
    t = 0.5 * any_sde.T
    assert torch.equal(model.denoise(x, t, label=label), label[:, None] * x)
    assert torch.equal(model.predict(x, t, label=label, strength=3.0).x0, 3 * label[:, None] * x)
    for name in ("eps", "score", "velocity"):
        method = getattr(model, name)
        assert not torch.equal(method(x, t, label=label), method(x, t, label=label + 1))


def test_the_model_is_a_module():
    network = nn.Linear(2, 2)
    model = DiffusionModel(lambda x, t: network(x), VPSDE(), data_shape=[2])
    assert (model.prediction, model.sigma_data, model.data_shape) == ("edm", 0.5, (2,))
    assert model.data == DataInfo(bits=None)
    assert not list(model.parameters()), "a function's parameters are not the model's"
    info = DataInfo(bits=8)
    model = DiffusionModel(network, VPSDE(), data_shape=(2,), data=info)
    assert isinstance(model, nn.Module)
    assert isinstance(model, Model)
    assert list(model.state_dict()) == ["network.weight", "network.bias"]
    assert model.data is info


def test_gradients_reach_state_and_parameters(any_sde):
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for prediction in PREDICTIONS:
        model = DiffusionModel(lambda x, t: weight * torch.sin(x), any_sde, prediction, data_shape=(2,))
        x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        gradients = torch.autograd.grad(model.velocity(x, 0.5 * any_sde.T).sum(), (x, weight))
        assert all(torch.isfinite(gradient).all() and (gradient != 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "noise"}, "prediction = 'noise': must be one of eps, x0, v, score, edm"),
        ({"sigma_data": 0.0}, "sigma_data = 0.0"),
        ({"sigma_data": -1.0}, "sigma_data = -1.0"),
        ({"sigma_data": math.nan}, "sigma_data = nan"),
    ],
)
def test_parameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModel(nn.Identity(), VPSDE(), data_shape=(2,), **options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_calls_are_checked(prediction):
    model = DiffusionModel(lambda x, t: x, VPSDE(), prediction, data_shape=(1, 4, 4))
    for name in ("predict", "denoise", "eps", "score", "velocity"):
        method = getattr(model, name)
        for shape in ((2, 1, 4, 5), (1, 4, 4), (2, 16)):
            with pytest.raises(ValueError, match=r"x has shape \(.*\): need \(B, 1, 4, 4\)"):
                method(torch.zeros(shape), 0.5)
        with pytest.raises(ValueError, match=r"dtype torch\.uint8: need a floating dtype"):
            method(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 0.5)
        with pytest.raises(ValueError, match=r"t = 2\.0"):
            method(torch.zeros(2, 1, 4, 4), 2.0)


def test_an_exact_model_offers_the_same_interface(any_sde):
    model = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None]).under(any_sde)
    assert isinstance(model, Model)
    assert model.data == DataInfo(bits=None)
    x = torch.ones(3, 2)
    # N(0, I): E[x₀ | x] = α x/(α² + σ²).
    t = torch.tensor(0.5 * any_sde.T)
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    torch.testing.assert_close(model.denoise(x, t), alpha * x / (alpha**2 + sigma**2))
