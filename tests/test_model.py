import math

import pytest
import torch
from torch import nn

from sde_diffusion import EDMSDE, VESDE, VPSDE, DataInfo, DiffusionModel, FlowSDE, GaussianMixture, Prediction
from sde_diffusion.chain import GaussianChain
from sde_diffusion.model import PREDICTIONS, Model, VariancePrediction

SIGMA_DATA = 0.7
MEAN_STEP = 0.02  # of the SDE's T
UNIT = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}


def build(network, sde, prediction, data_shape=(2,), **options):
    options = {"sigma_data": SIGMA_DATA, "mean_step": MEAN_STEP * sde.T, **options}
    return DiffusionModel(network, sde, prediction, data_shape=data_shape, **options)


def scales_of_mean(sde, t):
    """α_s, σ_s and 1 − SNR_t/SNR_s of the state that "mean" predicts; 1, 0 and 1 for the data."""
    s = (t - MEAN_STEP * sde.T).clamp(min=0)
    share = -torch.expm1(sde.log_snr(t) - sde.log_snr(s))
    return (torch.where(s > 0, value, end) for value, end in ((sde.alpha(s), 1.0), (sde.sigma(s), 0.0), (share, 1.0)))


def output_of(prediction, sde, t, x0, eps):
    """What a network should put out for E[x₀ | x] and E[ε | x] (n, ...) at t (n,); float64."""
    t = t.reshape(-1, *(1,) * (x0.ndim - 1)) if t.ndim else t
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    alpha_s, sigma_s, _ = scales_of_mean(sde, t)
    return {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "score": lambda: -eps / sigma,
        "flow": lambda: sde.alpha_dot(t) * x0 + sde.sigma_dot(t) * eps,
        # In x' = x/α and σ' = σ/α: the target (x₀ − c_skip x')/c_out, without the difference.
        "edm": lambda: (sigma / SIGMA_DATA * x0 - alpha * SIGMA_DATA * eps) / torch.hypot(sigma, alpha * SIGMA_DATA),
        # x_s = α_s x₀ + σ_s ε_s, and of ε_s the part that is seen in ε.
        "mean": lambda: alpha_s * x0 + alpha / alpha_s * sigma_s**2 / sigma * eps,
    }[prediction]()


