import math
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.distributions import Normal, kl_divergence

from sde_diffusion import EDMSDE, VPSDE, DiffusionModel, GaussianChain
from sde_diffusion.losses import (
    SPREADS,
    TIMES,
    VLB,
    WEIGHTINGS,
    Hybrid,
    Importance,
    Likelihood,
    LogNormal,
    LossSecondMoment,
    Mean,
    MinSNR,
    TimeSampler,
    Uniform,
    antithetic,
    denoising_loss,
    step_kl,
    stratified,
)
from sde_diffusion.model import PREDICTIONS

SIGMA_DATA = 0.7
EPS = torch.finfo(torch.float64).eps


def batch(sde, dtype=torch.float64, n=20, data_shape=(3,)):
    """x₀ (n, ...), ε, a network's output, and times over the whole range."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(n, *data_shape, generator=generator, dtype=dtype) for _ in range(3))
    u = torch.linspace(sde.log_noise(sde.t_min), sde.log_noise(sde.t_max), n, dtype=torch.float64)
    return x0, noise, output, sde.t_from_log_snr(-2 * u).clamp(sde.t_min, sde.t_max).to(dtype)


def model_of(sde, prediction, output, fraction=None, **options):
    """A model whose network has this output, and learns variances if there is a fraction."""
    full = output if fraction is None else torch.cat([output, 2 * fraction - 1], 1)
    return DiffusionModel(
        lambda x, t: full,
        sde,
        prediction,
        data_shape=output.shape[1:],
        sigma_data=SIGMA_DATA,
        learned_variance=fraction is not None,
        **options,
    )


def weight_on_x0(sde, t, weighting="simple", **options):
    """w(t) in terms of x0: the loss of an error of 1 there, which is one of -α/σ on ε."""
    x0 = torch.zeros(len(t), 3, dtype=t.dtype)
    # The network is asked at x = 0, and answers x̂₀ = 1.
    model = model_of(sde, "x0", torch.ones_like(x0), **options)
    return denoising_loss(model, x0, t, x0, weighting)


def inner_times(sde, n=40):
    """Times (n,) equally spaced in log-SNR over the middle of its range."""
    ends = [sde.log_noise(sde.t_min), sde.log_noise(sde.t_max)]
    u = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return sde.t_from_log_snr(-2 * (ends[0] + (ends[1] - ends[0]) * u))


def snr(sde, t):
    return (sde.alpha(t) / sde.sigma(t)).square()


@pytest.mark.parametrize("data_shape", [(3,), (2, 4, 4)])
def test_simple_is_the_squared_error_of_the_noise(any_sde, dtype, data_shape):
    x0, noise, output, t = batch(any_sde, dtype, data_shape=data_shape)
    loss = denoising_loss(model_of(any_sde, "eps", output), x0, t, noise)
    assert loss.shape == (20,)
    assert loss.dtype == dtype
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(noise, output, strict=True)])
    torch.testing.assert_close(loss, expected)
    assert torch.equal(loss, denoising_loss(model_of(any_sde, "eps", output), x0, t, noise, "simple"))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weightings_by_way_of_any_prediction(any_sde, prediction):
    """An error on ε is α/σ times that on x₀: each weighting is a weight on the square of either."""
    x0, noise, output, t = batch(any_sde)
    model = model_of(any_sde, prediction, output)
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    error = (x0 - model.denoise(any_sde.perturb(x0, t, noise), t)).square().mean(1)
    # "eps" and "score" find x̂₀ as x/α less a multiple of F, "x0" finds ε̂ as x/σ less one: at the ends of time
    # a rounding of x is σ/α, or α/σ, times as large.
    worst = 64 * torch.finfo(torch.float64).eps * (1 + (alpha / sigma + sigma / alpha).max().square())
    simple = denoising_loss(model, x0, t, noise, "simple")
    torch.testing.assert_close(simple, error * (alpha / sigma) ** 2, rtol=float(worst), atol=float(worst))
    edm = denoising_loss(model, x0, t, noise, "edm")
    inverse_c_out = (sigma**2 + (alpha * SIGMA_DATA) ** 2) / (sigma * SIGMA_DATA) ** 2
    torch.testing.assert_close(edm, error * inverse_c_out, rtol=float(worst), atol=float(worst))


def test_edm_is_the_plain_squared_error_of_its_network(any_sde, dtype):
    """1/c_out² leaves the mean square of F − (x₀ − c_skip x')/c_out: Karras et al. 2022, equation 8."""
    x0, noise, output, t = batch(any_sde, dtype)
    loss = denoising_loss(model_of(any_sde, "edm", output), x0, t, noise, "edm")
    alpha, sigma = any_sde.alpha(t.double())[:, None], any_sde.sigma(t.double())[:, None]
    scaled_noise = sigma / alpha
    scaled_x, total = x0.double() + scaled_noise * noise.double(), scaled_noise**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, scaled_noise * SIGMA_DATA / total.sqrt()
    target = (x0.double() - c_skip * scaled_x) / c_out
    expected = (output.double() - target).square().mean(1)
    # x̂₀ is rounded to eps of x₀, and the difference x₀ − x̂₀ divided by c_out.
    unit = torch.finfo(dtype).eps
    rounding = 16 * unit * (1 + 1 / c_out[:, 0]) * (1 + x0.double().square().mean(1).sqrt())
    assert ((loss - expected).abs() <= rounding * (expected.sqrt() + 1) + rounding**2).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_perfect_prediction_costs_nothing(any_sde, weighting):
    x0, noise, _, t = batch(any_sde)
    alpha, sigma = any_sde.alpha(t)[:, None], any_sde.sigma(t)[:, None]
    fraction = torch.zeros_like(x0) if weighting == "hybrid" else None
    model = model_of(any_sde, "v", alpha * noise - sigma * x0, fraction)
    loss = denoising_loss(model, x0, t, noise, weighting)
    # Squares of a few roundings of x₀ and ε, where α/σ and σ/α are below 1001, in units of each weighting's own.
    unit = denoising_loss(model_of(any_sde, "v", model.network(x0, t)[:, :3] + 1, fraction), x0, t, noise, weighting)
    assert (loss <= (64 * EPS * 1001) ** 2 * (1 + unit)).all()
    shifted = denoising_loss(model, x0 + 0.1, t, noise, weighting)
    # The weight of the bound is 0 at t_min, where its first step ends.
    has_weight = unit > 0
    assert has_weight[1:].all()
    assert (shifted > loss)[has_weight].all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_training_reaches_the_network_with_its_conditioning(weighting):
    channels = 6 if weighting == "hybrid" else 3

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(channels))

        def forward(self, x, t, label):
            return self.shift + label[:, None]

    network = Shifted()
    model = DiffusionModel(network, VPSDE(), "eps", data_shape=(3,), learned_variance=channels == 6)
    x0, noise, _, t = batch(VPSDE(), torch.float32)
    label = torch.linspace(-1, 1, 20)
    loss = denoising_loss(model, x0, t, noise, weighting, label=label)
    loss.sum().backward()
    assert network.shift.grad is not None
    assert (network.shift.grad.abs() > 0).all()
    assert not torch.equal(loss, denoising_loss(model, x0, t, noise, weighting, label=-label))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_float32_is_float64_rounded(any_sde, weighting):
    """At times and errors where no difference cancels: what is left is the weight, and it holds three digits."""
    x0, noise, output, _ = batch(any_sde, n=40)
    t = inner_times(any_sde).float()
    fraction = output.sigmoid() if weighting == "hybrid" else None
    exact, rounded = (
        denoising_loss(
            model_of(any_sde, "v", output.to(dtype), None if fraction is None else fraction.to(dtype)),
            x0.to(dtype),
            t.to(dtype),
            noise.to(dtype),
            weighting,
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-3, atol=1e-5)


def test_weights_are_those_of_the_table(any_sde):
    t = inner_times(any_sde)
    ratio, sigma2, alpha2 = snr(any_sde, t), any_sde.sigma(t).square(), any_sde.alpha(t).square()
    expected = {
        "simple": ratio,
        "x0": torch.ones_like(t),
        "v": (alpha2 + sigma2).square() / sigma2,
        "min_snr": ratio.clamp(max=5),
        "edm": (sigma2 + alpha2 * SIGMA_DATA**2) / (sigma2 * SIGMA_DATA**2),
    }
    for name, weight in expected.items():
        torch.testing.assert_close(weight_on_x0(any_sde, t, name), weight, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight_on_x0(any_sde, t, MinSNR(0.3)), ratio.clamp(max=0.3), rtol=1e-9, atol=0)
    torch.testing.assert_close(weight_on_x0(any_sde, t, MinSNR(math.inf)), ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight_on_x0(any_sde, t, torch.sigmoid), ratio * torch.sigmoid(ratio.log()))


def test_weights_of_a_step_are_those_of_the_chain(any_sde):
    """a, v and σ² of the last step of a chain of two, s and t; the whole cell before t has the weight of t."""
    steps = 300
    width = any_sde.t_max / steps
    count = (any_sde.t_max - any_sde.t_min) / width
    t = torch.tensor([2, 3, 10, 100, 299], dtype=torch.float64) * width
    for weighting in (VLB(steps), VLB(steps, "noising")):
        weight = weight_on_x0(any_sde, t, weighting)
        torch.testing.assert_close(weight_on_x0(any_sde, t - 0.99 * width, weighting), weight, rtol=1e-9, atol=0)
    chains = [GaussianChain.from_sde(any_sde, [float(time) - width, float(time)]) for time in t]
    a, _, v = (torch.stack([chain.posterior()[k][1] for chain in chains]) for k in range(3))
    noising = torch.stack([chain.stds[1].square() for chain in chains])
    # The chain finds σ²_t|s as a difference of variances of the size of σ_t².
    loss_of_digits = float((any_sde.sigma(t).square() / noising).max())
    rounding = {"rtol": 1e3 * EPS * loss_of_digits, "atol": 0}
    torch.testing.assert_close(weight_on_x0(any_sde, t, VLB(steps)), count * a.square() / (2 * v), **rounding)
    torch.testing.assert_close(
        weight_on_x0(any_sde, t, VLB(steps, "noising")), count * a.square() / (2 * noising), **rounding
    )
    torch.testing.assert_close(weight_on_x0(any_sde, t, Mean(width)), a.square(), **rounding)
    # Learned variances, with an error of 0.3 on x̂₀ that costs 0.09 SNR in the simple loss.
    for fraction in (0.0, 0.4, 1.0):
        reverse = torch.exp(fraction * noising.log() + (1 - fraction) * v.log())
        kl = kl_divergence(Normal(0.3 * a, v.sqrt()), Normal(torch.zeros_like(a), reverse.sqrt()))
        zero = torch.zeros(len(t), 3, dtype=torch.float64)
        model = model_of(any_sde, "x0", zero + 0.3, zero + fraction)
        loss = denoising_loss(model, zero, t, zero, Hybrid(steps, vlb_weight=0.7))
        # The divergence holds the digits of v/σ̃² beside 1.
        expected = 0.09 * snr(any_sde, t) + 0.7 * count * kl
        torch.testing.assert_close(loss, expected, rtol=rounding["rtol"], atol=1e3 * EPS * count * loss_of_digits)


def test_the_steps_of_the_bound_add_up(any_sde):
    """Over uniform times the mean of the loss is the sum of the chain's terms, each a step long."""
    steps = 50
    times = torch.arange(1, steps + 1, dtype=torch.float64) * (any_sde.t_max / steps)
    chain = GaussianChain.from_sde(any_sde, times.tolist())
    a, _, v = chain.posterior()
    # The first is the decoder's, whose variance is the first step's own.
    v[0] = chain.stds[0].square()
    x0, noise, output, _ = batch(any_sde, n=len(times))
    model = model_of(any_sde, "v", output)
    error = (x0 - model.denoise(any_sde.perturb(x0, times, noise), times)).square().mean(1)
    total = (a.square() * error / (2 * v)).sum()
    losses = denoising_loss(model, x0, times, noise, VLB(steps))
    torch.testing.assert_close(losses.sum() / (steps * (1 - any_sde.t_min / any_sde.t_max)), total, rtol=1e-9, atol=0)


def test_likelihood_is_the_bound_of_many_steps(any_sde):
    t = inner_times(any_sde)
    weight = weight_on_x0(any_sde, t, "likelihood")
    # ½ (t_max − t_min) g²/σ² on ε, with g²/σ² the slope of log-SNR.
    slope = torch.func.jvp(any_sde.log_snr, (t,), (torch.ones_like(t),))[1]
    expected = -0.5 * (any_sde.t_max - any_sde.t_min) * slope * snr(any_sde, t)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    # Ends of cells of both chains.
    t = torch.tensor([0.05, 0.1, 0.3, 0.6, 0.95], dtype=torch.float64) * any_sde.t_max
    weight = weight_on_x0(any_sde, t, "likelihood")
    gaps = []
    for steps in (1000, 2000):
        bound = weight_on_x0(any_sde, t, VLB(steps))
        gaps.append((bound / weight - 1).abs().max())
    # First order in the step.
    assert gaps[1] < 0.2
    assert 1.5 < gaps[0] / gaps[1] < 2.6


def test_losses_of_a_networks_own_output(any_sde):
    """The weightings that are the plain squared error of a prediction's output are it."""
    x0, noise, output, _ = batch(any_sde, n=40)
    t = inner_times(any_sde)
    for prediction, weighting in (("eps", "simple"), ("x0", "x0"), ("v", "v"), ("edm", "edm"), ("mean", "mean")):
        model = model_of(any_sde, prediction, output, mean_step=0.01)
        expected = (model.output_for(x0, noise, t) - output).square().mean(1)
        # "mean" divides by its a and the loss multiplies by it again, which leaves rounding of x/a.
        loss = denoising_loss(model, x0, t, noise, weighting)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    # A step of one's own is a weight on another mean.
    assert not torch.allclose(denoising_loss(model, x0, t, noise, Mean(0.02)), expected, rtol=1e-3)
    assert torch.equal(denoising_loss(model, x0, t, noise, Mean(0.01)), denoising_loss(model, x0, t, noise, "mean"))


def test_the_first_step_is_the_decoders(any_sde):
    """A density of variance σ²(Δ), for every time of the first cell: nothing diverges towards 0."""
    steps = 40
    width = any_sde.t_max / steps
    t = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64) * width
    t = t.clamp(min=any_sde.t_min)
    count = (any_sde.t_max - any_sde.t_min) / width
    expected = count / (2 * any_sde.sigma(torch.tensor(width, dtype=torch.float64)).square())
    for variance in ("posterior", "noising"):
        weight = weight_on_x0(any_sde, t, VLB(steps, variance))
        torch.testing.assert_close(weight, expected.expand(3), rtol=1e-9, atol=0)


