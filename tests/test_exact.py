import math
import subprocess
import sys

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sde_diffusion import VPSDE, Empirical, Gaussian, GaussianMixture

EPS = torch.finfo(torch.float64).eps


def states(distribution, sde, n=8):
    """x_t (n, ...) at times (n,) from t_min to t_max, and the times; float64."""
    # Equally spaced in log(σ/α), where the posterior goes from one point to all the data.
    u = torch.linspace(sde.log_noise(sde.t_min), sde.log_noise(sde.t_max), n, dtype=torch.float64)
    t = sde.t_from_log_snr(-2 * u).clamp(sde.t_min, sde.t_max)
    x0 = distribution.sample(n, seed=1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=x0.dtype)
    return sde.perturb(x0, t, noise), t


def size(distribution):
    """A bound on the norm of all but the rarest data."""
    if isinstance(distribution, Empirical):
        return distribution.points.norm(dim=1).max()
    return (distribution.means.norm(dim=1) + distribution.eigenvalues.sum(1).sqrt()).max()


def rounding(distribution, sde, x, t):
    """How far two float64 evaluations at x (B, D) may differ, for each quantity (B, 1), or (B,) for numbers.

    The exponents of the softmax, squared distances over σ², are known to δ, a few eps (|x|/σ + α |x₀|/σ)². By
    Cauchy and Schwarz this moves E[x₀ | x] by at most δ √V, and V = tr Cov[x₀ | x] by 2 δ V; rounding x moves
    E[x₀ | x] by tr J = α V/σ² as much. ε̂ = (x − α x̂₀)/σ and the rest follow.
    """
    dimension, largest = x.shape[1], size(distribution)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    alpha_dot, sigma_dot = sde.alpha_dot(t)[:, None], sde.sigma_dot(t)[:, None]
    ratio = (x.detach().norm(dim=1, keepdim=True) + alpha * largest) / sigma
    trace = distribution.traces(x.detach(), alpha[:, 0], sigma[:, 0])[0][:, None]
    variance = sigma**2 * trace / alpha
    delta = 8 * EPS * ratio**2
    denoise = delta * variance.sqrt() + 4 * EPS * (dimension * largest + trace * sigma * ratio)
    eps = alpha / sigma * denoise + 4 * EPS * ratio
    log_prob = delta + 8 * EPS * dimension * (1 + sigma.log().abs())
    # ∇·u = D σ̇/σ − α² (σ̇/σ − f) V/σ², with V found as E[|x₀|² | x] − |E[x₀ | x]|²
    rate = sigma_dot / sigma - alpha_dot / alpha
    divergence = rate * (alpha / sigma) ** 2 * (2 * delta * variance + 8 * EPS * largest**2)
    divergence = divergence + 8 * EPS * dimension * sigma_dot / sigma
    return {
        "denoise": denoise,
        "eps": eps,
        "score": eps / sigma,
        "velocity": alpha_dot.abs() * denoise + sigma_dot * eps,
        "log_prob": log_prob[:, 0],
        "divergence": divergence[:, 0],
    }


def jacobian(function, x, t):
    """∂function/∂x (B, D, D) by reverse-mode differentiation, one example at a time."""
    return torch.func.vmap(torch.func.jacrev(lambda x, t: function(x[None], t[None])[0]))(x, t)


