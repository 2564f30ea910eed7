import math

import pytest
import torch
import torchsde
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion import EDMSDE, SDE, VESDE, VPSDE, ConstantVESDE, CosineVPSDE, FlowSDE, SubVPSDE
from sde_diffusion.chain import BETAS, GaussianChain
from sde_diffusion.sde import SDES, drift_in_log_noise

CLOSED_FORMS = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), CosineVPSDE(), ConstantVESDE(), FlowSDE()]
DATA_SHAPES = [(5,), (2, 3, 4)]


def gradient(values, t):
    """Elementwise derivative, itself differentiable; 0 where t has no part in the values."""
    if not values.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(values.sum(), t, create_graph=True, materialize_grads=True)[0]


def assert_matches(computed, reference, t, ulps=8, reference_error=0.0):
    """Hold a function of t in t's dtype to its reference (of a float64 t), but for rounding.

    A few roundings of the result, and a few of t and what is computed from it, which move it by |t d/dt|.
    """
    exact_t = t.double().requires_grad_()
    exact = reference(exact_t)
    slope = gradient(exact, exact_t)
    error = ulps * torch.finfo(t.dtype).eps * (exact.abs() + (t * slope).abs()) + reference_error
    assert computed.dtype == t.dtype
    assert computed.shape == t.shape
    assert torch.isfinite(computed).all()
    assert ((computed - exact).abs() <= error).all()


def exact_rates(sde):
    """α̇, σ̇, f and g of float64 times, by autograd of alpha and sigma alone: g² = d(σ²)/dt − 2 f σ²."""

    def alpha_dot(t):
        return gradient(sde.alpha(t), t)

    def sigma_dot(t):
        return gradient(sde.sigma(t), t)

    def drift_coefficient(t):
        return alpha_dot(t) / sde.alpha(t)

    def diffusion(t):
        return torch.sqrt(gradient(sde.sigma(t) ** 2, t) - 2 * drift_coefficient(t) * sde.sigma(t) ** 2)

    return {f.__name__: f for f in (alpha_dot, sigma_dot, drift_coefficient, diffusion)}


def autograd_error(sde, rate, t):
    """Rounding error of the rate by autograd in float64, beyond a few units in its own last place.

    σ̇ = g²/2σ + f σ is found as a sum that cancels: the derivative of expm1(−B) as (e^{−B} − 1) + 1. The α of the
    cosine SDE is a sine of c (1 − t), whose derivative, a cosine, is near 0 at t = 0: there the rounding of 1 − t and
    of its product with c moves α̇ by α̈ = −c² α times the error of the time, and f by that over α.
    """
    t = t.double()
    eps = torch.finfo(t.dtype).eps
    if rate == "sigma_dot":
        return 8 * eps * (sde.drift_coefficient(t) * sde.sigma(t)).abs()
    if isinstance(sde, CosineVPSDE) and rate in ("alpha_dot", "drift_coefficient"):
        frequency = 0.5 * math.pi / (1 + sde.offset)
        return 2 * eps * frequency**2 * (sde.alpha(t) if rate == "alpha_dot" else 1)
    return 0.0


RATES = ["alpha_dot", "sigma_dot", "drift_coefficient", "diffusion"]


@pytest.mark.parametrize("rate", RATES)
def test_rates_are_the_derivatives_of_the_marginal(any_sde, dtype, rate, times):
    t = times(any_sde, dtype=dtype)
    error = autograd_error(any_sde, rate, t)
    assert_matches(getattr(any_sde, rate)(t), exact_rates(any_sde)[rate], t, reference_error=error)


@pytest.mark.parametrize("rate", [*RATES, "log_snr", "t_from_log_snr"])
@pytest.mark.parametrize("sde", CLOSED_FORMS, ids=repr)
def test_defaults_agree_with_closed_forms(sde, rate, times):
    t = times(sde)
    argument = sde.log_snr(t) if rate == "t_from_log_snr" else t
    default, closed = getattr(SDE, rate)(sde, argument), getattr(sde, rate)(argument)
    # A few roundings. Bisection multiplies those of a log-SNR < 14 by |dt/d log-SNR|: at most T/2, and constant VE's T.
    # The log-SNR is a difference of logarithms: where it is near 0 they keep the roundings of what they are taken of,
    # 2 |dα|/α + 2 |dσ|/σ, whatever is left of them.
    absolute = {"t_from_log_snr": 14 * sde.T, "log_snr": 8}.get(rate, 0)
    bound = torch.finfo(t.dtype).eps * (16 * closed.abs() + absolute)
    assert ((default - closed).abs() <= bound + autograd_error(sde, rate, t)).all()


