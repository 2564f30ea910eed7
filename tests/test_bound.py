"""The variational bound against exact log-densities, entropies and closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sde_diffusion as sd
from sde_diffusion.bound import log_bin_mass
from sde_diffusion.losses import step_kl

ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def gap(distribution, model, x, **options):
    """Bound minus −log p of the data themselves, nats a dimension: its mean over x and the standard error of that."""
    bound = sd.variational_bound(model, x, **options)
    difference = (bound.nats + distribution.log_prob(x, ONE, ZERO)) / bound.dimension
    return float(difference.mean()), float(difference.std() / math.sqrt(len(x)))


def ddpm_linear():
    return sd.GaussianChain.ddpm(sd.BETAS["linear"](1000))


def at_its_times(chain):
    """The grid whose chain is this one."""
    return chain.times[1:].flip(0).tolist()


def one_point(value, sde, bits=None):
    """The exact model of data that are one point of three numbers, whose x̂₀ has no error."""
    model = sd.Empirical(torch.full((1, 3), value, dtype=torch.float64)).under(sde)
    model.data = sd.DataInfo(bits=bits)
    return model


class OneDimensional:
    """A mixture of three normals as codes of a lattice: their exact probabilities and entropy."""

    means, stds, weights = (-1.0, 0.1, 1.2), (0.3, 0.5, 0.2), (0.3, 0.5, 0.2)

    def __init__(self, low=-2.5, high=2.5, bits=5, kind="centres", sde=None):
        def column(values):
            return torch.tensor(values, dtype=torch.float64)[:, None]

        variances = column(self.stds).square()[..., None]
        self.model = sd.GaussianMixture(column(self.means), variances, column(self.weights)[:, 0]).under(
            sde or sd.VPSDE()
        )
        self.model.data = sd.DataInfo(low, high, bits)
        self.codes = torch.arange(2**bits)[:, None]
        points = self.model.data.points(self.codes, kind, torch.float64)
        edges = self.model.data.bin_edges(self.codes, points, kind)
        lower, upper = (
            torch.special.ndtr((edge - column(self.means).T) / column(self.stds).T) @ column(self.weights)
            for edge in edges
        )
        self.probability = (upper - lower)[:, 0]
        self.entropy = -float(torch.special.xlogy(self.probability, self.probability).sum()) / math.log(2)

    def excess(self, **options):
        """Expected bound minus entropy, bits, and its standard error from the noise alone."""
        # An exact model computes codes in the default dtype.
        torch.set_default_dtype(torch.float64)
        try:
            bound = sd.variational_bound(self.model, self.codes, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        mean = float((self.probability * bound.per_example).sum())
        return mean - self.entropy, float((self.probability * bound.per_example_std_error).square().sum().sqrt())


@pytest.mark.parametrize("options", [{"steps": 40}, {"steps": math.inf, "terms": 40}], ids=["40 steps", "limit"])
def test_never_below_the_negative_log_density(rotated, any_sde, options):
    distribution = rotated(16)
    mean, error = gap(distribution, distribution.under(any_sde), distribution.sample(300, seed=1), **options)
    assert mean > -3 * error
    if options["steps"] == math.inf:
        # What is left is the prior and the noise at t_min, which VE and constant-rate SDEs start with.
        assert mean < 3 * error + 0.02


@pytest.mark.parametrize("variance", ["posterior", "noising", 0.5])
@pytest.mark.parametrize("grid", ["log_snr", "angle", "t"])
def test_a_bound_for_every_variance_and_grid(ring, variance, grid):
    options = {"t_min": 0.02} if grid == "t" else {}
    model, x = ring.under(sd.VPSDE()), ring.sample(300, seed=2)
    mean, error = gap(ring, model, x, steps=50, variance=variance, grid=grid, **options)
    assert mean > 3 * error


def test_the_gap_falls_as_one_over_the_number_of_steps(ring):
    x = ring.sample(3000, seed=1)
    gaps = [gap(ring, ring.under(sd.VPSDE()), x, steps=steps, repeats=1) for steps in (32, 128, 512)]
    for (coarse, coarse_error), (fine, fine_error) in pairwise(gaps):
        assert abs(coarse - 4 * fine) < 4 * math.hypot(coarse_error, 4 * fine_error) + 0.2 * coarse
    assert gaps[0][0] > 1


@pytest.mark.parametrize("kind", ["centres", "endpoints", "dequantized"])
@pytest.mark.parametrize("steps", [20, 200])
def test_codes_never_cost_less_than_their_entropy(kind, steps):
    known = OneDimensional(kind="endpoints" if kind == "endpoints" else "centres")
    excess, error = known.excess(codes=kind, steps=steps, variance=0.5, repeats=32)
    assert excess > -3 * error
    if steps == 200:
        assert excess < 0.1 + 3 * error


def cost_on_a_flat_density(noise_in_bins):
    """∫ N(ε; 0, 1) log₂ of the Gaussian's density, averaged over its own noise, by its mass of the bin, bits."""
    noise = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * noise.square()) / math.sqrt(2 * math.pi)
    half = 0.5 / noise_in_bins
    mass = torch.special.ndtr(noise + half) - torch.special.ndtr(noise - half)
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + math.log2(noise_in_bins)
    return float(torch.trapezoid(-density * torch.log2(mass), noise)) - entropy