@given(
    st.floats(-3, 3), st.floats(-2, 2), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.sampled_from(["post", "free"])
)
def test_step_kl_is_the_divergence_of_normals(error, a, v, reverse, kind):
    error, a, v, reverse = (torch.tensor(value, dtype=torch.float64) for value in (error, a, v, reverse))
    reverse = v if kind == "post" else reverse
    expected = kl_divergence(Normal(a * error, v.sqrt()), Normal(torch.zeros_like(v), reverse.sqrt()))
    # torch's form takes the squares of ratios of roots.
    rounding = 16 * EPS * float(1 + v / reverse)
    torch.testing.assert_close(step_kl(error, a, v, reverse), expected, rtol=1e-12, atol=rounding)
    assert step_kl(0 * error, a, v, v) == 0


def test_hybrid_trains_the_variance_by_the_bound_and_the_mean_by_the_simple_loss(any_sde):
    x0, noise, output, _ = batch(any_sde, n=40)
    t, fraction = inner_times(any_sde), torch.full_like(x0, 0.4)
    output.requires_grad_(True)
    fraction.requires_grad_(True)
    hybrid = denoising_loss(model_of(any_sde, "v", output, fraction), x0, t, noise, "hybrid")
    of_mean, of_variance = torch.autograd.grad(hybrid.sum(), (output, fraction))
    simple = denoising_loss(model_of(any_sde, "v", output), x0, t, noise, "simple")
    torch.testing.assert_close(of_mean, torch.autograd.grad(simple.sum(), output)[0], rtol=1e-12, atol=1e-12)
    assert (of_variance != 0).all()


