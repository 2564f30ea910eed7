import math
from itertools import pairwise

import pytest
import torch

from sde_diffusion import ConstantVESDE, DiffusionModel, Empirical, GaussianChain, GaussianMixture, sample, tutorial

SIGMA_Q = 3.0
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def sde():
    return ConstantVESDE(SIGMA_Q)


@pytest.fixture
def mixture():
    """One-dimensional and smooth, unequally likely and wide."""
    means = torch.tensor([[-1.0], [0.8]], dtype=torch.float64)
    covariances = torch.tensor([[[0.05]], [[0.3]]], dtype=torch.float64)
    return GaussianMixture(means, covariances, torch.tensor([0.3, 0.7], dtype=torch.float64))


def exact_mean(model, dt):
    """The μ_t(x) that a perfect network would put out."""
    return lambda x, t: tutorial.mean_from_denoiser(model.denoise(x, t), x, t, dt)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dt", [0.1, 1 / 64, 1e-3])
def test_weight_of_ddim(dt):
    for steps, expected in ((1, 1.0), (2, 0.586), (3, 0.551), (10, 0.513)):
        assert float(tutorial.ddim_weight(steps * dt, dt)) == pytest.approx(expected, abs=5e-4)
    assert float(tutorial.ddim_weight(dt, dt)) == 1
    # (1 + Δt/4t)/2 to first order
    assert float(tutorial.ddim_weight(1e4 * dt, dt)) == pytest.approx(0.5, abs=0.13e-4)
    t = dt * torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)
    # Its other form, (t/Δt) (1 − √(1 − Δt/t)).
    torch.testing.assert_close(tutorial.ddim_weight(t, dt), t / dt * (1 - torch.sqrt((1 - dt / t).clamp(min=0))))


def test_the_pair_is_of_one_path(dtype):
    x0 = torch.full((40_000, 1), 0.7, dtype=dtype)
    t, dt = 0.5, 0.2
    time = torch.full((len(x0),), t, dtype=dtype)
    previous, x = tutorial.noised_pair(x0, time, dt, SIGMA_Q, torch.Generator().manual_seed(0))
    assert previous.dtype == x.dtype == dtype
    steps = torch.cat([previous - x0, x - previous], 1).double()
    expected = SIGMA_Q**2 * torch.tensor([[t - dt, 0], [0, dt]], dtype=torch.float64)
    variance = expected.diagonal()
    assert (steps.mean(0).abs() < 4 * (variance / len(x0)).sqrt()).all()
    standard_error = torch.sqrt((expected**2 + variance[:, None] * variance) / len(x0))
    assert ((steps.T.cov() - expected).abs() < 4 * standard_error).all()


def test_the_earliest_pair_starts_at_the_data():
    x0 = normal(5, 2)
    previous, _ = tutorial.noised_pair(x0, torch.full((5,), 0.1, dtype=torch.float64), 0.1, SIGMA_Q)
    assert torch.equal(previous, x0)


@pytest.mark.parametrize("averaged", [False, True])
def test_loss_is_least_at_the_mean(sde, mixture, averaged):
    """Its slope along any direction h vanishes there: E[(μ − target) h] = 0."""
    model, n, dt, t = mixture.under(sde), 40_000, 0.05, 0.2
    x0, time = mixture.sample(n, seed=1), torch.full((n,), t, dtype=torch.float64)
    mean = exact_mean(model, dt)
    for h in (torch.ones_like, lambda x: x, torch.sin):

        def loss(scale, h=h):
            generator = torch.Generator().manual_seed(0)
            return tutorial.train_loss(
                lambda x, t: mean(x, t) + scale * h(x), x0, time, dt, SIGMA_Q, generator, averaged=averaged
            )

        zero = torch.zeros((), dtype=torch.float64)
        value, slope = torch.func.jvp(loss, (zero,), (torch.ones_like(zero),))
        assert value.shape == slope.shape == (n,)
        assert abs(slope.mean()) < 4 * slope.std() / math.sqrt(n)