def test_what_noise_below_a_bin_costs_where_the_density_is_flat():
    assert cost_on_a_flat_density(0.5) == pytest.approx(0.028, abs=5e-4)
    assert cost_on_a_flat_density(1) < 0.0025
    known = OneDimensional(bits=8)
    # A mode is ten bins wide, of which the second order shows.
    t_min = known.model.sde.t_from_log_noise(math.log(5 / 256 / 4))
    excess, error = known.excess(steps=math.inf, terms=32, repeats=64, t_min=t_min)
    assert error < 0.025
    assert abs(excess - cost_on_a_flat_density(0.25)) < 4 * error


def test_prior_term_of_ddpm():
    """½(ᾱ_T mean(x₀²) − ᾱ_T − log(1 − ᾱ_T)) nats a dimension: 7e-6 to 3e-5 bits/dim for images in [−1, 1]."""
    chain = ddpm_linear()
    alpha_bar = float(chain.marginal_scales[-1].square())
    for value in (0.5, 1.0):
        x0 = torch.full((2, 3), value, dtype=torch.float64)
        bound = sd.variational_bound(one_point(value, chain.to_sde()), x0, grid=at_its_times(chain), terms=1)
        bits = bound.prior / (3 * math.log(2))
        expected = 0.5 * (alpha_bar * value**2 - alpha_bar - math.log1p(-alpha_bar)) / math.log(2)
        # Of rounding errors of 1 − ᾱ, what the logarithm leaves is 1e-16 beside ᾱ²/4 = 4e-10, at the value 1e-9.
        torch.testing.assert_close(bits, torch.full_like(bits, expected), rtol=1e-5, atol=0)
        assert 7e-6 < expected < 3e-5


def test_the_second_part_of_the_kl():
    """With x̂₀ = x₀ it is all: nothing for σ̃² = v, 0.486 bits/dim for DDPM's σ̃² = β."""
    chain = ddpm_linear()
    model, x0 = one_point(0.5, chain.to_sde()), torch.full((1, 3), 0.5, dtype=torch.float64)
    options = {"grid": at_its_times(chain), "repeats": 1}
    assert float(sd.variational_bound(model, x0, **options).transitions.abs().max()) < 1e-12
    noising = sd.variational_bound(model, x0, variance="noising", **options)
    assert float(noising.transitions.sum() / (3 * math.log(2))) == pytest.approx(0.486, abs=5e-4)


