"""Each formula of the library, the test that holds it, and how far the two sides are apart here.

    python benchmarks/formulas.py > docs/formulas.md

Deviations are the largest over the arguments tried, in float64: relative to the reference where there is no unit, or
in standard errors (s.e.) of a Monte-Carlo estimate with a fixed seed. ``tests/test_formulas.py`` holds every row below
its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mixtures import ring, rotated
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import tutorial
from sde_diffusion.bound import log_bin_mass
from sde_diffusion.losses import TIMES, VLB
from sde_diffusion.model import PREDICTIONS
from sde_diffusion.samplers.ddim import DDIM

F64 = torch.float64
BETAS = sd.BETAS["linear"](1000)
DDPM = sd.GaussianChain.ddpm(BETAS)
ALPHA_BAR = DDPM.marginal_scales.square()
SDES: dict[str, sd.SDE] = {
    "VP": sd.VPSDE(),
    "sub-VP": sd.SubVPSDE(),
    "VE": sd.VESDE(),
    "EDM": sd.EDMSDE(),
    "constant VE": sd.ConstantVESDE(),
    "cosine VP": sd.CosineVPSDE(),
    "straight path": sd.FlowSDE(),
}


@dataclass(frozen=True)
class Formula:
    """A row: two sides that agree, where that is tested, how far apart they are here, and how far they may be."""

    text: str
    test: str
    deviation: Callable[[], float]
    bound: float
    unit: str


FORMULAS: list[Formula] = []


def formula(text: str, test: str, bound: float, unit: str) -> Callable[[Callable[[], float]], Callable[[], float]]:
    """Make a row of the function that measures its deviation."""

    def register(deviation: Callable[[], float]) -> Callable[[], float]:
        FORMULAS.append(Formula(text, test, deviation, bound, unit))
        return deviation

    return register


def main() -> None:
    """Print the table."""
    print("# Formulas\n\nPrinted by `python benchmarks/formulas.py`: each formula, the test that holds it, and its")
    print("largest deviation over the arguments tried, in float64.\n")
    print("| formula | test | largest deviation | unit |\n|---|---|---|---|")
    for row in FORMULAS:
        print(f"| {row.text} | `{row.test}` | {row.deviation():.1e} | {row.unit} |", flush=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def relative(computed: Tensor, reference: Tensor) -> float:
    """The largest deviation, relative to the largest entry near it."""
    return float(((computed - reference).abs() / reference.abs().clamp(min=1e-300)).max())


def absolute(computed: Tensor, reference: Tensor) -> float:
    """The largest deviation, for references that are of order one or pass through zero."""
    return float((computed - reference).abs().max())


def times(sde: sd.SDE, n: int = 200) -> Tensor:
    """Inside [t_min, t_max], where autograd of σ² does not cancel."""
    return torch.linspace(0.01, 0.99, n, dtype=F64) * (sde.t_max - sde.t_min) + sde.t_min


# The chain.


@formula(
    "λ_{t\\|0} = Π λ_s, σ²_{t\\|0} = λ_t² σ²_{t−1\\|0} + σ_t², simulated",
    "test_chain.py::test_marginals_are_the_composition_of_the_steps",
    4,
    "s.e.",
)
def marginal_by_simulation() -> float:
    """Variance of x_T given x₀ over 100,000 paths of a chain of three steps."""
    chain = sd.GaussianChain(torch.tensor([0.9, 0.8, 1.0]), torch.tensor([0.3, 0.5, 0.2]))
    x = torch.ones(100_000, dtype=F64)
    for i, (scale, std) in enumerate(zip(chain.scales, chain.stds, strict=True)):
        x = scale * x + std * normal(len(x), seed=i)
    mean = (x.mean() - chain.marginal_scales[-1]).abs() / (chain.marginal_stds[-1] / math.sqrt(len(x)))
    spread = (x.std() / chain.marginal_stds[-1] - 1).abs() * math.sqrt(2 * len(x))
    return float(torch.maximum(mean, spread))


@formula(
    "1/v = 1/σ²_{t\\|0} + λ²/σ², a = v λ_{t\\|0}/σ²_{t\\|0}, b = v λ/σ²",
    "test_chain.py::test_posterior_is_gaussian_conditioning",
    1e-9,
    "relative",
)
def posterior_by_bayes() -> float:
    """a, b, v of DDPM against precisions added up: 1/v = 1/σ²_{t|0} + λ²/σ²."""
    a, b, v = (value[1:] for value in DDPM.posterior())
    variance, scale, added = DDPM.marginal_stds[1:-1].square(), DDPM.scales[1:], DDPM.stds[1:].square()
    exact = 1 / (1 / variance + scale.square() / added)
    pairs = ((v, exact), (a, exact * DDPM.marginal_scales[1:-1] / variance), (b, exact * scale / added))
    return max(relative(computed, reference) for computed, reference in pairs)


@formula("DDPM: β̃_t = (1 − ᾱ_{t−1}) β_t/(1 − ᾱ_t) = v_{t−1}", "test_chain.py::test_ddpm", 1e-9, "relative")
def beta_tilde() -> float:
    """DDPM's posterior variance as printed."""
    return relative(DDPM.posterior()[2][1:], (1 - ALPHA_BAR[1:-1]) / (1 - ALPHA_BAR[2:]) * BETAS[1:])