@pytest.fixture(scope="module")
def points():
    return torch.randn(23, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def correlated(rotated):
    """Mean (16,) and covariance (16, 16) of a Gaussian, with eigenvalues over a factor of 200."""
    one = rotated(16, components=1)
    axes = one.eigenvectors[0]
    covariance = axes @ one.eigenvalues[0].diag() @ axes.T
    return one.means[0] + 0.5, (covariance + covariance.T) / 2


@pytest.fixture(scope="module", params=["mixture", "empirical"])
def small_distribution(request, ring, points):
    return ring if request.param == "mixture" else Empirical(points, chunk=7)


def test_score_is_the_gradient_of_the_log_density(any_sde, mixture):
    model = mixture.under(any_sde)
    x, t = states(mixture, any_sde)
    x.requires_grad_()
    gradient = torch.autograd.grad(model.log_prob(x, t).sum(), x)[0]
    # Sums over D coordinates of (x − α m)/variance, where x and α m are rounded and no variance is below σ².
    sigma, alpha = any_sde.sigma(t)[:, None], any_sde.alpha(t)[:, None]
    bound = 4 * x.shape[1] * EPS * (x.norm(dim=1, keepdim=True) + alpha * size(mixture)) / sigma**2
    assert ((model.score(x, t) - gradient).abs() <= bound).all()


def test_empirical_score_is_the_gradient_of_the_log_density(any_sde, points):
    model = Empirical(points, chunk=7).under(any_sde)
    x, t = states(model.distribution, any_sde)
    x.requires_grad_()
    gradient = torch.autograd.grad(model.log_prob(x, t).sum(), x)[0]
    bound = rounding(model.distribution, any_sde, x, t)["score"]
    assert ((model.score(x, t) - gradient).abs() <= bound).all()


def test_the_prediction_adds_up_to_the_state(any_sde, mixture):
    x, t = states(mixture, any_sde)
    x0, eps = mixture.under(any_sde).predict(x, t)
    alpha, sigma = any_sde.alpha(t)[:, None], any_sde.sigma(t)[:, None]
    bound = x.shape[1] * EPS * (x.norm(dim=1) + (alpha * x0).norm(dim=1) + (sigma * eps).norm(dim=1))
    assert ((alpha * x0 + sigma * eps - x).norm(dim=1) <= bound).all()


def test_divergence_is_the_trace_of_the_jacobian(any_sde, mixture):
    assert_divergence_is_the_trace(mixture, any_sde)


def test_divergence_of_the_empirical_distribution(any_sde, points):
    assert_divergence_is_the_trace(Empirical(points, chunk=7), any_sde)


def assert_divergence_is_the_trace(distribution, sde):
    model = distribution.under(sde)
    x, t = states(distribution, sde)
    trace = jacobian(model.velocity, x, t).diagonal(dim1=1, dim2=2).sum(1)
    # The trace is a sum of D entries, each a difference; and in those of ∂x̂₀/∂x, of the slopes (x − α m)/σ² of the
    # exponents, x/σ² cancels.
    slope = x.norm(dim=1) * size(distribution) / sde.sigma(t).square()
    entries = rounding(distribution, sde, x, t)["divergence"] + 4 * EPS * sde.alpha_dot(t).abs() * slope
    bound = x.shape[1] * entries
    assert ((model.divergence(x, t) - trace).abs() <= bound).all()


def test_gaussian_against_torch(any_sde, correlated):
    mean, covariance = correlated
    model = Gaussian(mean, covariance).under(any_sde)
    x, t = states(model.distribution, any_sde)
    for i, time in enumerate(t):
        noised_mean, noised_covariance = noised(any_sde, time, mean, covariance)
        expected = MultivariateNormal(noised_mean, noised_covariance).log_prob(x[i])
        # The Cholesky factor of the reference loses its condition number, below 200.
        torch.testing.assert_close(model.log_prob(x[i : i + 1], time)[0], expected, rtol=1e-11, atol=1e-11)
        gain = torch.linalg.solve(noised_covariance, any_sde.alpha(time) * covariance).T
        expected = mean + gain @ (x[i] - noised_mean)
        torch.testing.assert_close(model.denoise(x[i : i + 1], time)[0], expected, rtol=1e-11, atol=1e-11)


def test_mixture_against_torch(any_sde, points):
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    covariances = torch.diag_embed(points[:3].abs() + 0.1)
    model = GaussianMixture(points[:3], covariances, weights).under(any_sde)
    x, t = states(model.distribution, any_sde)
    for i, time in enumerate(t):
        components = MultivariateNormal(*noised(any_sde, time, points[:3], covariances))
        expected = MixtureSameFamily(Categorical(weights), components).log_prob(x[i])
        torch.testing.assert_close(model.log_prob(x[i : i + 1], time)[0], expected, rtol=1e-12, atol=1e-12)


def noised(sde, t, means, covariances):
    """Means and covariances of p_t."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return alpha * means, alpha**2 * covariances + sigma**2 * torch.eye(means.shape[-1], dtype=torch.float64)


def test_mixture_of_one_is_the_gaussian(any_sde, correlated):
    mean, covariance = correlated
    gaussian = Gaussian(mean, covariance).under(any_sde)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    one = GaussianMixture(mean[None], covariance[None]).under(any_sde)
    split = GaussianMixture(mean.repeat(2, 1), covariance.repeat(2, 1, 1), weights).under(any_sde)
    x, t = states(gaussian.distribution, any_sde)
    for name, bound in rounding(gaussian.distribution, any_sde, x, t).items():
        expected = getattr(gaussian, name)(x, t)
        assert torch.equal(getattr(one, name)(x, t), expected)
        assert ((getattr(split, name)(x, t) - expected).abs() <= bound).all()


def test_empirical_is_the_mixture_of_points(any_sde, points):
    empirical = Empirical(points).under(any_sde)
    mixture = GaussianMixture(points, torch.zeros(23, 3, 3, dtype=torch.float64)).under(any_sde)
    x, t = states(empirical.distribution, any_sde)
    for name, bound in rounding(empirical.distribution, any_sde, x, t).items():
        assert ((getattr(mixture, name)(x, t) - getattr(empirical, name)(x, t)).abs() <= bound).all()


def test_empirical_is_the_limit_of_small_covariances(any_sde, points):
    empirical, variance = Empirical(points).under(any_sde), 1e-18
    blur = variance * torch.eye(3, dtype=torch.float64).expand(23, 3, 3)
    x, t = states(empirical.distribution, any_sde)
    alpha, sigma, largest = any_sde.alpha(t)[:, None], any_sde.sigma(t)[:, None], size(empirical.distribution)
    difference = GaussianMixture(points, blur).under(any_sde).denoise(x, t) - empirical.denoise(x, t)
    # The variance σ² grows by the factor 1 + 1e-18 (α/σ)², and the exponents |x − α x₀|²/2σ² shrink by it.
    ratio = (x.norm(dim=1, keepdim=True) + alpha * largest) / sigma
    bound = (
        rounding(empirical.distribution, any_sde, x, t)["denoise"] + largest * variance * (alpha / sigma * ratio) ** 2
    )
    assert (difference.abs() <= bound).all()


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_do_not_matter(any_sde, points, chunk):
    x, t = states(Empirical(points), any_sde)
    whole, chunked = (Empirical(points, chunk=c).under(any_sde) for c in (23, chunk))
    for name, bound in rounding(whole.distribution, any_sde, x, t).items():
        assert ((getattr(whole, name)(x, t) - getattr(chunked, name)(x, t)).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_float32_keeps_the_digits_of_its_input(any_sde, rotated, kind):
    distribution = rotated(64) if kind == "mixture" else Empirical(rotated(64).sample(200))
    model = distribution.under(any_sde)
    x, t = (value.float() for value in states(distribution, any_sde))
    exact_x, exact_t = x.double(), t.double()
    alpha, sigma = any_sde.alpha(exact_t)[:, None], any_sde.sigma(exact_t)[:, None]
    expected = model.predict(exact_x, exact_t)
    # What rounding x and α x₀ does to the result, to first order, and one rounding of each of its D terms.
    slope = jacobian(model.denoise, exact_x, exact_t)
    noise_slope = (torch.eye(64) - alpha[..., None] * slope) / sigma[..., None]
    moved = x.norm(dim=1, keepdim=True) + alpha * size(distribution)
    by_slope = 4 * torch.linalg.matrix_norm(slope, 2)[:, None] * moved
    by_noise_slope = 4 * torch.linalg.matrix_norm(noise_slope, 2)[:, None] * moved
    eps_terms = 64 * expected.eps.norm(dim=1, keepdim=True)
    if kind == "empirical":
        # ε̂ is (x − α x̂₀)/σ here, of a rounded x̂₀.
        eps_terms = eps_terms + 4 * moved / sigma
    result = model.predict(x, t)
    unit = torch.finfo(torch.float32).eps
    assert result.x0.dtype == result.eps.dtype == torch.float32
    assert ((result.x0 - expected.x0).abs() <= unit * (64 * size(distribution) + by_slope)).all()
    assert ((result.eps - expected.eps).abs() <= unit * (eps_terms + by_noise_slope)).all()


def test_float32_log_density(any_sde, mixture):
    model = mixture.under(any_sde)
    x, t = (value.float() for value in states(mixture, any_sde))
    exact_x, exact_t = x.double(), t.double()
    expected, dimension = model.log_prob(exact_x, exact_t), x.shape[1]
    # D terms of a square and a logarithm, and what rounding x and α x₀ does to first order.
    moved = x.norm(dim=1) + any_sde.alpha(exact_t) * size(mixture)
    by_slope = 4 * model.score(exact_x, exact_t).norm(dim=1) * moved
    terms = 8 * (dimension * (1 + any_sde.sigma(exact_t).log().abs()) + expected.abs())
    result = model.log_prob(x, t)
    assert result.dtype == torch.float32
    assert ((result - expected).abs() <= torch.finfo(torch.float32).eps * (terms + by_slope)).all()


def test_image_shapes(any_sde, points):
    flat = torch.cat([points, points[:, :1]], dim=1)
    covariances = torch.eye(4, dtype=torch.float64).expand(23, 4, 4) * 0.1
    for build in (lambda means: GaussianMixture(means, covariances), lambda means: Empirical(means)):
        vectors, images = build(flat).under(any_sde), build(flat.reshape(23, 1, 2, 2)).under(any_sde)
        assert images.data_shape == (1, 2, 2)
        assert torch.equal(images.sample(5), vectors.sample(5).reshape(5, 1, 2, 2))
        x, t = states(vectors.distribution, any_sde)
        image = x.reshape(8, 1, 2, 2)
        for name in ("denoise", "eps", "score", "velocity"):
            assert torch.equal(getattr(images, name)(image, t).reshape(8, 4), getattr(vectors, name)(x, t))
        for name in ("log_prob", "divergence"):
            assert torch.equal(getattr(images, name)(image, t), getattr(vectors, name)(x, t))


def test_a_time_for_each_example(any_sde, small_distribution):
    model = small_distribution.under(any_sde)
    x, t = states(small_distribution, any_sde)
    for name, bound in rounding(small_distribution, any_sde, x, t).items():
        together = getattr(model, name)(x, t)
        for i, time in enumerate(t):
            assert ((together[i] - getattr(model, name)(x[i : i + 1], time)[0]).abs() <= bound[i]).all()
        assert torch.equal(getattr(model, name)(x, float(t[4])), getattr(model, name)(x, t[4]))


def assert_moments(samples, mean, covariance):
    """Within four standard errors, for samples (n, D) of tails no heavier than a Gaussian's."""
    n, variance = len(samples), covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    standard_error = torch.sqrt((covariance**2 + variance[:, None] * variance) / n)
    assert ((samples.T.cov() - covariance).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_samples_have_the_moments(any_sde, ring, fraction):
    t = fraction * any_sde.T
    samples = ring.under(any_sde).sample(20_000, t=t, seed=3)
    time = torch.tensor(t, dtype=torch.float64)
    # Zero mean and unit variance; the ring's fourth moments are below a Gaussian's.
    covariance = (any_sde.alpha(time) ** 2 + any_sde.sigma(time) ** 2) * torch.eye(2, dtype=torch.float64)
    assert_moments(samples, torch.zeros(2, dtype=torch.float64), covariance)


def test_gaussian_samples_have_the_moments(correlated):
    assert_moments(Gaussian(*correlated).sample(20_000, seed=0), *correlated)


def test_samples_follow_the_weights(points):
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    distribution = GaussianMixture(points[:3], torch.zeros(3, 3, 3, dtype=torch.float64), 5 * weights)
    samples, n = distribution.sample(10_000, seed=0), 10_000
    share = torch.stack([(samples == point).all(1).double().mean() for point in points[:3]])
    assert ((share - weights).abs() < 4 * torch.sqrt(weights * (1 - weights) / n)).all()
    picked = Empirical(points).sample(10_000, seed=0)
    share = torch.stack([(picked == point).all(1).double().mean() for point in points])
    assert share.sum() == pytest.approx(1, abs=1e-12)
    # Four standard errors for each of 23 shares leave a chance of 0.15 % to fail, for this seed decided.
    assert ((share - 1 / 23).abs() < 4 * math.sqrt(1 / 23 / n)).all()


def test_the_seed_decides(small_distribution):
    model = small_distribution.under(VPSDE())
    assert torch.equal(model.sample(9, t=0.5, seed=4), model.sample(9, t=0.5, seed=4))
    assert not torch.equal(model.sample(9, t=0.5, seed=4), model.sample(9, t=0.5, seed=5))


def test_the_denoiser_is_the_best_estimate(any_sde, ring):
    """E[(x₀ − E[x₀ | x]) h(x)] = 0 for any h: the law of total expectation, with nothing but samples."""
    model, n = ring.under(any_sde), 20_000
    x0 = ring.sample(n, seed=0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=x0.dtype)
    t = float(any_sde.t_from_log_snr(torch.tensor(1.0, dtype=torch.float64)))
    x = any_sde.perturb(x0, t, noise)
    for h in (torch.ones_like(x), x, torch.sin(3 * x)):
        product = (x0 - model.denoise(x, t)) * h
        assert (product.mean(0).abs() < 4 * product.std(0) / math.sqrt(n)).all()


def test_shapes_and_dtypes(dtype, small_distribution):
    model = small_distribution.under(VPSDE())
    x = torch.randn(5, *model.data_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for name in ("denoise", "eps", "score", "velocity"):
        assert getattr(model, name)(x, 0.5).shape == x.shape
        assert getattr(model, name)(x, 0.5).dtype == dtype
    for name in ("log_prob", "divergence"):
        assert getattr(model, name)(x, 0.5).shape == (5,)
        assert getattr(model, name)(x, 0.5).dtype == dtype
    assert model.sample(6).shape == (6, *model.data_shape)
    assert model.sample(6, t=0.5).dtype == torch.float64


def test_density_of_the_data_themselves(ring):
    # At t = 0 VP has no noise, and the mixture still has a density.
    x = ring.sample(5)
    reference = MixtureSameFamily(
        Categorical(torch.ones(8, dtype=torch.float64)),
        MultivariateNormal(ring.means, 0.01 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2)),
    )
    torch.testing.assert_close(ring.under(VPSDE()).log_prob(x), reference.log_prob(x), rtol=1e-12, atol=1e-12)


def conditional(distribution, chain, t, x, y):
    """log q(x_t = y | x_{t+1} = x) in one dimension by Bayes' rule, up to a constant, at y (n,)."""
    scale, std = chain.marginal_scales[t], chain.marginal_stds[t]
    prior = distribution.log_prob(y[:, None], scale.expand(len(y)), std.expand(len(y)))
    return prior - (x - chain.scales[t] * y).square() / (2 * chain.stds[t].square())


def one_dimensional(kind):
    """Unequally likely, of unequal widths; or points."""
    if kind == "empirical":
        return Empirical(torch.tensor([[-1.0], [-0.4], [1.3]], dtype=torch.float64), chunk=2)
    means = torch.tensor([[-1.0], [0.8]], dtype=torch.float64)
    covariances = torch.tensor([[[0.05]], [[0.3]]], dtype=torch.float64)
    return GaussianMixture(means, covariances, torch.tensor([0.3, 0.7], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_posterior_draws_have_the_posterior_moments(any_sde, kind, points, ring):
    """Their mean is the denoiser's, and their total variance the one that its slope gives (Tweedie)."""
    distribution, n = (ring if kind == "mixture" else Empirical(points, chunk=7)), 20_000
    t = any_sde.t_from_log_snr(torch.tensor(1.0, dtype=torch.float64))
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    x = any_sde.perturb(distribution.sample(1, seed=1), t, torch.tensor(0.3)).expand(n, -1)
    draws = distribution.draw_given(x, alpha, sigma, torch.Generator().manual_seed(0))
    assert draws.shape == x.shape
    mean = distribution.predict(x[:1], alpha, sigma).x0[0]
    square = (draws - mean).square().sum(1)
    assert ((draws.mean(0) - mean).abs() < 4 * draws.std(0) / math.sqrt(n)).all()
    variance = sigma.square() / alpha * distribution.traces(x[:1], alpha.expand(1), sigma.expand(1))[0]
    assert (square.mean() - variance).abs() < 4 * square.std() / math.sqrt(n)


@pytest.mark.parametrize("chunk", [1, 3, 23])
def test_points_are_drawn_by_their_weights(points, chunk):
    distribution, n = Empirical(points, chunk=chunk), 20_000
    alpha, sigma = torch.tensor([0.8, 0.5], dtype=torch.float64)
    x = torch.tensor([[0.3, -0.2, 0.4]], dtype=torch.float64)
    weights = distribution.posterior_weights(x, alpha, sigma)[0]
    distances = (x - alpha * points).square().sum(1)
    torch.testing.assert_close(weights, torch.softmax(-distances / (2 * sigma**2), 0), rtol=1e-13, atol=0)
    draws = distribution.draw_given(x.expand(n, 3), alpha, sigma, torch.Generator().manual_seed(0))
    counts = (draws[:, None] == points).all(2).sum(0)
    assert counts.sum() == n
    expected = n * weights
    common = expected > 5
    # χ² with one degree of freedom for each common point, all the rare ones together being one more.
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic, freedom = ((observed - expected).square() / expected).sum(), len(expected) - 1
    assert freedom > 8
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_weights_make_the_denoiser(any_sde, points):
    distribution = Empirical(points, chunk=7)
    x, t = states(distribution, any_sde)
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    weights = distribution.posterior_weights(x, alpha, sigma)
    assert weights.shape == (len(x), 23)
    bound = rounding(distribution, any_sde, x, t)["denoise"]
    assert ((weights @ points - distribution.predict(x, alpha, sigma).x0).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
@pytest.mark.parametrize("t", [1, 5, 9])
def test_a_reverse_step_is_bayes_rule(kind, t):
    distribution, n = one_dimensional(kind), 50_000
    chain, x = VPSDE().discretize(10), torch.tensor(0.35, dtype=torch.float64)
    draws = distribution.reverse_step(x.expand(n, 1), t, chain, torch.Generator().manual_seed(t))[:, 0]
    y = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    cumulative = conditional(distribution, chain, t, x, y).softmax(0).cumsum(0)
    # Kolmogorov and Smirnov's distance, beyond 2.2/√n once in 10⁴; the step of the grid adds below 1e-3.
    empirical = torch.searchsorted(draws.sort().values, y, right=True) / n
    assert (empirical - cumulative).abs().max() < 2.2 / math.sqrt(n) + 1e-3


def test_the_reverse_of_points_is_the_mixture_of_posteriors(points):
    """Σ w_i N(a x⁽ⁱ⁾ + b x, v) in one dimension, against Bayes' rule."""
    distribution, chain = one_dimensional("empirical"), VPSDE().discretize(10)
    y, x = torch.linspace(-4, 4, 4001, dtype=torch.float64), torch.tensor([[0.35]], dtype=torch.float64)
    for t in range(1, 10):
        a, b, v = (coefficient[t] for coefficient in chain.posterior())
        weights = distribution.posterior_weights(x, chain.marginal_scales[t + 1], chain.marginal_stds[t + 1])[0]
        means = a * distribution.points[:, 0] + b * x
        mixture = MixtureSameFamily(Categorical(weights), torch.distributions.Normal(means[0], v.sqrt().expand(3)))
        expected = conditional(distribution, chain, t, x[0, 0], y)
        difference = mixture.log_prob(y) - expected
        # Equal but for the constant; exponents of up to 10⁵ are known to 10⁻¹⁶ of themselves.
        torch.testing.assert_close(difference, difference[2000].expand(4001), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_the_mean_of_a_reverse_step_is_tweedies(any_sde, kind, points, ring):
    """a E[x₀ | x] + b x = (x + σ²_{t+1} s)/λ_{t+1}."""
    distribution, chain = (ring if kind == "mixture" else Empirical(points)), any_sde.discretize(20)
    a, b, _ = chain.posterior()
    for t in range(20):
        alpha, sigma = chain.marginal_scales[t + 1], chain.marginal_stds[t + 1]
        x0 = distribution.sample(4, seed=t)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(t), dtype=x0.dtype)
        prediction = distribution.predict(x, alpha, sigma)
        mean = a[t] * prediction.x0 + b[t] * x
        tweedie = chain.reverse_mean(x, -prediction.eps / sigma, t)
        # Roundings of x/λ, and of α x₀/σ, which is where ε̂ comes from; the step's variance is a difference of σ²'s.
        size_of_terms = (x.abs() + alpha * size(distribution)) / chain.scales[t]
        share = chain.stds[t].square() / sigma.square()
        assert ((mean - tweedie).abs() <= 64 * EPS * size_of_terms / share).all()


def test_ancestral_sampling_returns_the_points(points):
    """From the prior, by exact reverse steps: every sample is a point, and every point is as likely."""
    distribution, n = Empirical(points, chunk=7), 4000
    chain, generator = VPSDE().discretize(20), torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    for t in reversed(range(20)):
        x = distribution.reverse_step(x, t, chain, generator)
    counts = (x[:, None] == points).all(2).sum(0)
    assert counts.sum() == n
    # χ² with 22 degrees of freedom. The prior is off by the mean α_T x₀ < 0.02 of the last state.
    statistic = ((counts - n / 23).square() / (n / 23)).sum()
    assert statistic < 22 + 4 * math.sqrt(44)


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_small_reverse_steps_are_nearly_gaussian(kind):
    """q(x_t | x_{t+1}) against N(its mean, σ²_{t+1}): total variation falls as 1/T, relative entropy as 1/T².

    log q(x_t | x_{t+1}) is −(x_{t+1} − λ x_t)²/2σ² + log q(x_t) + const. Over the step's width σ = O(T^−½) the second
    term's slope only moves the mean; its curvature adds to the precision, which is λ²/σ² − ∂² log q for 1/σ². The
    variance is off by the factor 1 + r with r = 1/λ² − 1 + σ² ∂² log q = O(1/T), and so the relative entropy by r²/4.
    """
    distribution, x = one_dimensional(kind), torch.tensor(-0.9, dtype=torch.float64)
    entropies, variations = [], []
    for steps in (100, 200, 400, 800):
        chain = VPSDE().discretize([0.2 * i / steps for i in range(1, steps + 1)])
        t = steps - 1
        alpha, sigma = chain.marginal_scales[-1], chain.marginal_stds[-1]
        a, b, _ = (coefficient[t] for coefficient in chain.posterior())
        mean = a * distribution.predict(x.reshape(1, 1), alpha, sigma).x0[0, 0] + b * x
        std = chain.stds[t]
        y, width = mean + std * torch.linspace(-12, 12, 4001, dtype=torch.float64), 24 * std / 4000
        exact = torch.log_softmax(conditional(distribution, chain, t, x, y), 0)
        gaussian = -0.5 * ((y - mean) / std).square() + torch.log(width / (std * math.sqrt(2 * math.pi)))
        entropies.append(float((exact.exp() * (exact - gaussian)).sum()))
        variations.append(float(0.5 * (exact.exp() - gaussian.exp()).abs().sum()))
    # The next order is 1/T smaller, and so is the distance of the ratios from 4 and 2.
    for values, ratio in ((entropies, 4), (variations, 2)):
        errors = [abs(values[i] / values[i + 1] / ratio - 1) for i in range(3)]
        assert errors[0] < 0.1
        assert errors[2] < 0.3 * errors[0]
    curvature = -distribution.traces(x.reshape(1, 1), alpha.expand(1), sigma.expand(1))[1] / sigma.square()
    excess = 1 / chain.scales[-1].square() - 1 + chain.stds[-1].square() * curvature
    assert entropies[-1] == pytest.approx(float(excess.square() / 4), rel=0.05)


@pytest.mark.parametrize("t", [-1, 10])
def test_reverse_steps_are_checked(small_distribution, t):
    x = torch.zeros(2, *small_distribution.data_shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"t = {t}: must be in 0…9"):
        small_distribution.reverse_step(x, t, VPSDE().discretize(10), torch.Generator())


def test_no_signal(dtype, small_distribution):
    """At α = 0 nothing is known of x₀, and all of ε."""
    sigma = torch.tensor(2.0, dtype=dtype)
    x = torch.randn(4, *small_distribution.data_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x0, eps = small_distribution.predict(x, torch.zeros_like(sigma), sigma)
    mean = (
        small_distribution.points.mean(0)
        if isinstance(small_distribution, Empirical)
        else small_distribution.weights @ small_distribution.means
    )
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(x0, mean.to(x0).expand_as(x0), rtol=0, atol=16 * unit * float(size(small_distribution)))
    torch.testing.assert_close(eps, x / sigma, rtol=16 * unit, atol=0)


def test_no_noise(dtype, small_distribution):
    """At σ = 0 all is known of x₀, and nothing of ε, whose mean is 0."""
    x = small_distribution.sample(4, seed=3).to(dtype)
    if isinstance(small_distribution, Empirical):
        small_distribution = Empirical(small_distribution.points.to(dtype), chunk=7)
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    x0, eps = small_distribution.predict(x, one, zero)
    torch.testing.assert_close(x0, x, rtol=0, atol=16 * torch.finfo(dtype).eps * float(size(small_distribution)))
    assert torch.equal(eps, torch.zeros_like(x))
    draws = small_distribution.draw_given(x, one, zero, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, x, rtol=0, atol=16 * torch.finfo(dtype).eps * float(size(small_distribution)))


MEANS = torch.zeros(3, 2)
IDENTITY = torch.eye(2).expand(3, 2, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture(MEANS, torch.eye(2)), r"covariances has shape \(2, 2\): need \(3, 2, 2\)"),
        (lambda: GaussianMixture(MEANS, IDENTITY, torch.ones(2)), "need 3 positive numbers"),
        (lambda: GaussianMixture(MEANS, IDENTITY, torch.tensor([1, 1, -1])), "need 3 positive numbers"),
        (lambda: GaussianMixture(MEANS, IDENTITY + torch.tensor([[0, 1], [0, 0]])), "symmetric"),
        (lambda: GaussianMixture(MEANS, -IDENTITY), "semi-definite"),
        (lambda: GaussianMixture(torch.zeros(0, 2), IDENTITY[:0]), r"means has shape \(0, 2\)"),
        (lambda: GaussianMixture(torch.zeros(3), IDENTITY), r"means has shape \(3,\)"),
        (lambda: GaussianMixture(MEANS.long(), IDENTITY), r"torch\.int64"),
        (lambda: Gaussian(torch.zeros(2), torch.eye(3)), r"covariances has shape \(1, 3, 3\)"),
        (lambda: Empirical(torch.zeros(0, 2)), r"points has shape \(0, 2\)"),
        (lambda: Empirical(torch.zeros(3, 2), chunk=0), "chunk = 0"),
    ],
)
def test_parameters_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_calls_are_checked(small_distribution):
    model = small_distribution.under(VPSDE())
    x = torch.zeros(4, *model.data_shape)
    for name in ("predict", "log_prob", "divergence", "score"):
        method = getattr(model, name)
        with pytest.raises(ValueError, match=r"x has shape \(4, 7\)"):
            method(torch.zeros(4, 7), 0.5)
        with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
            method(x.long(), 0.5)
        with pytest.raises(ValueError, match=r"t = 1\.5"):
            method(x, 1.5)
    with pytest.raises(ValueError, match=r"cond = \['label'\]"):
        model.predict(x, 0.5, label=torch.zeros(4))


MEMORY_PROBE = """
import resource, torch
from sde_diffusion import Empirical, VPSDE
model = Empirical(torch.rand(60_000, 784)).under(VPSDE())
x = torch.randn(128, 784)
model.score(x, 0.5), model.log_prob(x, 0.5), model.divergence(x, 0.5)
model.distribution.reverse_step(x, 5, VPSDE().discretize(10), torch.Generator().manual_seed(0))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_on_a_whole_data_set(pytestconfig):
    # A process of its own: the peak of this one may lie behind it.
    command = [sys.executable, "-c", MEMORY_PROBE]
    run = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    kibibytes = int(run.stdout)
    # The differences x − α x⁽ⁱ⁾ at once would take 128 · 60,000 · 784 · 4 bytes = 24 GB.
    assert kibibytes < 2 * 2**20