@pytest.mark.parametrize("variance", ["posterior", "noising", 0.3])
def test_x0_form_and_eps_form_are_one_number(rotated, variance):
    distribution, chain = rotated(16), sd.GaussianChain.ddpm(sd.BETAS["linear"](50, 1e-3, 0.3))
    model, dimension = distribution.under(chain.to_sde()), 16
    bound = sd.variational_bound(model, distribution.sample(5), grid=at_its_times(chain), variance=variance, repeats=1)
    a, _, v = chain.posterior()
    reverse = chain.reverse_variance(variance, decoder=True)
    square = dimension * bound.squared_error[:, 1:]
    ratio = (v / reverse)[1:]
    constant = 0.5 * dimension * (ratio - 1 - ratio.log())
    of_data = a[1:].square() * square / (2 * reverse[1:])
    snr = (chain.marginal_scales[2:] / chain.marginal_stds[2:]).square()
    of_noise = chain.eps_weight(variance)[1:] * snr * square
    torch.testing.assert_close(of_data + constant, bound.transitions)
    torch.testing.assert_close(of_noise + constant, bound.transitions)


@given(
    numbers=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    v=st.floats(0.01, 2),
    reverse=st.floats(0.01, 2),
)
def test_kl_is_the_rao_blackwellised_objective_less_the_posteriors_entropy(numbers, v, reverse):
    """−KL = log N(a x₀ + b x; μ, σ̃²) − ½ v/σ̃² + ½ log(2πe v), with μ = a x̂₀ + b x, whatever b x is."""
    x0, x0_hat, a, rest = (torch.tensor(number, dtype=torch.float64) for number in numbers)
    v, reverse = torch.tensor(v, dtype=torch.float64), torch.tensor(reverse, dtype=torch.float64)
    log_density = torch.distributions.Normal(a * x0_hat + rest, reverse.sqrt()).log_prob(a * x0 + rest)
    objective = log_density - 0.5 * v / reverse
    kl = -objective - 0.5 * torch.log(2 * math.pi * math.e * v)
    torch.testing.assert_close(step_kl(x0 - x0_hat, a, v, reverse), kl, rtol=1e-9, atol=1e-9)


def test_gaussian_cross_entropy():
    """E_q log N(x; m_p, s_p²) = log N(m_q; m_p, s_p²) − ½ s_q²/s_p², by Monte Carlo."""
    x = 0.3 + 0.7 * torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.distributions.Normal(-0.5, 1.1)
    values = p.log_prob(x)
    expected = p.log_prob(torch.tensor(0.3)) - 0.5 * 0.7**2 / 1.1**2
    assert abs(float(values.mean() - expected)) < 4 * float(values.std()) / math.sqrt(len(x))


@given(
    mean=st.floats(-1.5, 1.5),
    log_std=st.floats(-8, 2),
    bits=st.integers(1, 8),
    kind=st.sampled_from(["centres", "endpoints"]),
)
def test_masses_of_the_bins_sum_to_one(mean, log_std, bits, kind):
    data, codes = sd.DataInfo(bits=bits), torch.arange(2**bits)
    lower, upper = data.bin_edges(codes, data.points(codes, kind, torch.float64), kind)
    variance = torch.tensor(math.exp(2 * log_std), dtype=torch.float64)
    log_mass = log_bin_mass(lower, upper, torch.tensor(mean, dtype=torch.float64), variance)
    # Neighbours' edges are rounded apart by an ulp of 1, here up to 3000 standard deviations, once a bin.
    rounding = 4 * torch.finfo(torch.float64).eps * (2**bits + 1 / math.exp(log_std))
    assert float(log_mass.exp().sum()) == pytest.approx(1, abs=rounding * 2**bits)