def test_every_named_sde_is_held_to_the_defaults():
    assert {type(sde) for sde in CLOSED_FORMS} <= set(SDES.values())
    assert len(CLOSED_FORMS) == len({type(sde) for sde in CLOSED_FORMS}) == 7


@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
def test_functions_of_time_keep_shape_and_dtype(any_sde, dtype, shape):
    t = torch.full(shape, 0.3 * any_sde.T, dtype=dtype)
    functions = [any_sde.alpha, any_sde.sigma, any_sde.log_snr, *(getattr(any_sde, rate) for rate in RATES)]
    for function in functions:
        assert function(t).shape == shape
        assert function(t).dtype == dtype
    assert any_sde.t_from_log_snr(t).dtype == dtype
    for value in (*any_sde.time_change(t - 1), *any_sde.reverse_rates(t, 1.0)):
        assert value.shape == shape
        assert value.dtype == dtype


def test_marginals_are_the_papers(times):
    t = times(VPSDE())
    integral = 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(VPSDE().alpha(t), torch.exp(-integral / 2))
    torch.testing.assert_close(VPSDE().alpha(t) ** 2 + VPSDE().sigma(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(SubVPSDE().alpha(t), torch.exp(-integral / 2))
    torch.testing.assert_close(SubVPSDE().sigma(t), VPSDE().sigma(t) ** 2)
    ends = torch.tensor([0, 0.5, 1], dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.5**0.5, 50], dtype=torch.float64)
    torch.testing.assert_close(VESDE(0.01, 50).sigma(ends), sigma)
    torch.testing.assert_close(EDMSDE().sigma(t), t)
    assert (VESDE().alpha(t) == 1).all()
    assert (EDMSDE().alpha(t) == 1).all()
    assert EDMSDE().T == 80


@pytest.mark.parametrize("offset", [0.0, 0.008, 0.1])
def test_cosine_marginals_are_the_papers(offset, times):
    """ᾱ = f(t)/f(0) with f(t) = cos²(½π (t + s)/(1 + s)): Nichol & Dhariwal's eq. 17."""
    sde = CosineVPSDE(offset)
    t = times(sde)

    def cosine(t):
        return torch.cos(0.5 * math.pi * (t + offset) / (1 + offset))

    alpha = cosine(t) / cosine(torch.zeros_like(t))
    # Near t = 1 the angle is a rounding, 1e-16, from its place beside π/2, and α is 1e-3; near t = 0, α is that from 1.
    torch.testing.assert_close(sde.alpha(t), alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.sigma(t) ** 2, 1 - alpha**2, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        sde.diffusion(t) ** 2,
        math.pi / (1 + offset) * torch.tan(0.5 * math.pi * (t + offset) / (1 + offset)),
        rtol=1e-12,
        atol=0,
    )


def test_cosine_without_offset_is_the_quarter_of_a_circle(user_sde, times):
    sde, t = CosineVPSDE(offset=0.0), times(user_sde)
    torch.testing.assert_close(sde.alpha(t), user_sde.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.sigma(t), user_sde.sigma(t), rtol=1e-15, atol=0)


def test_cosine_is_the_limit_of_the_cosine_chain():
    chain = GaussianChain.ddpm(BETAS["cosine"](1000))
    t = torch.arange(1000, dtype=torch.float64) / 1000
    # The last step is clipped; the others multiply a thousand ratios of two ᾱ.
    torch.testing.assert_close(CosineVPSDE().alpha(t), chain.marginal_scales[:-1], rtol=1e-11, atol=0)


def test_constant_ve_is_the_limit_of_the_chain_of_constant_rate():
    chain = GaussianChain.constant_rate(1000, 3.0)
    t = torch.arange(1001, dtype=torch.float64) / 1000
    sde = ConstantVESDE(3.0)
    torch.testing.assert_close(sde.sigma(t), chain.marginal_stds, rtol=1e-12, atol=0)
    assert (sde.alpha(t) == 1).all()
    assert (sde.drift_coefficient(t) == 0).all()
    assert (sde.diffusion(t) == 3).all()


def test_flow_is_the_straight_path(times, ring):
    sde = FlowSDE()
    t = times(sde)
    assert torch.equal(sde.alpha(t), 1 - t)
    assert torch.equal(sde.sigma(t), t)
    torch.testing.assert_close(sde.diffusion(t) ** 2, 2 * t / (1 - t), rtol=1e-15, atol=0)
    model, ends = ring.under(sde), torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    x = model.sample(3, t=0.5)
    x0, eps = model.predict(x, ends)
    assert torch.equal(sde.reverse(model, eta=0.0).drift(x, ends), eps - x0)


def test_diffusion_of_the_table(times):
    t = times(VPSDE())
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(VPSDE().diffusion(t) ** 2, beta)
    torch.testing.assert_close(SubVPSDE().diffusion(t) ** 2, beta * -torch.expm1(-2 * integral))
    torch.testing.assert_close(VESDE().diffusion(t) ** 2, 2 * VESDE().sigma(t) ** 2 * math.log(5000))
    torch.testing.assert_close(EDMSDE().diffusion(t) ** 2, 2 * t)


def test_log_snr(any_sde, dtype, times):
    def reference(t):
        return 2 * (torch.log(any_sde.alpha(t)) - torch.log(any_sde.sigma(t)))

    t = times(any_sde, dtype=dtype)
    assert_matches(any_sde.log_snr(t), reference, t)
    assert (any_sde.log_snr(t.sort().values).diff() <= 0).all()


@pytest.mark.parametrize("sde", CLOSED_FORMS, ids=repr)
def test_log_snr_is_infinite_where_there_is_no_noise_or_no_data(sde, dtype):
    ends = torch.tensor([0, sde.T], dtype=dtype)
    first, last = sde.log_snr(ends).tolist()
    assert not math.isnan(first)
    assert not math.isnan(last)
    assert (first == math.inf) == (not isinstance(sde, VESDE))
    assert (last == -math.inf) == isinstance(sde, CosineVPSDE | FlowSDE)
    assert torch.equal(sde.t_from_log_snr(torch.tensor([math.inf, -math.inf], dtype=dtype)), ends)


@given(fraction=st.floats(0, 1), power=st.floats(0, 9))
def test_time_from_log_snr_inverts_it(any_sde, dtype, fraction, power):
    span = any_sde.t_max - any_sde.t_min
    t = torch.tensor(any_sde.t_min + span * fraction * 10**-power, dtype=dtype)
    exact_t = t.double().requires_grad_()
    slope = gradient(any_sde.log_snr(exact_t), exact_t)
    # What one rounding of the log-SNR hides of t, and a few of t: near VP's t_min, where the log-SNR is 13.8 and its
    # slope -1/t, half a unit in its last place is already 5e-7 of t in float32, whatever the inverse. Near t = 0, VE
    # has only the absolute error.
    hidden = any_sde.log_snr(exact_t).abs() / slope.abs()
    error = (any_sde.t_from_log_snr(any_sde.log_snr(t)) - t).abs()
    assert error <= torch.finfo(dtype).eps * (hidden + 4 * t)
    assert error <= {torch.float32: 1e-6, torch.float64: 1e-12}[dtype] * any_sde.T
    if dtype == torch.float64 and t > 1e-3 * span:
        assert error <= 1e-12 * t


def test_log_snr_beyond_the_range_gives_the_ends(any_sde):
    beyond = torch.tensor([-math.inf, -1e3, math.inf])
    assert any_sde.t_from_log_snr(beyond).tolist() == [any_sde.T, any_sde.T, 0]
    assert VESDE().t_from_log_snr(torch.tensor(1e3)) == 0
    # Rates for which the root of the quadratic rounds up.
    assert VPSDE(0.482, 29.59).t_from_log_snr(torch.tensor(-1e3)) == 1


def test_time_from_log_snr_beyond_the_range_of_float32():
    # log-SNR from -25 to -40, where B and −log-SNR are equal but for less than a rounding.
    sde, t = VPSDE(0.1, 80.0), torch.linspace(0.8, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(sde.t_from_log_snr(sde.log_snr(t)), t, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["alpha", "sigma", "log_snr"])
def test_functions_of_time_compile_to_one_graph(any_sde, name):
    torch._dynamo.reset()
    function = getattr(any_sde, name)
    t = torch.tensor([0.2, 0.5, 0.9]) * any_sde.T
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(t), function(t))


def test_functions_of_time_stay_on_the_device_of_t(any_sde):
    t = torch.empty(3, device="meta")
    names = ("alpha", "sigma", "log_snr", "t_from_log_snr", *RATES)
    assert {getattr(any_sde, name)(t).device.type for name in names} == {"meta"}


def test_range_of_time(any_sde, dtype):
    assert 0 <= any_sde.t_min < 0.01 * any_sde.T
    assert 0.99 * any_sde.T < any_sde.t_max <= any_sde.T
    ends = torch.tensor([any_sde.t_min, any_sde.t_max], dtype=dtype)
    for function in (any_sde.log_snr, any_sde.alpha, any_sde.sigma, any_sde.sigma_dot, any_sde.diffusion):
        assert torch.isfinite(function(ends)).all()
    # Within a factor of 1000, but for rounding t: the log-SNR at the user's t_max moves by 2000 times that.
    slack = 2000 * torch.finfo(dtype).eps
    assert (any_sde.log_snr(ends).abs() <= 2 * math.log(1000) + slack).all()


def cosine_time(ratio, offset=0.008):
    """The time of σ/α = ratio: φ with sin² φ = (sin² φ₀ + ratio²)/(1 + ratio²), as cos φ = α cos φ₀."""
    scale = 0.5 * math.pi / (1 + offset)
    tangent = math.sqrt(math.sin(scale * offset) ** 2 + ratio**2) / math.cos(scale * offset)
    return math.atan(tangent) / scale - offset


@pytest.mark.parametrize(
    ("sde", "t_min", "t_max"),
    [
        # B = log(1 + 1e-6) and 2 asinh(5e-4), and t from beta_min t + beta_slope t²/2.
        (VPSDE(), (math.sqrt(0.01 + 39.8 * math.log1p(1e-6)) - 0.1) / 19.9, 1),
        (SubVPSDE(), (math.sqrt(0.01 + 79.6 * math.asinh(5e-4)) - 0.1) / 19.9, 1),
        (VESDE(), 0, 1),
        (VESDE(1e-4, 1e4), math.log(10) / math.log(1e8), math.log(1e7) / math.log(1e8)),
        (EDMSDE(), 0.002, 80),
        (CosineVPSDE(), cosine_time(1e-3), cosine_time(1e3)),
        (ConstantVESDE(), (1e-3 / 50) ** 2, 1),
        (ConstantVESDE(2e3), (1e-3 / 2e3) ** 2, 0.25),
        (FlowSDE(), 1e-3 / (1 + 1e-3), 1 / (1 + 1e-3)),
    ],
    ids=repr,
)
def test_ends_of_time(sde, t_min, t_max):
    # The roots above cancel a factor of 500 at VP, and of 300 at the cosine's start.
    assert sde.t_min == pytest.approx(t_min, rel=1e-12)
    assert sde.t_max == pytest.approx(t_max, rel=1e-12)


def test_ends_of_a_users_time(user_sde):
    assert user_sde.t_min == pytest.approx(math.atan(1e-3) * 2 / math.pi, rel=1e-12)
    assert user_sde.t_max == pytest.approx(math.atan(1e3) * 2 / math.pi, rel=1e-12)


def test_noisiest_edm_level_is_bounded():
    # Above a ratio of 1000 the range is cut, as for every SDE.
    assert EDMSDE(sigma_max=1e4).t_max == pytest.approx(1e3, rel=1e-12)


@pytest.mark.parametrize("data_shape", DATA_SHAPES)
def test_prior_density(any_sde, data_shape):
    x = any_sde.prior_std * torch.randn(4, *data_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), any_sde.prior_std)
    expected = reference.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(any_sde.prior_log_prob(x), expected, rtol=1e-13, atol=0)


