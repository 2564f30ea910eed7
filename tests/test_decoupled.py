"""The path and its correction, the allocation of probes, and what their spread says, on nodes of known variance."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sde_diffusion as sd
from sde_diffusion import decoupled
from sde_diffusion.decoupled import Plan, _beside, _meet, _Nodes, _sample, _sizes, _Traces, _walk
from sde_diffusion.ode import ProbabilityFlow

NODES, EXAMPLES = 40, 3000


@pytest.fixture(scope="module")
def model(rotated):
    return rotated(16).under(sd.VPSDE())


def solver_deviation(model, x, result):
    """Computed minus exact log density, with the exact density of x(T) in place of the prior's."""
    at_end = model.log_prob(result.latent, model.sde.t_max) - model.sde.prior_log_prob(result.latent)
    return result.log_prob + at_end - model.log_prob(x, result.t_min)


def exact_trace(model, x, **options):
    """With no tolerance that would add steps."""
    return sd.log_likelihood(model, x, trace="exact", atol=math.inf, **options)


def without_correction(monkeypatch):
    exact = decoupled._Look.exact

    def exact_without(look):
        traces = exact(look)
        look.defect.zero_()
        return traces

    monkeypatch.setattr(decoupled._Look, "exact", exact_without)


def test_error_falls_by_at_least_fifth_order_with_steps(model):
    x = model.distribution.sample(4, seed=3)
    errors = [
        float(solver_deviation(model, x, exact_trace(model, x, steps=steps, nodes=6)).abs().mean())
        for steps in (8, 16, 32)
    ]
    assert errors[0] > 2**5 * errors[1]
    assert errors[1] > 2**5 * errors[2]


def test_error_falls_geometrically_with_nodes(model):
    """Each node more gains at least a factor of three, as where the integrand is analytic about the interval."""
    x = model.distribution.sample(4, seed=3)
    fine = exact_trace(model, x, steps=24, nodes=9).log_prob
    errors = [float((exact_trace(model, x, steps=24, nodes=k).log_prob - fine).abs().mean()) for k in (1, 2, 3, 4, 5)]
    for fewer, more in pairwise(errors):
        assert fewer > 3 * more
    assert errors[0] > 3**6 * errors[-1]