@formula("DDPM: μ = (x − β ε̂/√(1 − ᾱ))/√(1 − β) = a x̂₀ + b x", "test_chain.py::test_ddpm", 1e-9, "absolute")
def ddpm_mean_in_eps() -> float:
    """DDPM's mean in ε against a x̂₀ + b x."""
    x, eps = normal(999), normal(999, seed=1)
    a, b, _ = (value[1:] for value in DDPM.posterior())
    x0 = (x - DDPM.marginal_stds[2:] * eps) / DDPM.marginal_scales[2:]
    printed = (x - BETAS[1:] * eps / torch.sqrt(1 - ALPHA_BAR[2:])) / torch.sqrt(1 - BETAS[1:])
    return absolute(a * x0 + b * x, printed)


@formula("a subsequence keeps every marginal", "test_chain.py::test_subsequence_keeps_the_marginals", 1e-12, "relative")
def subsequence_marginals() -> float:
    """Marginals of every seventh state."""
    part = DDPM.subsequence(range(7, 1001, 7))
    return relative(part.marginal_stds[1:], DDPM.marginal_stds[7::7])


@formula(
    "SDE.discretize keeps every marginal, every SDE",
    "test_chain.py::test_chain_of_an_sde_has_its_marginals",
    1e-9,
    "relative",
)
def discretize_marginals() -> float:
    """α and σ of every SDE against its chain's."""
    worst = 0.0
    for sde in SDES.values():
        chain = sde.discretize(500)
        t = chain.times[1:]
        worst = max(worst, relative(chain.marginal_scales[1:], sde.alpha(t)))
        worst = max(worst, relative(chain.marginal_stds[1:], sde.sigma(t)))
    return worst


def slope(error: Callable[[int], float]) -> float:
    """How far the order of convergence from 200 to 400 steps is from one."""
    return abs(math.log2(error(200) / error(400)) - 1)


@formula("chain → SDE: f converges at order 1", "test_chain.py::test_to_sde_converges_at_first_order", 0.1, "order")
def to_sde_order() -> float:
    """f and g² of the round trip, at points between the states."""
    t = torch.linspace(0.0501, 0.9501, 19, dtype=F64)

    def error(steps: int) -> float:
        back = sd.VPSDE().discretize(steps).to_sde()
        return float((back.drift_coefficient(t) - sd.VPSDE().drift_coefficient(t)).abs().mean())

    return slope(error)