def test_prior_samples(any_sde, dtype):
    def draw(seed):
        return any_sde.sample_prior((64, 2, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=dtype)

    x = draw(0)
    assert x.shape == (64, 2, 8, 8)
    assert x.dtype == dtype
    assert torch.equal(x, draw(0))
    assert not torch.equal(x, draw(1))
    scaled = (x / any_sde.prior_std).double()
    assert scaled.mean().abs() < 4 / math.sqrt(x.numel())
    assert (scaled.square().mean() - 1).abs() < 4 * math.sqrt(2 / x.numel())


def test_prior_is_the_noise_at_the_end(any_sde):
    last = torch.tensor(any_sde.t_max, dtype=torch.float64)
    # VP and sub-VP give N(0, I) for a noise of 1 - e^-10.05 in variance and in deviation.
    expected = float(any_sde.sigma(last))
    assert any_sde.prior_std == pytest.approx(expected, rel=1e-12, abs=1.001 * math.exp(-10.05))


@pytest.mark.parametrize("data_shape", DATA_SHAPES)
def test_marginal_and_perturb(any_sde, dtype, data_shape):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, *data_shape, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=dtype) * any_sde.T
    mean, std = any_sde.marginal(x0, t)
    assert mean.shape == x0.shape
    assert std.shape == (3, *(1 for _ in data_shape))
    x = any_sde.perturb(x0, t, noise)
    assert x.dtype == dtype
    for i in range(3):
        torch.testing.assert_close(mean[i], any_sde.alpha(t[i]) * x0[i])
        torch.testing.assert_close(x[i], any_sde.alpha(t[i]) * x0[i] + any_sde.sigma(t[i]) * noise[i])
        torch.testing.assert_close(x[i : i + 1], any_sde.perturb(x0[i : i + 1], t[i], noise[i : i + 1]))
    assert any_sde.marginal(x0, t[0])[1].shape == ()
    assert torch.equal(any_sde.perturb(x0, float(t[0]), noise), any_sde.perturb(x0, t[0], noise))