def test_averaging_leaves_the_gradient_and_takes_its_noise(sde, mixture):
    """At a network off by a constant c the slope is 2c on average, either way."""
    model, n, dt, t, offset = mixture.under(sde), 40_000, 0.05, 0.8, 0.1
    x0, time = mixture.sample(n, seed=1), torch.full((n,), t, dtype=torch.float64)
    mean = exact_mean(model, dt)
    spread = {}
    for averaged in (False, True):
        generator = torch.Generator().manual_seed(0)
        previous, x = tutorial.noised_pair(x0, time, dt, SIGMA_Q, torch.Generator().manual_seed(0))
        loss = tutorial.train_loss(
            lambda x, t: mean(x, t) + offset, x0, time, dt, SIGMA_Q, generator, averaged=averaged
        )
        target = tutorial.mean_from_denoiser(x0, x, time, dt) if averaged else previous
        residual = (mean(x, time) + offset - target)[:, 0]
        torch.testing.assert_close(loss, residual.square(), rtol=1e-12, atol=0)
        assert abs(residual.mean() - offset) < 4 * residual.std() / math.sqrt(n)
        spread[averaged] = float(residual.var())
    # x_{t−Δt} given x_t and x₀ has the variance σ_q² Δt (t − Δt)/t, which is what is gone.
    gone = SIGMA_Q**2 * dt * (t - dt) / t
    assert spread[False] - spread[True] == pytest.approx(gone, rel=4 * math.sqrt(2 / n) * spread[False] / gone)
    assert spread[True] < 0.05 * spread[False]


def test_the_mean_is_the_prediction(sde, dtype):
    """``DiffusionModel`` of prediction "mean" finds the denoiser that the tutorial's formula goes back to."""
    dt = 1 / 16
    t = torch.arange(1, 17, dtype=dtype) * dt
    x0, eps = (normal(16, 3, seed=seed).to(dtype) for seed in (0, 1))
    x = sde.perturb(x0, t, eps)
    mean = tutorial.mean_from_denoiser(x0, x, t, dt)
    assert mean.dtype == dtype
    model = DiffusionModel(lambda x, t: mean, sde, "mean", data_shape=(3,), mean_step=dt)
    unit = torch.finfo(dtype).eps
    # x is of size σ_q; the share of x₀ in the mean is Δt/t, at least a sixteenth.
    torch.testing.assert_close(model.output_for(x0, eps, t), mean, rtol=0, atol=32 * unit * SIGMA_Q)
    torch.testing.assert_close(model.denoise(x, t), x0, rtol=0, atol=16 * 32 * unit * SIGMA_Q)


def test_ddpm_is_the_chain_with_the_noising_variance():
    steps = 8
    chain, dt = GaussianChain.constant_rate(steps, SIGMA_Q), 1 / 8
    a, b, _ = chain.posterior()
    x0, x, noise = normal(3, 4, 2).unbind()
    for i in range(1, steps + 1):
        mean = tutorial.mean_from_denoiser(x0, x, i * dt, dt)
        torch.testing.assert_close(mean, a[i - 1] * x0 + b[i - 1] * x, rtol=0, atol=16 * EPS)
        expected = mean + chain.reverse_variance("noising")[i - 1].sqrt() * noise
        torch.testing.assert_close(tutorial.ddpm_update(mean, dt, noise, SIGMA_Q), expected, rtol=0, atol=64 * EPS)


def test_ddim_is_ddim(sde, mixture):
    """The library's solver "ddim" on equal steps, to rounding."""
    steps, model = 16, mixture.under(sde)
    x = SIGMA_Q * normal(6, 1)
    times = [i / steps for i in range(steps, 0, -1)]
    expected = sample(model, 6, solver="ddim", grid=times, x_start=x, trajectory=True).trajectory
    mean = exact_mean(model, 1 / steps)
    for i, t in enumerate(times[:-1]):
        time = torch.full((6,), t, dtype=torch.float64)
        x = tutorial.ddim_update(x, mean(x, time), t, 1 / steps)
        # Rounding errors of a step grow by what the denoiser answers, of order one, in every later one.
        torch.testing.assert_close(x, expected[i + 1], rtol=0, atol=1e-13)
    time = torch.full((6,), 1 / steps, dtype=torch.float64)
    # On the last step λ = 1 and the mean is the denoiser's.
    last = tutorial.ddim_update(x, mean(x, time), 1 / steps, 1 / steps)
    torch.testing.assert_close(last, model.denoise(x, time), rtol=0, atol=1e-15)


