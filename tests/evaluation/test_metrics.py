"""Distances between distributions, against closed forms."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion.evaluation import (
    Moments,
    energy_distance,
    frechet_distance,
    gaussian_frechet,
    kernel_distance,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(dimension, seed, rank=None):
    """A mean, and a covariance of the given rank."""
    factor = normal(dimension, rank or dimension, seed=seed)
    return normal(dimension, seed=seed + 1), factor @ factor.mT


def known(mean, covariance, count=10**9):
    """Moments as of very many points."""
    moments = Moments(len(mean))
    moments.count, moments.mean, moments.scatter = count, mean, covariance * (count - 1)
    return moments


def test_commuting_covariances_in_closed_form():
    # d² = |μ₁ − μ₂|² + Σ (√λ₁ − √λ₂)², here 0.25 + 9 + (1 − 3)² + (2 − 0)².
    mean1, mean2 = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 4.0])
    distance = gaussian_frechet(
        mean1, torch.diag(torch.tensor([1.0, 4.0])), mean2, torch.diag(torch.tensor([9.0, 0.0]))
    )
    assert distance.dtype == torch.float64
    assert float(distance) == pytest.approx(0.25 + 9 + 4 + 4, rel=1e-14)


@pytest.mark.parametrize("dimension", [1, 3, 20])
def test_equals_the_formula_with_a_matrix_square_root(dimension):
    (mean1, covariance1), (mean2, covariance2) = gaussian(dimension, 0), gaussian(dimension, 10)
    product = scipy.linalg.sqrtm((covariance1 @ covariance2).numpy()).real
    expected = float((mean1 - mean2).square().sum() + (covariance1 + covariance2).trace()) - 2 * product.trace()
    # The root loses half the digits of the smallest eigenvalues, in scipy's formula.
    assert float(gaussian_frechet(mean1, covariance1, mean2, covariance2)) == pytest.approx(expected, rel=1e-7)


def test_rank_one_covariances_in_closed_form():
    # The one singular value that is not 0 is |aᵀb|: d² = |a|² + |b|² − 2 |aᵀb|.
    a, b, zero = normal(30, seed=1), normal(30, seed=2), torch.zeros(30, dtype=torch.float64)
    distance = gaussian_frechet(zero, torch.outer(a, a), zero, torch.outer(b, b))
    # Null eigenvalues come out as eps |a|², their roots as √eps |a|; 30 of them meet |b|.
    assert float(distance) == pytest.approx(float(a @ a + b @ b - 2 * (a @ b).abs()), abs=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_zero_for_equal_gaussians_singular_or_not(rank):
    mean, covariance = gaussian(20, seed=3, rank=rank)
    # Rounding, of the sum of 20 eigenvalues twice over.
    assert 0 <= float(gaussian_frechet(mean, covariance, mean, covariance)) < 1e-13 * float(covariance.trace())


@given(dimension=st.integers(1, 8), rank=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_unchanged_by_rotation_shift_and_exchange(dimension, rank, seed):
    mean1, covariance1 = gaussian(dimension, seed, min(rank, dimension))
    mean2, covariance2 = gaussian(dimension, seed + 10)
    rotation = torch.linalg.qr(normal(dimension, dimension, seed=seed + 20)).Q
    shift = normal(dimension, seed=seed + 30)
    first = (rotation @ mean1 + shift, rotation @ covariance1 @ rotation.mT)
    second = (rotation @ mean2 + shift, rotation @ covariance2 @ rotation.mT)
    plain = float(gaussian_frechet(mean1, covariance1, mean2, covariance2))
    scale = float(covariance1.trace() + covariance2.trace())
    # A null eigenvalue is known to eps, its root to √eps = 1.5e-8 of the scale.
    assert float(gaussian_frechet(*first, *second)) == pytest.approx(plain, abs=1e-6 * scale)
    assert float(gaussian_frechet(*second, *first)) == pytest.approx(plain, abs=1e-6 * scale)
    assert plain >= float((mean1 - mean2).square().sum()) * (1 - 1e-12)


def test_identical_sets_are_at_distance_zero():
    x = normal(50, 6)
    result = frechet_distance(x, x, bootstrap=20)
    assert 0 <= result.distance < 1e-12
    assert (result.samples, result.reference, result.features) == (50, 50, "the vectors as given")


def test_is_the_distance_of_the_fitted_gaussians():
    x, y = normal(50, 4), 0.5 + 2 * normal(70, 4, seed=1)
    expected = gaussian_frechet(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    for reference in (y, Moments.of(y), Moments(4).update(y[:30]).update(y[30:])):
        assert frechet_distance(x, reference, bootstrap=20).distance == pytest.approx(float(expected), rel=1e-12)


def test_repeats_from_its_seed():
    x, y = normal(50, 4), normal(70, 4, seed=1)
    first, same, other = (frechet_distance(x, y, bootstrap=20, seed=seed) for seed in (3, 3, 4))
    assert first == same
    assert first.distance == other.distance
    assert first.interval != other.interval


@pytest.mark.parametrize(("dimension", "count", "shift", "std"), [(4, 200, 0.5, 1.0), (12, 200, 0.3, 1.2)])
def test_the_interval_covers_and_the_bias_is_removed(dimension, count, shift, std):
    mean, identity = torch.zeros(dimension, dtype=torch.float64), torch.eye(dimension, dtype=torch.float64)
    truth = float(gaussian_frechet(mean + shift, std**2 * identity, mean, identity))
    repeats = 100
    results = [
        frechet_distance(
            shift + std * normal(count, dimension, seed=seed), known(mean, identity), bootstrap=40, confidence=0.9
        )
        for seed in range(repeats)
    ]
    covered = sum(r.interval[0] <= truth <= r.interval[1] for r in results) / repeats
    # Binomial, four standard deviations.
    assert 0.9 - 4 * (0.09 / repeats) ** 0.5 < covered
    distance, corrected = (torch.tensor([getattr(r, name) for r in results]) for name in ("distance", "corrected"))
    width = torch.tensor([r.interval[1] - r.interval[0] for r in results]).mean()
    # Nor is it needlessly wide: a normal's is 3.29 standard deviations, known from 100 to 7 %, five times.
    assert float(width / distance.std()) == pytest.approx(3.29, rel=0.35)
    error = float(distance.std()) / repeats**0.5
    # The bias, D (D + 5)/(4 n) for unit covariances and a known reference, goes up to terms of higher order in 1/n.
    assert float(distance.mean()) - truth > 3 * error
    assert abs(float(corrected.mean()) - truth) < 4 * error + 0.1 * (float(distance.mean()) - truth)


def test_names_the_feature_space():
    def halves(images):
        return images.flatten(1)[:, :3] / 2

    x, y = normal(20, 1, 2, 2), normal(30, 1, 2, 2, seed=1)
    result = frechet_distance(x, y, halves, bootstrap=20)
    assert result.features == kernel_distance(x, y, halves, blocks=2).features == "halves"
    vectors = frechet_distance(halves(x), halves(y), bootstrap=20)
    assert (result.distance, result.interval) == (vectors.distance, vectors.interval)
    assert "Fréchet distance in the feature space of halves: " in str(result)
    assert "from 20 samples and 30 of the reference" in str(result)
    assert "95 % interval [" in str(result)


@pytest.mark.parametrize(
    ("samples", "reference", "options", "message"),
    [
        (normal(4, 4), normal(9, 4), {}, "samples must be at least 5 for 4 features, got 4"),
        (normal(9, 4), normal(4, 4), {}, "reference must be at least 5 for 4 features, got 4"),
        (normal(9, 4), normal(9, 3), {}, "samples have 4 features, the reference 3"),
        (normal(9, 4), Moments(3), {}, "samples have 4 features, the reference 3"),
        (normal(9, 4), Moments(4), {}, "reference must be at least 5 for 4 features, got 0"),
        (normal(9, 4), normal(9, 4).log(), {}, r"reference\[\d\] holds NaN"),
        (normal(9, 4) / 0, normal(9, 4), {}, r"samples\[0\] holds NaN or infinite"),
        (normal(9, 2, 2), normal(9, 4), {}, r"samples must be float vectors \(N, D\).*shape \(9, 2, 2\)"),
        (torch.zeros(9, 4, dtype=torch.int64), normal(9, 4), {}, "got torch.int64"),
        (normal(0, 4), normal(9, 4), {}, r"samples must be .* not empty"),
        (normal(9, 4), normal(9, 4), {"bootstrap": 5}, "bootstrap = 5: must be at least 20"),
        (normal(9, 4), normal(9, 4), {"confidence": 95}, "confidence = 95: must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(samples, reference, options, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(samples, reference, **options)


def test_bad_gaussians_are_named():
    mean, covariance = gaussian(3, 0)
    with pytest.raises(ValueError, match=r"covariance2 must have shape \(3, 3\).*got \(2, 2\)"):
        gaussian_frechet(mean, covariance, mean, covariance[:2, :2])
    with pytest.raises(ValueError, match=r"mean2\[0\] holds NaN"):
        gaussian_frechet(mean, covariance, mean * torch.nan, covariance)


@given(
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
    offset=st.sampled_from([0.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_streamed_moments_are_those_of_the_whole(cuts, offset, dtype):
    x = normal(40, 3, dtype=dtype) + offset
    parts = [part for part in x.tensor_split(cuts) if len(part)]
    streamed, merged = Moments(3), Moments(3)
    for part in parts:
        streamed.update(part)
    for rank in range(2):
        of_rank = Moments(3)
        for part in parts[rank::2]:
            of_rank.update(part)
        merged.merge(of_rank)
    for moments in (streamed, merged):
        assert moments.count == 40
        # Means are rounded by eps |x|, 1e-10 at 1e6, which is what the centred products see.
        torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(moments.covariance, x.double().T.cov(), rtol=1e-8, atol=1e-8)


def test_moments_refuse_what_does_not_fit():
    moments = Moments(3).update(normal(5, 3))
    with pytest.raises(ValueError, match="moments of 2 dimensions do not merge into those of 3"):
        moments.update(normal(5, 2))
    with pytest.raises(ValueError, match=r"vectors\[0\] holds NaN"):
        moments.update(normal(5, 3) * torch.nan)
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        _ = Moments(3).update(normal(1, 3)).covariance
    assert moments.count == 5


def energy_of_shift(shift):
    """Energy distance of N(0, 1) and N(shift, 1): x − y is N(shift, 2), whose absolute value is a folded normal."""
    folded = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    return 2 * folded - 4 / math.sqrt(math.pi)


def kernel_of_shift(shift):
    """In one dimension (x y + 1)³ compares raw moments: 3 (Δm₁)² + 3 (Δm₂)² + (Δm₃)²."""
    return 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2


@pytest.mark.parametrize(
    ("metric", "closed_form"), [(kernel_distance, kernel_of_shift), (energy_distance, energy_of_shift)]
)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_unbiased_with_an_honest_error(metric, closed_form, shift):
    # Small blocks, in which pairs of a point with itself would weigh the most.
    repeats = 60
    results = [
        metric(normal(60, 1, seed=seed), shift + normal(90, 1, seed=seed + 1000), blocks=6) for seed in range(repeats)
    ]
    distance, std_error = (torch.tensor([getattr(r, name) for r in results]) for name in ("distance", "std_error"))
    spread = float(distance.std())
    assert float(distance.mean()) == pytest.approx(closed_form(shift), abs=4 * spread / repeats**0.5)
    # In quadrature the errors are unbiased; a variance of 60 heavy-tailed numbers is known to a factor of two.
    assert 0.5 < float(std_error.square().mean()) / spread**2 < 2
    assert (results[0].samples, results[0].reference) == (60, 90)


@pytest.mark.parametrize("metric", [kernel_distance, energy_distance])
def test_samples_in_order_of_their_values_are_as_good(metric):
    # Such as a class after the other; a block of them as they come would be of one class alone.
    x, y = normal(400, 1), normal(400, 1, seed=1)
    shuffled, in_order = metric(x, y), metric(x.sort(dim=0).values, y)
    assert abs(in_order.distance - shuffled.distance) < 5 * (in_order.std_error**2 + shuffled.std_error**2) ** 0.5
    assert in_order.std_error < 3 * shuffled.std_error


@pytest.mark.parametrize("metric", [kernel_distance, energy_distance])
def test_blocks_of_more_points_than_are_held_at_a_time(metric, monkeypatch):
    x, y = normal(60, 2), normal(50, 2, seed=1)
    whole = metric(x, y, blocks=2)
    monkeypatch.setattr("sde_diffusion.evaluation.metrics._ROWS", 7)
    in_pieces = metric(x, y, blocks=2)
    assert in_pieces.distance == pytest.approx(whole.distance, abs=1e-12)
    assert in_pieces.std_error == pytest.approx(whole.std_error, abs=1e-12)


def test_energy_distance_in_the_plane_sees_what_moments_do_not():
    # Four points of a square against a circle of the same mean and covariance.
    angle = 2 * math.pi * torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    square = torch.stack([(angle * 2 / math.pi).round() * math.pi / 2] * 2, dim=1)
    square = torch.stack([square[:, 0].cos(), square[:, 1].sin()], dim=1)
    result = energy_distance(square, circle)
    assert result.distance > 5 * result.std_error
    assert abs(energy_distance(circle[:2000], circle[2000:]).distance) < 4 * result.std_error


@pytest.mark.parametrize(
    ("samples", "reference", "blocks", "message"),
    [
        (normal(30, 2), normal(30, 3), 10, "samples have 2 features, the reference 3"),
        (normal(30, 2), normal(19, 2), 10, "blocks = 10.*got 30 samples and 19 of the reference"),
        (normal(30, 2), normal(30, 2), 1, "blocks = 1: must be at least 2"),
        (normal(30, 2) / 0, normal(30, 2), 10, r"samples\[0\] holds"),
    ],
)
def test_bad_arguments_of_the_block_estimates_are_named(samples, reference, blocks, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(samples, reference, blocks=blocks)
