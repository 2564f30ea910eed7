"""Likelihoods against closed forms, and what is said of their errors against repeats."""

import dataclasses
import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion import decoupled
from sde_diffusion.divergence import PROBES
from sde_diffusion.networks import UNet


def build(dtype=torch.float64, **options):
    """A small random U-Net of 8-bit images, with attention where nothing else is said."""
    torch.manual_seed(0)
    options = {"attention_resolutions": (2,), "blocks_per_level": 1} | options
    network = UNet((1, 4, 4), base_channels=4, channel_multipliers=(1, 2), **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sd.DiffusionModel(network, sd.VPSDE(), data_shape=(1, 4, 4), data=sd.DataInfo(bits=8)).to(dtype)


@pytest.fixture(scope="module")
def image_model():
    """In float64, so that rounding is not what decides."""
    return build()


def codes(count, seed=0):
    return torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def images(count, seed=0):
    return 2 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def examples(mixture):
    """Few where a product costs much."""
    return mixture.sample({2: 32, 16: 8, 64: 2}[mixture.data_shape[0]], seed=3)


def test_exact_trace_gives_the_closed_form_of_the_density_at_t_min(mixture, any_sde):
    model, x = mixture.under(any_sde), examples(mixture).float()
    result = sd.log_likelihood(model, x, trace="exact")
    error = (result.log_prob - model.log_prob(x, result.t_min)).abs().mean() / x.shape[1]
    assert float(error) < 1e-3
    assert result.t_min == any_sde.t_min
    assert not bool(result.std_error.any())
    assert bool((result.degrees_of_freedom == math.inf).all())
    lower, upper = result.interval()
    assert torch.equal(lower, result.log_prob)
    assert torch.equal(upper, result.log_prob)


@pytest.mark.parametrize("mixture", [2, 16, pytest.param(64, marks=pytest.mark.slow)], ids="{}d".format, indirect=True)
def test_the_adaptive_method_gives_the_closed_form(mixture, any_sde):
    model, x = mixture.under(any_sde), examples(mixture)[:4]
    result = sd.log_likelihood(model, x, trace="exact", method="adaptive")
    error = (result.log_prob - model.log_prob(x, result.t_min)).abs().mean() / x.shape[1]
    assert float(error) < 1e-3
    assert 0 < int(result.nfe.max()) < 400
    assert bool(result.solver_error.isnan().all())


def test_error_of_the_adaptive_method_falls_with_the_tolerance(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(64, seed=3)
    exact = model.log_prob(x, model.sde.t_min)
    options = {"trace": "exact", "method": "adaptive"}
    errors = [
        float((sd.log_likelihood(model, x, rtol=tol, atol=tol, **options).log_prob - exact).abs().max())
        for tol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5


def test_float32_follows_float64(rotated):
    model, x = rotated(16).under(sd.VPSDE()), rotated(16).sample(8, seed=3).float()
    options = {"trace": "exact", "atol": math.inf}
    single, double = (sd.log_likelihood(model, values, **options) for values in (x, x.double()))
    assert single.log_prob.dtype == torch.float32
    # The state of some 100 evaluations is rounded to 2⁻²⁴, where the score is of size √D/σ for the narrowest σ = 0.05.
    torch.testing.assert_close(
        single.log_prob.double(), double.log_prob, rtol=0, atol=100 * 2**-24 * math.sqrt(16) / 0.05
    )


def test_as_many_probes_as_dimensions_are_the_exact_trace(rotated):
    model, x = rotated(16).under(sd.VPSDE()), rotated(16).sample(3, seed=3)
    exact = sd.log_likelihood(model, x, trace="exact")
    for options in ({"probes": 16}, {"probes": 17, "probe": "gaussian"}):
        result = sd.log_likelihood(model, x, **options)
        assert torch.equal(result.log_prob, exact.log_prob)
        assert not bool(result.std_error.any())
    assert bool((sd.log_likelihood(model, x, probes=15).std_error > 0).all())


# The counts in which a probe costs more than the rest: two, the least, and what leaves blocks to share out.
@pytest.mark.parametrize("probes", [2, 5])
@pytest.mark.parametrize("probe", PROBES)
def test_hutchinson_is_unbiased_and_its_error_is_right(rotated, probe, probes):
    check_probes(rotated(16).under(sd.VPSDE()), 150, probe=probe, probes=probes)


def test_hutchinson_is_unbiased_under_every_sde(rotated, any_sde):
    check_probes(rotated(16).under(any_sde), 40, probes=4)


@pytest.mark.parametrize("probe", PROBES)
def test_frozen_probes_are_unbiased(rotated, probe):
    check_probes(rotated(16).under(sd.VPSDE()), 60, method="adaptive", probe=probe, probes=16, rtol=1e-5, atol=1e-5)


def check_probes(model, count, **options):
    """Estimates less the exact trace's along the same path, against their standard errors."""
    x = model.distribution.sample(count, seed=5)
    if options.get("method") != "adaptive":
        options |= {"steps": 8, "nodes": 3, "atol": math.inf}
    result = sd.log_likelihood(model, x, seed=1, **options)
    exact = sd.log_likelihood(model, x, trace="exact", **{k: v for k, v in options.items() if "probe" not in k})
    deviation = result.log_prob - exact.log_prob
    # The mean over independent examples, against its own standard error; tolerances allow the adaptive 1e-4 a nat.
    error = float(result.std_error.square().sum().sqrt()) / count
    assert abs(float(deviation.mean())) < 4 * error + 1e-3
    # The square of Student's t has mean ν/(ν − 2), and a standard error of its own over the examples.
    squares, degrees = (deviation / result.std_error).square(), result.degrees_of_freedom
    expected = float((degrees / (degrees - 2).clamp(min=1)).mean())
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(count) + 0.1 * expected


def coverage(rotated, repeats, **options):
    """Share of repeats, each with a stream of its own, whose 95% interval has the exact trace's value."""
    model = rotated(16).under(sd.VPSDE())
    x = model.distribution.sample(1, seed=2)
    options |= {"steps": 8, "nodes": 3, "atol": math.inf}
    result = sd.log_likelihood(model, x.expand(repeats, -1), **options)
    exact = sd.log_likelihood(model, x, trace="exact", steps=8, nodes=3, atol=math.inf).log_prob
    lower, upper = result.interval(0.95)
    return float(((lower <= exact) & (exact <= upper)).double().mean())


@pytest.mark.parametrize("options", [{"probes": 2}, {"probes": 6}, {"target_std_error": 0.8}], ids=str)
def test_intervals_cover(rotated, options):
    assert abs(coverage(rotated, 400, **options) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.slow
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("options", [{"probes": 2}, {"probes": 4}, {"probes": 8}, {"target_std_error": 0.8}], ids=str)
def test_intervals_cover_in_a_thousand_repeats(rotated, options, probe):
    share = coverage(rotated, 1000, probe=probe, seed=1, **options)
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_hutchinson_is_exact_for_a_diagonal_jacobian():
    """With z² = 1 a Rademacher probe reads a diagonal Jacobian without error."""
    diagonal = sd.Gaussian(torch.zeros(5).double(), torch.diag(torch.linspace(0.1, 2, 5).double()))
    model, x = diagonal.under(sd.VPSDE()), diagonal.sample(7)
    for options in ({}, {"method": "adaptive", "rtol": 1e-9, "atol": 1e-9}):
        exact = sd.log_likelihood(model, x, trace="exact", **options)
        estimate = sd.log_likelihood(model, x, probes=4, probe="rademacher", **options)
        torch.testing.assert_close(estimate.log_prob, exact.log_prob, rtol=1e-8, atol=1e-8)
        assert float(estimate.std_error.max()) < 1e-8


def test_one_frozen_probe_has_no_standard_error(ring):
    model, x = ring.under(sd.VPSDE()), ring.sample(3)
    result = sd.log_likelihood(model, x, method="adaptive", probes=1)
    assert bool(result.std_error.isnan().all())
    assert bool(result.log_prob.isfinite().all())
    # Blocks of four probes, two of them: one degree.
    several = sd.log_likelihood(model, x, method="adaptive", probes=8)
    assert bool((several.degrees_of_freedom == 1).all())
    assert bool((several.derivative_evaluations == 8 * several.nfe).all())


@pytest.mark.parametrize("target", [0.2, 0.02])
def test_the_target_is_met_by_every_example(image_model, rotated, target):
    for model, x in ((rotated(16).under(sd.VPSDE()), rotated(16).sample(4, seed=3)), (image_model, images(2))):
        result = sd.log_likelihood(model, x, target_std_error=target / 10 if model is image_model else target)
        limit = target / 10 if model is image_model else target
        assert bool((result.std_error <= limit).all())


def test_a_smaller_target_costs_more_and_is_in_the_units_of_the_result(image_model):
    coarse, fine = (sd.bits_per_dim(image_model, codes(2), target_std_error=target) for target in (1e-3, 1e-4))
    for result, target in ((coarse, 1e-3), (fine, 1e-4)):
        assert bool((result.per_example_std_error <= target).all())
    # Not by chance: of the coarse ones none meets the fine target.
    assert bool((coarse.per_example_std_error > 1e-4).all())
    assert bool((fine.derivative_evaluations > coarse.derivative_evaluations).all())
    assert bool((fine.nfe >= coarse.nfe).all())


def test_evaluations_are_counted_and_within_the_budget(rotated):
    model = rotated(16).under(sd.VPSDE())
    predict, rows = model.predict, []
    model.predict = lambda x, t: rows.append(len(x)) or predict(x, t)
    x = model.distribution.sample(3)
    options = {"steps": 5, "nodes": 4, "atol": math.inf}
    exact = sd.log_likelihood(model, x, trace="exact", **options)
    assert bool((exact.nfe == 1 + 6 * 5 + 4 * 5).all())
    assert bool((exact.derivative_evaluations == 16 * 4 * 5).all())
    assert sum(rows) == int(exact.nfe.sum())
    rows.clear()
    result = sd.log_likelihood(model, x, probes=8, **options)
    assert sum(rows) == int(result.nfe.sum())
    assert bool((result.derivative_evaluations <= 8 * 4 * 5).all())
    assert bool((result.derivative_evaluations > 0.5 * 8 * 4 * 5).all())


def test_steps_are_halved_where_the_solver_s_error_is_too_large(rotated, monkeypatch):
    model, x = rotated(16).under(sd.VPSDE()), rotated(16).sample(6, seed=3)
    few = sd.log_likelihood(model, x, trace="exact", steps=6, atol=math.inf)
    limit = float(few.solver_error.median()) / 16
    result = sd.log_likelihood(model, x, trace="exact", steps=6, atol=limit)
    assert bool((result.solver_error <= 16 * limit).all())
    again = few.solver_error > 16 * limit
    assert 0 < int(again.sum()) < 6
    assert bool((result.nfe[again] > few.nfe[again]).all())
    for before, after in ((few.nfe, result.nfe), (few.log_prob, result.log_prob), (few.latent, result.latent)):
        assert torch.equal(after[~again], before[~again])
    monkeypatch.setattr(decoupled, "_MOST_STEPS", 12)
    with pytest.raises(sd.SolverError, match=r"example \d of its batch: in 12 steps the solver's error is .* nats"):
        sd.log_likelihood(model, x, trace="exact", steps=6, atol=1e-12)


def test_latent_has_the_prior_density(ring):
    model, x = ring.under(sd.VPSDE()), ring.sample(16, seed=2)
    for options in ({"steps": 80}, {"method": "adaptive", "rtol": 1e-8, "atol": 1e-8}):
        result = sd.log_likelihood(model, x, trace="exact", **options)
        back = sd.sample(model, 16, x_start=result.latent, rtol=1e-8, atol=1e-8, dtype=torch.float64)
        torch.testing.assert_close(back.samples, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 2), (1, 2, 2), (1, 2, 1, 2)], ids=str)
def test_data_of_any_rank(shape):
    """(B, C, H, W) is (B, D) reshaped."""
    size = math.prod(shape)
    means = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariances = 0.2 * torch.eye(size, dtype=torch.float64).expand(3, size, size)
    model = sd.GaussianMixture(means, covariances).under(sd.VPSDE())
    flat = sd.GaussianMixture(means.flatten(1), covariances).under(sd.VPSDE())
    x = model.distribution.sample(3)
    result = sd.log_likelihood(model, x, trace="exact")
    assert result.latent.shape == x.shape
    expected = sd.log_likelihood(flat, x.flatten(1), trace="exact")
    torch.testing.assert_close(result.log_prob, expected.log_prob, rtol=1e-10, atol=1e-10)
    estimate = sd.log_likelihood(model, x, probes=2)
    deviation = (estimate.log_prob - result.log_prob).abs()
    # Of one degree at the least: t is below 130 but for one in 200.
    assert bool((deviation <= 130 * estimate.std_error + 1e-9).all())


EVERY_METHOD = {
    "hutchinson": {},
    "exact": {"trace": "exact"},
    "target": {"target_std_error": 1e-3},
    "rows": {"rows": 3, "probes": 4},
}


@pytest.mark.parametrize("options", EVERY_METHOD.values(), ids=EVERY_METHOD)
def test_an_example_does_not_depend_on_its_batch(image_model, options):
    data, options = codes(7), options | {"steps": 3, "nodes": 3, "atol": 1.0}
    together = sd.bits_per_dim(image_model, data, **options)
    alone = [5]
    for some, batch_size in ((range(7), 2), (alone, None), ([6, 2, 0, 3], 3)):
        rows = list(some)
        part = sd.bits_per_dim(image_model, data[rows], indices=rows, batch_size=batch_size, **options)
        for name in ("per_example", "per_example_std_error", "per_example_solver_error"):
            torch.testing.assert_close(getattr(part, name), getattr(together, name)[rows], rtol=1e-5, atol=1e-12)
        assert torch.equal(part.nfe, together.nfe[rows])
        assert torch.equal(part.derivative_evaluations, together.derivative_evaluations[rows])
    other = sd.bits_per_dim(image_model, data, seed=1, **options)
    assert bool((other.per_example != together.per_example).all())


def test_rows_do_not_matter(image_model):
    few, many = (
        sd.log_likelihood(image_model, images(3), steps=3, atol=1.0, rows=rows, allow_discrete=True)
        for rows in (3, 100)
    )
    torch.testing.assert_close(few.log_prob, many.log_prob, rtol=1e-9, atol=0)


def test_only_steps_are_shared_by_an_adaptive_batch(image_model):
    for trace in ("hutchinson", "exact"):
        options = {"method": "adaptive", "trace": trace, "rtol": 1e-4, "atol": 1e-4}
        together = sd.bits_per_dim(image_model, codes(3), **options)
        apart = sd.bits_per_dim(image_model, codes(3), batch_size=2, **options)
        # The tolerance is of nats a dimension.
        torch.testing.assert_close(apart.per_example, together.per_example, rtol=0, atol=1e-3)


def test_exact_trace_of_a_network_is_the_mean_of_hutchinson(image_model):
    # The same seed dequantises alike; nine degrees or so, of which six standard errors are one in 5,000.
    exact = sd.bits_per_dim(image_model, codes(2), trace="exact")
    estimate = sd.bits_per_dim(image_model, codes(2), probes=12)
    assert bool(((estimate.per_example - exact.per_example).abs() < 6 * estimate.per_example_std_error).all())


def test_bits_per_dim_of_a_known_density():
    """8-bit data under a Gaussian: the value is the closed form's at the same dequantised points."""
    mean, covariance = torch.zeros(2, 2), 0.1 * torch.eye(4) + 0.05
    model = sd.Gaussian(mean[None], covariance).under(sd.VPSDE())
    model.data = sd.DataInfo(low=-1.0, high=1.0, bits=8)
    known = model.data.quantize(model.sample(400).clamp(-1, 0.999))
    result = sd.bits_per_dim(model, known, trace="exact", t_min=1e-4)
    # Averaged over the bin the log-density is that of the code's centre, to second order in the bin's width.
    centre = (known.float() + 0.5) / 128 - 1
    expected = -(model.log_prob(centre, 1e-4) / 4 + math.log(2 / 256)) / math.log(2)
    assert abs(result.mean - float(expected.mean())) < 4 * float((result.per_example - expected).std()) / 20 + 1e-3
    assert result.sampling_error == pytest.approx(float(result.per_example.double().std()) / 20)
    assert result.std_error == 0


def narrow(count):
    """A Gaussian of 2.6 bins, codes of it, and their probability's −log₂ a dimension, at t_min."""
    mean, std = torch.tensor([0.1, -0.2], dtype=torch.float64), 0.02
    model = sd.Gaussian(mean, std**2 * torch.eye(2, dtype=torch.float64)).under(sd.VPSDE())
    model.data = sd.DataInfo(bits=8)
    known = model.data.quantize(model.distribution.sample(count, seed=1))
    t = torch.tensor(model.sde.t_min, dtype=torch.float64)
    noised = torch.sqrt((model.sde.alpha(t) * std).square() + model.sde.sigma(t).square())
    lower = (known.double() / 128 - 1 - model.sde.alpha(t) * mean) / noised
    mass = torch.special.ndtr(lower + 1 / (128 * noised)) - torch.special.ndtr(lower)
    return model, known, -mass.log2().mean(1)


def test_the_importance_weighted_bound_converges_to_the_probability():
    model, known, exact = narrow(40)
    options = {"trace": "exact", "steps": 12}
    few, many = (sd.bits_per_dim(model, known, draws=draws, importance_weighted=True, **options) for draws in (1, 8))
    mean = sd.bits_per_dim(model, known, draws=8, **options)
    # By Jensen's inequality, for every example: the draws are the same.
    assert bool((many.per_example < mean.per_example).all())
    # The relative variance of one draw's density, (w z/s)²/12 a dimension, costs half of itself, and 1/K of that.
    deviation = many.per_example.double() - exact
    assert abs(float(deviation.mean())) < 3 * float(deviation.std()) / math.sqrt(len(known)) + 2e-3
    # Fewer draws are a worse bound in expectation.
    paired = (few.per_example - many.per_example).double()
    assert float(paired.mean()) > -3 * float(paired.std()) / math.sqrt(len(known))
    assert float(paired.std()) > 0


def test_draws_are_averaged(image_model):
    data, options = codes(2), {"steps": 3, "nodes": 3, "atol": 1.0}
    one, four = (sd.bits_per_dim(image_model, data, draws=draws, **options) for draws in (1, 4))
    assert bool(one.dequantization_error.isnan().all())
    assert bool((four.dequantization_error > 0).all())
    assert bool((four.derivative_evaluations > 3 * one.derivative_evaluations).all())
    assert bool((four.degrees_of_freedom > one.degrees_of_freedom).all())
    ratio = four.per_example_std_error / one.per_example_std_error
    assert bool((ratio > 0.25).all() and (ratio < 1).all())
    # With one draw the result is the first of the four.
    exact = [sd.bits_per_dim(image_model, data, draws=k, trace="exact", **options) for k in (1, 2)]
    other = 2 * exact[1].per_example - exact[0].per_example
    spread = (other - exact[0].per_example).abs() / 2
    torch.testing.assert_close(exact[1].dequantization_error, spread, rtol=1e-6, atol=1e-12)
    assert not bool(exact[1].per_example_std_error.any())
    assert bool((exact[1].degrees_of_freedom == math.inf).all())


def test_standard_errors_of_the_mean_are_kept_apart(image_model):
    result = sd.bits_per_dim(image_model, codes(4), probes=4, steps=3, atol=1.0)
    assert result.std_error == pytest.approx(float(result.per_example_std_error.square().sum().sqrt()) / 4)
    assert result.sampling_error == pytest.approx(float(result.per_example.std()) / 2)
    assert result.mean == pytest.approx(float(result.per_example.mean()))
    assert result.solver_error == pytest.approx(float(result.per_example_solver_error.mean()))
    assert math.isnan(sd.bits_per_dim(image_model, codes(1), steps=1, nodes=1, atol=math.inf).sampling_error)


def test_interval_is_student_s():
    """Of 0.975 and one degree the quantile is tan(0.475 π), of infinitely many 1.96."""
    degrees = torch.tensor([1.0, math.inf, math.inf], dtype=torch.float64)
    std_error = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    mean, count = torch.tensor([5.0, -1.0, 3.0], dtype=torch.float64), torch.zeros(3)
    result = sd.likelihood.LogLikelihood(mean, std_error, degrees, count, count, count, count, 0.0, 0.0)
    lower, upper = result.interval()
    half = torch.tensor([2 * math.tan(0.475 * math.pi), 1.959963985, 0.0], dtype=torch.float64)
    torch.testing.assert_close(upper - mean, half, rtol=1e-8, atol=0)
    torch.testing.assert_close(mean - lower, half, rtol=1e-8, atol=0)
    for level in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match=f"level = {level}: must be between 0 and 1"):
            result.interval(level)


def test_bits_per_dim_has_the_interval_of_its_examples(image_model):
    result = sd.bits_per_dim(image_model, codes(2), steps=3, atol=1.0)
    lower, upper = result.interval(0.5)
    assert bool((lower < result.per_example).all() and (result.per_example < upper).all())
    wider = result.interval(0.9)
    assert bool((wider[0] < lower).all() and (wider[1] > upper).all())


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_a_network_in_lower_precision_follows(trace):
    """Attention and normalisation in float64, float32 and bfloat16, with float32 data; probes depend on the dtype."""
    options = {"trace": trace, "steps": 8, "nodes": 3, "atol": math.inf}
    double = sd.log_likelihood(build(), images(2), **options)
    single = sd.log_likelihood(build(torch.float32), images(2).float(), **options)
    half = sd.log_likelihood(build(torch.bfloat16), images(2).float(), **options)
    probes = 6 * float(torch.stack([double.std_error, half.std_error.double()]).max()) * math.sqrt(2)
    # Of a random network whose outputs are of size 1: 2⁻²⁴ and 2⁻⁸ of each of 16 dimensions.
    torch.testing.assert_close(single.log_prob.double(), double.log_prob, rtol=0, atol=16 * 2**-16 + probes)
    torch.testing.assert_close(half.log_prob.double(), double.log_prob, rtol=0, atol=16 * 2**-8 + probes)
    assert half.log_prob.dtype == torch.float32


def test_dropout_is_off_and_the_mode_restored():
    model = build(dropout=0.5, attention_resolutions=()).train()
    first, second = (sd.log_likelihood(model, images(2), steps=3, atol=1.0) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob)
    assert model.training


def test_conditioning_reaches_the_network_in_batches():
    model = build(attention_resolutions=(), classes=3)
    x, label = images(1).expand(3, -1, -1, -1), torch.tensor([0, 1, 2])
    for options, atol in (
        ({"steps": 4, "atol": 1.0}, 1e-9),
        # So that they are solved again, in part.
        ({"steps": 4, "atol": 1e-4}, 1e-9),
        ({"method": "adaptive", "rtol": 1e-5, "atol": 1e-5}, 1e-2),
    ):
        options |= {"trace": "exact"}
        whole = sd.log_likelihood(model, x, cond={"label": label}, **options)
        parts = sd.log_likelihood(model, x, cond={"label": label}, batch_size=2, **options)
        torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=0, atol=atol)
        assert float(whole.log_prob.std()) > 2 * atol


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trace": "exakt"}, "trace = 'exakt'.*hutchinson, exact"),
        ({"probe": "uniform"}, "probe = 'uniform'.*orthogonal, rademacher, gaussian"),
        ({"method": "decoupled!"}, "method = .*decoupled, adaptive"),
        ({"probes": 1}, "probes = 1: must be at least 2"),
        ({"probes": 0, "trace": "exact"}, "probes = 0: must be at least 1"),
        ({"probes": 0, "method": "adaptive"}, "probes = 0: must be at least 1"),
        ({"t_min": 2.0}, r"t_min = 2.0 is outside the range \[0, 1.0\]"),
        ({"t_min": 1.0}, "t_min = 1.0: must be below t_max"),
        ({"t_min": 0.0}, "t_min = 0.0: the noise is 0 there"),
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"nodes": 0}, "nodes = 0: must be at least 1"),
        ({"rows": 0}, "rows = 0: must be at least 1"),
        ({"solver": "dopri6", "method": "adaptive"}, "solver = 'dopri6'.*dopri5"),
        ({"solver": "rk4", "method": "adaptive"}, "solver = 'rk4': must be one of dopri5"),
        ({"solver": "dopri5"}, "solver = 'dopri5': method 'decoupled' takes none"),
        ({"rtol": 1e-3}, "rtol = 0.001: method 'decoupled' takes none"),
        ({"method": "adaptive", "steps": 3}, "steps = 3: method 'adaptive' takes none"),
        ({"method": "adaptive", "nodes": 3}, "nodes = 3: method 'adaptive' takes none"),
        ({"method": "adaptive", "rows": 3}, "rows = 3: method 'adaptive' takes none"),
        ({"method": "adaptive", "compile": True}, "compile = True: method 'adaptive' takes none"),
        ({"method": "adaptive", "target_std_error": 0.1}, "target_std_error = 0.1: method 'adaptive' takes none"),
        ({"rtol": 0.0, "method": "adaptive"}, "rtol = 0.0: must be positive"),
        ({"atol": 0.0, "method": "adaptive"}, "atol = 0.0: must be positive"),
        ({"atol": -1.0}, "atol = -1.0: must be positive"),
        ({"atol": math.nan}, "atol = nan: must be positive"),
        ({"target_std_error": 0.0}, "target_std_error = 0.0: must be positive and finite"),
        ({"target_std_error": -1.0}, "target_std_error = -1.0: must be positive and finite"),
        ({"target_std_error": math.inf}, "target_std_error = inf: must be positive and finite"),
        ({"target_std_error": 0.1, "trace": "exact"}, "target_std_error = 0.1.*the trace estimated"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"indices": [1]}, "indices has length 1: must be 2, one for each example"),
        ({"seed": -1}, "seed = -1"),
        ({"cond": {"label": torch.zeros(3)}}, "cond.*length 3"),
    ],
)
def test_wrong_arguments_are_named(ring, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.log_likelihood(ring.under(sd.VPSDE()), ring.sample(2), **arguments)


def test_wrong_data_are_named(ring, image_model):
    model = ring.under(sd.VPSDE())
    x = ring.sample(4)
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\)"):
        sd.log_likelihood(model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64: need a floating dtype"):
        sd.log_likelihood(model, torch.zeros(4, 2, dtype=torch.int64))
    x[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"x\[2\] holds NaN"):
        sd.log_likelihood(model, x)
    with pytest.raises(ValueError, match="0 examples"):
        sd.log_likelihood(model, x[:0])
    with pytest.raises(ValueError, match="bits is None"):
        sd.bits_per_dim(model, torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images has dtype torch\.float32: need integer codes"):
        sd.bits_per_dim(image_model, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"values in \[300, 300\]: need 0 to 255"):
        sd.bits_per_dim(image_model, torch.full((1, 1, 4, 4), 300))
    with pytest.raises(ValueError, match=r"images has shape \(1, 4, 4\): need \(B, 1, 4, 4\)"):
        sd.bits_per_dim(image_model, codes(1)[0])


def test_wrong_draws_are_named(image_model):
    with pytest.raises(ValueError, match="draws = 0: must be at least 1"):
        sd.bits_per_dim(image_model, codes(1), draws=0)
    with pytest.raises(ValueError, match="importance_weighted = True: needs trace = 'exact', got 'hutchinson'"):
        sd.bits_per_dim(image_model, codes(1), draws=2, importance_weighted=True)


@pytest.mark.parametrize("kind", ["centres", "endpoints"])
def test_data_on_the_lattice_of_codes_are_refused_by_name(image_model, kind):
    x = images(3)
    x[1] = image_model.data.points(codes(1)[0], kind, torch.float64)
    with pytest.raises(ValueError, match=r"x\[1\] holds only values that codes of 8 bits have.*allow_discrete=True"):
        sd.log_likelihood(image_model, x)
    options = {"steps": 3, "nodes": 2, "atol": math.inf}
    allowed = sd.log_likelihood(image_model, x, allow_discrete=True, **options)
    assert bool(allowed.log_prob.isfinite().all())
    continuous = sd.log_likelihood(image_model, x[:1], **options)
    torch.testing.assert_close(continuous.log_prob, allowed.log_prob[:1], rtol=1e-10, atol=0)


def test_results_are_of_one_length(image_model):
    result = sd.log_likelihood(image_model, images(3), steps=2, nodes=2, atol=math.inf)
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    assert fields.pop("latent").shape == (3, 1, 4, 4)
    assert fields.pop("t_min") == image_model.sde.t_min
    assert fields.pop("seconds") > 0
    assert all(values.shape == (3,) for values in fields.values())
    assert result.nfe.dtype == result.derivative_evaluations.dtype == torch.int64
