"""Every weighting has one minimiser, the exact score: proved on a mixture whose score is known.

For x = α x₀ + σ ε the best prediction of v = α ε − σ x₀ at every (x, t) is v* = E[v | x], whatever w(t) > 0. So for the
expected loss L, at v* + θ h with any function h(x, t):

    dL/dθ = 0 at θ = 0        L(θ) − L(0) = θ² E[w ‖h‖²]/D > 0
"""

import math

import pytest
import torch

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    DiffusionModel,
    FlowSDE,
    Gaussian,
    GaussianMixture,
    SubVPSDE,
    train,
)
from sde_diffusion.losses import WEIGHTINGS, Hybrid, Importance, MinSNR, denoising_loss, stratified

SDES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(), "edm": EDMSDE(), "cosine": CosineVPSDE(), "flow": FlowSDE()}
EVERY_WEIGHTING = {**{name: name for name in WEIGHTINGS}, "gamma of 1": MinSNR(1.0), "function": torch.sigmoid}
# Ways of being wrong about v, in units of its size n = √(α² + σ²).
PERTURBATIONS = {
    "constant": lambda x, n, log_snr: torch.ones_like(x),
    "linear": lambda x, n, log_snr: x / n,
    "wave": lambda x, n, log_snr: torch.sin(3 * x.flip(1) / n),
    "early": lambda x, n, log_snr: torch.sigmoid(log_snr - 2) * x / n,
    "late": lambda x, n, log_snr: torch.sigmoid(-log_snr) * torch.cos(x / n),
}


@pytest.fixture(scope="module", params=list(SDES.values()), ids=list(SDES))
def drawn(request, ring):
    """(SDE, x₀, t, ε, weight of t): many draws, with times by importance, which keeps every weight's tail short."""
    sde, n = request.param, 20_000
    generator = torch.Generator().manual_seed(0)
    x0 = ring.draw(n, generator)
    u, noise = torch.rand(n, generator=generator, dtype=torch.float64), torch.randn(n, 2, generator=generator).double()
    t, time_weight = Importance(sde).draw(u)
    return sde, x0, t, noise, time_weight


def exact_v(distribution, sde, x, t):
    """v* (B, D)."""
    x0, eps = distribution.under(sde).predict(x, t)
    return sde.alpha(t)[:, None] * eps - sde.sigma(t)[:, None] * x0


def perturbations(sde, x, t):
    """Each h(x, t) (B, D), of the size of v."""
    scale = torch.sqrt(sde.alpha(t).square() + sde.sigma(t).square())[:, None]
    return {name: scale * h(x, scale, sde.log_snr(t)[:, None]) for name, h in PERTURBATIONS.items()}


def model_with(sde, v, weighting):
    """A model that predicts this v, and for "hybrid" the middle of the variances."""
    learned = weighting == "hybrid"
    output = torch.cat([v, torch.zeros_like(v)], 1) if learned else v
    return DiffusionModel(lambda x, t: output, sde, "v", data_shape=v.shape[1:], learned_variance=learned)