def test_velocity_is_minus_that_of_the_ode(sde, mixture):
    """To order Δt, and exactly where DDIM goes."""
    model, x, t = mixture.under(sde), torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None], 0.5
    time = torch.full((7,), t, dtype=torch.float64)
    errors = []
    for dt in (1e-2, 1e-3, 1e-4):
        mean = exact_mean(model, dt)(x, time)
        velocity = tutorial.velocity(x, mean, t, dt)
        torch.testing.assert_close(x + dt * velocity, tutorial.ddim_update(x, mean, t, dt), rtol=1e-15, atol=1e-15)
        errors.append(float((velocity + model.velocity(x, time)).norm()))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(10, rel=0.02)


def test_only_ddims_weight_carries_a_point_along():
    """For data always 0, x_t is N(0, σ_q² t) and μ_t(x) = (1 − Δt/t) x: the variance after a step of weight λ."""
    dt = 0.1
    for t in (0.1, 0.2, 0.5, 1.0):
        x = SIGMA_Q * math.sqrt(t)  # one standard deviation
        one = torch.tensor([[x]], dtype=torch.float64)
        mean = tutorial.mean_from_denoiser(torch.zeros_like(one), one, t, dt)
        wanted = SIGMA_Q**2 * max(0.0, t - dt)
        variance = {w: float(x + w * (float(mean) - x)) ** 2 for w in (0.0, 1.0)}
        assert variance[0.0] == pytest.approx(SIGMA_Q**2 * t)
        assert variance[1.0] == pytest.approx(SIGMA_Q**2 * (t - dt) ** 2 / t, abs=1e-12)
        assert variance[0.0] > wanted + 0.5 * SIGMA_Q**2 * dt
        # λ = 1 is right on the last step, and only there.
        assert (wanted - variance[1.0] > 0.05 * SIGMA_Q**2 * dt) == (t > dt)
        assert float(tutorial.ddim_update(one, mean, t, dt)) ** 2 == pytest.approx(wanted, rel=1e-12, abs=1e-30)


def test_small_reverse_steps_are_gaussian(sde, mixture):
    """Claim 1: x_{t−Δt} given x_t = x is nearly N(x + σ_q² Δt ∇log p_t(x), σ_q² Δt).

    The mean is exact (Tweedie). The curvature of log p, on the scale σ_q √Δt, changes the variance by the factor
    1 + σ_q² Δt ∂² log p: relative entropy falls as Δt², to a quarter of the square of that.
    """
    model, x, t = mixture.under(sde), torch.tensor([[-0.9]], dtype=torch.float64), 0.1
    entropies, steps = [], [0.1 * 2.0**-k / 50 for k in range(4)]
    for dt in steps:
        variance = SIGMA_Q**2 * dt
        mean = x + variance * model.score(x, t)
        y = mean + math.sqrt(variance) * torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
        # By Bayes' rule, from the density at t − Δt alone.
        exact = model.log_prob(y, t - dt) - (x - y).square()[:, 0] / (2 * variance)
        gaussian = -(y - mean).square()[:, 0] / (2 * variance)
        exact, gaussian = torch.log_softmax(exact, 0), torch.log_softmax(gaussian, 0)
        expectation = float((exact.exp() * y[:, 0]).sum())
        assert expectation == pytest.approx(float(mean), abs=1e-12)
        entropies.append(float((exact.exp() * (exact - gaussian)).sum()))
    ratios = [coarse / fine for coarse, fine in pairwise(entropies)]
    assert ratios == pytest.approx([4] * 3, rel=0.1)
    assert abs(ratios[-1] / 4 - 1) < abs(ratios[0] / 4 - 1) < 0.1
    curvature = torch.func.jacrev(lambda x: model.score(x, t).sum())(x).item()
    assert entropies[-1] == pytest.approx((SIGMA_Q**2 * steps[-1] * curvature) ** 2 / 4, rel=0.05)


