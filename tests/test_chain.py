"""The chain against the composition of its steps, Gaussian conditioning, the printed formulas, and its limit."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion import (
    BETAS,
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    ChainSDE,
    ConstantVESDE,
    DiffusionModel,
    Empirical,
    Gaussian,
    GaussianChain,
    GaussianMixture,
    zero_terminal_snr,
)

EPS = torch.finfo(torch.float64).eps

steps = st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.001, 3)), min_size=1, max_size=30)


def ddpm():
    """Ho et al. 2020, section 4: T = 1000, β from 1e-4 to 0.02."""
    beta = BETAS["linear"](1000)
    return GaussianChain.ddpm(beta), beta


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(steps=steps)
def test_marginals_are_the_composition_of_the_steps(steps):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    assert len(chain) == len(steps)
    assert (chain.marginal_scales[0], chain.marginal_stds[0]) == (1, 0)
    for t in range(1, len(steps) + 1):
        # x_t = Σ_s (Π_{r > s} λ_r) σ_s ε_s + (Π_r λ_r) x₀
        later = [math.prod(scale for scale, _ in steps[s:t]) for s in range(t + 1)]
        assert float(chain.marginal_scales[t]) == pytest.approx(later[0], rel=2 * t * EPS, abs=0)
        variance = sum((later[s + 1] * steps[s][1]) ** 2 for s in range(t))
        assert float(chain.marginal_stds[t]) == pytest.approx(math.sqrt(variance), rel=4 * t * EPS, abs=0)


@given(steps=steps)
def test_posterior_is_gaussian_conditioning(steps):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    a, b, v = chain.posterior()
    assert a.shape == b.shape == v.shape == (len(steps),)
    for t, (scale, std) in enumerate(steps):
        # The joint law of (x_t, x_{t+1}) given x₀, means in units of x₀, conditioned on x_{t+1}.
        mean = torch.stack([chain.marginal_scales[t], scale * chain.marginal_scales[t]])
        step = torch.tensor([[1, 0], [scale, std]], dtype=torch.float64)
        factor = step * torch.stack([chain.marginal_stds[t], torch.ones((), dtype=torch.float64)])
        covariance = factor @ factor.T
        gain = covariance[0, 1] / covariance[1, 1]
        # Differences here, products there: rounding errors of the minuends.
        torch.testing.assert_close(b[t], gain, rtol=16 * EPS, atol=0)
        torch.testing.assert_close(a[t], mean[0] - gain * mean[1], rtol=0, atol=64 * EPS * float(mean[0]))
        left = covariance[0, 0] - gain * covariance[0, 1]
        torch.testing.assert_close(v[t], left, rtol=0, atol=64 * EPS * float(covariance[0, 0]))


@given(steps=steps)
def test_posterior_keeps_the_marginals(steps):
    """x_{t+1} ~ q(x_{t+1}|x₀) and then x_t ~ q(x_t|x_{t+1}, x₀) is x_t ~ q(x_t|x₀)."""
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    a, b, v = chain.posterior()
    scale, variance = chain.marginal_scales, chain.marginal_stds**2
    torch.testing.assert_close(a + b * scale[1:], scale[:-1], rtol=16 * EPS, atol=0)
    torch.testing.assert_close(v + b**2 * variance[1:], variance[:-1], rtol=32 * EPS, atol=0)


@given(steps=steps)
def test_posterior_at_the_data_is_the_data(steps):
    first = [float(value[0]) for value in GaussianChain(*torch.tensor(steps).T).posterior()]
    assert first == [1, 0, 0]


def test_ddpm():
    chain, beta = ddpm()
    alpha_bar = torch.cumprod(1 - beta, 0)
    # Variance preserving: λ² + σ² = 1 makes every marginal so.
    torch.testing.assert_close(chain.marginal_scales[1:], alpha_bar.sqrt(), rtol=2000 * EPS, atol=0)
    torch.testing.assert_close(chain.marginal_stds[1:], (1 - alpha_bar).sqrt(), rtol=1e-11, atol=0)
    assert float(alpha_bar[-1]) == pytest.approx(4.036e-5, abs=5e-9)
    a, b, v = chain.posterior()
    # Equations 6 and 7, whose t is our t + 1, from t = 2 on. 1 - ᾱ starts at 1e-4 and loses four digits.
    previous, current, beta = alpha_bar[:-1], alpha_bar[1:], beta[1:]
    share = beta / (1 - current)
    torch.testing.assert_close(v[1:], (1 - previous) * share, rtol=1e-11, atol=0)
    torch.testing.assert_close(a[1:], previous.sqrt() * share, rtol=1e-11, atol=0)
    expected = (1 - beta).sqrt() * (1 - previous) / (1 - current)
    torch.testing.assert_close(b[1:], expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_chain_of_an_sde_has_its_marginals(any_sde, count):
    chain = any_sde.discretize(count)
    assert len(chain) == count
    times = torch.arange(1, count + 1, dtype=torch.float64) * (any_sde.t_max / count)
    # A step's variance is found as a difference and added back: a few roundings more a step, and no step
    # enlarges what came before. A rounding of t moves α = 0.001, at the user's t_max, by 1600 times as much.
    torch.testing.assert_close(chain.marginal_scales[1:], any_sde.alpha(times), rtol=(4 * count + 4000) * EPS, atol=0)
    torch.testing.assert_close(chain.marginal_stds[1:], any_sde.sigma(times), rtol=(8 * count + 100) * EPS, atol=0)


def test_chain_of_an_sde_at_given_times(any_sde):
    times = [fraction * any_sde.t_max for fraction in (0.001, 0.1, 0.7, 1)]
    chain = any_sde.discretize(times)
    time = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(chain.marginal_scales[1:], any_sde.alpha(time), rtol=20 * EPS, atol=0)
    torch.testing.assert_close(chain.marginal_stds[1:], any_sde.sigma(time), rtol=200 * EPS, atol=0)
    assert torch.equal(GaussianChain.from_sde(any_sde, times).scales, chain.scales)


def test_betas_of_the_vp_chain_are_not_ddpms():
    # β(i/N)/N of the SDE: β_1 = 1 - exp(-∫) over a thousandth.
    chain = VPSDE().discretize(1000)
    integral = 0.1e-3 + 19.9e-6 / 2
    assert float(chain.stds[0] ** 2) == pytest.approx(-math.expm1(-integral), rel=1e-12)


def test_chains_are_float64():
    chain = GaussianChain(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2]))
    for values in (chain.scales, chain.stds, chain.marginal_scales, chain.marginal_stds, *chain.posterior()):
        assert values.dtype == torch.float64


def test_a_step_may_forget_everything():
    chain = GaussianChain(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 2.0]))
    assert chain.marginal_scales.tolist() == [1, 0.5, 0]
    assert [value.tolist() for value in chain.posterior()] == [[1, 0.5], [0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("scales", "stds", "message"),
    [
        ([0.9, 0.8], [0.1], r"shapes \(2,\), \(1,\)"),
        ([], [], r"shapes \(0,\), \(0,\)"),
        ([[0.9]], [[0.1]], r"shapes \(1, 1\), \(1, 1\)"),
        ([0.9, 1.1], [0.1, 0.1], r"scales are in \[.*, 1\.1.*\]: must be in \[0, 1\]"),
        ([-0.1], [0.1], "scales are in"),
        ([math.nan], [0.1], "scales are in"),
        ([0.9, 0.9], [0.1, 0.0], "stds has smallest entry 0.0"),
        ([0.9], [math.nan], "stds has smallest entry nan"),
        ([0.9], [math.inf], "stds has largest entry inf: must be finite"),
    ],
)
def test_parameters_are_checked(scales, stds, message):
    with pytest.raises(ValueError, match=message):
        GaussianChain(torch.tensor(scales), torch.tensor(stds))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "steps = 0: must be at least 1"),
        (-3, "steps = -3: must be at least 1"),
        ([], r"steps = \[\]: must be at least one time"),
        ([0.2, 0.1], r"steps = \[0\.2, 0\.1\]"),
        ([0.1, 0.1], r"steps = \[0\.1, 0\.1\]"),
        ([0.5, 1.5], r"steps = 1\.5 is outside the range \[0, 1\.0\] of VPSDE"),
        ([-0.5, 0.5], r"steps = -0\.5 is outside"),
        ([0.0, 0.5], r"steps\[0\] = 0\.0: VPSDE.* has no noise there, .*; give the times after it"),
    ],
)
def test_times_are_checked(steps, message):
    with pytest.raises(ValueError, match=message):
        VPSDE().discretize(steps)


def test_data_blurred_at_the_start_may_be_a_step():
    # VE's σ(0) is σ_min, not 0, and EDM's time is the noise itself.
    assert float(VESDE().discretize([0.0, 1.0]).marginal_stds[1]) == pytest.approx(0.01, rel=4 * EPS)
    assert float(EDMSDE().discretize(80).marginal_stds[1]) == pytest.approx(1, rel=4 * EPS)


def test_times_are_of_the_states(any_sde):
    times = [fraction * any_sde.t_max for fraction in (0.001, 0.1, 0.7, 1)]
    assert any_sde.discretize(times).times.tolist() == [0, *times]
    assert any_sde.discretize(4).times.tolist() == [any_sde.t_max * i / 4 for i in range(5)]
    # Those of a chain of no SDE.
    half = torch.tensor([0.5] * 4)
    assert GaussianChain(half, half).times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert GaussianChain(half, half, torch.tensor([0.0, 1, 2, 2, 5])).times.tolist() == [0, 1, 2, 2, 5]
    assert GaussianChain(half, half).times.dtype == torch.float64


@pytest.mark.parametrize("times", [[0.0, 1], [0.1, 0.5, 1], [0, 0.7, 0.5], [0, 0.5, math.nan]])
def test_times_of_a_chain_are_checked(times):
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"times = .*: need \(3,\) that start at 0 and never decrease"):
        GaussianChain(half, half, torch.tensor(times))


@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_chain_of_an_sde_takes_integers_of_numpy(integer):
    for sde in (VPSDE(), ddpm()[0].to_sde()):
        assert torch.equal(sde.discretize(integer(7)).stds, sde.discretize(7).stds)
    assert len(GaussianChain.from_sde(VPSDE(), integer(7))) == 7


def test_length_and_end_are_shown():
    assert repr(ddpm()[0]) == "GaussianChain of 1000 steps to time 1.0"


# Schedules.


@given(scales=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30))
def test_variance_preserving(scales):
    scales = torch.tensor(scales, dtype=torch.float64)
    chain = GaussianChain.variance_preserving(scales)
    assert torch.equal(chain.scales, scales)
    total = chain.marginal_scales**2 + chain.marginal_stds**2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=8 * len(scales) * EPS)
    assert chain.prior_std == 1


@pytest.mark.parametrize("scales", [[0.5, 1.0], [1.5], [-0.1]])
def test_variance_preserving_needs_noise_and_no_growth(scales):
    with pytest.raises(ValueError, match=r"scales are in|stds has smallest entry"):
        GaussianChain.variance_preserving(torch.tensor(scales))


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.1], [1.0, 0.5], [-0.1], [math.nan]])
def test_ddpm_checks_betas(betas):
    with pytest.raises(ValueError, match=r"betas are in .*: must be in \(0, 1\), of which only the last may be 1"):
        GaussianChain.ddpm(torch.tensor(betas))


def test_linear_betas():
    betas = BETAS["linear"](1000)
    assert (float(betas[0]), float(betas[-1])) == (1e-4, 0.02)
    torch.testing.assert_close(betas.diff(), torch.full_like(betas[1:], 0.0199 / 999), rtol=1e-11, atol=0)
    torch.testing.assert_close(BETAS["linear"](3, beta_min=0.1, beta_max=0.3).tolist(), [0.1, 0.2, 0.3])


def test_scaled_linear_betas():
    betas = BETAS["scaled_linear"](1000)
    assert (float(betas[0]), float(betas[-1])) == pytest.approx((0.00085, 0.012), rel=4 * EPS, abs=0)
    between = (math.sqrt(0.012) - math.sqrt(0.00085)) / 999
    torch.testing.assert_close(betas.sqrt().diff(), torch.full_like(betas[1:], between), rtol=1e-11, atol=0)


def test_cosine_betas():
    """f(t)/f(0) with f = cos²((t/T + s)/(1 + s) π/2), s = 0.008, and β at most 0.999."""
    steps = 1000
    chain = GaussianChain.ddpm(BETAS["cosine"](steps))
    expected = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    expected = torch.tensor(expected, dtype=torch.float64) / expected[0]
    # The last ratio is 0, so its β is 1 before it is limited.
    torch.testing.assert_close(chain.marginal_scales[:-1] ** 2, expected[:-1], rtol=1e-10, atol=0)
    assert float(chain.stds[-1] ** 2) == pytest.approx(0.999, rel=4 * EPS)
    assert BETAS["cosine"](4, max_beta=0.3).max() == 0.3
    wide = GaussianChain.ddpm(BETAS["cosine"](4, offset=1.0)).marginal_scales[2] ** 2
    assert float(wide) == pytest.approx(math.cos(0.75 * math.pi / 2) ** 2 / 0.5, rel=1e-12)


@pytest.mark.parametrize("name", BETAS)
def test_schedules_are_those_of_a_chain_of_any_length(name):
    for steps in (1, 2, 50):
        betas = BETAS[name](steps)
        assert betas.dtype == torch.float64
        assert len(GaussianChain.ddpm(betas)) == steps
    with pytest.raises(ValueError, match="steps = 0: must be at least 1"):
        BETAS[name](0)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_zero_terminal_snr(name, steps):
    """Lin et al. 2024, algorithm 1: √ᾱ less its last value, times first/(first − last)."""
    before = torch.cumprod(1 - BETAS[name](steps), 0).sqrt()
    betas = zero_terminal_snr(BETAS[name](steps))
    assert float(betas[0]) == pytest.approx(float(1 - before[0] ** 2), rel=1e-11)
    assert float(betas[-1]) == 1
    chain = GaussianChain.ddpm(betas)
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    torch.testing.assert_close(chain.marginal_scales[1:], expected, rtol=1e-9, atol=0)
    assert (float(chain.marginal_scales[-1]), float(chain.marginal_stds[-1]), chain.prior_std) == (0, 1, 1)


@pytest.mark.parametrize(
    ("betas", "message"),
    [([0.1], "betas holds 1: need at least 2"), ([0.1, 1.1], "betas are in"), ([1.0, 0.1], "betas are in")],
)
def test_zero_terminal_snr_checks_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        zero_terminal_snr(torch.tensor(betas))


@pytest.mark.parametrize(("steps", "sigma_q"), [(1, 1.0), (10, 0.3), (100, 50.0)])
def test_constant_rate(steps, sigma_q):
    chain = GaussianChain.constant_rate(steps, sigma_q)
    assert torch.equal(chain.marginal_scales, torch.ones(steps + 1, dtype=torch.float64))
    torch.testing.assert_close(chain.marginal_stds, sigma_q * chain.times.sqrt(), rtol=2 * steps * EPS, atol=0)
    same = ConstantVESDE(sigma_q).discretize(chain.times[1:].tolist())
    torch.testing.assert_close(chain.stds, same.stds, rtol=4 * steps * EPS, atol=0)
    assert chain.prior_std == pytest.approx(sigma_q, rel=2 * steps * EPS)


@pytest.mark.parametrize(
    ("steps", "sigma_q", "message"),
    [(0, 1.0, "steps = 0: must be"), (4, 0.0, "sigma_q = 0.0"), (4, math.inf, "sigma_q = inf"), (4, -1, "sigma_q")],
)
def test_constant_rate_checks_its_arguments(steps, sigma_q, message):
    with pytest.raises(ValueError, match=message):
        GaussianChain.constant_rate(steps, sigma_q)


def test_prior_is_that_of_the_last_state():
    assert ddpm()[0].prior_std == 1
    # Not 1, though it comes near: σ_{2|0}² = 0.25 + 0.5.
    mixed = GaussianChain(torch.tensor([0.5, 0.5]), torch.tensor([1.0, math.sqrt(0.5)]))
    assert mixed.prior_std == pytest.approx(math.sqrt(0.75), rel=1e-7)


# Subsequences.


@given(steps=steps, data=st.data())
def test_subsequence_keeps_the_marginals(steps, data):
    scales, stds = torch.tensor(steps, dtype=torch.float64).T
    times = torch.arange(len(steps) + 1, dtype=torch.float64) ** 2
    chain = GaussianChain(scales, stds, times)
    chosen = sorted(data.draw(st.sets(st.integers(1, len(steps)), min_size=1)))
    for indices in (chosen, torch.tensor(chosen)):
        part, states = chain.subsequence(indices), [0, *chosen]
        assert part.times.tolist() == times[states].tolist()
        tolerance = 4 * len(steps) * EPS
        torch.testing.assert_close(part.marginal_scales, chain.marginal_scales[states], rtol=tolerance, atol=0)
        torch.testing.assert_close(part.marginal_stds, chain.marginal_stds[states], rtol=tolerance, atol=0)


def test_subsequence_of_all_is_the_chain():
    chain = ddpm()[0]
    same = chain.subsequence(range(1, 1001))
    assert torch.equal(same.scales, chain.scales)
    torch.testing.assert_close(same.stds, chain.stds, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("indices", [[], [0, 1], [2, 1], [3, 3], [1, 6], [-1, 2]])
def test_indices_are_checked(indices):
    chain = GaussianChain.constant_rate(5)
    with pytest.raises(ValueError, match=r"indices = \[.*\]: must be at least one, and increase within 1…5"):
        chain.subsequence(indices)


# Reverse variances.


def test_reverse_variance():
    chain = ddpm()[0]
    posterior, noising = chain.posterior()[2], chain.stds**2
    assert torch.equal(chain.reverse_variance("posterior"), posterior)
    assert torch.equal(chain.reverse_variance("noising"), noising)
    assert torch.equal(chain.reverse_variance(0), posterior)
    assert torch.equal(chain.reverse_variance(1.0), noising)
    for fraction in (0.5, 0.25):
        logarithm = fraction * noising[1:].log() + (1 - fraction) * posterior[1:].log()
        torch.testing.assert_close(chain.reverse_variance(fraction)[1:].log(), logarithm, rtol=1e-13, atol=0)
        assert float(chain.reverse_variance(fraction)[0]) == 0
    given_variance = torch.linspace(0, 1, 1000)
    assert torch.equal(chain.reverse_variance(given_variance), given_variance.double())


def test_reverse_variance_of_a_decoder_is_not_0():
    chain = ddpm()[0]
    posterior, noising = chain.posterior()[2], chain.stds**2
    expected = {"posterior": posterior[1], "noising": noising[0], 0.5: torch.sqrt(posterior[1] * noising[0])}
    for variance, first in expected.items():
        result = chain.reverse_variance(variance, decoder=True)
        assert float(result[0]) == pytest.approx(float(first), rel=4 * EPS)
        assert torch.equal(result[1:], chain.reverse_variance(variance)[1:])
    rest = torch.full((999,), 0.3, dtype=torch.float64)
    for first, used in ((0.0, float(posterior[1])), (0.2, 0.2)):
        variances = torch.cat([torch.tensor([first], dtype=torch.float64), rest])
        assert chain.reverse_variance(variances, decoder=True).tolist() == [used, *rest.tolist()]
    # A chain of one step has no v_1.
    single = GaussianChain.ddpm(torch.tensor([0.5]))
    assert float(single.reverse_variance("posterior", decoder=True)) == pytest.approx(0.5, rel=4 * EPS)


@pytest.mark.parametrize(
    ("variance", "message"),
    [
        (-0.1, r"variance = -0.1: must be in \[0, 1\]"),
        (1.1, r"variance = 1.1: must be in \[0, 1\]"),
        (math.nan, "variance = nan"),
        ("beta", r"variance = 'beta': must be one of posterior, noising, a number in \[0, 1\] or a tensor"),
        ([0.1, 0.2, 0.3], r"variance = \[0.1, 0.2, 0.3\]: must be one of"),
        (None, "variance = None: must be one of"),
        (torch.tensor([0.1, 0.2]), r"variance = .*: must be \(3,\), finite and not negative"),
        (torch.tensor(0.5), r"must be \(3,\)"),
        (torch.tensor([0.1, -0.2, 0.3]), r"must be \(3,\)"),
        (torch.tensor([0.1, math.nan, 0.3]), r"must be \(3,\)"),
        (torch.tensor([0.1, math.inf, 0.3]), r"must be \(3,\)"),
    ],
)
def test_reverse_variance_is_checked(variance, message):
    with pytest.raises(ValueError, match=message):
        GaussianChain.constant_rate(3).reverse_variance(variance)


def gaussian_mean_square_score(chain, eigenvalues):
    """E‖s_t‖²/D, t = 1…T, for data of a covariance with these eigenvalues: the mean of 1/(λ² c + σ²)."""
    c = torch.tensor(eigenvalues, dtype=torch.float64)
    return (1 / (chain.marginal_scales[1:, None] ** 2 * c + chain.marginal_stds[1:, None] ** 2)).mean(1)


@given(steps=steps, eigenvalues=st.lists(st.floats(0.01, 4), min_size=1, max_size=3))
def test_optimal_variance_is_the_mean_of_the_reverse_covariance(steps, eigenvalues):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    best = chain.optimal_variance(gaussian_mean_square_score(chain, eigenvalues))
    # Of x_t and x_{t+1} = λ x_t + σ ε, Gaussian: Var[x_t | x_{t+1}] = S σ²/(λ² S + σ²) with S = Var[x_t].
    c = torch.tensor(eigenvalues, dtype=torch.float64)
    before = chain.marginal_scales[:-1, None] ** 2 * c + chain.marginal_stds[:-1, None] ** 2
    scales, noising = chain.scales[:, None], chain.stds[:, None] ** 2
    expected = (before * noising / (scales**2 * before + noising)).mean(1)
    # 1 − σ² E‖s‖²/D is a difference from 1.
    error = 32 * len(steps) * EPS * (noising / scales**2)[:, 0]
    assert bool(((best - expected).abs() <= error).all())


@pytest.mark.parametrize("betas", BETAS)
def test_noising_variance_is_exact_for_normal_data(betas):
    chain = GaussianChain.ddpm(BETAS[betas](1000))
    # E‖s‖²/D = 1, as every state is N(0, I).
    one = gaussian_mean_square_score(chain, [1.0, 1.0])
    torch.testing.assert_close(one, torch.ones_like(one), rtol=1e-12, atol=0)
    torch.testing.assert_close(chain.optimal_variance(one), chain.stds**2, rtol=1e-8, atol=0)


@pytest.mark.parametrize("betas", BETAS)
def test_noising_variance_is_too_large_and_posterior_too_small_for_less_than_normal_data(betas):
    chain = GaussianChain.ddpm(BETAS[betas](1000))
    best = chain.optimal_variance(gaussian_mean_square_score(chain, [0.9, 0.3, 0.01]))
    # Where data are all but gone, each is right to the digits that are left.
    assert bool((best[:900] < chain.stds[:900] ** 2).all())
    assert bool((best[:900] > chain.posterior()[2][:900]).all())


@pytest.mark.parametrize("betas", BETAS)
def test_posterior_variance_is_exact_for_one_point(betas):
    chain = GaussianChain.ddpm(BETAS[betas](1000))
    best = chain.optimal_variance(gaussian_mean_square_score(chain, [0.0]))
    noising = chain.stds**2
    error = (best - chain.posterior()[2]).abs() * chain.scales**2 / noising
    assert float(error.max()) < 1e-10
    # The closed form is that of the model of one point.
    short = GaussianChain.ddpm(BETAS[betas](20))
    point = torch.tensor([[0.3, -0.8, 0.5]], dtype=torch.float64)
    n = 4000
    estimate = short.mean_square_score(Empirical(point).under(short.to_sde()), point.expand(n, 3))
    relative = estimate / gaussian_mean_square_score(short, [0.0]) - 1
    assert float(relative.abs().max()) < 4 * math.sqrt(2 / (3 * n))


def test_optimal_variance_of_a_mixture_is_between_the_two():
    chain = GaussianChain.ddpm(BETAS["linear"](100, 1e-3, 0.1))
    means = torch.tensor([[-0.9], [0.4]], dtype=torch.float64)
    data = GaussianMixture(means, torch.tensor([[[0.05]], [[0.1]]], dtype=torch.float64))
    # E s² by quadrature over all of the line that matters.
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    squares = []
    for alpha, sigma in zip(chain.marginal_scales[1:], chain.marginal_stds[1:], strict=True):
        score = -data.predict(x, alpha, sigma).eps[:, 0] / sigma
        squares.append(torch.trapezoid(data.log_prob(x, alpha, sigma).exp() * score**2, x[:, 0]))
    best = chain.optimal_variance(torch.stack(squares))
    assert bool((best > chain.posterior()[2]).all())
    assert bool((best < chain.stds**2).all())


def test_optimal_variance_is_never_below_the_posterior():
    chain = ddpm()[0]
    assert torch.equal(chain.optimal_variance(torch.full((1000,), 1e9)), chain.posterior()[2])


@pytest.mark.parametrize(
    "values", [[1.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0], [[1.0, 1.0, 1.0]]]
)
def test_mean_square_score_is_checked(values):
    with pytest.raises(ValueError, match=r"mean_square_score = .*: must be \(3,\), finite, not negative"):
        GaussianChain.constant_rate(3).optimal_variance(torch.tensor(values))


def test_optimal_variance_needs_a_scale():
    chain = GaussianChain.ddpm(zero_terminal_snr(BETAS["linear"](3)))
    with pytest.raises(ValueError, match="scales: one is 0"):
        chain.optimal_variance(torch.ones(3))


def test_mean_square_score():
    chain = GaussianChain.ddpm(BETAS["linear"](20, 1e-3, 0.5))
    eigenvalues, n = [0.9, 0.3, 0.02], 4000
    c = torch.tensor(eigenvalues, dtype=torch.float64)
    data = Gaussian(torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64), torch.diag(c))
    estimate = chain.mean_square_score(data.under(chain.to_sde()), data.sample(n))
    # s ~ N(0, S⁻¹), so the variance of ‖s‖² is 2 tr S⁻².
    inverse = 1 / (chain.marginal_scales[1:, None] ** 2 * c + chain.marginal_stds[1:, None] ** 2)
    error = torch.sqrt(2 * inverse.square().sum(1) / n) / len(c)
    assert bool(((estimate - gaussian_mean_square_score(chain, eigenvalues)).abs() < 4 * error).all())
    again = [chain.mean_square_score(data.under(chain.to_sde()), data.sample(8), seed) for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_mean_square_score_evaluates_a_network_and_leaves_it_as_it_was():
    chain = GaussianChain.ddpm(BETAS["linear"](3))
    modes = []

    class Watching(torch.nn.Linear):
        def forward(self, x, t):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = DiffusionModel(Watching(2, 2), chain.to_sde(), "eps", data_shape=(2,)).train()
    result = chain.mean_square_score(model, torch.ones(4, 2))
    assert modes == [(False, False)] * 3
    assert model.training
    assert model.network.training
    assert result.shape == (3,)
    assert result.dtype == torch.float64


# Reverse means.


@pytest.mark.parametrize("t", [0, 1, 10, 18])
def test_reverse_mean_is_that_of_the_exact_mixture(t):
    """E[x_t | x_{t+1}] = Σ_i p(i | x_{t+1}) (a x⁽ⁱ⁾ + b x_{t+1}), as each term is the mean given one point."""
    chain = GaussianChain.ddpm(BETAS["cosine"](20))
    points, x = normal(7, 3, seed=1), normal(16, 3, seed=2)
    data, (a, b, _) = Empirical(points), chain.posterior()
    alpha, sigma = chain.marginal_scales[t + 1], chain.marginal_stds[t + 1]
    weight = data.posterior_weights(x, alpha, sigma)
    expected = torch.einsum("bi,bid->bd", weight, a[t] * points + b[t] * x[:, None])
    score = -data.predict(x, alpha, sigma).eps / sigma
    torch.testing.assert_close(chain.reverse_mean(x, score, t), expected, rtol=1e-10, atol=1e-10)


@given(steps=steps, data=st.data())
def test_reverse_mean_is_gaussian_conditioning(steps, data):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    t = data.draw(st.integers(0, len(steps) - 1))
    mean, variance, x = 0.7, 0.3, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    (scale, std), (alpha, sigma) = steps[t], (float(chain.marginal_scales[t]), float(chain.marginal_stds[t]))
    before = alpha**2 * variance + sigma**2
    after = scale**2 * before + std**2
    centred = x - scale * alpha * mean
    expected = alpha * mean + scale * before / after * centred
    result = chain.reverse_mean(x, -centred / after, t)
    torch.testing.assert_close(result, expected, rtol=0, atol=64 * len(steps) * EPS * 4 / scale)


def test_reverse_mean_agrees_with_undoing_the_contraction_to_second_order():
    """x/λ + σ² s, in which the score is not divided by λ, differs by O(Δ²)."""
    time, errors = 0.5, []
    x, score = torch.tensor([0.8]).double(), torch.tensor([-1.3]).double()
    for steps in (100, 200, 400, 800):
        chain = VPSDE().discretize([i / steps for i in range(1, steps + 1)])
        t = round(time * steps)
        other = x / chain.scales[t] + chain.stds[t] ** 2 * score
        errors.append(float((chain.reverse_mean(x, score, t) - other).abs()))
    assert slopes(errors) == pytest.approx([2, 2, 2], abs=0.05)


@pytest.mark.parametrize(("t", "message"), [(-1, r"t = -1: must be in 0…2"), (3, "t = 3"), (2, "t = 2: the step")])
def test_reverse_mean_checks_t(t, message):
    chain = GaussianChain.ddpm(zero_terminal_snr(BETAS["linear"](3)))
    with pytest.raises(ValueError, match=message):
        chain.reverse_mean(torch.zeros(1), torch.zeros(1), t)


# Weights of the bound.


@pytest.mark.parametrize("schedule", BETAS)
def test_eps_weight(schedule):
    """β²/(2 σ̃² (1 − β)(1 − ᾱ)), for both variances; the posterior's at t = 0 is v_1."""
    betas = BETAS[schedule](200)
    chain, alpha_bar = GaussianChain.ddpm(betas), torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    posterior = (1 - previous) * betas / (1 - alpha_bar)
    posterior[0] = posterior[1]
    for name, variance in (("posterior", posterior), ("noising", betas), (None, torch.full_like(betas, 0.1))):
        expected = betas**2 / (2 * variance * (1 - betas) * (1 - alpha_bar))
        # 1 − ᾱ starts at 1e-4 and loses four digits.
        torch.testing.assert_close(chain.eps_weight(name or variance), expected, rtol=1e-10, atol=0)
    assert torch.equal(chain.eps_weight(), chain.eps_weight("posterior"))


