r"""Denoising score matching as one weighted regression on what the network sees.

    x_t = α x₀ + σ ε            loss = E_t E_{x₀, ε}  w(t) ‖target − prediction‖²/D

| weighting | target | w(t)                              | source |
|-----------|--------|-----------------------------------|--------|
| simple    | ε      | 1                                 | Ho et al. 2020, eq. 14 |
| edm       | x₀     | (σ² + α² σ_d²)/(σ σ_d)² = 1/c_out² | Karras et al. 2022, table 1 |

Times t are drawn from uniform numbers u: uniform on [t_min, t_max], or such that log(σ/α) ~ N(mean, std²).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.model import DiffusionModel, Prediction
from sde_diffusion.sde import SDE, expand_to


def denoising_loss(
    model: DiffusionModel, x0: Tensor, t: Tensor, noise: Tensor, weighting: str = "simple", **cond: Any
) -> Tensor:
    """Weighted squared error per example, averaged over the dimensions.

    Args:
        model: the model to train.
        x0: data (B, *data_shape).
        t: times (B,).
        noise: ε, of x₀'s shape.
        weighting: a key of ``WEIGHTINGS``.
        **cond: passed to the network.

    Returns:
        (B,) losses.

    Raises:
        ValueError: for an unknown weighting, or data that the model does not take.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r}: must be one of {', '.join(WEIGHTINGS)}")
    prediction = model.predict(model.sde.perturb(x0, t, noise), t, **cond)
    return WEIGHTINGS[weighting](model, prediction, x0, noise, t)


def _simple(model: DiffusionModel, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (noise - prediction.eps).square().flatten(1).mean(1)


def _edm(model: DiffusionModel, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = expand_to(model.sde.alpha(t), x0), expand_to(model.sde.sigma(t), x0)
    c_out = sigma * model.sigma_data / torch.sqrt(sigma.square() + (alpha * model.sigma_data).square())
    # Divided before it is squared: at small σ the plain square would lose digits.
    return ((x0 - prediction.x0) / c_out).square().flatten(1).mean(1)


WEIGHTINGS: dict[str, Callable[[DiffusionModel, Prediction, Tensor, Tensor, Tensor], Tensor]] = {
    "simple": _simple,
    "edm": _edm,
}


def uniform_time(sde: SDE, u: Tensor) -> Tensor:
    """Times uniform on [t_min, t_max] from u (B,) uniform on [0, 1)."""
    return sde.t_min + (sde.t_max - sde.t_min) * u


def log_normal_time(sde: SDE, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Times with log(σ/α) ~ N(mean, std²), kept inside [t_min, t_max], from u (B,); Karras et al. 2022."""
    log_noise = mean + std * torch.special.ndtri(u.double())
    return sde.t_from_log_snr(-2 * log_noise).clamp(sde.t_min, sde.t_max).to(u.dtype)


TIMES: dict[str, Callable[..., Tensor]] = {"uniform": uniform_time, "log_normal": log_normal_time}