@formula(
    "β_i = β(i/N)/N: marginals converge at order 1",
    "test_chain.py::test_betas_of_the_limit_converge_at_first_order",
    0.1,
    "order",
)
def betas_order() -> float:
    """ᾱ_T of the chain with β_i = β(i/N)/N against the SDE's α²."""

    def error(steps: int) -> float:
        t = torch.arange(1, steps + 1, dtype=F64) / steps
        chain = sd.GaussianChain.ddpm(sd.VPSDE().beta(t) / steps)
        return abs(float(chain.marginal_scales[steps // 2] - sd.VPSDE().alpha(t[steps // 2 - 1])))

    return slope(error)


@formula("zero terminal SNR: √ᾱ_1 kept, √ᾱ_T = 0", "test_chain.py::test_zero_terminal_snr", 1e-15, "absolute")
def zero_terminal_snr() -> float:
    """Both ends of the rescaled schedule."""
    scales = sd.GaussianChain.ddpm(sd.zero_terminal_snr(BETAS)).marginal_scales
    return max(abs(float(scales[1] - DDPM.marginal_scales[1])), float(scales[-1]))


@formula(
    "best variance (σ²/λ²)(1 − σ² E‖s‖²/D) = mean of Cov[x_t \\| x_{t+1}]",
    "test_chain.py::test_optimal_variance_is_the_mean_of_the_reverse_covariance",
    1e-9,
    "relative",
)
def optimal_variance() -> float:
    """For a Gaussian, whose E‖s‖²/D is the mean of 1/(ᾱ c + 1 − ᾱ) over eigenvalues c."""
    c = torch.tensor([0.05, 0.3, 2.0], dtype=F64)[:, None]
    total = ALPHA_BAR[1:] * c + 1 - ALPHA_BAR[1:]
    before = ALPHA_BAR[:-1] * c + 1 - ALPHA_BAR[:-1]
    exact = (before * BETAS / total).mean(0)
    best = DDPM.optimal_variance((1 / total).mean(0))
    return relative(best[1:], exact[1:])


# Continuous time.


@formula(
    "f = α̇/α by autograd, every SDE", "test_sde.py::test_rates_are_the_derivatives_of_the_marginal", 1e-9, "relative"
)
def drift_by_autograd() -> float:
    """f of every SDE against autograd of α."""
    return rate_by_autograd("f")


@formula(
    "g² = d(σ²)/dt − 2 f σ² by autograd, every SDE",
    "test_sde.py::test_rates_are_the_derivatives_of_the_marginal",
    1e-9,
    "relative",
)
def diffusion_by_autograd() -> float:
    """g² of every SDE against autograd of α and σ."""
    return rate_by_autograd("g")


def rate_by_autograd(rate: str) -> float:
    """The largest deviation of f or g² over the SDEs."""
    worst = 0.0
    for sde in SDES.values():
        t = times(sde).requires_grad_()
        # α of a variance-exploding SDE does not depend on t, which autograd would refuse.
        (alpha_dot,) = torch.autograd.grad((sde.alpha(t) + 0 * t).sum(), t)
        (variance_dot,) = torch.autograd.grad(sde.sigma(t).square().sum(), t)
        t = t.detach()
        drift = alpha_dot / sde.alpha(t)
        if rate == "f":
            worst = max(worst, absolute(sde.drift_coefficient(t), drift) / float(drift.abs().max().clamp(min=1)))
        else:
            worst = max(worst, relative(sde.diffusion(t).square(), variance_dot - 2 * drift * sde.sigma(t).square()))
    return worst


@formula(
    "t_from_log_snr(log_snr(t)) = t, every SDE", "test_sde.py::test_time_from_log_snr_inverts_it", 1e-12, "relative"
)
def log_snr_round_trip() -> float:
    """t_from_log_snr(log_snr(t))."""
    return max(relative(sde.t_from_log_snr(sde.log_snr(times(sde))), times(sde)) for sde in SDES.values())


@formula(
    "VP from β(t), log-SNR(t), (α, σ), or f(t) and g(t)",
    "test_general.py::test_marginals_are_those_of_the_closed_form",
    1e-11,
    "relative",
)
def general_forms() -> float:
    """VP from its β, its log-SNR, its marginals and its rates."""
    from sde_diffusion.general import BetaSDE, LogSNRSDE, MarginalSDE, RateSDE

    vp, t = sd.VPSDE(), torch.logspace(-5, 0, 200, dtype=F64)
    forms = (
        BetaSDE(vp.beta),
        LogSNRSDE(vp.log_snr),
        MarginalSDE(vp.alpha, vp.sigma),
        RateSDE(vp.drift_coefficient, vp.diffusion),
    )
    return max(max(relative(form.alpha(t), vp.alpha(t)), relative(form.sigma(t), vp.sigma(t)), 0.0) for form in forms)


@formula("α̇ x̂₀ + σ̇ ε̂ = f x − ½ g² s, every SDE", "test_sde.py::test_reverse_drift", 1e-9, "relative")
def flow_drift() -> float:
    """The velocity of the ODE, both ways."""
    return reverse_drift(0.0)


@formula("α̇ x̂₀ + σ̇ ε̂ + ½ g² ε̂/σ = f x − g² s, every SDE", "test_sde.py::test_reverse_drift", 1e-9, "relative")
def sde_drift() -> float:
    """The drift of the reverse SDE, both ways."""
    return reverse_drift(1.0)


def reverse_drift(eta: float) -> float:
    """α̇ x̂₀ + σ̇ ε̂ + ½ η² g² ε̂/σ against f x − ½ (1 + η²) g² s."""
    worst = 0.0
    for sde in SDES.values():
        model, t = ring().under(sde), torch.tensor(0.4 * sde.t_max, dtype=F64)
        x = model.sample(64, float(t))
        textbook = sde.drift(x, t) - 0.5 * (1 + eta**2) * sde.diffusion(t).square() * model.score(x, t)
        worst = max(worst, absolute(sde.reverse(model, eta).drift(x, t), textbook) / float(textbook.abs().max()))
    return worst


@formula(
    "every prediction ↔ (x̂₀, ε̂), every SDE",
    "test_model.py::test_predictions_are_inverses_of_their_targets",
    1e-9,
    "absolute",
)
def predictions_round_trip() -> float:
    """Every prediction's output, from the exact pair and back."""
    worst = 0.0
    for sde in SDES.values():
        model, t = ring().under(sde), torch.tensor(0.4 * sde.t_max, dtype=F64)
        x = model.sample(64, float(t))
        pair = model.predict(x, t)
        for name in PREDICTIONS:
            wanted = sd.DiffusionModel(lambda x, t: x, sde, name, data_shape=(2,)).output_for(*pair, t)
            same = sd.DiffusionModel(lambda x, t, out=wanted: out, sde, name, data_shape=(2,)).predict(x, t)
            worst = max(worst, absolute(same.x0, pair.x0), absolute(same.eps, pair.eps))
    return worst


@formula(
    "forward SDE, 2,000 Euler-Maruyama steps, against α x₀, σ: VP",
    "test_sde.py::test_simulated_forward_sde_has_the_marginals",
    4,
    "s.e.",
)
def simulated_forward() -> float:
    """Mean and spread of 20,000 paths of VP at t = ½, whose bias is a tenth of a standard error."""
    vp, steps, paths = sd.VPSDE(), 2000, 20_000
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.full((paths, 1), 1.5, dtype=F64), 0.5 / steps
    for i in range(steps):
        t = torch.tensor((i + 0.5) * dt, dtype=F64)
        noise = torch.randn(x.shape, generator=generator, dtype=F64)
        x = x + vp.drift(x, t) * dt + vp.diffusion(t) * math.sqrt(dt) * noise
    end = torch.tensor(0.5, dtype=F64)
    mean = (x.mean() - 1.5 * vp.alpha(end)).abs() / (vp.sigma(end) / math.sqrt(paths))
    spread = (x.std() / vp.sigma(end) - 1).abs() * math.sqrt(2 * paths)
    return float(torch.maximum(mean, spread))


@formula("prior: log N(x; 0, p² I), every SDE", "test_sde.py::test_prior_density", 1e-12, "relative")
def prior_density() -> float:
    """Against torch's."""
    worst = 0.0
    for sde in SDES.values():
        x = sde.prior_std * normal(16, 5)
        reference = torch.distributions.Normal(torch.zeros((), dtype=F64), sde.prior_std).log_prob(x).sum(1)
        worst = max(worst, relative(sde.prior_log_prob(x), reference))
    return worst


@formula("EDM: x̂₀ = c_skip x' + c_out F", "test_model.py::test_edm_is_the_papers_preconditioning", 1e-9, "absolute")
def edm_preconditioning() -> float:
    """In the paper's variables x' = x/α, σ' = σ/α."""
    vp, t, data = sd.VPSDE(), 0.3, 0.5
    x, output = normal(64, 2), normal(64, 2, seed=1)
    model = sd.DiffusionModel(lambda x, t: output, vp, "edm", data_shape=(2,), sigma_data=data)
    time = torch.tensor(t, dtype=F64)
    level = vp.sigma(time) / vp.alpha(time)
    skip, out = data**2 / (level**2 + data**2), level * data / torch.sqrt(level**2 + data**2)
    return absolute(model.denoise(x, t), skip * x / vp.alpha(time) + out * output)


# Exact models.


@formula(
    "mixture: s = −E[ε \\| x]/σ = ∇ log p_t",
    "test_exact.py::test_score_is_the_gradient_of_the_log_density",
    1e-9,
    "relative",
)
def score_by_autograd() -> float:
    """−E[ε | x]/σ of a mixture against the gradient of its log density."""
    model, t = ring().under(sd.VPSDE()), 0.2
    x = model.sample(256, t).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
    return absolute(model.score(x.detach(), t), gradient) / float(gradient.abs().max())


@formula(
    "mixture: ∇·v = α̇ tr J + σ̇ (D − α tr J)/σ",
    "test_exact.py::test_divergence_is_the_trace_of_the_jacobian",
    1e-9,
    "relative",
)
def divergence_by_autograd() -> float:
    """∇·v of a mixture against the trace of its Jacobian."""
    model, t = ring().under(sd.VPSDE()), 0.2
    x = model.sample(32, t)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: model.velocity(y[None], t)[0]))(x)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    return absolute(model.divergence(x, t), trace) / float(trace.abs().max())


@formula(
    "(x + σ² s)/λ = Σ w_i (a x⁽ⁱ⁾ + b x)",
    "test_exact.py::test_the_mean_of_a_reverse_step_is_tweedies",
    1e-9,
    "absolute",
)
def tweedie() -> float:
    """One-step reverse mean by the score against Σ w_i (a x_i + b x)."""
    chain, t = sd.GaussianChain.ddpm(sd.BETAS["cosine"](50)), 20
    points = sd.Empirical(ring().sample(30))
    x, (a, b, _) = normal(64, 2), chain.posterior()
    x0, eps = points.predict(x, chain.marginal_scales[t + 1], chain.marginal_stds[t + 1])
    return absolute(chain.reverse_mean(x, -eps / chain.marginal_stds[t + 1], t), a[t] * x0 + b[t] * x)


@formula(
    "log p_{t₀} = log p_T + ∫ ∇·v dt, exact trace",
    "test_likelihood.py::test_exact_trace_gives_the_closed_form_of_the_density_at_t_min",
    1e-5,
    "nats/dim",
)
def likelihood() -> float:
    """log p by the ODE with the exact trace against the closed form, nats a dimension."""
    model = ring().under(sd.VPSDE())
    x = ring().sample(64, seed=1)
    result = sd.log_likelihood(model, x, trace="exact", steps=32, nodes=6)
    return float((result.log_prob - model.log_prob(x, result.t_min)).abs().max()) / 2


@formula(
    "E zᵀ(∂v)z = ∇·v: mean of estimates minus exact",
    "test_likelihood.py::test_hutchinson_is_unbiased_and_its_error_is_right",
    4,
    "s.e.",
)
def hutchinson() -> float:
    """Mean over examples of the estimate minus the exact trace."""
    model, x = rotated(16).under(sd.VPSDE()), rotated(16).sample(256, seed=1)
    estimate = sd.log_likelihood(model, x, probes=8)
    exact = sd.log_likelihood(model, x, trace="exact")
    error = estimate.std_error.square().sum().sqrt() / len(x)
    return float((estimate.log_prob - exact.log_prob).mean().abs() / error)


@formula(
    "points: ancestral sampling by Σ w_i N(a x⁽ⁱ⁾ + b x, v) ends in them",
    "test_exact.py::test_ancestral_sampling_returns_the_points",
    1e-9,
    "absolute",
)
def ancestral_sampling() -> float:
    """Largest distance of 200 samples to the nearest of 30 points."""
    chain = sd.GaussianChain.ddpm(sd.BETAS["cosine"](50))
    points = ring().sample(30)
    generator = torch.Generator().manual_seed(0)
    x = normal(200, 2)
    for t in reversed(range(len(chain))):
        x = sd.Empirical(points).reverse_step(x, t, chain, generator)
    return float((x[:, None] - points).square().sum(2).min(1).values.max().sqrt())


# Bounds and weights.


@formula(
    "DDPM: weight on ε, β²/(2σ̃² (1 − β)(1 − ᾱ)), both variances", "test_chain.py::test_eps_weight", 1e-9, "relative"
)
def eps_weight() -> float:
    """DDPM's weight on ε as printed, both variances."""
    worst = 0.0
    for name, variance in (("posterior", DDPM.posterior()[2][1:]), ("noising", BETAS[1:])):
        printed = BETAS[1:].square() / (2 * variance * (1 - BETAS[1:]) * (1 - ALPHA_BAR[2:]))
        worst = max(worst, relative(DDPM.eps_weight(name)[1:], printed))
    return worst


@formula(
    "a²/2v = ½ (SNR_s − SNR_t) = the weight on ε × SNR",
    "test_bound.py::test_x0_form_and_eps_form_are_one_number",
    1e-9,
    "relative",
)
def x0_weight() -> float:
    """A²/2σ̃² on x₀ against the weight on ε and ½ (SNR_s − SNR_t)."""
    a, _, v = DDPM.posterior()
    snr = ALPHA_BAR[1:] / (1 - ALPHA_BAR[1:])
    of_x0 = (a.square() / (2 * v))[1:]
    from_eps = DDPM.eps_weight("posterior")[1:] * snr[1:]
    return max(relative(of_x0, from_eps), relative(of_x0, 0.5 * (snr[:-1] - snr[1:])))


@formula("DDIM: ELBO weight at η = 1 = DDPM's", "test_chain.py::test_ddim_weight_at_eta_1_is_ddpms", 1e-9, "relative")
def ddim_weight() -> float:
    """DDIM's ELBO weight at η = 1 against DDPM's."""
    return relative(DDPM.ddim_weight(1.0), DDPM.eps_weight("posterior"))


@formula(
    "Σ ½ (v/β − 1 − log(v/β)) = 0.486 bits/dim, t = 2…1000",
    "test_bound.py::test_the_second_part_of_the_kl",
    5e-4,
    "bits/dim",
)
def noising_excess() -> float:
    """Σ ½ (v/β − 1 − log(v/β)) over t = 2…1000, in bits/dim, against 0.486."""
    ratio = DDPM.posterior()[2][1:] / BETAS[1:]
    return abs(float((0.5 * (ratio - 1 - ratio.log())).sum()) / math.log(2) - 0.486)


@formula("L_T = ½ (ᾱ_T ‖x₀‖² − D ᾱ_T − D log(1 − ᾱ_T))", "test_bound.py::test_prior_term_of_ddpm", 1e-8, "relative")
def prior_term() -> float:
    """L_T of the bound against its closed form, bits/dim."""
    x0 = torch.rand(16, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 - 1
    model = sd.Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)).under(DDPM.to_sde())
    bound = sd.variational_bound(model, x0, grid=DDPM.times[1:].flip(0).tolist())
    last = ALPHA_BAR[-1]
    exact = 0.5 * (last * x0.square().mean(1) - last - torch.log1p(-last)) * 3
    return relative(bound.prior, exact)