def variances(data, steps, deterministic):
    """Variance at every step from t = 1 on, for data N(0, data), whose mean is linear in x, starting from p_1."""
    dt, variance = 1 / steps, [SIGMA_Q**2 + data]
    for i in range(steps, 0, -1):
        t = i * dt
        mean = 1 - dt / t * (1 - data / (data + SIGMA_Q**2 * t))
        if deterministic:
            weight = math.sqrt(t) / (math.sqrt(t) + math.sqrt((i - 1) * dt))
            variance.append((1 + weight * (mean - 1)) ** 2 * variance[-1])
        else:
            variance.append(mean**2 * variance[-1] + SIGMA_Q**2 * dt)
    return variance


@pytest.mark.parametrize("deterministic", [True, False])
def test_samples_of_a_gaussian(sde, deterministic):
    data, steps, n = 0.5, 20, 20_000
    model = GaussianMixture(torch.zeros(1, 1), torch.full((1, 1, 1), data)).under(sde)
    trajectory = tutorial.sample(
        exact_mean(model, 1 / steps),
        n,
        (1,),
        steps,
        sigma_q=SIGMA_Q,
        deterministic=deterministic,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    assert trajectory.shape == (steps + 1, n, 1)
    # The start is N(0, σ_q²), without the data's variance, which DDIM keeps as a factor and DDPM forgets.
    expected = torch.tensor(variances(data, steps, deterministic), dtype=torch.float64)
    kept = expected[0] - SIGMA_Q**2
    if deterministic:
        expected *= SIGMA_Q**2 / (SIGMA_Q**2 + data)
    else:
        t = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        means = 1 - 1 / (steps * t) * (1 - data / (data + SIGMA_Q**2 * t))
        expected -= kept * torch.cat([t.new_ones(1), means.square().cumprod(0)])
    found = trajectory.flatten(1).var(1)
    assert ((found - expected).abs() < 4 * math.sqrt(2 / n) * expected).all()
    assert (trajectory.flatten(1).mean(1).abs() < 4 * torch.sqrt(expected / n)).all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_small_steps_keep_the_marginals(deterministic):
    """From p_1 to the data: DDPM to order Δt at every t, DDIM to order Δt log(1/Δt).

    DDIM's error is of first order in steps of the noise's standard deviation, σ_q² Δt/2σ each: the sum of their squares
    is a quarter of σ_q² Δt (1 + 1/2 + … + Δt).
    """
    data, scaled = 0.5, []
    for steps in (1000, 2000, 4000):
        exact = [data + SIGMA_Q**2 * i / steps for i in range(steps, -1, -1)]
        found = variances(data, steps, deterministic)
        scaled.append(steps * max(abs(a - b) for a, b in zip(found, exact, strict=True)))
    if deterministic:
        assert scaled[2] - scaled[1] == pytest.approx(scaled[1] - scaled[0], rel=0.05)
        assert scaled[1] - scaled[0] > 0.1
    else:
        assert scaled == pytest.approx([scaled[0]] * 3, rel=0.05)


def test_sampling_from_points_returns_them():
    points = normal(5, 2)
    mean = exact_mean(Empirical(points).under(ConstantVESDE(1.0)), 1 / 400)
    ends = tutorial.sample(mean, 64, (2,), 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[-1]
    distances = torch.cdist(ends, points)
    # The last step goes to the denoiser: a point, unless from between two that are 0.05 = σ_q √Δt apart.
    assert (distances.min(1).values < 1e-6).double().mean() > 0.95
    assert len(distances.argmin(1).unique()) == 5


def test_the_seed_decides(dtype):
    def run(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return tutorial.sample(lambda x, t: x / 2, 3, (1, 2), 4, generator=generator, dtype=dtype, **options)

    for deterministic in (True, False):
        result = run(0, deterministic=deterministic)
        assert (result.shape, result.dtype) == ((5, 3, 1, 2), dtype)
        assert torch.equal(result, run(0, deterministic=deterministic))
        assert not torch.equal(result, run(1, deterministic=deterministic))


@pytest.mark.parametrize("steps", [0, -2])
def test_steps_are_checked(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}: must be at least 1"):
        tutorial.sample(lambda x, t: x, 3, (2,), steps)