@pytest.mark.parametrize("data_shape", DATA_SHAPES)
def test_drift(any_sde, dtype, data_shape):
    x = torch.randn(3, *data_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=dtype) * any_sde.T
    drift = any_sde.drift(x, t)
    assert drift.dtype == dtype
    for i in range(3):
        torch.testing.assert_close(drift[i], any_sde.drift_coefficient(t[i]) * x[i])
    assert torch.equal(any_sde.drift(x, float(t[1])), any_sde.drift(x, t[1]))


def test_time_change(any_sde):
    first, last = any_sde.log_noise(any_sde.t_min), any_sde.log_noise(any_sde.t_max)
    u = torch.linspace(first, last, 52, dtype=torch.float64)[1:-1]
    t, dt_du = any_sde.time_change(u)
    for i in (0, 25, 49):
        assert any_sde.log_noise(float(t[i])) == pytest.approx(float(u[i]), abs=1e-12)
    noise_rate = any_sde.diffusion(t) ** 2 * dt_du
    # At the end of the user's time, where α < 0.0015, what is left of α multiplies its rounding by 1000.
    rtol = 2000 * torch.finfo(u.dtype).eps
    torch.testing.assert_close(noise_rate, 2 * any_sde.sigma(t) ** 2, rtol=rtol, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_reverse_drift(any_sde, ring, eta):
    model = ring.under(any_sde)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64) * any_sde.T
    x = model.sample(4, t=0.5 * any_sde.T)
    f, g, score = any_sde.drift_coefficient(t)[:, None], any_sde.diffusion(t)[:, None], model.score(x, t)
    noise_part = 0.5 * (1 + eta**2) * g**2 * score
    # The two forms differ by the rounding of terms that cancel; 64 of them covers an α of 0.08 at t = 0.95.
    bound = 64 * torch.finfo(torch.float64).eps * ((f * x).abs() + noise_part.abs() + (g**2 * score).abs())
    reverse = any_sde.reverse(model, eta)
    assert ((reverse.drift(x, t) - (f * x - noise_part)).abs() <= bound).all()
    torch.testing.assert_close(reverse.diffusion(t), eta * any_sde.diffusion(t))
    assert torch.equal(reverse.drift(x, float(t[0])), reverse.drift(x, t[0]))
    if eta == 0:
        assert torch.equal(reverse.drift(x, t), model.velocity(x, t))