@formula(
    "E_q log N(x; m_p, s_p²) = log N(m_q; m_p, s_p²) − ½ s_q²/s_p²",
    "test_bound.py::test_gaussian_cross_entropy",
    4,
    "s.e.",
)
def cross_entropy() -> float:
    """E_q log N(x; m_p, s_p²) = log N(m_q; m_p, s_p²) − ½ s_q²/s_p², by Monte Carlo."""
    m_q, s_q, m_p, s_p = 0.3, 0.7, -0.2, 1.1
    p = torch.distributions.Normal(torch.tensor(m_p, dtype=F64), s_p)
    values = p.log_prob(m_q + s_q * normal(100_000))
    exact = float(p.log_prob(torch.tensor(m_q, dtype=F64))) - 0.5 * s_q**2 / s_p**2
    return float((values.mean() - exact).abs() / (values.std() / math.sqrt(len(values))))


@formula("DDIM: ELBO weight as printed, η = ½", "test_chain.py::test_ddim_weight", 1e-6, "relative")
def ddim_weight_printed() -> float:
    """(√ᾱ_{t−1} − c √ᾱ_t)² (1 − ᾱ_t)/ᾱ_t/2ς², whose bracket cancels."""
    std = 0.5 * DDPM.posterior()[2][1:].sqrt()
    before, after = ALPHA_BAR[1:-1], ALPHA_BAR[2:]
    c = torch.sqrt((1 - before - std.square()) / (1 - after))
    printed = (before.sqrt() - c * after.sqrt()).square() * (1 - after) / after / (2 * std.square())
    return relative(DDPM.ddim_weight(0.5)[1:], printed)