@given(steps=st.lists(st.tuples(st.floats(0.3, 1), st.floats(0.1, 1)), min_size=1, max_size=10))
def test_eps_weight_is_that_of_the_divergence(steps):
    """KL of two Gaussians with means a x₀ + b x and a x̂₀ + b x, where ε̂ is ε + 1."""
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    a, b, _ = chain.posterior()
    alpha, sigma = chain.marginal_scales[1:], chain.marginal_stds[1:]
    x0, eps = 0.4, -0.7
    x = alpha * x0 + sigma * eps
    for variance in ("posterior", "noising", 0.5):
        std = chain.reverse_variance(variance, decoder=True).sqrt()
        exact = torch.distributions.Normal(a * x0 + b * x, std)
        predicted = torch.distributions.Normal(a * (x - sigma * (eps + 1)) / alpha + b * x, std)
        divergence = torch.distributions.kl_divergence(exact, predicted)
        torch.testing.assert_close(chain.eps_weight(variance), divergence, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", BETAS)
def test_ddim_weight_at_eta_1_is_ddpms(schedule):
    chain = GaussianChain.ddpm(BETAS[schedule](1000))
    torch.testing.assert_close(chain.ddim_weight(1.0), chain.eps_weight("posterior"), rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_ddim_weight(schedule, eta):
    """(√ᾱ' − c √ᾱ)² ((1 − ᾱ)/ᾱ)/(2 ς²), c = √((1 − ᾱ' − ς²)/(1 − ᾱ)), with ᾱ' of the state before."""
    betas = BETAS[schedule](200)
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous, current = alpha_bar[:-1], alpha_bar[1:]
    variance = eta**2 * (1 - previous) * betas[1:] / (1 - current)
    c = torch.sqrt((1 - previous - variance) / (1 - current))
    expected = (previous.sqrt() - c * current.sqrt()) ** 2 * (1 - current) / current / (2 * variance)
    weight = GaussianChain.ddpm(betas).ddim_weight(eta)
    torch.testing.assert_close(weight[1:], expected, rtol=1e-9, atol=0)
    # The step to the data is to x̂₀ alone, and η² v_1 stands for its variance.
    first = (1 - alpha_bar[0]) / alpha_bar[0] / (2 * variance[0])
    assert float(weight[0]) == pytest.approx(float(first), rel=1e-9)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_weights_are_not_monotone_in_t(eta):
    for weight in (ddpm()[0].ddim_weight(eta), ddpm()[0].eps_weight("noising")):
        # Down from the data to a third of the way, and up from there, by a factor.
        lowest = int(weight.argmin())
        assert 300 < lowest < 400
        assert bool((weight[: lowest + 1].diff() < 0).all())
        assert bool((weight[lowest:].diff() > 0).all())
        assert float(weight[-1]) > 1.5 * float(weight[lowest])


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.1, math.nan])
def test_ddim_weight_checks_eta(eta):
    with pytest.raises(ValueError, match=f"eta = {eta}: must be"):
        ddpm()[0].ddim_weight(eta)