def test_mass_of_a_bin_far_out_in_the_tails(dtype):
    """60 standard deviations out: log[φ(60)/60 (1 − …)], the same on both sides, and finite in float32."""
    lower, upper = torch.tensor([60.0, -61.0], dtype=dtype), torch.tensor([61.0, -60.0], dtype=dtype)
    log_mass = log_bin_mass(lower, upper, torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    expected = -1800 - math.log(60 * math.sqrt(2 * math.pi)) - 1 / 3600
    torch.testing.assert_close(log_mass.double(), torch.full((2,), expected).double(), rtol=1e-6, atol=0)


def test_points_of_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    data = sd.DataInfo(low=-1, high=1, bits=8)
    centres = data.points(codes, "centres", torch.float64)
    assert torch.equal(data.quantize(centres), codes)
    torch.testing.assert_close(centres, data.dequantize(codes, torch.full((256,), 0.5, dtype=torch.float64)))
    torch.testing.assert_close(data.points(codes, "endpoints", torch.float64), 2 * codes.double() / 255 - 1)
    lower, upper = data.bin_edges(codes, centres, "centres")
    torch.testing.assert_close(upper[:-1], lower[1:])
    torch.testing.assert_close(lower[1:], -1 + codes[1:].double() / 128)
    assert (float(lower[0]), float(upper[-1])) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match=r"kind = 'middle': must be one of centres, endpoints"):
        data.points(codes, "middle")


@pytest.mark.parametrize("grid", ["log_snr", "t"])
def test_sampled_terms_are_unbiased(rotated, grid):
    distribution = rotated(16)
    model, x = distribution.under(sd.VPSDE()), distribution.sample(200, seed=1)
    options = {"steps": 100, "grid": grid, "t_min": 0.01, "variance": "noising"}
    every = sd.variational_bound(model, x, repeats=4, **options)
    some = sd.variational_bound(model, x, terms=12, repeats=16, seed=1, **options)
    assert (every.nfe, some.nfe) == (4 * 100, 16 * 13)
    error = math.hypot(every.std_error, some.std_error)
    assert abs(every.mean - some.mean) < 4 * error
    assert error < 0.01


def test_standard_error_is_that_of_a_repeat(rotated):
    distribution = rotated(16)
    model, x = distribution.under(sd.VPSDE()), distribution.sample(200, seed=1)
    first, second = (sd.variational_bound(model, x, terms=8, repeats=16, seed=seed) for seed in (0, 1))
    difference = first.nats - second.nats
    squares = difference.square() / (first.nats_std_error.square() + second.nats_std_error.square())
    # Student's t with 30 degrees of freedom squared: mean 30/28, variance 2.8, less where the two spreads differ.
    assert abs(float(squares.mean()) - 30 / 28) < 4 * math.sqrt(3.4 / 200) + 0.07
    assert first.std_error == pytest.approx(float(first.per_example_std_error.square().sum().sqrt()) / 200)
    assert first.sampling_error == pytest.approx(float(first.per_example.std()) / math.sqrt(200))
    single = sd.variational_bound(model, x[:1], terms=8, repeats=1)
    assert math.isnan(single.std_error)
    assert math.isnan(single.sampling_error)


@pytest.mark.parametrize("options", [{"steps": 9}, {"steps": 9, "terms": 4}, {"steps": math.inf, "terms": 4}])
def test_an_example_does_not_depend_on_its_batch_but_on_the_seed(rotated, options):
    distribution = rotated(16)
    model, x = distribution.under(sd.VPSDE()), distribution.sample(7)
    together = sd.variational_bound(model, x, **options)
    apart = sd.variational_bound(model, x, batch_size=2, **options)
    torch.testing.assert_close(apart.nats, together.nats, rtol=1e-10, atol=0)
    torch.testing.assert_close(apart.squared_error, together.squared_error, rtol=1e-9, atol=0)
    other = sd.variational_bound(model, x, seed=1, **options)
    assert bool((other.nats != together.nats).all())
    assert together.times.shape == (together.transitions.shape[1] + 1,) == together.squared_error.shape[1:]
    assert bool((together.times.diff() > 0).all())