@formula(
    "vlb: mean over the ends of cells = Σ of the chain's weights",
    "test_losses.py::test_the_steps_of_the_bound_add_up",
    1e-9,
    "relative",
)
def vlb_weights() -> float:
    """Weights on x₀ of 50 steps of VP, of which the first is the decoder's."""
    vp, steps = sd.VPSDE(), 50
    chain = vp.discretize(steps)
    a, _, v = chain.posterior()
    variance = torch.cat([chain.stds[:1].square(), v[1:]])
    model = sd.DiffusionModel(lambda x, t: x, vp, "x0", data_shape=(1,))
    unit = VLB(steps).unit(model, chain.times[1:])
    count = steps * (1 - vp.t_min / vp.t_max)
    return relative(unit**-2 / count, a.square() / (2 * variance))


@formula(
    "importance: t uniform in log-SNR, density × weight constant, every SDE",
    "test_losses.py::test_importance_is_uniform_in_log_snr",
    1e-9,
    "relative",
)
def importance() -> float:
    """The weight against the slope of the times over u."""
    worst = 0.0
    for sde in SDES.values():
        u = torch.linspace(0.05, 0.95, 50, dtype=F64).requires_grad_()
        t, weight = TIMES["importance"](sde).draw(u)
        log_snr = sde.log_snr(t.detach())
        span = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=F64)).diff().abs()
        even = span * 0.9 / 49
        worst = max(worst, relative(log_snr.diff().abs(), even.expand(49)))
        rate = (sde.diffusion(t.detach()) / sde.sigma(t.detach())).square()
        worst = max(worst, relative(weight.detach() * rate * (sde.t_max - sde.t_min), span.expand(50)))
    return worst