def test_weight_is_infinite_where_no_data_are_left():
    weight = GaussianChain.ddpm(zero_terminal_snr(BETAS["linear"](10))).eps_weight()
    assert weight.isinf().tolist() == [False] * 9 + [True]


# In continuous time.


def slopes(errors):
    """Orders of convergence from errors at N, 2N, 4N, …"""
    return [math.log2(before / after) for before, after in pairwise(errors)]


def test_to_sde_converges_at_first_order():
    """f and g² of the SDE of an SDE's chain; α and σ are exact at the chain's times whatever N."""
    sde, t = VPSDE(), torch.linspace(0.01, 0.99, 997, dtype=torch.float64)
    drift_errors, diffusion_errors = [], []
    for steps in (100, 200, 400, 800):
        chain = sde.discretize([i / steps for i in range(1, steps + 1)])
        again = chain.to_sde()
        torch.testing.assert_close(again.alpha(chain.times), sde.alpha(chain.times), rtol=8 * steps * EPS, atol=0)
        torch.testing.assert_close(again.sigma(chain.times), sde.sigma(chain.times), rtol=8 * steps * EPS, atol=0)
        drift_errors.append(float((again.drift_coefficient(t) - sde.drift_coefficient(t)).abs().max()))
        diffusion_errors.append(float((again.diffusion(t) ** 2 - sde.diffusion(t) ** 2).abs().max()))
    assert slopes(drift_errors) == pytest.approx([1, 1, 1], abs=0.1)
    assert slopes(diffusion_errors) == pytest.approx([1, 1, 1], abs=0.1)