def level(t):
    """A noise level for any SDE."""
    return torch.sqrt(0.3 + t)


def test_reverse_drift_at_a_noise_level(any_sde, ring):
    """α̇ x̂₀ + σ̇ ε̂ + ½ w²/σ ε̂, with w in place of η g."""
    model = ring.under(any_sde)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64) * any_sde.T
    x = model.sample(4, t=0.5 * any_sde.T)
    x0, eps = model.predict(x, t)
    from_noise = 0.5 * level(t) ** 2 / any_sde.sigma(t)
    terms = any_sde.alpha_dot(t)[:, None] * x0, any_sde.sigma_dot(t)[:, None] * eps, from_noise[:, None] * eps
    reverse = any_sde.reverse(model, eta=level)
    bound = 8 * torch.finfo(t.dtype).eps * sum(term.abs() for term in terms)
    assert ((reverse.drift(x, t) - sum(terms)).abs() <= bound).all()
    assert torch.equal(reverse.diffusion(t), level(t))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_number_eta_is_the_noise_level_eta_g(any_sde, ring, eta):
    model = ring.under(any_sde)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64) * any_sde.T
    x = model.sample(4, t=0.5 * any_sde.T)
    by_number, by_level = (any_sde.reverse(model, e) for e in (eta, lambda t: eta * any_sde.diffusion(t)))
    assert torch.equal(by_number.drift(x, t), by_level.drift(x, t))
    assert torch.equal(by_number.diffusion(t), by_level.diffusion(t))