@formula(
    "decoder: masses of the bins add up to one", "test_bound.py::test_masses_of_the_bins_sum_to_one", 1e-12, "absolute"
)
def decoder_bins() -> float:
    """For means in and outside the range, and two variances."""
    codes = torch.arange(256)
    info = sd.DataInfo()
    edges = info.bin_edges(codes, info.points(codes, "centres", F64), "centres")
    worst = 0.0
    for mean in (-1.5, -0.3, 0.999):
        for variance in (1e-5, 0.3):
            values = torch.full((256,), mean, dtype=F64), torch.full((256,), variance, dtype=F64)
            worst = max(worst, abs(float(log_bin_mass(*edges, *values).exp().sum()) - 1))
    return worst


@formula(
    "bound of infinitely many steps = −log p for the exact model",
    "test_bound.py::test_never_below_the_negative_log_density",
    4,
    "s.e.",
)
def bound_in_the_limit() -> float:
    """Paired differences over 1,000 points."""
    model, x0 = ring().under(sd.VPSDE()), ring().sample(1000, seed=2)
    bound = sd.variational_bound(model, x0, steps=math.inf, terms=100)
    difference = bound.nats + model.log_prob(x0, float(bound.times[0]))
    return float(difference.mean().abs() / (difference.std() / math.sqrt(len(x0))))