@pytest.mark.parametrize("steps", [8, 16])
def test_the_correction_removes_most_of_the_path_s_error(model, monkeypatch, steps):
    x = model.distribution.sample(8, seed=3)
    corrected = exact_trace(model, x, steps=steps, nodes=6)
    without_correction(monkeypatch)
    uncorrected = exact_trace(model, x, steps=steps, nodes=6)
    error, error_without = (solver_deviation(model, x, result).abs().mean() for result in (corrected, uncorrected))
    assert float(error) < float(error_without) / 3
    # What was subtracted is what is reported, next to the error of the quadrature, which is that of both.
    torch.testing.assert_close(
        corrected.solver_error - uncorrected.solver_error,
        (corrected.log_prob - uncorrected.log_prob).abs(),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("steps", [None, 8])
def test_the_solver_s_error_is_below_its_estimate_in_the_mean(rotated, ring, any_sde, steps):
    for distribution in (ring, rotated(16)):
        model, x = distribution.under(any_sde), distribution.sample(16, seed=3)
        result = exact_trace(model, x, steps=steps)
        error = float(solver_deviation(model, x, result).abs().mean())
        # An estimate, and a mean over few points.
        assert error < 1.5 * float(result.solver_error.mean())


@pytest.mark.parametrize("size", [0.0, 0.03, 0.3])
def test_any_path_gives_the_density_of_an_exact_model(model, monkeypatch, size):
    """Also one that does not solve the ODE, and ends elsewhere."""
    x = model.distribution.sample(4, seed=3)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [model.sde.log_noise(t) for t in (model.sde.t_min, model.sde.t_max)]

    def detour(flow, y_first, grid, number):
        y_last, nodes = _walk(flow, y_first, grid, number)
        shift, rate = size * torch.sin(nodes.u - ends[0]), size * torch.cos(nodes.u - ends[0])
        # On a scale that the density has there: narrow at the data.
        scale = torch.sigmoid(nodes.u)
        rate, shift = rate * scale + shift * scale * (1 - scale), shift * scale
        along = direction[:, None] * torch.stack([shift, rate])[:, None, :, None]
        end = size * math.sin(ends[1] - ends[0]) / (1 + math.exp(-ends[1]))
        return y_last + end * direction, nodes._replace(
            y=nodes.y + along[0].flatten(0, 1), rate=nodes.rate + along[1].flatten(0, 1)
        )

    monkeypatch.setattr(decoupled, "_walk", detour)
    result = exact_trace(model, x, steps=40, nodes=8)
    if size == 0.3:
        # What the correction removes is far above the bound below.
        assert float(result.solver_error.mean()) > 0.3
    torch.testing.assert_close(solver_deviation(model, x, result), torch.zeros(4).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_nodes_integrate_polynomials_and_lie_on_the_path(any_sde, number):
    """N(0, 1/2) under the flow: y in proportion to the standard deviation of its density."""
    flow = ProbabilityFlow(
        any_sde, sd.Gaussian(torch.zeros(2).double(), 0.5 * torch.eye(2).double()).under(any_sde).predict
    )

    def std(u):
        cos_squared = torch.sigmoid(-2 * u)
        return torch.sqrt(1 - cos_squared / 2)

    grid = torch.linspace(-3, 3, 25, dtype=torch.float64)
    x = torch.tensor([[1.0, -2.0], [0.3, 0.1]], dtype=torch.float64)
    y_last, nodes = _walk(flow, x * std(grid[0]), grid.tolist(), number)
    u = nodes.u.clone().requires_grad_()
    (rate,) = torch.autograd.grad(std(u).sum(), u)
    # Of order five at the ends, and of four in between for y and three for its derivative, in steps of 1/4.
    torch.testing.assert_close(y_last, x * std(grid[-1]), rtol=0, atol=2e-6)
    torch.testing.assert_close(nodes.y.unflatten(0, (2, -1)), x[:, None] * std(nodes.u)[:, None], rtol=0, atol=2e-5)
    torch.testing.assert_close(nodes.rate.unflatten(0, (2, -1)), x[:, None] * rate[:, None], rtol=0, atol=4e-4)
    for degree in range(2 * number):
        exact = (3 ** (degree + 1) - (-3) ** (degree + 1)) / (degree + 1)
        assert float(nodes.integral(nodes.u**degree)) == pytest.approx(exact, abs=1e-12 * 3**degree)


class Known:
    """In place of the model: estimates that are normal, of known mean and variance at every node."""

    def __init__(self, mean, variance, examples=EXAMPLES, seed=0):
        self.mean, self.variance = mean.expand(examples, -1), variance.expand(examples, -1)
        self.defect = torch.zeros(self.mean.shape)
        self.generator = torch.Generator().manual_seed(seed)
        self.products = torch.zeros(examples)

    def __call__(self, which, size, blocks):
        noise = torch.randn(len(which), blocks, generator=self.generator, dtype=torch.float64)
        examples = which // self.mean.shape[1]
        self.products += size * blocks * torch.bincount(examples, minlength=len(self.products))
        scale = (self.variance.reshape(-1)[which] / size).sqrt()
        return self.mean.reshape(-1)[which, None] + scale[:, None] * noise


@pytest.fixture(scope="module")
def known():
    """Weights of the nodes, and mean and variance of one probe at each, over a factor of 300."""
    place = torch.linspace(-1, 1, NODES, dtype=torch.float64)
    nodes = _Nodes(place, 0.05 + 0.02 * torch.cos(3 * place), place, place)
    return SimpleNamespace(nodes=nodes, mean=torch.sin(5 * place), variance=0.01 + 3 * torch.exp(-20 * place.square()))


def plan(probes=8, target=None):
    return Plan("hutchinson", "orthogonal", probes, target, 1, NODES, 64)


def check_estimates(known, look, traces):
    """Unbiased mean and variance, and Student's t of the degrees stated."""
    deviation = known.nodes.integral(traces.mean - look.mean)
    variance, degrees = traces.spread(known.nodes)
    assert abs(float(deviation.mean())) < 4 * float(deviation.std()) / math.sqrt(EXAMPLES)
    excess = variance - deviation.square()
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / math.sqrt(EXAMPLES)
    # The mean square of Student's t is ν/(ν − 2); Satterthwaite's is an approximation, good to a tenth here.
    squares = deviation.square() / variance
    expected = float((degrees / (degrees - 2)).clamp(max=5).mean())
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(EXAMPLES) + 0.1 * expected
    return deviation


@pytest.mark.parametrize("probes", [2, 3, 8, 32])
def test_sampled_integrals_are_unbiased_with_an_honest_error(known, probes):
    look = Known(known.mean, known.variance)
    traces = _sample(look, known.nodes, plan(probes), dimension=64)
    check_estimates(known, look, traces)
    assert float(look.products.max()) <= probes * NODES
    if probes > 8:
        assert float(look.products.mean()) > 0.7 * probes * NODES


def test_allocation_beats_equal_blocks(known):
    """Variance in proportion to the least that there is, (Σ w √V)²/Σ b, to what rounding to powers of two costs."""
    look = Known(known.mean, known.variance)
    traces = _sample(look, known.nodes, plan(32), dimension=64)
    weight, products = known.nodes.weight, look.products.mean()
    least = float((weight * known.variance.sqrt()).sum().square() / products)
    equal = float((weight.square() * known.variance).sum() * NODES / products)
    variance = float(known.nodes.integral(traces.mean - look.mean).square().mean())
    assert least < variance < 0.75 * equal


@pytest.mark.parametrize("target", [0.3, 0.1, 0.02])
def test_the_target_is_met_for_every_example(known, target):
    look = Known(known.mean, known.variance)
    # Blocks of at most 4, past which there are more of them.
    traces = _sample(look, known.nodes, plan(target=target), dimension=4)
    assert bool((traces.spread(known.nodes)[0] <= target**2).all())
    assert float(traces.size.max()) <= 4
    if target == 0.02:
        assert float(traces.blocks.max()) > 2
    deviation = known.nodes.integral(traces.mean - look.mean)
    assert abs(float(deviation.mean())) < 4 * float(deviation.std()) / math.sqrt(EXAMPLES)
    # It stops where the estimate is below the target, and so a little early.
    assert float(deviation.square().mean()) < 1.5 * target**2


def test_a_smaller_target_costs_more(known):
    cost = []
    for target in (0.4, 0.2, 0.1, 0.05):
        look = Known(known.mean, known.variance, examples=100)
        _sample(look, known.nodes, plan(target=target), dimension=64)
        cost.append(float(look.products.mean()))
    # All make the pilot; from where that does not do, a half of the error is up to four times the probes.
    assert cost[0] < cost[1] < cost[2] < cost[3] < 64 * cost[0]
    assert cost[3] > 2 * cost[2]


@pytest.mark.parametrize("node", [6, 7])
def test_a_node_s_own_pilot_does_not_decide_on_its_probes(known, node):
    """Nor that of any other node of its parity."""
    sizes = []
    for factor in (1, 100):
        scale = torch.ones(NODES, dtype=torch.float64)
        scale[node] = factor
        traces = _sample(Known(known.mean, known.variance * scale, examples=50), known.nodes, plan(16), dimension=64)
        sizes.append(traces.size)
    parity = node % 2
    assert torch.equal(sizes[0][:, parity::2], sizes[1][:, parity::2])
    assert not torch.equal(sizes[0][:, 1 - parity :: 2], sizes[1][:, 1 - parity :: 2])


@given(
    log_importance=st.lists(st.floats(-20, 20), min_size=2, max_size=30, unique=True),
    log_largest=st.integers(0, 6),
    probes=st.floats(0, 200),
)
def test_sizes_are_proportional_powers_of_two_within_the_budget(log_importance, log_largest, probes):
    importance = torch.tensor(log_importance, dtype=torch.float64).exp()[None]
    sizes = _sizes(importance, 2**log_largest, probes)[0]
    assert torch.equal(sizes, torch.exp2(torch.log2(sizes).round()))
    assert 1 <= float(sizes.min()) <= float(sizes.max()) <= 2**log_largest
    spent = 2 * sizes[sizes > 1].sum()
    assert float(spent) <= probes * len(sizes)
    order = importance[0].argsort()
    assert bool((sizes[order].diff() >= 0).all())
    # Between the ends, sizes are in the importance's proportion but for rounding to a power of two.
    inside = (sizes > 1) & (sizes < 2**log_largest)
    ratio = torch.log2(sizes / importance[0])[inside]
    assert not len(ratio) or float(ratio.max() - ratio.min()) <= 1 + 1e-9
    # A scale common to all does not matter, but where the sum ties.
    torch.testing.assert_close(_sizes(2.0 * importance, 2**log_largest, probes)[0], sizes)


def test_the_budget_is_used():
    """Where importances differ, one more doubling of one node would be too many."""
    importance = torch.rand(200, NODES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for probes in (1.0, 6.0, 30.0):
        sizes = _sizes(importance, 64, probes)
        left = probes * NODES - 2 * (sizes * (sizes > 1)).sum(1)
        assert bool((left >= 0).all())
        # From one probe to two is four products, from n to 2n it is 2n.
        assert bool((left < (2 * sizes.amax(1)).clamp(min=4)).all())


@given(
    blocks=st.sampled_from([2, 4, 8]),
    times=st.integers(1, 3),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 10**6),
)
def test_joined_blocks_have_the_mean_of_all_and_the_variance_of_the_last(blocks, times, shift, seed):
    estimates = torch.randn(3, blocks * 2**times, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    estimates[:, blocks:] += shift
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    traces = _Traces(*(zeros.clone() for _ in range(5)))
    which = torch.tensor([1, 4, 6])
    traces.update(which, estimates[:, :blocks], 8)
    for k in range(times):
        traces.add(which, estimates[:, blocks * 2**k : blocks * 2 ** (k + 1)])
    torch.testing.assert_close(traces.mean.flatten()[which], estimates.mean(1), rtol=1e-10, atol=1e-10)
    last = estimates[:, blocks * 2 ** (times - 1) :]
    torch.testing.assert_close(traces.variance.flatten()[which], last.var(1), rtol=1e-10, atol=1e-10)
    assert bool((traces.degrees.flatten()[which] == last.shape[1] - 1).all())
    assert bool((traces.blocks.flatten()[which] == blocks * 2**times).all())
    assert bool((traces.size.flatten()[which] == 8).all())
    # Others are as they were.
    assert int((traces.mean != 0).sum()) == 3


def traces_of(variance, blocks):
    zeros = torch.zeros_like(variance)
    return _Traces(zeros, variance, zeros + (blocks - 1), zeros + blocks, zeros + 1)


def of_weights(weight):
    return _Nodes(weight, weight, weight, weight)


@pytest.mark.parametrize("blocks", [2, 3, 4, 8])
def test_degrees_of_one_node_are_its_own(blocks):
    variance = torch.tensor([[0.0, 4.0, 0.0]], dtype=torch.float64)
    total, degrees = traces_of(variance, blocks).spread(of_weights(torch.tensor([1.0, 3.0, 2.0]).double()))
    assert float(total) == pytest.approx(9 * 4 / blocks)
    assert float(degrees) == pytest.approx(blocks - 1)


def test_degrees_of_equal_nodes_add_up():
    """K of one degree make about K: by the delta method, with moments 1, 3, 15, 105 of χ²₁, K + 8/3 in the mean."""
    number, examples = 256, 2000
    normal = torch.randn(examples, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, degrees = traces_of(normal.square(), 2).spread(of_weights(torch.ones(number).double()))
    error = float(degrees.std()) / math.sqrt(examples)
    assert abs(float(degrees.mean()) - number - 8 / 3) < 4 * error + 1


def test_sums_of_satterthwaite_s_formula_are_unbiased():
    """For estimates of known variances q σ²_k χ²_ν/ν: both of its sums, from variance and degrees."""
    examples, blocks = 20_000, 4
    exact = torch.logspace(-1, 1, 12, dtype=torch.float64)
    weight = torch.linspace(1, 2, 12, dtype=torch.float64)
    normal = torch.randn(examples, 12, blocks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance, degrees = traces_of(exact * normal.var(2), blocks).spread(of_weights(weight))
    parts = weight.square() * exact / blocks
    fourth = variance.square() / (degrees + 2)
    for values, expected in (
        (variance, parts.sum()),
        (fourth, parts.square().sum() / (blocks - 1)),
        (variance.square() - 2 * fourth, parts.sum().square()),
    ):
        assert abs(float(values.mean() - expected)) < 4 * float(values.std()) / math.sqrt(examples)


def test_without_spread_degrees_are_infinite_and_never_fewer_than_one():
    weight = torch.ones(3, dtype=torch.float64)
    variance, degrees = traces_of(torch.zeros(2, 3, dtype=torch.float64), 2).spread(of_weights(weight))
    assert not bool(variance.any())
    assert bool((degrees == math.inf).all())
    uneven = torch.tensor([[1.0, 1e-9, 1e-9]], dtype=torch.float64)
    assert float(traces_of(uneven, 2).spread(of_weights(weight))[1]) >= 1


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_beside_is_the_mean_over_the_nodes_of_the_other_parity(number):
    values = torch.randn(2, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros_like(values)
    for k in range(number):
        near = [j for j in (k - 3, k - 1, k + 1, k + 3) if 0 <= j < number]
        if near:
            expected[:, k] = values[:, near].mean(1)
    torch.testing.assert_close(_beside(values), expected)


def test_meeting_a_target_leaves_examples_alone_that_have():
    """Those that meet it take as many again, to say so, and no more for those that do not."""
    easy, hard = torch.full((1, NODES), 1e-6).double(), torch.full((1, NODES), 1.0).double()
    look = Known(torch.zeros(2, NODES).double(), torch.cat([easy, hard]), examples=2)
    nodes = of_weights(torch.full((NODES,), 0.1).double())
    pilot = look(torch.arange(2 * NODES), 1, 2).reshape(2, NODES, 2)
    ones = torch.ones(2, NODES).double()
    traces = _Traces(pilot.mean(2), pilot.var(2), ones.clone(), 2 * ones, ones.clone())
    _meet(0.01**2 * 4, look, traces, nodes, 64)
    assert look.products[0] == 4 * NODES
    assert look.products[1] > 100 * NODES
