"""DDIM and DDPM against the marginals they keep, the ODE, each other, and the published updates."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sde_diffusion as sd
from sde_diffusion.samplers.ddim import DDIM, DDPM
from sde_diffusion.sde import SDES, expand_to

EPS = torch.finfo(torch.float64).eps

ZERO_SNR = sd.GaussianChain.ddpm(sd.zero_terminal_snr(sd.BETAS["linear"](100)))
EVERY_SDE = {name: build() for name, build in SDES.items()}
EVERY_SDE |= {"chain": sd.GaussianChain.ddpm(sd.BETAS["cosine"](20)).to_sde(), "zero_snr": ZERO_SNR.to_sde()}


def rows(coefficients):
    """The coefficients step by step, as ``DDIM.step`` takes them."""
    names = list(coefficients)
    return [SimpleNamespace(**dict(zip(names, row, strict=True))) for row in zip(*coefficients.values(), strict=True)]


def slope(errors):
    """Order of convergence when the number of steps doubles: the last of the local slopes."""
    return math.log2(errors[-2] / errors[-1])


def end_points(model, x, solver, steps, **options):
    return sd.sample(
        model, len(x), x_start=x, solver=solver, steps=steps, t_end=options.pop("t_end", 1e-2), dtype=x.dtype, **options
    ).samples


@pytest.fixture(scope="module")
def problem():
    """A mixture of wide modes under VP, starts, and the end points of the ODE at 1e-10."""
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.8]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=torch.float64))
    model = sd.GaussianMixture(means, covariances).under(sd.VPSDE())
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, end_points(model, x, "ode", None, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_deterministic_solvers_converge_to_the_ode_at_their_order(problem, solver, order):
    model, x, exact = problem
    errors = [float((end_points(model, x, solver, n) - exact).square().mean().sqrt()) for n in (64, 128, 256)]
    assert slope(errors) == pytest.approx(order, abs=0.2)
    assert slope(errors[:2]) == pytest.approx(order, abs=0.2)


@st.composite
def runs(draw):
    """An SDE, and decreasing times of at least two states: any of 0, …, 200 two-hundredths of T."""
    sde = draw(st.sampled_from(list(EVERY_SDE.values())))
    states = draw(st.sets(st.integers(0, 200), min_size=2, max_size=12))
    return sde, torch.tensor(sorted(states, reverse=True), dtype=torch.float64) * (sde.T / 200)


@given(run=runs(), eta=st.floats(0, 1))
def test_ddim_keeps_every_marginal(asked, run, eta):
    """With the true x₀ and ε a step from q(x_t | x₀) ends in q(x_s | x₀), at any η."""
    sde, times = run
    solver = DDIM(eta)
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    # x_t = α x₀ + σ ε is affine in x₀, ε and the step's z, with coefficients that three runs find.
    x0, eps, z = torch.eye(3, dtype=torch.float64)
    for i, c in enumerate(rows(solver.prepare(sde, times))):
        x = alpha[i] * x0 + sigma[i] * eps
        mean, *stds = solver.step(asked(lambda x, t: sd.Prediction(x0, eps)), x, c, lambda: z).tolist()
        # The chain is found from α and σ, and they from it, in one rounding or two a state.
        tolerance = 32 * len(times) * EPS
        assert mean == pytest.approx(float(alpha[i + 1]), rel=tolerance, abs=0)
        assert math.hypot(*stds) == pytest.approx(float(sigma[i + 1]), rel=tolerance, abs=0)
        assert eta > 0 or stds[1] == 0


@given(run=runs(), eta=st.floats(0, 1))
def test_noise_of_ddim_is_the_published(run, eta):
    """ς² = η² (σ_s²/σ_t²) (σ_t² − (α_t/α_s)² σ_s²), which is 0 at s without noise."""
    sde, times = run
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    ratio = alpha[:-1] / alpha[1:]
    variance = sigma[1:] ** 2 / sigma[:-1] ** 2 * (sigma[:-1] ** 2 - ratio**2 * sigma[1:] ** 2)
    std = DDIM(eta).prepare(sde, times)["std"]
    # A difference, of at most σ_s².
    error = 100 * len(times) * EPS * sigma[1:] ** 2
    assert bool(((std**2 - eta**2 * variance).abs() <= error).all())


@given(run=runs())
def test_ddpm_is_ddim_at_eta_1(run):
    """On the full sequence of states, whichever they are: x_s by its coefficients of x_t, of x̂₀ and of z."""
    sde, times = run
    ddim, ddpm = DDIM(eta=1.0).prepare(sde, times), DDPM().prepare(sde, times)
    tolerance = {"rtol": 64 * len(times) * EPS, "atol": 0}
    torch.testing.assert_close(ddim["std"], ddpm["std"], **tolerance)
    # x_s = α_s x̂₀ + direction (x_t − α_t x̂₀)/σ_t + ς z
    alpha, sigma = sde.alpha(times[:-1]), sde.sigma(times[:-1])
    torch.testing.assert_close(ddim["direction"] / sigma, ddpm["b"], **tolerance)
    of_data = ddim["alpha_s"] - ddim["direction"] * alpha / sigma
    error = 64 * len(times) * EPS * ddim["alpha_s"]
    assert bool(((of_data - ddpm["a"]).abs() <= error).all())


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(problem, any_sde):
    model, x = problem[0].distribution.under(any_sde), any_sde.prior_std * problem[1]
    options = {"steps": 20, "seed": 3, "t_end": 0.02 * any_sde.t_max}
    ddim, ddpm = end_points(model, x, "ddim", eta=1.0, **options), end_points(model, x, "ddpm", **options)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


class Constant(sd.Model):
    """Predicts the same noise whatever the state."""

    def __init__(self, sde, eps):
        self.sde, self.constant, self.data_shape = sde, eps, tuple(eps.shape)

    def predict(self, x, t):
        eps = self.constant.expand_as(x)
        alpha, sigma = expand_to(self.sde.alpha(t), x), expand_to(self.sde.sigma(t), x)
        return sd.Prediction((x - sigma * eps) / alpha, eps)


@pytest.mark.parametrize("name", SDES)
def test_ddim_is_the_exponential_integrator_of_the_ode(name):
    """d(x/α) = ε̂ d(σ/α): exact in one step where ε̂ does not change, as the ODE solved closely shows."""
    sde = SDES[name]()
    eps = torch.tensor([0.7, -1.1], dtype=torch.float64)
    model, x = Constant(sde, eps), torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    start, end = 0.6 * sde.T, 0.2 * sde.T
    options = {"t_start": start, "t_end": end}
    once = end_points(model, x, "ddim", 1, **options)
    ends = torch.tensor([start, end], dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = sde.alpha(ends), sde.sigma(ends)
    exact = alpha_s * (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * eps)
    torch.testing.assert_close(once, exact, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(end_points(model, x, "ddim", 7, **options), exact, rtol=1e-12, atol=1e-11)
    ode = end_points(model, x, "ode", None, rtol=1e-10, atol=1e-10, **options)
    torch.testing.assert_close(ode, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("steps", "printed"), [(1, 1.0), (2, 0.586), (3, 0.551), (10, 0.513)])
def test_ddim_is_the_constant_rate_update(asked, steps, printed):
    """x_s = x_t + λ (μ − x_t) with λ = √t/(√t + √s), s = t − Δ and μ = (Δ/t) x̂₀ + (1 − Δ/t) x_t; at t = n Δ."""
    sde, step = sd.ConstantVESDE(3.0), 0.02
    t, s = steps * step, (steps - 1) * step
    [c] = rows(DDIM().prepare(sde, torch.tensor([t, s], dtype=torch.float64)))
    x, x0 = torch.tensor([0.3, -2.0]).double(), torch.tensor([1.0, 0.4]).double()
    result = DDIM().step(asked(lambda x, _: sd.Prediction(x0, (x - x0) / (3 * math.sqrt(t)))), x, c, torch.empty)
    mean = step / t * x0 + (1 - step / t) * x
    rate = math.sqrt(t) / (math.sqrt(t) + math.sqrt(s))
    assert rate == pytest.approx(printed, abs=5e-4)
    torch.testing.assert_close(result, x + rate * (mean - x), rtol=1e-12, atol=1e-12)


def test_ddpm_is_the_published_update():
    """Ho et al. 2020, algorithm 2, from the betas of the chain alone."""
    sde, steps = sd.VPSDE(), 50
    times = torch.linspace(sde.t_max, 0, steps + 1, dtype=torch.float64)
    c = DDPM().prepare(sde, times)
    alpha_bar = sde.alpha(times.flip(0)).square()
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    for i in range(steps):
        t = steps - 1 - i  # beta[t] leads from state t to t + 1, and this step back
        expected = (x - beta[t] * eps / torch.sqrt(1 - alpha_bar[t + 1])) / torch.sqrt(1 - beta[t])
        x0 = (x - torch.sqrt(1 - alpha_bar[t + 1]) * eps) / torch.sqrt(alpha_bar[t + 1])
        torch.testing.assert_close(c["a"][i] * x0 + c["b"][i] * x, expected, rtol=1e-9, atol=1e-9)
        variance = beta[t] * (1 - alpha_bar[t]) / (1 - alpha_bar[t + 1])
        torch.testing.assert_close(c["std"][i].square(), variance, rtol=1e-9, atol=1e-12)
    assert float(c["std"][-1]) == 0.0
    noising = DDPM(variance="noising").prepare(sde, times)
    torch.testing.assert_close(noising["std"].square().flip(0)[1:], beta[1:])
    assert float(noising["std"][-1]) == 0.0


def test_ddpm_and_em_agree_in_a_thousand_steps(problem):
    model, n = problem[0], 5000
    moments = []
    for solver in ("ddpm", "em"):
        x = sd.sample(model, n, solver=solver, steps=1000, seed=len(moments), dtype=torch.float64).samples
        products = torch.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)
        moments.append((products.mean(0), products.var(0) / n))
    (first, first_variance), (second, second_variance) = moments
    assert bool(((first - second).abs() < 4 * torch.sqrt(first_variance + second_variance)).all())


# Variances.


def equal_times(steps, end=0.0):
    return torch.linspace(1, end, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("variance", ["posterior", "noising", 0, 0.3, 1.0])
def test_ddpm_has_the_variances_of_the_chain(variance, end):
    sde, times = sd.VPSDE(), equal_times(10, end)
    std = DDPM(variance).prepare(sde, times)["std"]
    # A time with noise is a state of the chain, after x₀; one without is x₀.
    chain = sde.discretize(times.flip(0)[0 if end else 1 :].tolist())
    expected = chain.reverse_variance(variance).flip(0)[:10].sqrt()
    if not end:
        expected[-1] = 0
    torch.testing.assert_close(std, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_ddpm_takes_variances_in_the_chains_order(convert):
    given_variances, sde = [0.5, 0.1, 0.2, 0.3], sd.VPSDE()
    solver = DDPM(convert(given_variances))
    kept = solver.prepare(sde, equal_times(4, 0.1))["std"].square()
    torch.testing.assert_close(kept, torch.tensor(given_variances[::-1]).double(), rtol=1e-6, atol=0)
    # The first is of the step to x₀, which adds none.
    last = solver.prepare(sde, equal_times(4))["std"].square()
    torch.testing.assert_close(last, torch.tensor([0.3, 0.2, 0.1, 0.0]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("length", [3, 5])
def test_ddpm_checks_how_many_variances_are_given(length, end):
    solver = DDPM([0.1] * length)
    with pytest.raises(
        ValueError, match=rf"variance has shape \({length},\): need \(4,\), one for each step, data first"
    ):
        solver.prepare(sd.VPSDE(), equal_times(4, end))


def test_ddpm_of_optimal_variance_is_exact_for_isotropic_data():
    """Of N(0, c I) the chain's reverse is Gaussian: exact mean and variance give exact states in any few steps."""
    sde, c, times = sd.VPSDE(), 0.3, equal_times(5)
    chain = sde.discretize(times.flip(0)[1:].tolist())
    state = chain.marginal_scales**2 * c + chain.marginal_stds**2
    variances = chain.optimal_variance(1 / state[1:])
    # The posterior's variance is too small and the noising one too large, as c < 1.
    for variance, sign in ((variances, 0), ("posterior", -1), ("noising", 1)):
        result = [float(state[-1])]
        for i, row in enumerate(rows(DDPM(variance).prepare(sde, times))):
            t = len(chain) - i
            gain = chain.marginal_scales[t] * c / state[t]
            result.append(float((row.a * gain + row.b) ** 2 * result[-1] + row.std**2))
            if 0 < i < len(chain) - 1:
                difference = result[-1] / float(state[t - 1]) - 1
                assert abs(difference) < 1e-12 if sign == 0 else sign * difference > 1e-3


