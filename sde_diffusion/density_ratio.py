r"""The log ratio of two models' densities at a point, such as that of a class to all of them.

    log p(x)/q(x) = log p_{t_min}(x) − log q_{t_min}(x)

by two calls of ``log_likelihood`` with common random numbers: the same streams of probes for both, so that part of what
two alike models are wrong by cancels. With method="adaptive", whose probes are frozen, most of it does. How much is not
to be known from the standard errors s_p and s_q of the two, but the difference's is

    |s_p − s_q| <= s <= s_p + s_q

whatever the correlation. The upper end is what is reported: √2 times the error of independent ones of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sde_diffusion.likelihood import LogLikelihood, log_likelihood
from sde_diffusion.model import Model


@dataclass(frozen=True)
class LogDensityRatio:
    """What ``log_density_ratio`` returns.

    Attributes:
        log_ratio: (B,) log p(x) − log q(x), in nats.
        std_error: (B,) not below its standard error over the probes: the sum of both densities'.
        numerator: the result for p.
        denominator: the result for q.
    """

    log_ratio: Tensor
    std_error: Tensor
    numerator: LogLikelihood
    denominator: LogLikelihood


def log_density_ratio(
    numerator: Model,
    denominator: Model,
    x: Tensor,
    *,
    numerator_cond: dict[str, Any] | None = None,
    denominator_cond: dict[str, Any] | None = None,
    **options: Any,
) -> LogDensityRatio:
    """Log p(x)/q(x) of two models of the same data, which may be one model under two conditions.

    Args:
        numerator: the model p.
        denominator: the model q.
        x: (B, *data_shape), floating, in the units of both models.
        numerator_cond: conditioning of p, as ``cond`` of ``log_likelihood``.
        denominator_cond: conditioning of q.
        **options: the other keyword arguments of ``log_likelihood``, for both.

    Raises:
        ValueError: for models of different shapes or ranges of data, or as ``log_likelihood``; "cond" is not an option.
        SolverError: if the solver cannot meet the tolerance.
    """
    if "cond" in options:
        raise ValueError("cond: give numerator_cond, denominator_cond or both")
    for name in ("data_shape", "data"):
        ours, theirs = getattr(numerator, name), getattr(denominator, name)
        if ours != theirs:
            raise ValueError(f"numerator.{name} = {ours}, denominator.{name} = {theirs}: must be equal")
    p = log_likelihood(numerator, x, cond=numerator_cond, **options)
    q = log_likelihood(denominator, x, cond=denominator_cond, **options)
    return LogDensityRatio(p.log_prob - q.log_prob, p.std_error + q.std_error, p, q)
