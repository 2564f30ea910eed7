"""The differentiable log-likelihood against closed forms, finite differences and ``log_likelihood``."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import sde_diffusion as sd
from sde_diffusion.networks import MLP, UNet


class GaussianNoise(nn.Module):
    """The noise prediction of N(mean, e^{2 log_scale} I) under an SDE, with both as parameters."""

    def __init__(self, sde, mean):
        super().__init__()
        self.sde, self.mean, self.log_scale = sde, nn.Parameter(mean), nn.Parameter(mean.new_tensor(-0.7))

    def forward(self, x, t):
        alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
        return sigma * (x - alpha * self.mean) / ((alpha * self.log_scale.exp()).square() + sigma.square())

    def log_prob(self, x, t_min):
        """The flow is affine: it takes one marginal, of given means and standard deviations, to the other."""
        t = torch.tensor([t_min, self.sde.t_max], dtype=x.dtype)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        std = torch.sqrt((alpha * self.log_scale.exp()).square() + sigma.square())
        latent = alpha[1] * self.mean + std[1] / std[0] * (x - alpha[0] * self.mean)
        return self.sde.prior_log_prob(latent) + x.shape[1] * torch.log(std[1] / std[0])


class PerExample(nn.Module):
    """A layer of tanh whose weights each example has for itself, so that their gradients come apart."""

    def __init__(self, count):
        super().__init__()
        weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.weight = nn.Parameter(weight.repeat(count, 1, 1))

    def forward(self, x, t):
        return torch.tanh(torch.einsum("bij,bj->bi", self.weight, x) + t[:, None])


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    network = MLP((2,), width=8, depth=2, time_scale=1.0, embedding=0)
    return sd.DiffusionModel(network, sd.VPSDE(), "v", data_shape=(2,)).double()


@pytest.fixture(scope="module")
def attentive():
    """A small random U-Net with attention and dropout."""
    torch.manual_seed(0)
    network = UNet(
        (1, 4, 4), 4, channel_multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(2,), dropout=0.5, classes=3
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return sd.DiffusionModel(network, sd.VPSDE(), "v", data_shape=(1, 4, 4)).double()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def test_value_is_the_closed_form_s(any_sde, ring):
    model = ring.under(any_sde)
    x = ring.sample(32, seed=3)
    # A start at noise of a tenth of a mode's width: the smallest safe one of all SDEs but one, whose own is twice that.
    t_min = max(any_sde.t_min, any_sde.t_from_log_noise(math.log(0.01)))
    value = sd.differentiable_log_likelihood(model, x, steps=64, trace="exact", t_min=t_min)
    # The prior's distance from p_T, of order (α_T/σ_T)², is in the value.
    mismatch = math.exp(-any_sde.log_noise(any_sde.t_max))
    assert float((value - model.log_prob(x, t_min)).abs().max()) < 5e-3 + 2 * mismatch


@torch.no_grad()
def test_error_falls_with_the_fourth_power_of_the_steps(ring):
    model, x = ring.under(sd.VPSDE()), ring.sample(64, seed=3)
    values = [sd.differentiable_log_likelihood(model, x, steps=n, trace="exact") for n in (64, 128, 256)]
    first, second = ((a - b).abs().mean() for a, b in pairwise(values))
    assert 10 < float(first / second) < 30


@torch.no_grad()
def test_agrees_with_log_likelihood(mlp):
    x = normal(8, 2)
    value = sd.differentiable_log_likelihood(mlp, x, trace="exact")
    expected = sd.log_likelihood(mlp, x, method="adaptive", trace="exact", rtol=1e-6, atol=1e-6).log_prob
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)


def test_gradient_in_parameters_is_the_closed_form_s():
    sde = sd.VPSDE()
    network = GaussianNoise(sde, torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64))
    model = sd.DiffusionModel(network, sde, "eps", data_shape=(3,))
    x = normal(16, 3)
    value = sd.differentiable_log_likelihood(model, x, steps=64, trace="exact", t_min=0.01)
    expected = network.log_prob(x, 0.01)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)
    gradients, expected = (torch.autograd.grad(v.sum(), list(model.parameters())) for v in (value, expected))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=0)


def test_gradient_in_x_is_the_score(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(16, seed=1).requires_grad_()
    value = sd.differentiable_log_likelihood(model, x, steps=64, trace="exact", t_min=0.01, recompute=False)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    # Scores are of order 1/(width of a mode) = 10.
    torch.testing.assert_close(gradient, model.score(x, 0.01).detach(), rtol=0, atol=5e-2)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gradient_is_that_of_finite_differences(mlp, trace, recompute):
    options = {"steps": 3, "trace": trace, "recompute": recompute}
    weight = mlp.network.layers[-1].weight

    def value(x, weight):
        parameters = {"network.layers.3.weight": weight}
        return torch.func.functional_call(Likelihood(mlp, options), {f"model.{k}": v for k, v in parameters.items()}, x)

    assert mlp.network.layers[3].weight is weight
    assert torch.autograd.gradcheck(value, (normal(2, 2).requires_grad_(), weight), fast_mode=True)


class Likelihood(nn.Module):
    """The likelihood as a module's forward pass, so that its parameters can be replaced."""

    def __init__(self, model, options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        return sd.differentiable_log_likelihood(self.model, x, **self.options)


def test_gradient_of_a_network_with_attention_is_that_of_finite_differences(attentive):
    x, label = normal(2, 1, 4, 4), torch.tensor([0, 2])
    options = {"steps": 4, "cond": {"label": label}}
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(attentive.parameters())]
    value = sd.differentiable_log_likelihood(attentive, x, **options).sum()
    gradients = torch.autograd.grad(value, list(attentive.parameters()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))

    def moved(step):
        with torch.no_grad():
            for parameter, direction in zip(attentive.parameters(), directions, strict=True):
                parameter += step * direction
            value = sd.differentiable_log_likelihood(attentive, x, **options).sum()
            for parameter, direction in zip(attentive.parameters(), directions, strict=True):
                parameter -= step * direction
        return float(value)

    # A central difference: third derivatives times h², against rounding over h.
    assert slope == pytest.approx((moved(1e-4) - moved(-1e-4)) / 2e-4, rel=1e-4)