def test_no_variance_depends_on_the_noise_level(any_sde):
    """Backwards in time, dv/dt = 2 k v − w² for a drift k x: at v = α² c + σ² it is d(α² c + σ²)/dt whatever w is."""
    c, t = 0.5, torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64, requires_grad=True)
    variance = any_sde.alpha(any_sde.T * t) ** 2 * c + any_sde.sigma(any_sde.T * t) ** 2
    expected = gradient(variance, t) / any_sde.T
    t, v = any_sde.T * t.detach(), variance.detach()
    for eta in (0.0, 1.0, level):
        data_rate, noise_rate = any_sde.reverse_rates(t, eta)
        k = (data_rate * any_sde.alpha(t) * c + noise_rate * any_sde.sigma(t)) / v
        spread = any_sde.reverse_diffusion(t, eta) ** 2
        terms = 2 * any_sde.alpha(t) * data_rate * c, 2 * any_sde.sigma(t) * noise_rate, spread
        bound = 32 * torch.finfo(t.dtype).eps * sum(term.abs() for term in terms)
        bound = bound + 2 * any_sde.sigma(t) * autograd_error(any_sde, "sigma_dot", t)
        assert ((2 * k * v - spread - expected).abs() <= bound).all()


def test_a_flow_with_a_finite_noise_level_starts_where_g_is_infinite(ring, dtype):
    sde = FlowSDE()
    model = ring.under(sde)
    x, last = torch.ones(3, 2, dtype=dtype), torch.ones((), dtype=dtype)
    assert sde.diffusion(last) == math.inf
    reverse = sde.reverse(model, eta=lambda t: torch.sqrt(2 * t))
    x0, eps = model.predict(x, last)
    # σ̇ + ½ w²/σ = 1 + 1.
    torch.testing.assert_close(reverse.drift(x, 1.0), 2 * eps - x0)
    assert torch.isfinite(reverse.drift(x, 1.0)).all()
    assert torch.equal(reverse.diffusion(last), torch.sqrt(2 * last))


