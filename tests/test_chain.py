import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion import EDMSDE, VESDE, VPSDE, GaussianChain

EPS = torch.finfo(torch.float64).eps

steps = st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.001, 3)), min_size=1, max_size=30)


def ddpm():
    """Ho et al. 2020, section 4: T = 1000, β from 1e-4 to 0.02."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return GaussianChain(torch.sqrt(1 - beta), torch.sqrt(beta)), beta


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
        ([0.0, 0.5], "stds has smallest entry 0.0"),
    ],
)
def test_times_are_checked(steps, message):
    with pytest.raises(ValueError, match=message):
        VPSDE().discretize(steps)


def test_data_blurred_at_the_start_may_be_a_step():
    # VE's σ(0) is σ_min, not 0, and EDM's time is the noise itself.
    assert float(VESDE().discretize([0.0, 1.0]).marginal_stds[1]) == pytest.approx(0.01, rel=4 * EPS)
    assert float(EDMSDE().discretize(80).marginal_stds[1]) == pytest.approx(1, rel=4 * EPS)