# DDIM and the tutorial form.


@formula(
    "DDIM: any η keeps q(x_τ \\| x₀), every SDE",
    "samplers/test_ddim.py::test_ddim_keeps_every_marginal",
    1e-9,
    "relative",
)
def ddim_marginals() -> float:
    """Mean and variance after a DDIM step given x₀, for every SDE and three values of η."""
    worst = 0.0
    for sde in SDES.values():
        t = times(sde, 20).flip(0)
        for eta in (0.0, 0.5, 1.0):
            c = DDIM(eta).prepare(sde, t)
            # Given x₀, ε̂ is (x_t − α_t x₀)/σ_t, of variance 1.
            variance = c["direction"].square() + c["std"].square()
            worst = max(worst, relative(variance, sde.sigma(t[1:]).square()), relative(c["alpha_s"], sde.alpha(t[1:])))
    return worst


@formula(
    "DDIM at η = 1 on all states = DDPM with v", "samplers/test_ddim.py::test_ddpm_is_ddim_at_eta_1", 1e-9, "absolute"
)
def ddpm_is_ddim() -> float:
    """DDIM at η = 1 on all states against the chain's a, b, v."""
    sde = DDPM.to_sde()
    c = DDIM(1.0).prepare(sde, DDPM.times.flip(0))
    a, b, v = (value.flip(0) for value in DDPM.posterior())
    sigma, alpha = DDPM.marginal_stds[1:].flip(0), DDPM.marginal_scales[1:].flip(0)
    of_x, of_x0 = c["direction"] / sigma, c["alpha_s"] - c["direction"] * alpha / sigma
    return max(absolute(of_x, b), absolute(of_x0, a), absolute(c["std"].square(), v))