def learned(fraction, sde, learned_variance=True):
    """A network of four channels that predicts noise, and the same fraction for every entry."""

    def network(x, t):
        eps = 0.5 * torch.sin(x)
        return torch.cat([eps, torch.full_like(x, 2 * fraction - 1)], 1) if learned_variance else eps

    return sd.DiffusionModel(network, sde, "eps", data_shape=(4,), learned_variance=learned_variance)


@pytest.mark.parametrize("t_end", [0.0, 0.1])
@pytest.mark.parametrize(("fraction", "same"), [(0.0, "posterior"), (1.0, "noising"), (0.3, 0.3)])
def test_ddpm_of_learned_variance(fraction, same, t_end, dtype):
    sde = sd.VPSDE()
    options = {"steps": 10, "grid": "t", "t_end": t_end, "dtype": dtype, "solver": "ddpm", "seed": 2}
    result = sd.sample(learned(fraction, sde), 8, variance="learned", **options).samples
    expected = sd.sample(learned(fraction, sde, False), 8, variance=same, **options).samples
    tolerance = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_ddpm_learns_a_variance_for_every_entry():
    sde, fraction = sd.VPSDE(), torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    times = equal_times(4, 0.1)
    solver, zero = DDPM("learned"), torch.zeros(1, 3, dtype=torch.float64)
    prediction = sd.VariancePrediction(zero, zero, fraction)
    columns = [DDPM(variance).prepare(sde, times)["std"] for variance in ("posterior", 0.5, "noising")]
    for i, c in enumerate(rows(solver.prepare(sde, times))):
        std = solver.step(lambda x, t: prediction, zero, c, lambda: zero + 1)
        torch.testing.assert_close(std[0], torch.stack([column[i] for column in columns]), rtol=1e-12, atol=0)