def test_hybrid_is_finite_at_the_ends(any_sde, dtype):
    """Where the first step has no length, and where a fraction is far outside [0, 1]."""
    x0, noise, output, _ = batch(any_sde, dtype, n=4)
    ends = torch.tensor([any_sde.t_min, any_sde.t_max], dtype=torch.float64)
    t = torch.cat([ends, ends * (1 - 1e-7)]).to(dtype)
    for value in (-5.0, 0.0, 1.0, 5.0):
        fraction = torch.full_like(x0, value).requires_grad_(True)
        # The ratio of variances is below 1000, VE's first step's, and its fifth power a number of float32.
        model = model_of(any_sde, "edm", output, fraction)
        loss = denoising_loss(model, x0, t, noise, Hybrid(10_000))
        (gradient,) = torch.autograd.grad(loss.sum(), fraction)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("weighting", [VLB(), VLB(variance="noising"), Likelihood()], ids=repr)
def test_weights_are_finite_at_the_first_time(any_sde, dtype, weighting):
    """Also where a time rounded to float32 comes before t_min."""
    first = torch.tensor([any_sde.t_min], dtype=torch.float64).to(dtype)
    t = torch.cat([first, torch.nextafter(first, torch.zeros_like(first))])
    weight = weight_on_x0(any_sde, t, weighting)
    assert weight.isfinite().all()
    assert (weight >= 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MinSNR(0.0), r"gamma = 0\.0: must be positive"),
        (lambda: MinSNR(math.nan), "gamma = nan: must be positive"),
        (lambda: VLB(1), "steps = 1: must be at least 2"),
        (lambda: VLB(variance="learned"), "variance = 'learned': must be one of posterior, noising"),
        (lambda: Mean(-0.1), r"step = -0\.1: must be positive"),
        (lambda: Hybrid(steps=-1), "steps = -1: must be at least 2"),
        (lambda: Hybrid(vlb_weight=0.0), r"vlb_weight = 0\.0: must be positive"),
        (lambda: LogNormal(VPSDE(), std=-1.0), r"std = -1\.0: must be positive"),
        (lambda: LossSecondMoment(VPSDE(), bins=0), "bins = 0: must be positive"),
        (lambda: LossSecondMoment(VPSDE(), history=0), "history = 0: must be positive"),
        (lambda: LossSecondMoment(VPSDE(), floor=0.0), r"floor = 0\.0: must be above 0 and at most 1"),
        (lambda: LossSecondMoment(VPSDE(), floor=1.5), r"floor = 1\.5: must be above 0 and at most 1"),
        (lambda: Uniform(VPSDE()).load_state_dict({"p": torch.ones(1)}), "p: Uniform has no state"),
        (lambda: LossSecondMoment(VPSDE()).load_state_dict({}), r"losses: the state has nothing, .* \(100, 10\)"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_calls_are_checked():
    x0, noise, output, t = batch(VPSDE())
    model = model_of(VPSDE(), "eps", output)
    with pytest.raises(ValueError, match=r"weighting = 'plain': must be one of simple, x0, .*, or a function"):
        denoising_loss(model, x0, t, noise, "plain")
    with pytest.raises(ValueError, match="'hybrid' needs a model with learned_variance=True"):
        denoising_loss(model, x0, t, noise, "hybrid")
    with pytest.raises(ValueError, match=r"dtype torch\.uint8: need a floating dtype"):
        denoising_loss(model, x0.to(torch.uint8), t, noise)
    with pytest.raises(ValueError, match=r"x has shape \(20, 2\)"):
        denoising_loss(model, x0[:, :2], t, noise[:, :2])
    with pytest.raises(NotImplementedError, match=r"TimeSampler must define draw\(u\)"):
        TimeSampler(VPSDE()).draw(t)


# Times


def filled(sde, bins=7, history=2):
    """A sampler that has learnt very different losses in its bins."""
    sampler = LossSecondMoment(sde, bins, history)
    middles = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    for factor in (1.0, 1.5):
        sampler.update(Uniform(sde).draw(middles)[0], factor * torch.arange(1.0, bins + 1).square())
    return sampler


SAMPLERS = {**TIMES, "filled": filled}


def test_log_normal_is_log_normal(any_sde):
    """log(σ/α) ~ N(−1.2, 1.2²), by Kolmogorov and Smirnov."""
    n = 4096
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, weight = LogNormal(any_sde).draw(u)
    assert (weight == 1).all()
    log_noise = -0.5 * any_sde.log_snr(t)
    # The mass beyond the ends of time is moved to them.
    ends = stats.norm.cdf([any_sde.log_noise(any_sde.t_min), any_sde.log_noise(any_sde.t_max)], -1.2, 1.2)
    outside = max(ends[0], 1 - ends[1])
    assert outside < 0.003
    statistic = stats.kstest(log_noise.numpy(), "norm", args=(-1.2, 1.2)).statistic
    # A sample's distance is below 1.95/√n but once in a thousand.
    assert statistic < 1.95 / math.sqrt(n) + outside


def test_log_normal_of_a_quantile(any_sde):
    u = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    for mean, std in ((-1.2, 1.2), (0.5, 0.8)):
        log_noise = -0.5 * any_sde.log_snr(LogNormal(any_sde, mean, std).draw(u)[0])
        quantiles = torch.tensor([-1.6448536269514722, 0.0, 1.6448536269514722], dtype=torch.float64)
        torch.testing.assert_close(log_noise, mean + std * quantiles, rtol=1e-9, atol=1e-9)


def test_log_normal_of_float32_is_rounded_once(any_sde):
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LogNormal(any_sde).draw(u)[0], LogNormal(any_sde).draw(u.double())[0].float())


