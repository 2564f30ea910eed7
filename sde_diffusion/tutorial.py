r"""Diffusion in its simplest form: noise added at a constant rate, one mean to learn, two ways back.

Time t in [0, 1] in steps of Δt, every step adding the same noise:

    x_{t+Δt} = x_t + N(0, σ_q² Δt)            so that x_t = x₀ + N(0, σ_q² t)

The network f(x, t) is regressed on the previous state, and so learns the mean

    μ_t(z) = E[x_{t−Δt} | x_t = z] = (Δt/t) E[x₀ | x_t = z] + (1 − Δt/t) z

Starting from x_1 ~ N(0, σ_q²), for t = 1, 1 − Δt, …, Δt:

    DDPM    x_{t−Δt} = μ_t(x_t) + N(0, σ_q² Δt)                    the last step adds its noise too
    DDIM    x_{t−Δt} = x_t + λ (μ_t(x_t) − x_t)                    λ = √t/(√t + √(t − Δt))

DDPM is right because the reverse of a small step is nearly Gaussian, N(x_t + σ_q² Δt ∇log p_t(x_t), σ_q² Δt); DDIM
because it moves every marginal into the next one, which λ = 0 or λ = 1 would not. The field λ (μ − x)/Δt that DDIM
follows points towards the data: it is minus dx/dt of the probability-flow ODE, up to order Δt.

This is ``ConstantVESDE(sigma_q)`` with prediction "mean", and the solvers "ddpm" and "ddim" on equal steps.
Source: Nakkiran, Bradley, Zhou & Advani 2024 (arXiv:2406.08929), sections 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sde_diffusion.sde import expand_to

Mean = Callable[[Tensor, Tensor], Tensor]


def noised_pair(
    x0: Tensor, t: Tensor, dt: float, sigma_q: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw (x_{t−Δt}, x_t) of one path from x₀ (B, ...), each of its shape; times t (B,) in [Δt, 1]."""
    earlier, later = torch.randn((2, *x0.shape), generator=generator, device=x0.device, dtype=x0.dtype)
    previous = x0 + sigma_q * torch.sqrt(expand_to((t - dt).clamp(min=0), x0)) * earlier
    return previous, previous + sigma_q * dt**0.5 * later


def train_loss(
    mean: Mean,
    x0: Tensor,
    t: Tensor,
    dt: float,
    sigma_q: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    averaged: bool = False,
) -> Tensor:
    """‖f(x_t, t) − x_{t−Δt}‖², the tutorial's pseudocode 1.

    Args:
        mean: the network f(x, t), of x's shape (B, ...) with t (B,).
        x0: data (B, ...).
        t: times (B,) in [Δt, 1], such as ``dt + (1 - dt) * torch.rand(B)``.
        dt: Δt.
        sigma_q: standard deviation of the noise at t = 1.
        generator: of the noise.
        averaged: regress on E[x_{t−Δt} | x_t, x₀] in place of x_{t−Δt}. The minimum is the same, the gradient less
            noisy (Rao and Blackwell).

    Returns:
        (B,) squared errors, summed over the dimensions.
    """
    previous, x = noised_pair(x0, t, dt, sigma_q, generator)
    target = mean_from_denoiser(x0, x, t, dt) if averaged else previous
    return (mean(x, t) - target).square().flatten(1).sum(1)


def mean_from_denoiser(x0: Tensor, x: Tensor, t: Tensor | float, dt: float) -> Tensor:
    """(Δt/t) x₀ + (1 − Δt/t) x, of x's shape (B, ...): μ_t(x) of E[x₀ | x_t = x], E[x_{t−Δt} | x_t = x, x₀] of x₀."""
    time = _time(t, dt)
    return _coefficient(dt / time, x) * x0 + _coefficient((time - dt) / time, x) * x


def ddpm_update(mean: Tensor, dt: float, noise: Tensor, sigma_q: float = 1.0) -> Tensor:
    """x_{t−Δt} = μ + σ_q √Δt z of the mean μ and standard normal z, both (B, ...)."""
    return mean + sigma_q * dt**0.5 * noise


def ddim_weight(t: Tensor | float, dt: float) -> Tensor:
    """λ = √t/(√t + √(t − Δt)), of t's shape: 1 on the last step, t = Δt, and ½ in the limit of small ones."""
    time = _time(t, dt)
    return time.sqrt() / (time.sqrt() + (time - dt).sqrt())


def ddim_update(x: Tensor, mean: Tensor, t: Tensor | float, dt: float) -> Tensor:
    """x_{t−Δt} = x + λ (μ − x), of x's shape (B, ...)."""
    return x + _coefficient(ddim_weight(t, dt), x) * (mean - x)


def velocity(x: Tensor, mean: Tensor, t: Tensor | float, dt: float) -> Tensor:
    """λ (μ − x)/Δt, the field that DDIM follows towards the data, of x's shape (B, ...)."""
    return _coefficient(ddim_weight(t, dt) / dt, x) * (mean - x)


@torch.no_grad()
def sample(
    mean: Mean,
    n: int,
    data_shape: Sequence[int],
    steps: int,
    *,
    sigma_q: float = 1.0,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tutorial's pseudocode 2 (DDPM), or 3 (DDIM) if deterministic.

    Args:
        mean: the network f(x, t), of x's shape (n, *data_shape) with t (n,).
        n: how many samples.
        data_shape: shape of one.
        steps: 1/Δt.
        sigma_q: standard deviation of the noise at t = 1.
        deterministic: whether to take DDIM's steps or DDPM's.
        generator: of all random numbers, on ``device``.
        device: where to compute.
        dtype: of the samples.

    Returns:
        Trajectories (steps + 1, n, *data_shape) from t = 1 to t = 0.

    Raises:
        ValueError: unless steps >= 1.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1")

    def normal() -> Tensor:
        return torch.randn((n, *data_shape), generator=generator, device=device, dtype=dtype)

    dt = 1 / steps
    x = sigma_q * normal()
    trajectory = [x]
    for i in range(steps, 0, -1):
        t = i * dt
        mu = mean(x, x.new_full((n,), t))
        x = ddim_update(x, mu, t, dt) if deterministic else ddpm_update(mu, dt, normal(), sigma_q)
        trajectory.append(x)
    return torch.stack(trajectory)


def _time(t: Tensor | float, dt: float) -> Tensor:
    """t in float64, where t − Δt cancels; below Δt there is no previous state, and rounding is taken for equality."""
    return torch.as_tensor(t, dtype=torch.float64).clamp(min=dt)


def _coefficient(value: Tensor, x: Tensor) -> Tensor:
    return expand_to(value.to(x), x)