@pytest.mark.parametrize(("probe", "probes"), [("rademacher", 1), ("gaussian", 1), ("orthogonal", 4)])
def test_gradient_by_probes_is_unbiased(probe, probes):
    count = 400
    model = sd.DiffusionModel(PerExample(count), sd.VPSDE(), "v", data_shape=(3,))
    x = normal(1, 3).expand(count, 3).clone().requires_grad_()

    def gradients(**options):
        value = sd.differentiable_log_likelihood(model, x, steps=8, recompute=False, **options)
        return [g.flatten(1) for g in torch.autograd.grad(value.sum(), [model.network.weight, x])]

    exact = gradients(trace="exact")
    estimates = gradients(trace="hutchinson", probe=probe, probes=probes, seed=1)
    for estimate, expected in zip(estimates, exact, strict=True):
        std_error = estimate.std(0) / math.sqrt(count)
        assert bool((std_error > 0).all())
        assert bool(((estimate.mean(0) - expected[0]).abs() < 4.5 * std_error).all())


def test_more_probes_have_less_variance():
    count = 400
    model = sd.DiffusionModel(PerExample(count), sd.VPSDE(), "v", data_shape=(3,))
    x = normal(1, 3).expand(count, 3)
    with torch.no_grad():
        one, four = (sd.differentiable_log_likelihood(model, x, steps=4, probes=n).var() for n in (1, 4))
    # A variance of 400 is known to √(2/400) = 7 %, or better: that of signs is bounded.
    assert 4 * (1 - 0.4) < float(one / four) < 4 * (1 + 0.4)


def test_computing_again_changes_nothing_but_what_is_kept(attentive):
    x = normal(2, 1, 4, 4)
    kept, values, gradients = [], [], []
    for recompute in (True, False):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = sd.differentiable_log_likelihood(attentive, x, steps=2, probes=2, recompute=recompute)
        kept.append(size)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), list(attentive.parameters())[2:8]))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert kept[0] < kept[1] / 20


def test_dropout_is_off_and_the_mode_restored(attentive):
    attentive.train()
    x = normal(2, 1, 4, 4)
    values = []
    for _ in range(2):
        value = sd.differentiable_log_likelihood(attentive, x, steps=2)
        values.append([value.detach(), *torch.autograd.grad(value.sum(), list(attentive.parameters())[2:8])])
    torch.testing.assert_close(*values, rtol=0, atol=0)
    assert all(module.training for module in attentive.modules())


def test_an_example_does_not_depend_on_its_batch(mlp):
    x = normal(5, 2)
    whole = sd.differentiable_log_likelihood(mlp, x, steps=4, seed=3)
    first = sd.differentiable_log_likelihood(mlp, x[:2], steps=4, seed=3)
    torch.testing.assert_close(whole[:2], first)


def test_probes_come_from_the_seed(mlp):
    x = normal(5, 2)
    first, again, other = (sd.differentiable_log_likelihood(mlp, x, steps=4, seed=s).detach() for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_gradients_nothing_is_kept(mlp):
    with torch.no_grad():
        value = sd.differentiable_log_likelihood(mlp, normal(2, 2), steps=2)
    assert not value.requires_grad


@torch.no_grad()
def test_float32_follows_float64(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(8, seed=1)
    double, single = (
        sd.differentiable_log_likelihood(model, x.to(dtype), trace="exact") for dtype in (torch.float64, torch.float32)
    )
    assert single.dtype == torch.float32
    # The state is kept to a unit in the last place of 1, 1e-7, for each of 64 steps, and log p has a slope of 10 there.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=64 * 1.2e-7 * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"probes": 0}, "probes = 0: must be at least 1"),
        ({"trace": "exakt"}, "trace = 'exakt': must be one of hutchinson, exact"),
        ({"probe": "uniform"}, "probe = 'uniform': must be one of"),
        ({"t_min": 2.0}, r"t_min = 2.0 is outside the range \[0, 1.0\]"),
        ({"t_min": 0.0}, "t_min = 0.0: the noise is 0 there"),
        ({"t_min": 1.0}, "t_min = 1.0: .*below t_max"),
        ({"cond": {"label": torch.zeros(3)}}, "cond.*length 3"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_wrong_arguments_are_named(ring, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.differentiable_log_likelihood(ring.under(sd.VPSDE()), ring.sample(2), **arguments)


def test_wrong_data_are_named(ring):
    model = ring.under(sd.VPSDE())
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\)"):
        sd.differentiable_log_likelihood(model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        sd.differentiable_log_likelihood(model, torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x\[0\] holds NaN"):
        sd.differentiable_log_likelihood(model, torch.full((1, 2), math.nan))
    with pytest.raises(ValueError, match=r"len\(x\) = 0"):
        sd.differentiable_log_likelihood(model, torch.zeros(0, 2))