@formula("x + λ (μ − x) = DDIM, α = 1, η = 0", "test_tutorial.py::test_ddim_is_ddim", 1e-9, "absolute")
def tutorial_ddim() -> float:
    """X + λ (μ − x) against DDIM on the constant-rate SDE."""
    sde, dt = sd.ConstantVESDE(sigma_q=3.0), 0.01
    model, x = ring().under(sde), normal(64, 2)
    worst = 0.0
    for t in (0.01, 0.02, 0.1, 0.5, 1.0):
        mu = tutorial.mean_from_denoiser(model.denoise(x, t), x, t, dt)
        ours = sd.sample(model, 64, solver="ddim", grid=[t, max(t - dt, 0.0)], x_start=x).samples
        worst = max(worst, absolute(tutorial.ddim_update(x, mu, t, dt), ours))
    return worst


@formula("λ(Δt, 2Δt, 3Δt, 10Δt) = 1, 0.586, 0.551, 0.513", "test_tutorial.py::test_weight_of_ddim", 5e-4, "absolute")
def tutorial_weights() -> float:
    """λ at Δt, 2Δt, 3Δt, 10Δt against 1, 0.586, 0.551, 0.513."""
    printed = {1: 1.0, 2: 0.586, 3: 0.551, 10: 0.513}
    return max(abs(float(tutorial.ddim_weight(0.01 * n, 0.01)) - value) for n, value in printed.items())


if __name__ == "__main__":
    main()