def test_uniform_is_uniform(any_sde):
    n = 4096
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, weight = Uniform(any_sde).draw(u)
    assert (weight == 1).all()
    range_ = (any_sde.t_min, any_sde.t_max - any_sde.t_min)
    assert stats.kstest(t.numpy(), "uniform", args=range_).statistic < 1.95 / math.sqrt(n)
    ends = Uniform(any_sde).draw(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))[0]
    middle = (any_sde.t_min + any_sde.t_max) / 2
    torch.testing.assert_close(ends, torch.tensor([any_sde.t_min, middle, any_sde.t_max], dtype=torch.float64))


def test_importance_is_uniform_in_log_snr(any_sde):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    log_snr = any_sde.log_snr(Importance(any_sde).draw(u)[0])
    first, last = (-2 * any_sde.log_noise(t) for t in (any_sde.t_min, any_sde.t_max))
    torch.testing.assert_close(log_snr, first + (last - first) * u, rtol=1e-6, atol=1e-6)


def test_importance_makes_the_likelihood_weight_constant(any_sde):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    t, weight = Importance(any_sde).draw(u)
    on_eps = weight * weight_on_x0(any_sde, t, "likelihood") / snr(any_sde, t)
    span = 2 * (any_sde.log_noise(any_sde.t_max) - any_sde.log_noise(any_sde.t_min))
    torch.testing.assert_close(on_eps, torch.full_like(u, 0.5 * span), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "log_normal"])