def sensitivities(prediction, sde, t):
    """How x̂₀ and ε̂ each move with x and with the output: |∂x̂₀/∂x|, |∂x̂₀/∂F|, |∂ε̂/∂x|, |∂ε̂/∂F|."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    one, none = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "flow":
        alpha_dot, sigma_dot = sde.alpha_dot(t), sde.sigma_dot(t)
        determinant = alpha * sigma_dot - alpha_dot * sigma
        return tuple(value.abs() / determinant for value in (sigma_dot, sigma, alpha_dot, alpha))
    if prediction == "mean":
        alpha_s, sigma_s, share = scales_of_mean(sde, t)
        a, b = alpha_s * share, alpha / alpha_s * (sigma_s / sigma) ** 2
        return b / a, 1 / a, alpha_s / (a * sigma), alpha / (a * sigma)
    square, norm = alpha**2 + sigma**2, torch.hypot(sigma, alpha * SIGMA_DATA)
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
    x0_x, x0_f, eps_x, eps_f = sensitivities(prediction, sde, t)
    moved = t * (sde.sigma_dot(t) / sde.sigma(t) - sde.drift_coefficient(t))
    scale = 8 + 4 * moved
    if prediction == "mean":
        # 1 − SNR_t/SNR_s is known to eps of the logarithms.
        _, _, share = scales_of_mean(sde, t)
        scale = scale + 4 * (sde.log_snr(t).abs() + moved) / share
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
def test_any_output_adds_up_to_the_state(any_sde, dtype, times, prediction):
    t = times(any_sde, dtype=dtype)
    x, output = torch.randn(2, len(t), 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x0, eps = build(lambda x, t: output, any_sde, prediction, (3,)).predict(x, t)
    alpha, sigma = any_sde.alpha(t)[:, None], any_sde.sigma(t)[:, None]
    x0_x, x0_f, eps_x, eps_f = (value[:, None].to(dtype) for value in sensitivities(prediction, any_sde, t.double()))
    # A few roundings of each of the terms that are added.
    terms = (1 + alpha * x0_x + sigma * eps_x) * x.abs() + (alpha * x0_f + sigma * eps_f) * output.abs()
    assert ((alpha * x0 + sigma * eps - x).abs() <= 8 * UNIT[dtype] * terms).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_the_exact_prediction(any_sde, dtype, ring, prediction):
    exact = ring.under(any_sde)
    x, t = states(exact, dtype)
    alpha, sigma = any_sde.alpha(t.double())[:, None], any_sde.sigma(t.double())[:, None]
    expected = exact.predict(x.double(), t.double())
    output = output_of(prediction, any_sde, t.double(), *expected).to(dtype)
    model = build(lambda x, t: output, any_sde, prediction)
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
            x = x * torch.hypot(any_sde.sigma(t), any_sde.alpha(t) * SIGMA_DATA)[:, None]
        return output_of(prediction, any_sde, t, *exact.predict(x, t))

    model = build(network, any_sde, prediction)
    x, t = (value[3:-3] for value in states(exact, torch.float64))
    # At these times 0.006 < σ/α < 200: a few roundings of x, and 14 of t found back from log(σ/α), move what
    # a mixture answers by less than (α/σ)² < 3e4 times as much, which is 1e-10.
    for name in ("denoise", "eps", "score", "velocity"):
        result, expected = getattr(model, name)(x, t), getattr(exact, name)(x, t)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_of_the_network(any_sde, dtype, prediction):
    x, t = states(GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None]).under(any_sde), torch.float64)
    x0, eps = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = build(nn.Identity(), any_sde, prediction)
    expected = output_of(prediction, any_sde, t, x0, eps)
    # To the terms that are added: α and σ move with a rounding of t.
    terms = sum(output_of(prediction, any_sde, t, *pair).abs() for pair in ((x0, 0 * eps), (0 * x0, eps)))
    moved = (t * (any_sde.sigma_dot(t) / any_sde.sigma(t) - any_sde.drift_coefficient(t)))[:, None]
    output = model.output_for(x0.to(dtype), eps.to(dtype), t.to(dtype))
    assert output.dtype == dtype
    assert ((output - expected).abs() <= UNIT[dtype] * (8 + 4 * moved) * terms).all()
    together = model.output_for(x0, eps, float(t[5]))
    torch.testing.assert_close(together[5], expected[5], rtol=1e-12, atol=1e-12 * float(terms[5].max()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_are_inverses_of_their_targets(any_sde, dtype, times, prediction):
    t = times(any_sde, dtype=dtype)
    x0, eps = torch.randn(2, len(t), 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    output = build(nn.Identity(), any_sde, prediction, (3,)).output_for(x0, eps, t)
    model = build(lambda x, t: output, any_sde, prediction, (3,))
    result = model.predict(any_sde.perturb(x0, t, eps), t)
    # Their errors are those of the terms of x and of the output, times the part that these have in them.
    time = t.double()[:, None]
    alpha, sigma = any_sde.alpha(time), any_sde.sigma(time)
    x0_x, x0_f, eps_x, eps_f = sensitivities(prediction, any_sde, time)
    of_x = alpha * x0.abs() + sigma * eps.abs()
    pairs = [(x0.double(), 0 * eps.double()), (0 * x0.double(), eps.double())]
    of_output = sum(output_of(prediction, any_sde, t.double(), *pair).abs() for pair in pairs)
    scale = 16 * UNIT[dtype] * torch.ones_like(time)
    if prediction == "mean":
        # Both directions know the share of new noise to the rounding of the logarithms, in float64.
        _, _, share = scales_of_mean(any_sde, time)
        moved = time * (any_sde.sigma_dot(time) / sigma - any_sde.drift_coefficient(time))
        scale = scale + 16 * UNIT[torch.float64] * (1 + any_sde.log_snr(time).abs() + moved) / share
    x0_error, eps_error = scale * (x0_x * of_x + x0_f * of_output), scale * (eps_x * of_x + eps_f * of_output)
    assert ((result.x0 - x0).abs() <= x0_error).all()
    assert ((result.eps - eps).abs() <= eps_error).all()
    # And back: the same errors, as the output answers to them.
    one, zero = torch.ones_like(x0), torch.zeros_like(x0)
    of_x0, of_eps = model.output_for(one, zero, t).abs(), model.output_for(zero, one, t).abs()
    assert (
        (model.output_for(*result, t) - output).abs() <= of_x0 * x0_error + of_eps * eps_error + scale * of_output
    ).all()


ENDS = {
    # (SDE, time): the predictions that say more than x does.
    (FlowSDE(), 1.0): {"x0", "v", "flow", "edm", "mean"},
    (FlowSDE(), 0.0): {"eps", "v", "score", "flow", "edm"},
    # g is finite here, so that σ rises from 0 as √t and the velocity is infinite.
    (VPSDE(), 0.0): {"eps", "v", "score", "edm"},
    (VPSDE(), 1.0): set(PREDICTIONS),
    (EDMSDE(), 0.0): {"eps", "v", "score", "flow", "edm"},
    (VESDE(), 0.0): set(PREDICTIONS),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sde", "t"), ENDS, ids=lambda value: str(value))
def test_the_ends_of_time(ring, dtype, sde, t, prediction):
    """At α = 0 and σ = 0 a pair is exact, or refused with what to do."""
    exact = GaussianMixture(ring.means.to(dtype), 0.01 * torch.eye(2, dtype=dtype).expand(8, 2, 2)).under(sde)
    x = exact.sample(5, t=t)
    seen = []

    def network(x, time):
        seen.append(time)
        # The score at σ = 0 is finite, but says nothing that x does not, and −ε/σ is not it.
        return model.output_for(*expected, t).nan_to_num()

    model = build(network, sde, prediction)
    if prediction not in ENDS[sde, t]:
        with pytest.raises(ValueError, match=rf"t_start = {t}: prediction '{prediction}' does not determine") as error:
            model.check_time("t_start", t)
        assert set(str(error.value).partition("one of ")[2].split(", ")) == ENDS[sde, t]
        return
    assert model.check_time("t_start", t) == t
    expected = exact.predict(x, t)
    result = model.predict(x, t)
    assert all(torch.isfinite(time).all() for time in seen)
    gains = sensitivities(prediction, sde, torch.tensor(t, dtype=torch.float64))
    output = model.output_for(*expected, t).nan_to_num().abs()
    for value, exact_value, (of_x, of_output) in zip(result, expected, (gains[:2], gains[2:]), strict=True):
        assert torch.isfinite(value).all()
        assert ((value - exact_value).abs() <= 32 * UNIT[dtype] * (of_x * x.abs() + of_output * output)).all()


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_an_end_is_where_its_rounding_begins(user_sde, prediction):
    # cos(½π) is 6e-17 in float64, and what is left of x₀ there is no answer.
    model = build(nn.Identity(), user_sde, prediction)
    assert model.check_time("t", user_sde.t_max) == user_sde.t_max
    with pytest.raises(ValueError, match="one of x0, v, flow, edm, mean"):
        model.check_time("t", 1.0)
    with pytest.raises(ValueError, match=r"t = 1\.5 is outside"):
        model.check_time("t", 1.5)


def test_the_mean_is_that_of_the_chain(any_sde):
    """a and b are the posterior's of the chain whose steps are Δ long, and the first state is the data."""
    chain = GaussianChain.from_sde(any_sde, [i * MEAN_STEP * any_sde.T for i in range(1, 40)])
    zero, one = torch.zeros(39, 1, dtype=torch.float64), torch.ones(39, 1, dtype=torch.float64)
    # x̂₀ = (F − b x)/a
    slope = build(lambda x, t: one, any_sde, "mean", (1,)).predict(zero, chain.times[1:]).x0[:, 0]
    skip = build(lambda x, t: zero, any_sde, "mean", (1,)).predict(one, chain.times[1:]).x0[:, 0]
    a, b, _ = chain.posterior()
    # The chain's times differ from multiples of Δ by their rounding, in a step of a fiftieth of T; its variances are
    # differences.
    torch.testing.assert_close(1 / slope, a, rtol=1e-9, atol=0)
    torch.testing.assert_close(-skip / slope, b, rtol=1e-9, atol=1e-12)


