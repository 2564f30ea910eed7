r"""Thresholding: x̂₀ kept in the range of the data, which a solver of few steps, or strong guidance, can leave.

With u = (x̂₀ − c)/h for data in [c − h, c + h]:

    static      u ← clamp(u, −1, 1)
    dynamic     u ← clamp(u, −s, s)/s        s = max(1, the p-quantile of |u| over the entries of a sample)

ε̂ = (x − α x̂₀)/σ follows. Saharia et al. 2022 (arXiv:2205.11487), section 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sde_diffusion.model import Model, Prediction, VariancePrediction, Wrapped
from sde_diffusion.sde import expand_to

# p where none is given.
_QUANTILE = 0.995


class Thresholded(Wrapped):
    """A model whose x̂₀ stays within the range that ``model.data`` states."""

    def __init__(self, model: Model, threshold: str | float):
        """Choose how.

        Args:
            model: whose x̂₀ is kept in range.
            threshold: "static", "dynamic", or the p of "dynamic", in (0, 1).

        Raises:
            ValueError: for any other.
        """
        super().__init__(model)
        quantile: float | None = None
        if threshold != "static":
            if threshold == "dynamic":
                threshold = _QUANTILE
            if isinstance(threshold, str) or not 0 < threshold < 1:
                raise ValueError(f"threshold = {threshold!r}: must be 'static', 'dynamic' or a quantile in (0, 1)")
            quantile = threshold
        self.quantile = quantile
        self.centre, self.half = (self.data.high + self.data.low) / 2, (self.data.high - self.data.low) / 2

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        """The model's x̂₀ in range, and the ε̂ that goes with it."""
        prediction = self.model.predict(x, t, **cond)
        x0 = self.centre + self.half * self._limit((prediction.x0 - self.centre) / self.half)
        t = self.sde.as_time(t, x)
        alpha, sigma = expand_to(self.sde.alpha(t), x), expand_to(self.sde.sigma(t), x)
        eps = torch.where(sigma > 0, (x - alpha * x0) / sigma, prediction.eps)
        fraction = getattr(prediction, "fraction", None)
        return Prediction(x0, eps) if fraction is None else VariancePrediction(x0, eps, fraction)

    def _limit(self, u: Tensor) -> Tensor:
        if self.quantile is None:
            return u.clamp(-1, 1)
        limit = expand_to(torch.quantile(u.flatten(1).abs(), self.quantile, dim=1).clamp(min=1), u)
        return torch.maximum(torch.minimum(u, limit), -limit) / limit