def test_ddpm_of_learned_variance_needs_a_model_that_learns_it():
    with pytest.raises(
        ValueError, match="variance = 'learned': the model predicts none; it must have learned_variance"
    ):
        sd.sample(learned(0.5, sd.VPSDE(), learned_variance=False), 2, solver="ddpm", steps=2, variance="learned")


@pytest.mark.parametrize("variance", ["posterior", "noising", 0.5, [0.1] * 10, "learned"])
def test_no_noise_is_added_to_a_state_without_noise(variance):
    model = learned(1.0, sd.VPSDE())
    x = torch.full((3, 4), 0.2, dtype=torch.float64)
    options = {"grid": [1.0, *[0.1 - 0.01 * i for i in range(9)], 0.0], "solver": "ddpm", "variance": variance}
    states = sd.sample(model, 3, x_start=x, trajectory=True, dtype=x.dtype, **options)
    expected = model.denoise(states.trajectory[-2], states.times[-2])
    torch.testing.assert_close(states.samples, expected, rtol=1e-12, atol=1e-12)
    ddim = sd.sample(model, 3, x_start=x, trajectory=True, solver="ddim", eta=1.0, grid=options["grid"])
    torch.testing.assert_close(ddim.samples, model.denoise(ddim.trajectory[-2], ddim.times[-2]), rtol=1e-12, atol=1e-12)