@pytest.mark.parametrize("sde", [EDMSDE(), FlowSDE()], ids=repr)
def test_the_odes_rates_are_finite_without_noise(sde):
    start = torch.zeros(())
    assert sde.sigma(start) == 0
    assert sde.reverse_rates(start, 0.0) == (sde.alpha_dot(start), 1)


@pytest.mark.parametrize("sde", CLOSED_FORMS, ids=repr)
def test_the_ode_is_finite_at_the_end_of_time(sde, ring, dtype):
    model, x = ring.under(sde), torch.ones(3, 2, dtype=dtype)
    reverse = sde.reverse(model, eta=0.0)
    assert torch.isfinite(reverse.drift(x, sde.T)).all()
    assert reverse.diffusion(torch.tensor(sde.T, dtype=dtype)) == 0


@pytest.mark.parametrize(
    ("eta", "got"),
    [(lambda t: 1.0, "1.0"), (lambda t: torch.ones(3), r"\(3,\)"), (lambda t: t[None], r"\(1, 2\)")],
)
def test_a_noise_level_of_another_shape_is_an_error(any_sde, ring, eta, got):
    t = torch.tensor([0.3, 0.6]) * any_sde.T
    reverse = any_sde.reverse(ring.under(any_sde), eta)
    for call in (lambda: reverse.diffusion(t), lambda: reverse.drift(torch.ones(2, 2), t)):
        with pytest.raises(ValueError, match=rf"eta\(t\) = {got} for t of shape \(2,\): must be a tensor of that"):
            call()


@pytest.mark.parametrize("eta", [0.0, 1.0, level], ids=["ode", "sde", "level"])
def test_drift_over_log_noise_is_the_drift_over_time(any_sde, ring, eta):
    model = ring.under(any_sde)
    x = any_sde.perturb(ring.sample(4), 0.4 * any_sde.T, torch.ones(4, 2, dtype=torch.float64))
    u = torch.tensor(any_sde.log_noise(0.4 * any_sde.T), dtype=torch.float64)
    t, dt_du = any_sde.time_change(u)
    over_u = drift_in_log_noise(any_sde, model.predict, x, u, eta)
    over_t = any_sde.reverse(model, eta).drift(x, t) * dt_du
    torch.testing.assert_close(over_u, over_t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rates_over_log_noise_are_rounded_once(any_sde, eta):
    x, none = torch.ones(5, 3), torch.zeros(5, 3)
    u = torch.tensor(any_sde.log_noise(any_sde.t_min) + 0.1, dtype=torch.float64)
    for answer in ((x, none), (none, x)):
        exact = drift_in_log_noise(any_sde, lambda x, t, pair=answer: pair, x.double(), u, eta)
        rounded = drift_in_log_noise(any_sde, lambda x, t, pair=answer: pair, x, u, eta)
        assert torch.equal(rounded, exact.float())


def test_simulated_forward_sde_has_the_marginals(any_sde):
    start, steps, paths, x0 = any_sde.t_min, 200, 4000, 1.5
    end = float(any_sde.t_from_log_snr(torch.tensor(0.0, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(0)
    data = torch.full((paths, 1), x0, dtype=torch.float64)
    x = any_sde.perturb(data, start, torch.randn(paths, 1, generator=generator, dtype=torch.float64))

    class Forward:
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, x):
            return any_sde.drift(x, t)

        def g(self, t, x):
            return any_sde.diffusion(t).expand_as(x)

    step = (end - start) / steps
    brownian = torchsde.BrownianInterval(start, end, size=x.shape, dtype=x.dtype, entropy=0)
    ends = torch.tensor([start, end], dtype=torch.float64)
    simulated = torchsde.sdeint(Forward(), x, ends, bm=brownian, method="euler", dt=step)[-1]

    # Euler's own mean and variance: its bias is what they differ by from the marginal.
    mean, variance = any_sde.alpha(ends[:1]) * x0, any_sde.sigma(ends[:1]) ** 2
    for t in start + step * torch.arange(steps, dtype=torch.float64)[:, None]:
        growth = 1 + step * any_sde.drift_coefficient(t)
        mean, variance = growth * mean, growth**2 * variance + step * any_sde.diffusion(t) ** 2
    exact_mean, exact_std = any_sde.alpha(ends[1:]) * x0, any_sde.sigma(ends[1:])
    mean_bias, std_bias = (mean - exact_mean).abs(), (variance.sqrt() - exact_std).abs()
    # First order in the step: about 1/200 times the 4.6 e-folds of the noise that VE's 200 steps take.
    assert mean_bias < 0.02 * x0
    assert std_bias < 0.03 * exact_std
    assert (simulated.mean() - exact_mean).abs() < 4 * exact_std / math.sqrt(paths) + mean_bias
    assert (simulated.std() - exact_std).abs() < 4 * exact_std / math.sqrt(2 * paths) + std_bias


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VPSDE(20.0, 0.1), "beta_min = 20.0, beta_max = 0.1"),
        (lambda: SubVPSDE(beta_min=0.0), "beta_min = 0.0"),
        (lambda: VESDE(50.0, 0.01), "sigma_min = 50.0, sigma_max = 0.01"),
        (lambda: VESDE(sigma_min=0.0), "sigma_min = 0.0"),
        (lambda: EDMSDE(1.0, 1.0), "sigma_min = 1.0, sigma_max = 1.0"),
        (lambda: EDMSDE(sigma_max=math.inf), "sigma_max = inf"),
        (lambda: ConstantVESDE(0.0), "sigma_q = 0.0: must be positive and finite"),
        (lambda: ConstantVESDE(-1.0), "sigma_q = -1.0"),
        (lambda: ConstantVESDE(math.inf), "sigma_q = inf"),
        (lambda: ConstantVESDE(math.nan), "sigma_q = nan"),
        (lambda: CosineVPSDE(-0.1), "offset = -0.1: must be finite and at least 0"),
        (lambda: CosineVPSDE(offset=math.inf), "offset = inf"),
        (lambda: CosineVPSDE(offset=math.nan), "offset = nan"),
    ],
)
def test_parameters_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("t", [-0.1, 80.5, math.nan])
def test_time_outside_the_range_is_named(any_sde, ring, t):
    x = torch.zeros(2, 2, dtype=torch.float64)
    model = ring.under(any_sde)
    for call in (
        lambda: any_sde.drift(x, t),
        lambda: any_sde.marginal(x, t),
        lambda: any_sde.perturb(x, t, x),
        lambda: any_sde.reverse(model).drift(x, t),
        lambda: model.score(x, t),
        lambda: any_sde.check_time("t", t),
    ):
        with pytest.raises(ValueError, match=rf"t = {t} is outside the range \[0, {any_sde.T}\] of"):
            call()