def test_weighted_means_are_those_of_uniform_times(any_sde, name):
    n = 50_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t, weight = SAMPLERS[name](any_sde).draw(u)
    share = (t - any_sde.t_min) / (any_sde.t_max - any_sde.t_min)
    for power in range(4):
        # The midpoint rule; the steps of "filled" leave an error of the order of 1/n at each of seven edges.
        assert float((weight * share**power).mean()) == pytest.approx(1 / (power + 1), abs=2e-4)


@pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_times_stay_inside_the_range(any_sde, dtype, build):
    # With the extremes of torch.rand, and 1, which an antithetic 0 becomes.
    last = 1 - torch.finfo(dtype).eps / 2
    u = torch.tensor([0, 2**-53, 2**-24, 0.25, 0.5, 0.75, 1 - 2**-24, last, 1], dtype=dtype)
    t, weight = build(any_sde).draw(u)
    assert t.shape == weight.shape == u.shape
    assert t.dtype == weight.dtype == dtype
    low, high = torch.tensor([any_sde.t_min, any_sde.t_max], dtype=torch.float64).to(dtype)
    assert (t >= low).all()
    assert (t <= high).all()
    assert (t.diff() >= 0).all()
    assert (weight > 0).all()
    assert weight.isfinite().all()


def test_narrow_ranges_clamp():
    sde = EDMSDE(0.3, 0.4)
    t, _ = LogNormal(sde).draw(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    assert t.tolist() == [0.3, pytest.approx(math.exp(-1.2)), 0.4]


def test_second_moments_decide_where_times_are_drawn():
    sde, bins, floor = VPSDE(), 5, 0.1
    sampler = LossSecondMoment(sde, bins, history=3, floor=floor)
    uniform = torch.full((bins,), 0.2, dtype=torch.float64)
    moments = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    middles = Uniform(sde).draw((torch.arange(bins, dtype=torch.float64) + 0.5) / bins)[0]
    for factor in (1.0, -2.0, 3.0):
        assert torch.equal(sampler.probabilities(), uniform)
        sampler.update(middles, factor * moments)
    expected = (1 - floor) * moments / moments.sum() + floor / bins
    torch.testing.assert_close(sampler.probabilities(), expected)
    # The share of times in each bin, from a dense and even u.
    n = 100_000
    t, weight = sampler.draw((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    bin_ = ((t - sde.t_min) / (sde.t_max - sde.t_min) * bins).long().clamp(max=bins - 1)
    torch.testing.assert_close(torch.bincount(bin_, minlength=bins) / n, expected.float(), rtol=0, atol=3 / n)
    torch.testing.assert_close(weight, (1 / (bins * expected))[bin_])


def test_losses_of_zero_leave_times_uniform():
    sampler = LossSecondMoment(VPSDE(), bins=2, history=1)
    sampler.update(torch.tensor([0.2, 0.9]), torch.zeros(2))
    assert sampler.probabilities().tolist() == [0.5, 0.5]


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6), st.integers(1, 4))
def test_the_last_losses_of_a_bin_are_kept(batches, history):
    sde = VPSDE()
    sampler, kept = LossSecondMoment(sde, 4, history), [deque(maxlen=history) for _ in range(4)]
    counter = 0.0
    for batch_ in batches:
        bins = torch.tensor(batch_, dtype=torch.float64)
        losses = counter + 1 + torch.arange(len(batch_))
        counter += len(batch_)
        sampler.update(Uniform(sde).draw((bins + 0.5) / 4)[0], losses)
        for bin_, loss in zip(batch_, losses.tolist(), strict=True):
            kept[bin_].append(loss)
    for row, count, expected in zip(sampler.losses, sampler.counts, kept, strict=True):
        assert sorted(row[: len(expected)].tolist()) == sorted(expected)
        assert min(int(count), history) == len(expected)


def test_what_a_sampler_has_learnt_can_be_stored():
    first = filled(VPSDE())
    second = LossSecondMoment(VPSDE(), 7, 2)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for one, other in zip(first.draw(u), second.draw(u), strict=True):
            assert torch.equal(one, other)
        for sampler in (first, second):
            sampler.update(sampler.draw(u)[0], u + 1)
    assert Uniform(VPSDE()).state_dict() == {}


@given(st.integers(1, 9), st.integers(0, 1000))
def test_spread_numbers_are_uniform_and_even(n, seed):
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for name, spread in SPREADS.items():
        numbers = spread(u)
        assert numbers.shape == u.shape, name
        assert ((numbers >= 0) & (numbers <= 1)).all(), name
        assert numbers[0] == u[0], name
    assert torch.equal(SPREADS["independent"](u), u)
    places = stratified(u).sort().values
    gaps = torch.cat([places.diff(), places[:1] + 1 - places[-1:]])
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / n))
    pairs = antithetic(u)
    assert torch.equal(pairs[::2], u[::2])
    assert torch.equal(pairs[1::2], 1 - u[: n - n % 2 : 2])
