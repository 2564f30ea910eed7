r"""Outliers by likelihood: why a high density is no sign of belonging, and what to ask in its place.

In many dimensions the mass of a density p lies where log p is close to its mean, minus the entropy, and next to none of
it where p is highest: no draw of N(0, I) is near 0, the most likely point. A smooth image can be more likely than all
data. What belongs to the data is therefore known by a density that is typical, neither lower nor higher. With r the log
densities of a reference set, the score of a batch of m is

    score = |mean of log p over the batch − mean r| / std r

Its threshold is a quantile of the scores of batches drawn from the reference with replacement; of the reference itself
for m = 1. The reference should not be what the model was trained on, if that is more likely than other data.

The area under the ROC curve is the probability that an outlier has a higher score than an inlier, ties counting half:
Mann & Whitney's U over the number of pairs. 1 is a perfect detector, ½ a blind one, and one below ½ points the wrong
way. With F_in(s), F_out(s) the share of inliers, and of outliers, that lie below s (ties half),

    area = mean of F_in over the m outliers = 1 − mean of F_out over the n inliers
    std_error² = var F_in/m + var F_out/n

Sources: Nalisnick et al. 2019 (arXiv:1906.02994), algorithm 1, and the same year's arXiv:1810.09136 for the failure;
DeLong, DeLong & Clarke-Pearson 1988 (Biometrics 44) for the area's error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor


@dataclass(frozen=True)
class Typicality:
    """What ``typicality`` returns.

    Attributes:
        score: (N,) distance of each batch's mean log density from the reference's, in standard deviations of that.
        threshold: what ``quantile`` of such batches of reference data do not exceed.
        quantile: the share of reference data that are to pass.
    """

    score: Tensor
    threshold: float
    quantile: float

    @property
    def is_typical(self) -> Tensor:
        """(N,) whether each score is within the threshold."""
        return self.score <= self.threshold


@dataclass(frozen=True)
class RocArea:
    """What ``roc_area`` returns.

    Attributes:
        area: under the ROC curve, in [0, 1].
        std_error: of the area, over the draw of inliers and outliers; NaN if there is but one of either.
    """

    area: float
    std_error: float


def typicality(
    log_probs: Tensor, reference: Tensor, *, quantile: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Typicality:
    """How far log densities are from what is typical of a reference, in either direction.

    Args:
        log_probs: (N,) log densities, each tested alone, or (N, m) of batches of m, each tested by its mean. Any unit
            will do, such as bits/dim, if the reference is in it too.
        reference: (n,) log densities of data known to be inliers, n >= 2.
        quantile: the share of inliers that are to pass.
        resamples: batches of m > 1 drawn from the reference for the threshold.
        seed: of these draws.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
    """
    if log_probs.ndim not in (1, 2) or log_probs.numel() == 0:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}: need (N,) or (N, m), not empty")
    if reference.ndim != 1 or len(reference) < 2:
        raise ValueError(f"reference has shape {tuple(reference.shape)}: need (n,) with n >= 2")
    for name, values in (("log_probs", log_probs), ("reference", reference)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile = {quantile}: must be between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: must be at least 1")
    reference = reference.double()
    centre, spread = reference.mean(), reference.std()
    if not spread > 0:
        raise ValueError(f"reference holds {len(reference)} equal values: need some spread")

    def score(batches: Tensor) -> Tensor:
        return (batches.mean(1) - centre).abs() / spread

    batches = log_probs.double().reshape(len(log_probs), -1)
    inliers = reference[:, None]
    if batches.shape[1] > 1:
        generator = torch.Generator(reference.device).manual_seed(seed)
        rows = (resamples, batches.shape[1])
        inliers = reference[torch.randint(len(reference), rows, generator=generator, device=reference.device)]
    # The smallest score that the share does not exceed, and no value between two.
    threshold = float(torch.quantile(score(inliers), quantile, interpolation="higher"))
    return Typicality(score(batches), threshold, quantile)


def roc_area(inliers: Tensor, outliers: Tensor) -> RocArea:
    """Area under the ROC curve of a detector whose score should be higher for outliers.

    Args:
        inliers: (n,) scores, finite.
        outliers: (m,) scores, finite.

    Raises:
        ValueError: for another shape, no scores, or NaN and infinite ones.
    """
    for name, scores in (("inliers", inliers), ("outliers", outliers)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} has shape {tuple(scores.shape)}: need (n,) with n >= 1")
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    above, below = _share_below(outliers, inliers), _share_below(inliers, outliers)
    variances = [float(share.var()) / len(share) if len(share) > 1 else math.nan for share in (above, below)]
    return RocArea(float(above.mean()), math.sqrt(sum(variances)))


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Share of the others that lie below each of the scores (n,), half of those that equal it."""
    together, alone = (
        torch.from_numpy(rankdata(s.detach().cpu().numpy())) for s in (torch.cat([scores, others]), scores)
    )
    return (together[: len(scores)] - alone) / len(others)
