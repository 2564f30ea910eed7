import math

import pytest
import torch
from scipy import stats
from torch import nn

from sde_diffusion import EDMSDE, VPSDE, DiffusionModel
from sde_diffusion.losses import TIMES, WEIGHTINGS, denoising_loss, log_normal_time, uniform_time
from sde_diffusion.model import PREDICTIONS

SIGMA_DATA = 0.7


def batch(sde, dtype=torch.float64, n=20, data_shape=(3,)):
    """x₀ (n, ...), ε, a network's output, and times over the whole range."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(n, *data_shape, generator=generator, dtype=dtype) for _ in range(3))
    u = torch.linspace(sde.log_noise(sde.t_min), sde.log_noise(sde.t_max), n, dtype=torch.float64)
    return x0, noise, output, sde.t_from_log_snr(-2 * u).clamp(sde.t_min, sde.t_max).to(dtype)


def model_of(sde, prediction, output):
    return DiffusionModel(lambda x, t: output, sde, prediction, data_shape=output.shape[1:], sigma_data=SIGMA_DATA)


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
    model = model_of(any_sde, "v", alpha * noise - sigma * x0)
    loss = denoising_loss(model, x0, t, noise, weighting)
    # Squares of a few roundings of x₀, α/σ < 1001 times as large on ε.
    assert (loss <= (32 * torch.finfo(torch.float64).eps * 1001) ** 2).all()
    assert (denoising_loss(model, x0 + 0.1, t, noise, weighting) > loss).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_training_reaches_the_network_with_its_conditioning(weighting):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x, t, label):
            return self.shift + label[:, None]

    network = Shifted()
    model = DiffusionModel(network, VPSDE(), "eps", data_shape=(3,))
    x0, noise, _, t = batch(VPSDE(), torch.float32)
    label = torch.linspace(-1, 1, 20)
    loss = denoising_loss(model, x0, t, noise, weighting, label=label)
    loss.sum().backward()
    assert network.shift.grad is not None
    assert (network.shift.grad.abs() > 0).all()
    assert not torch.equal(loss, denoising_loss(model, x0, t, noise, weighting, label=-label))


def test_calls_are_checked():
    x0, noise, output, t = batch(VPSDE())
    model = model_of(VPSDE(), "eps", output)
    with pytest.raises(ValueError, match="weighting = 'plain': must be one of simple, edm"):
        denoising_loss(model, x0, t, noise, "plain")
    with pytest.raises(ValueError, match=r"dtype torch\.uint8: need a floating dtype"):
        denoising_loss(model, x0.to(torch.uint8), t, noise)
    with pytest.raises(ValueError, match=r"x has shape \(20, 2\)"):
        denoising_loss(model, x0[:, :2], t, noise[:, :2])


def test_log_normal_time_is_log_normal(any_sde):
    """log(σ/α) ~ N(−1.2, 1.2²), by Kolmogorov and Smirnov."""
    n = 4096
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_noise = -0.5 * any_sde.log_snr(log_normal_time(any_sde, u))
    # The mass beyond the ends of time is moved to them.
    ends = stats.norm.cdf([any_sde.log_noise(any_sde.t_min), any_sde.log_noise(any_sde.t_max)], -1.2, 1.2)
    outside = max(ends[0], 1 - ends[1])
    assert outside < 0.003
    statistic = stats.kstest(log_noise.numpy(), "norm", args=(-1.2, 1.2)).statistic
    # A sample's distance is below 1.95/√n but once in a thousand.
    assert statistic < 1.95 / math.sqrt(n) + outside


def test_log_normal_time_of_a_quantile(any_sde):
    u = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    for mean, std in ((-1.2, 1.2), (0.5, 0.8)):
        log_noise = -0.5 * any_sde.log_snr(log_normal_time(any_sde, u, mean, std))
        quantiles = torch.tensor([-1.6448536269514722, 0.0, 1.6448536269514722], dtype=torch.float64)
        torch.testing.assert_close(log_noise, mean + std * quantiles, rtol=1e-12, atol=1e-12)


def test_log_normal_time_of_float32_is_rounded_once(any_sde):
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(log_normal_time(any_sde, u), log_normal_time(any_sde, u.double()).float())


def test_uniform_time_is_uniform(any_sde):
    n = 4096
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = uniform_time(any_sde, u)
    range_ = (any_sde.t_min, any_sde.t_max - any_sde.t_min)
    assert stats.kstest(t.numpy(), "uniform", args=range_).statistic < 1.95 / math.sqrt(n)
    ends = uniform_time(any_sde, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    middle = (any_sde.t_min + any_sde.t_max) / 2
    torch.testing.assert_close(ends, torch.tensor([any_sde.t_min, middle, any_sde.t_max], dtype=torch.float64))


@pytest.mark.parametrize("draw", TIMES.values(), ids=TIMES.keys())
def test_times_stay_inside_the_range(any_sde, dtype, draw):
    # With the extremes of torch.rand.
    last = 1 - torch.finfo(dtype).eps / 2
    u = torch.tensor([0, 2**-53, 2**-24, 0.25, 0.5, 0.75, 1 - 2**-24, last], dtype=dtype)
    t = draw(any_sde, u)
    assert t.shape == u.shape
    assert t.dtype == dtype
    low, high = torch.tensor([any_sde.t_min, any_sde.t_max], dtype=torch.float64).to(dtype)
    assert (t >= low).all()
    assert (t <= high).all()
    assert (t.diff() >= 0).all()


def test_narrow_ranges_clamp():
    sde = EDMSDE(0.3, 0.4)
    t = log_normal_time(sde, torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    assert t.tolist() == [0.3, pytest.approx(math.exp(-1.2)), 0.4]