@pytest.mark.parametrize("eta", [-1.0, math.nan, math.inf])
def test_eta_is_checked(ring, eta):
    with pytest.raises(ValueError, match=f"eta = {eta}"):
        VPSDE().reverse(ring.under(VPSDE()), eta=eta)


def test_integer_data_are_refused(any_sde):
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        any_sde.perturb(codes, torch.tensor([0.1, 0.2]), torch.zeros(2, 3))


def test_an_sde_must_define_its_marginal():
    t = torch.zeros(())
    with pytest.raises(NotImplementedError, match=r"SDE must define alpha\(t\)"):
        SDE().alpha(t)
    with pytest.raises(NotImplementedError, match=r"SDE must define sigma\(t\)"):
        SDE().sigma(t)


@pytest.mark.parametrize(
    "sde", [*CLOSED_FORMS, VPSDE(0.2, 30.0), EDMSDE(0.01, 10.0), CosineVPSDE(0.02), ConstantVESDE(3.0)], ids=repr
)
def test_repr_builds_an_equal_sde(sde):
    assert sde.t_min < sde.t_max, "read first: what it caches is no parameter"
    rebuilt = eval(repr(sde))
    assert type(rebuilt) is type(sde)
    assert repr(rebuilt) == repr(sde)
    assert (rebuilt.t_min, rebuilt.t_max, rebuilt.T) == (sde.t_min, sde.t_max, sde.T)


def test_repr_of_a_users_sde(user_sde):
    assert user_sde.t_min < user_sde.t_max
    assert repr(user_sde) == "UserSDE()"