def test_an_example_draws_from_the_stream_of_its_index(rotated):
    distribution = rotated(16)
    model, x = distribution.under(sd.VPSDE()), distribution.sample(5)
    whole = sd.variational_bound(model, x, steps=9)
    some = [4, 1, 3]
    part = sd.variational_bound(model, x[some], steps=9, indices=some, batch_size=2)
    torch.testing.assert_close(part.nats, whole.nats[some], rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="indices has length 3: must be 5, one for each example"):
        sd.variational_bound(model, x, steps=9, indices=some)


def test_variance_given_as_numbers(ring):
    model, x = ring.under(sd.VPSDE()), ring.sample(4)
    options = {"steps": 6, "grid": "t", "t_min": sd.VPSDE().t_max / 6}
    noising = sd.VPSDE().discretize(6).reverse_variance("noising")
    by_name = sd.variational_bound(model, x, variance="noising", **options)
    given = sd.variational_bound(model, x, variance=noising, **options)
    torch.testing.assert_close(given.nats, by_name.nats)
    decoder = sd.variational_bound(model, x, variance="noising", decoder_variance=float(noising[0]), **options)
    torch.testing.assert_close(decoder.nats, by_name.nats)
    wider = sd.variational_bound(model, x, decoder_variance=4 * float(noising[0]), **options)
    narrow = sd.variational_bound(model, x, **options)
    error = narrow.squared_error[:, 0] / noising[0]
    # ½ Σ err²/σ̃² + D log σ̃ at σ̃² four times as large.
    torch.testing.assert_close(narrow.decoder - wider.decoder, 0.75 * error - 2 * math.log(2))


def test_learned_variance_is_interpolated():
    """A network that always says fraction 0.3 gives the bound of that interpolation."""

    def network(x, t):
        return torch.cat([0.5 * x, torch.full_like(x, 2 * 0.3 - 1)], 1)

    def fixed(x, t):
        return 0.5 * x

    sde, x = sd.VPSDE(), torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learned = sd.DiffusionModel(network, sde, "v", data_shape=(2, 4), learned_variance=True)
    plain = sd.DiffusionModel(fixed, sde, "v", data_shape=(2, 4))
    variance = sde.discretize(8).reverse_variance(0.3, decoder=True)
    options = {"steps": 8, "grid": "t", "t_min": sde.t_max / 8}
    by_network = sd.variational_bound(learned, x, variance="learned", **options)
    torch.testing.assert_close(by_network.nats, sd.variational_bound(plain, x, variance=variance, **options).nats)
    torch.testing.assert_close(
        sd.variational_bound(learned, x, **options).nats, sd.variational_bound(plain, x, **options).nats
    )
    with pytest.raises(ValueError, match=r"variance = 'learned': the model must have learned_variance=True"):
        sd.variational_bound(plain, x, variance="learned", **options)


def test_dropout_is_off_and_conditioning_is_cut_into_batches():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)
            self.scale = torch.nn.Parameter(torch.tensor([0.1, 0.9, 2.0]))

        def forward(self, x, t, label):
            return self.dropout(self.scale[label][:, None] * x)

    model = sd.DiffusionModel(Network(), sd.VPSDE(), "eps", data_shape=(4,)).train()
    x = torch.ones(3, 4)
    options = {"steps": 5, "cond": {"label": torch.tensor([0, 1, 2])}}
    whole = sd.variational_bound(model, x, **options)
    torch.testing.assert_close(sd.variational_bound(model, x, batch_size=1, **options).nats, whole.nats)
    torch.testing.assert_close(sd.variational_bound(model, x, **options).nats, whole.nats, rtol=0, atol=0)
    assert model.training
    assert whole.nats.unique().numel() == 3
    assert not whole.nats.requires_grad


