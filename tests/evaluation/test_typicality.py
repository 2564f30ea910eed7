"""Typicality of log densities, and the area under the ROC curve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion.evaluation.typicality import roc_area, typicality

DIMENSION = 200


def gaussian_log_probs(x):
    return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


def draws(count, seed, dimension=DIMENSION):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_most_likely_point_is_not_typical():
    """Of N(0, I) in many dimensions: 0 has a higher density than every draw, and is found out."""
    inliers, reference = (gaussian_log_probs(draws(1000, seed)) for seed in (0, 1))
    centre, far = gaussian_log_probs(torch.stack([0 * draws(1, 0)[0], 1.3 * draws(1, 2)[0]]))
    assert centre > inliers.max()
    result = typicality(torch.stack([centre, far]), reference)
    # log p of a draw has variance D/2; of 0 it is D/2 above the mean.
    assert float(result.score[0]) == pytest.approx(math.sqrt(DIMENSION / 2), rel=0.1)
    assert not bool(result.is_typical.any())
    # As many as the quantile says, within 4 standard errors of both samples.
    passed = typicality(inliers, reference, quantile=0.9).is_typical.double().mean()
    assert abs(float(passed) - 0.9) < 4 * math.sqrt(2 * 0.9 * 0.1 / 1000)
    assert roc_area(inliers, centre.expand(5)).area == 1
    assert roc_area(-inliers, -centre.expand(5)).area == 0


@pytest.mark.parametrize("size", [1, 4, 25])
def test_threshold_of_a_batch_is_a_quantile_of_its_mean(size):
    """For a Gaussian reference the score of a batch of m is |N(0, 1)|/√m: its 95 % quantile is 1.96/√m."""
    reference = draws(20_000, 3, 1)[:, 0]
    result = typicality(reference[:100].reshape(-1, size), reference, quantile=0.95)
    # The standard error of this quantile: √(0.95 · 0.05/n)/(2 φ(1.96)), with n = 10,000 resamples.
    tolerance = 4.5 * math.sqrt(0.95 * 0.05 / 10_000) / (2 * math.exp(-(1.96**2) / 2) / math.sqrt(2 * math.pi))
    assert abs(result.threshold * math.sqrt(size) - 1.96) < tolerance
    assert result.score.shape == (100 // size,)


def test_a_batch_shows_what_its_members_do_not():
    reference, shifted = draws(4000, 4, 1)[:, 0], 0.5 + draws(64, 5, 1)[:, 0]
    assert float(typicality(shifted, reference).is_typical.double().mean()) > 0.8
    assert not bool(typicality(shifted[None], reference).is_typical.any())


def test_units_do_not_matter():
    reference, values = draws(50, 6, 1)[:, 0], draws(9, 7, 1)[:, 0]
    plain, scaled = typicality(values, reference), typicality(3 - 2 * values, 3 - 2 * reference)
    torch.testing.assert_close(scaled.score, plain.score)
    assert scaled.threshold == pytest.approx(plain.threshold)


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda scores: torch.tensor(scores).double())


@given(SCORES, SCORES)
def test_area_is_the_share_of_pairs_in_order(inliers, outliers):
    pairs = outliers[:, None] - inliers
    expected = float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())
    assert roc_area(inliers, outliers).area == pytest.approx(expected)
    assert roc_area(outliers, inliers).area == pytest.approx(1 - expected)


def test_area_of_two_gaussians_and_its_standard_error():
    """With the means d apart it is Φ(d/√2); the errors of many repeats have the size that each claims."""
    repeats, distance = 400, 1.0
    results = [
        roc_area(draws(40, 2 * seed, 1)[:, 0], distance + draws(60, 2 * seed + 1, 1)[:, 0]) for seed in range(repeats)
    ]
    areas = torch.tensor([result.area for result in results], dtype=torch.float64)
    claimed = torch.tensor([result.std_error for result in results], dtype=torch.float64).square().mean().sqrt()
    expected = 0.5 * (1 + math.erf(distance / 2))
    assert abs(float(areas.mean()) - expected) < 4 * float(areas.std()) / math.sqrt(repeats)
    assert abs(float(areas.std() / claimed) - 1) < 4 / math.sqrt(2 * repeats)


def test_a_perfect_detector_has_no_error_and_a_single_score_none_known():
    perfect = roc_area(torch.arange(5.0), torch.arange(5.0) + 10)
    assert (perfect.area, perfect.std_error) == (1, 0)
    assert math.isnan(roc_area(torch.zeros(1), torch.ones(3)).std_error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_probs": torch.zeros(0)}, r"log_probs has shape \(0,\)"),
        ({"log_probs": torch.zeros(2, 2, 2)}, r"log_probs has shape \(2, 2, 2\)"),
        ({"log_probs": torch.tensor([math.nan])}, "log_probs holds NaN"),
        ({"reference": torch.zeros(1)}, r"reference has shape \(1,\)"),
        ({"reference": torch.tensor([0.0, math.inf])}, "reference holds NaN or infinite"),
        ({"reference": torch.zeros(3)}, "reference holds 3 equal values"),
        ({"quantile": 1.0}, "quantile = 1.0"),
        ({"resamples": 0}, "resamples = 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        typicality(**{"log_probs": torch.zeros(3), "reference": torch.arange(4.0), **arguments})


def test_wrong_scores_are_named():
    with pytest.raises(ValueError, match=r"inliers has shape \(2, 1\)"):
        roc_area(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"outliers has shape \(0,\)"):
        roc_area(torch.zeros(2), torch.zeros(0))
    with pytest.raises(ValueError, match="outliers holds NaN"):
        roc_area(torch.zeros(2), torch.tensor([math.nan]))