def test_the_mean_of_a_gaussian(any_sde):
    """For data N(0, c): E[x_s | x_t] = x_t Cov(x_s, x_t)/Var(x_t), with no posterior in it."""
    t = torch.linspace(0.2, 0.9, 7, dtype=torch.float64) * any_sde.t_max
    s = t - MEAN_STEP * any_sde.T
    alpha, alpha_s, variance = any_sde.alpha(t), any_sde.alpha(s), 0.3
    covariance = alpha / alpha_s * (alpha_s**2 * variance + any_sde.sigma(s) ** 2)
    total = alpha**2 * variance + any_sde.sigma(t) ** 2
    x = torch.ones(7, 1, dtype=torch.float64)
    exact = GaussianMixture(torch.zeros(1, 1), torch.full((1, 1, 1), variance).double()).under(any_sde)
    mean = build(nn.Identity(), any_sde, "mean", (1,)).output_for(*exact.predict(x, t), t)
    torch.testing.assert_close(mean[:, 0], covariance / total, rtol=1e-6, atol=0)


def test_small_steps_of_the_mean_keep_float32(any_sde):
    """x̂₀ = (F − b x)/a with a as small as the step: as good in float32 as its argument."""
    t = torch.linspace(0.2, 0.9, 7) * any_sde.t_max
    result = [
        build(lambda x, t: torch.ones_like(x), any_sde, "mean", (1,), mean_step=1e-5 * any_sde.T)
        .predict(torch.zeros(7, 1, dtype=dtype), t.to(dtype))
        .x0.double()
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*result, rtol=4 * UNIT[torch.float32], atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("data_shape", [(2,), (3, 4, 4)])
def test_learned_variance(any_sde, dtype, prediction, data_shape):
    generator = torch.Generator().manual_seed(0)
    x, output, variance = torch.randn(3, 5, *data_shape, generator=generator, dtype=dtype)
    t = torch.linspace(0.2, 0.9, 5, dtype=dtype) * any_sde.t_max
    expected = build(lambda x, t: output, any_sde, prediction, data_shape).predict(x, t)
    both = torch.cat([output, variance], 1)
    model = build(lambda x, t: both, any_sde, prediction, data_shape, learned_variance=True)
    result = model.predict(x, t)
    assert isinstance(result, VariancePrediction)
    assert isinstance(result, Prediction)
    x0, eps = result
    assert torch.equal(x0, expected.x0)
    assert torch.equal(eps, expected.eps)
    assert torch.equal(model.denoise(x, t), x0)
    assert result.fraction.dtype == dtype
    assert torch.equal(result.fraction, (variance + 1) / 2)


def test_learned_variances_are_told_by_their_channels():
    x = torch.zeros(3, 2, 4)
    doubled = build(lambda x, t: torch.cat([x, x], 1), VPSDE(), "v", (2, 4), learned_variance=False)
    with pytest.raises(ValueError, match=r"network returned shape \(3, 4, 4\): must be \(3, 2, 4\)"):
        doubled.predict(x, 0.5)
    for network in (lambda x, t: x, lambda x, t: torch.cat([x, x], 2)):
        with pytest.raises(ValueError, match=r"network returned shape .*: must be \(3, 4, 4\)"):
            build(network, VPSDE(), "v", (2, 4), learned_variance=True).predict(x, 0.5)


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
    model = build(network, any_sde, prediction, (3,))
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
        ({"prediction": "noise"}, "prediction = 'noise': must be one of eps, x0, v, score, flow, edm, mean"),
        ({"sigma_data": 0.0}, "sigma_data = 0.0"),
        ({"sigma_data": -1.0}, "sigma_data = -1.0"),
        ({"sigma_data": math.nan}, "sigma_data = nan"),
        ({"sigma_data": math.inf}, "sigma_data = inf"),
        ({"mean_step": 0.0}, "mean_step = 0.0: must be positive and finite"),
        ({"mean_step": math.nan}, "mean_step = nan"),
        ({"learned_variance": True, "data_shape": ()}, "learned_variance = True"),
    ],
)
def test_parameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModel(nn.Identity(), VPSDE(), **({"data_shape": (2,)} | options))


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