def mean_and_error(values):
    """Mean over the draws, and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


@pytest.mark.parametrize("weighting", EVERY_WEIGHTING.values(), ids=EVERY_WEIGHTING)
def test_the_exact_prediction_is_a_minimum_in_every_direction(ring, drawn, weighting):
    sde, x0, t, noise, time_weight = drawn
    x = sde.perturb(x0, t, noise)
    v = exact_v(ring, sde, x, t)

    for name, h in perturbations(sde, x, t).items():

        def loss(theta, h=h):
            return time_weight * denoising_loss(model_with(sde, v + theta * h, weighting), x0, t, noise, weighting)

        zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
        least, slope = torch.func.jvp(loss, (zero,), (one,))
        mean, error = mean_and_error(slope)
        assert abs(mean) < 4 * error, name
        # Of both sides together, where the noise of the slope drops out.
        mean, error = mean_and_error((loss(one) + loss(-one)) / 2 - least)
        assert mean > 4 * error, name


@pytest.mark.parametrize("weighting", EVERY_WEIGHTING.values(), ids=EVERY_WEIGHTING)
def test_least_squares_finds_the_exact_prediction(ring, drawn, weighting):
    """v̂ = Σ θ_k f_k with v* in the span: the fit is θ = (1, 0, …), up to the errors of weighted least squares."""
    sde, x0, t, noise, time_weight = drawn
    x = sde.perturb(x0, t, noise)
    v = exact_v(ring, sde, x, t)
    features = torch.stack([v, *perturbations(sde, x, t).values()])
    theta = torch.zeros(len(features), dtype=x.dtype)

    def loss(theta):
        v = torch.einsum("k,kbd->bd", theta, features)
        return time_weight * denoising_loss(model_with(sde, v, weighting), x0, t, noise, weighting)

    # The loss is quadratic: one step of Newton's method from anywhere is the minimum.
    slopes = torch.func.jacfwd(loss)(theta)
    curvature = torch.func.hessian(lambda theta: loss(theta).mean())(theta)
    fit = theta - torch.linalg.solve(curvature, slopes.mean(0))
    # The covariance of the fit, from the spread of the slopes there.
    slopes = torch.func.jacfwd(loss)(fit)
    assert (slopes.mean(0).abs() < 1e-6 * slopes.std(0)).all()
    inverse = torch.linalg.inv(curvature)
    error = (inverse @ (slopes.T.cov() / len(slopes)) @ inverse).diagonal().sqrt()
    truth = torch.eye(len(features), dtype=x.dtype)[0]
    assert ((fit - truth).abs() < 5 * error).all()
    # Which says something: v* is told from nothing, and the rest from half of what would matter.
    assert error[0] < 0.1
    assert (error < 0.5).all()


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_hybrid_learns_the_variance_of_the_reverse_step(sde):
    """For a Gaussian, x_s given x_t is Gaussian with variance v + a² Var[x₀ | x_t]: the bound is least there."""
    n, steps, variance = 20_000, 20, 0.3
    distribution = Gaussian(torch.tensor([0.5], dtype=torch.float64), torch.tensor([[variance]], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x0 = distribution.draw(n, generator)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    for i in (2, 10, 20):
        earlier, later = ((i - k) * sde.t_max / steps for k in (1, 0))
        t = torch.full((n,), later, dtype=torch.float64)
        chain = sde.discretize([earlier, later])
        a, _, v = (value[1] for value in chain.posterior())
        alpha, sigma = sde.alpha(t[0]), sde.sigma(t[0])
        best = v + a.square() * variance * sigma.square() / (alpha.square() * variance + sigma.square())
        fraction = torch.log(best / v) / torch.log(chain.stds[1].square() / v)
        exact = exact_v(distribution, sde, sde.perturb(x0, t, noise), t)

        def loss(fraction, exact=exact, t=t):
            output = torch.cat([exact, (2 * fraction - 1).expand(n, 1)], 1)
            model = DiffusionModel(lambda x, t: output, sde, "v", data_shape=(1,), learned_variance=True)
            return denoising_loss(model, x0, t, noise, Hybrid(steps, vlb_weight=1.0))

        for shift, sign in ((0.0, 0), (-0.3, -1), (0.3, 1)):
            _, slope = torch.func.jvp(loss, (fraction + shift,), (torch.ones_like(fraction),))
            mean, error = mean_and_error(slope)
            assert abs(mean) < 4 * error if sign == 0 else sign * mean > 4 * error


@pytest.mark.slow
def test_networks_trained_by_every_weighting_agree_with_the_exact_score():
    """A network on two narrow modes, where the best linear prediction, that of one Gaussian, is far off.

    Its mean squared error of ε, beside the exact ε*, is below a tenth of the linear prediction's for each weighting,
    and so no two differ by more than four tenths: ‖a − b‖² <= (‖a − c‖ + ‖c − b‖)².
    """
    mixture = GaussianMixture(
        torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.01]], [[0.04]]]), torch.tensor([0.4, 0.6])
    )
    data = mixture.sample(20_000)
    linear = Gaussian(data.mean(0), data.var(0)[:, None])
    generator = torch.Generator().manual_seed(1)
    x0 = mixture.draw(4000, generator)
    # Judged where the shape of the data matters: neither all noise nor none.
    sde = VPSDE()
    log_noise = -2.5 + 3.5 * stratified(torch.rand(4000, generator=generator))
    t = sde.t_from_log_snr(-2 * log_noise)
    x = sde.perturb(x0, t, torch.randn(4000, 1, generator=generator))
    exact = mixture.under(sde).eps(x, t)
    bar = float((linear.under(sde).eps(x, t) - exact).square().mean())
    errors = {}
    for weighting in WEIGHTINGS:
        config = {
            "network": {"name": "mlp", "width": 64, "depth": 3, "embedding": 32, "time_scale": 10.0},
            "model": {"sigma_data": 0.9, "learned_variance": weighting == "hybrid"},
            # Trained there too: the minimiser is the same for any density of times, but what is left of a finite run
            # is where it saw least.
            "loss": {
                "weighting": weighting,
                "time": {"name": "log_normal", "mean": -0.7, "std": 1.0},
                "spread": "stratified",
            },
            "optim": {"lr": 5e-3, "warmup": 50},
            "ema": {"decay": 0.99},
            "train": {"steps": 1500, "batch_size": 256, "sample_every": 0},
        }
        model = train(config, dataset=data).model
        with torch.no_grad():
            errors[weighting] = float((model.eps(x, t) - exact).square().mean())
    assert all(error < 0.1 * bar for error in errors.values()), (bar, errors)