def test_rate_distortion():
    """The rate starts at L_T and ends at all but L_0; a model that always says 0 shows it at every rate."""
    sde = sd.VPSDE()
    model = sd.DiffusionModel(lambda x, t: torch.zeros_like(x), sde, "x0", data_shape=(1, 2, 2), data=sd.DataInfo())
    codes = torch.randint(0, 256, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bound = sd.variational_bound(model, codes, steps=12)
    curve = sd.rate_distortion(bound)
    assert curve.times.shape == curve.rate.shape == curve.distortion.shape == (12,)
    assert float(curve.times[0]) == sde.t_max
    assert bool((curve.rate.diff() > 0).all())
    assert float(curve.rate[0]) == pytest.approx(float(bound.prior.mean()) / (4 * math.log(2)))
    last = float(curve.rate[-1] + bound.decoder.mean() / (4 * math.log(2)))
    assert last == pytest.approx(bound.mean)
    x0 = 255 * model.data.points(codes).double() / 2
    torch.testing.assert_close(curve.distortion, torch.full_like(curve.distortion, float(x0.square().mean().sqrt())))


def test_distortion_falls_as_the_rate_rises(ring):
    curve = sd.rate_distortion(sd.variational_bound(ring.under(sd.VPSDE()), ring.sample(500), steps=30))
    # Means of 2000 squares: noise of 0.016 at most, and far less on a ring, whose points have one norm.
    assert bool((curve.distortion.diff() < 0.01).all())
    # From the spread of the data themselves, 1, to the noise at t_min, a thousandth.
    assert float(curve.distortion[0]) == pytest.approx(1, abs=0.05)
    assert float(curve.distortion[-1]) < 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps = 1: must be a whole number of at least 2, or inf"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"steps": math.nan}, "steps = nan"),
        ({"steps": math.inf}, "steps = inf: give terms"),
        ({"grid": "cosine"}, "grid = 'cosine': must be one of log_snr, exponential, angle, t"),
        ({"grid": [1.0, 0.5], "steps": 3}, "grid is given as times"),
        ({"grid": [0.5, 1.0]}, "needs at least two strictly decreasing times"),
        ({"grid": [1.0, 0.0]}, "no noise there"),
        ({"t_min": 0.0}, "t_min = 0.0: there must be noise"),
        ({"t_min": 1.0}, "t_min = 1.0: .* below t_max"),
        ({"t_min": 2.0}, r"t_min = 2.0 is outside the range \[0, 1.0\]"),
        ({"variance": 1.5}, "1.5"),
        ({"variance": "largest"}, "'largest'"),
        ({"variance": "learned"}, "variance = 'learned'"),
        ({"variance": torch.ones(3)}, r"must be \(10,\)"),
        ({"decoder_variance": 0.0}, "decoder_variance = 0.0: must be positive"),
        ({"codes": "edges"}, "codes = 'edges': must be one of centres, endpoints, dequantized"),
        ({"terms": 0}, "terms = 0: must be at least 1"),
        ({"repeats": 0}, "repeats = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"cond": {"label": torch.zeros(3)}}, "cond.*length 3"),
    ],
)
def test_wrong_arguments_are_named(ring, arguments, message):
    arguments = arguments if "grid" in arguments or "steps" in arguments else {"steps": 10, **arguments}
    with pytest.raises(ValueError, match=message):
        sd.variational_bound(ring.under(sd.VPSDE()), ring.sample(2), **arguments)


def test_wrong_data_are_named(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(4)
    with pytest.raises(ValueError, match=r"images has shape \(4, 3\)"):
        sd.variational_bound(model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"images has dtype torch\.uint8: need a floating dtype"):
        sd.variational_bound(model, torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images holds 0 examples"):
        sd.variational_bound(model, x[:0])
    x[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"images\[2\] holds NaN"):
        sd.variational_bound(model, x)
    coded = one_point(0.5, sd.VPSDE(), bits=8)
    with pytest.raises(ValueError, match=r"images has dtype torch\.float32: need integer codes"):
        sd.variational_bound(coded, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"values in \[300, 300\]: need 0 to 255"):
        sd.variational_bound(coded, torch.full((4, 3), 300))
    with pytest.raises(ValueError, match=r"images has shape \(4, 2\): need \(B, 3\)"):
        sd.variational_bound(coded, torch.zeros(4, 2, dtype=torch.uint8))