# VE's data at time 0 are blurred, so the last step adds noise.
@pytest.mark.parametrize("solver", [DDIM(1.0), DDPM(), DDPM("noising")], ids=["ddim", "posterior", "noising"])
def test_noise_is_added_to_a_state_with_noise(solver):
    assert float(solver.prepare(sd.VESDE(), equal_times(5))["std"][-1]) > 0


# Starts without data.

STARTS = {
    "zero_snr": (ZERO_SNR.to_sde(), ZERO_SNR.times.flip(0).tolist()),
    "zero_snr_angle": (ZERO_SNR.to_sde(), "angle"),
    "flow_t": (sd.FlowSDE(), "t"),
    "flow_angle": (sd.FlowSDE(), "angle"),
    "cosine_t": (sd.CosineVPSDE(), "t"),
}


def start_options(grid):
    return {"grid": grid} if not isinstance(grid, str) else {"grid": grid, "t_start": 1.0, "t_end": 0.0, "steps": 20}


@pytest.mark.parametrize("start", STARTS)
def test_ddim_from_a_start_without_data_is_exact_for_one_point(start):
    """Every state is α x₀ + σ x_T, as the noise is all there is at T."""
    sde, grid = STARTS[start]
    point = torch.tensor([[0.5, -2.0, 1.0]], dtype=torch.float64)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = sd.Empirical(point).under(sde)
    result = sd.sample(model, 4, x_start=x, solver="ddim", trajectory=True, **start_options(grid))
    assert float(sde.alpha(torch.tensor(result.times[0], dtype=torch.float64))) == pytest.approx(0, abs=1e-15)
    for t, state in zip(result.times[:-1], result.trajectory, strict=False):
        torch.testing.assert_close(state, sde.perturb(point, t, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.samples, point.expand(4, 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {}), ("ddim", {"eta": 1.0}), ("ddpm", {}), ("ddpm", {"variance": "noising"})]
)
@pytest.mark.parametrize("start", STARTS)
def test_mean_from_a_start_without_data_is_exact(start, solver, options):
    """Of one Gaussian: E[x₀ | x] is affine, so that each step takes the right mean to the right mean."""
    sde, grid = STARTS[start]
    mean, n = torch.tensor([3.0, -1.0], dtype=torch.float64), 4000
    data = sd.Gaussian(mean, torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64))
    x = sd.sample(data.under(sde), n, solver=solver, dtype=torch.float64, **start_options(grid), **options).samples
    assert bool(((x.mean(0) - mean).abs() < 4 * x.std(0) / math.sqrt(n)).all())


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "edm"])
def test_network_starts_without_data(prediction):
    sde = sd.FlowSDE()
    model = sd.DiffusionModel(lambda x, t: 0.5 * torch.sin(x), sde, prediction, data_shape=(3,))
    for solver in ("ddim", "ddpm"):
        assert bool(sd.sample(model, 2, solver=solver, t_start=1.0, steps=5).samples.isfinite().all())


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ddim_refuses_an_eta_outside_its_range(eta):
    with pytest.raises(ValueError, match="eta = "):
        DDIM(eta=eta)


@pytest.mark.parametrize(
    ("variance", "message"),
    [
        ("beta", r"variance = 'beta': must be one of posterior, noising, a number in \[0, 1\]"),
        (1.5, r"variance = 1.5: must be in \[0, 1\]"),
        (-0.5, r"variance = -0.5: must be in \[0, 1\]"),
        (math.nan, "variance = nan"),
        (None, "variance = None"),
    ],
)
def test_ddpm_refuses_other_variances(variance, message):
    with pytest.raises(ValueError, match=message):
        DDPM(variance)


@pytest.mark.parametrize("variance", [[0.1, -0.1], [0.1, math.nan], [math.inf, 0.1]])
def test_ddpm_refuses_variances_that_are_none(variance):
    with pytest.raises(ValueError, match=r"variance = .*: must be \(\d,\), finite and not negative"):
        DDPM(variance).prepare(sd.VPSDE(), equal_times(2, 0.1))