def test_betas_of_the_limit_converge_at_first_order():
    """β_i = β(i/N)/N of the SDE makes a chain whose marginals are the SDE's but for O(1/N)."""
    sde, scale_errors, std_errors = VPSDE(), [], []
    for steps in (100, 200, 400, 800):
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        chain = GaussianChain.ddpm(sde.beta(t) / steps)
        scale_errors.append(float((chain.marginal_scales[1:] - sde.alpha(t)).abs().max()))
        std_errors.append(float((chain.marginal_stds[1:] - sde.sigma(t)).abs().max()))
    assert slopes(scale_errors) == pytest.approx([1, 1, 1], abs=0.1)
    assert slopes(std_errors) == pytest.approx([1, 1, 1], abs=0.1)
    # DDPM's start 20 % lower: they are equally spaced from 1e-4, not from β_min/N at i = 0.
    first = float(sde.beta(torch.tensor(1e-3, dtype=torch.float64))) / 1000
    assert first == pytest.approx(1.199e-4, rel=1e-12)
    assert float(BETAS["linear"](1000)[0]) == 1e-4


@given(steps=steps)
def test_marginals_of_the_sde_of_a_chain_are_the_chains(steps):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T, torch.arange(len(steps) + 1) ** 1.5)
    sde = chain.to_sde()
    assert float(chain.times[-1]) == sde.T
    torch.testing.assert_close(sde.alpha(chain.times), chain.marginal_scales, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(sde.sigma(chain.times), chain.marginal_stds, rtol=4 * EPS, atol=0)
    # Nor do they jump between steps.
    before = torch.nextafter(chain.times[1:], torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(sde.alpha(before), chain.marginal_scales[1:], rtol=1e-11, atol=0)
    torch.testing.assert_close(sde.sigma(before), chain.marginal_stds[1:], rtol=1e-8, atol=0)
    assert sde.prior_std == chain.prior_std


@given(steps=steps)
def test_rates_of_the_sde_of_a_chain_are_the_derivatives_of_its_marginals(steps):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    sde = chain.to_sde()
    progress = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    t = (chain.times[:-1, None] + progress * chain.times.diff()[:, None]).flatten()
    # What a difference of terms, each at most so large, loses in a few roundings.
    of_step = [value.repeat_interleave(3) for value in (chain.marginal_scales[:-1], chain.marginal_stds[:-1] ** 2)]
    previous, variance = of_step[0], of_step[1] + chain.stds.repeat_interleave(3) ** 2
    rounding, scale = 64 * EPS * len(steps), sde.alpha(t) / previous
    # The base class differentiates α and σ.
    f, sigma, sigma_dot = SDE.drift_coefficient(sde, t), sde.sigma(t), SDE.sigma_dot(sde, t)
    for result, expected, size in (
        (sde.alpha_dot(t), SDE.alpha_dot(sde, t), previous),
        (sde.drift_coefficient(t), f, 1 / scale),
        (sde.sigma_dot(t), sigma_dot, variance / sigma),
        (sde.diffusion(t) ** 2, 2 * sigma * (sigma_dot - f * sigma), variance / scale),
    ):
        assert bool(((result - expected).abs() <= rounding * size).all())


@given(steps=steps)
def test_rates_at_the_start_of_a_step_are_the_chains(steps):
    """f = −(1 − λ)/Δ and g² = σ²/Δ."""
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T, 2.5 * torch.arange(len(steps) + 1) ** 1.5)
    sde, start, duration = chain.to_sde(), chain.times[:-1], chain.times.diff()
    torch.testing.assert_close(sde.drift_coefficient(start), -(1 - chain.scales) / duration, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(sde.diffusion(start) ** 2, chain.stds**2 / duration, rtol=8 * EPS, atol=0)


@given(steps=st.lists(st.tuples(st.floats(0.3, 1), st.floats(0.1, 1)), min_size=1, max_size=10))
def test_time_of_a_log_snr(steps):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    sde = chain.to_sde()
    t = torch.linspace(1e-3, 1, 100, dtype=torch.float64)
    log_snr = sde.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    # Where the log-SNR hardly falls, its rounding moves t by more: by EPS/(slope).
    torch.testing.assert_close(sde.log_snr(sde.t_from_log_snr(log_snr)), log_snr, rtol=0, atol=1e-10)
    torch.testing.assert_close(sde.t_from_log_snr(log_snr), t, rtol=0, atol=1e-7)
    infinite = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    assert sde.t_from_log_snr(infinite).tolist() == [0, 1]


@given(steps=steps)
def test_discretizing_the_sde_of_a_chain_gives_the_chain(steps):
    chain = GaussianChain(*torch.tensor(steps, dtype=torch.float64).T)
    for again in (chain.to_sde().discretize(len(chain)), chain.to_sde().discretize(chain.times[1:].tolist())):
        assert torch.equal(again.times, chain.times)
        torch.testing.assert_close(again.scales, chain.scales, rtol=16 * EPS, atol=0)
        # σ_t² is found as a difference.
        error = 32 * EPS * chain.marginal_stds[1:] ** 2
        assert bool(((again.stds**2 - chain.stds**2).abs() <= error).all())


def test_sde_of_the_constant_rate_is_of_constant_rate():
    """λ = 1 in every step: nothing is divided by 1 − λ."""
    sde, same = GaussianChain.constant_rate(8, 3.0).to_sde(), ConstantVESDE(3.0)
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    for name in ("alpha", "alpha_dot", "sigma", "drift_coefficient", "diffusion", "sigma_dot"):
        torch.testing.assert_close(getattr(sde, name)(t), getattr(same, name)(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(sde.t_from_log_snr(same.log_snr(t)), t, rtol=1e-14, atol=1e-15)


def test_sde_of_a_chain_of_no_data_at_the_end():
    chain = GaussianChain.ddpm(zero_terminal_snr(BETAS["linear"](1000)))
    sde = chain.to_sde()
    end = torch.ones((), dtype=torch.float64)
    assert (float(sde.alpha(end)), float(sde.sigma(end)), float(sde.log_snr(end))) == (0, 1, -math.inf)
    assert float(sde.t_from_log_snr(sde.log_snr(end))) == 1
    assert sde.prior_std == 1
    assert 0.98 < sde.t_max < 1
    t = torch.cat([chain.times[1:-1], torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)])
    for name in ("alpha", "alpha_dot", "sigma", "sigma_dot", "drift_coefficient", "diffusion", "log_snr"):
        assert bool(getattr(sde, name)(t).isfinite().all())
        assert not bool(getattr(sde, name)(torch.cat([t, end[None]])).isnan().any())
    torch.testing.assert_close(sde.t_from_log_snr(sde.log_snr(t)), t, rtol=0, atol=1e-10)


RATES = ("alpha", "alpha_dot", "sigma", "sigma_dot", "drift_coefficient", "diffusion", "log_snr", "t_from_log_snr")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("name", RATES)
def test_sde_of_a_chain_keeps_shape_and_dtype(name, shape, dtype):
    function = getattr(ddpm()[0].to_sde(), name)
    t = torch.linspace(0.05, 0.95, math.prod(shape)).to(dtype).reshape(shape)
    result = function(t)
    assert result.shape == shape
    assert result.dtype == dtype
    torch.testing.assert_close(result, function(t.double()).to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_sde_of_a_chain_compiles_to_one_graph():
    torch._dynamo.reset()
    sde, t = ddpm()[0].to_sde(), torch.linspace(0.05, 0.95, 7)

    def rates(t):
        return [getattr(sde, name)(t) for name in RATES]

    for result, expected in zip(torch.compile(rates, backend="eager", fullgraph=True)(t), rates(t), strict=True):
        torch.testing.assert_close(result, expected)


def test_sde_needs_times_that_increase_and_scales_above_0():
    # VE's chain may start with data blurred at time 0.
    with pytest.raises(ValueError, match=r"times = \[0.0, 0.0, 1.0\]: must increase"):
        VESDE().discretize([0.0, 1.0]).to_sde()
    with pytest.raises(ValueError, match="scales: only the last may be 0"):
        GaussianChain(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.0])).to_sde()
    sde = ddpm()[0].to_sde()
    assert isinstance(sde, ChainSDE)
    assert repr(sde) == "ChainSDE(GaussianChain of 1000 steps to time 1.0)"
    with pytest.raises(ValueError, match="steps = 0: must be at least 1"):
        sde.discretize(0)
    with pytest.raises(ValueError, match=r"steps = 1\.5 is outside the range \[0, 1\.0\] of ChainSDE"):
        sde.discretize([0.5, 1.5])
