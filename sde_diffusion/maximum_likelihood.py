r"""A log-likelihood that can be differentiated, for fitting a model by maximum likelihood.

Over u = log(σ/α), with v = dx/du the velocity of the probability-flow ODE,

    log p_{t_min}(x) = log p_T(x(T)) + ∫ ∇·v(x(u), u) du        from u(t_min) to u(T)

is solved by the classical Runge-Kutta method of order 4 (Kutta's 3/8 rule) in equal steps of u, and backpropagation
goes through these steps: discretise, then optimise. The gradient is then that of the value itself, errors of the steps
included, which an adjoint ODE solved backwards would only approximate.

The divergence is exact (D products with unit vectors), or Hutchinson's zᵀ(∂v/∂x)z. As it enters the value linearly, and
the path x(u) does not depend on the probes, value and gradient by probes are both unbiased for those by exact traces.
Its own gradient takes second derivatives of the network, which has to be smooth: no ReLU.

Evaluations can be computed again for backpropagation in place of being kept. Memory is then that of one of them and of
the states; the price is a forward pass more for backpropagation, and one more for every product.

Sources: Chen et al. 2018 (arXiv:1806.07366) and Grathwohl et al. 2019 (arXiv:1810.01367) for the likelihood of a flow
and its probes; Gholami et al. 2019 (arXiv:1902.10298) and Onken & Ruthotto 2020 (arXiv:2005.13420) for the order of
discretising and optimising; Chen et al. 2016 (arXiv:1604.06174) for computing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sde_diffusion.divergence import PROBES, block_size, draw_blocks, exact_trace, trace_estimates
from sde_diffusion.likelihood import TRACES, check_continuous, start_time
from sde_diffusion.model import Model, evaluating, slice_cond
from sde_diffusion.ode import integrate
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.sde import drift_in_log_noise


def differentiable_log_likelihood(
    model: Model,
    x: Tensor,
    *,
    steps: int = 64,
    trace: str = "hutchinson",
    probes: int = 1,
    probe: str = "rademacher",
    t_min: float | None = None,
    recompute: bool = True,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_discrete: bool = False,
) -> Tensor:
    """Log density of continuous data under a model, differentiable in its parameters and in x.

    Where no gradient is wanted, ``log_likelihood`` gives it with its errors, and more cheaply. Training wants other
    probes for each iteration, and so another seed.

    Args:
        model: a trained or exact model; its dropout is off.
        x: (B, *data_shape), floating, in the model's units; codes of discrete data dequantised.
        steps: of the solver, each of four evaluations; the error falls with their fourth power.
        trace: "exact" or "hutchinson".
        probes: number of probes of the estimate, whose mean is taken.
        probe: their distribution, "orthogonal", "rademacher" or "gaussian".
        t_min: time whose density is wanted; the SDE's t_min by default.
        recompute: whether to compute evaluations again for backpropagation, and not keep all of them.
        cond: keyword arguments for the model; tensors are of length B.
        seed: of the probes; example i's come from stream i.
        allow_discrete: as in ``log_likelihood``.

    Returns:
        (B,) log densities of p at t_min, in nats.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if the state leaves the finite numbers, as with too few steps.
    """
    check_continuous(model, x, allow_discrete)
    _check(x, steps, trace, probes, probe)
    ends = [model.sde.log_noise(t) for t in (start_time(model, t_min), model.sde.t_max)]
    cond = slice_cond(cond, len(x), range(len(x)), model.device)
    x = x.to(model.device)
    draws = None if trace == "exact" else _draw(x, probes, probe, seed)

    def rates(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        # Entered here as it holds for a second computation too. Fused attention has no second derivative.
        with evaluating(model), sdpa_kernel(SDPBackend.MATH):
            velocity = partial(drift_in_log_noise, model.sde, partial(model.predict, **cond), u=u)
            value, gradient = _with_products(velocity, x)
            divergence = exact_trace(gradient, x) if draws is None else trace_estimates(gradient, draws).mean(0)
            return value, divergence[:, None]

    def slope(state: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(rates, state[0], u, use_reentrant=False) if recompute else rates(state[0], u)

    grid = torch.linspace(ends[0], ends[1], steps + 1, dtype=torch.float64).tolist()
    state = (x, x.new_zeros(len(x), 1))
    latent, change = integrate(slope, state, grid, method="rk4", to_time=model.sde.t_from_log_noise)
    return model.sde.prior_log_prob(latent) + change[:, 0]


def _with_products(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """f(x), and the map z -> zᵀ ∂f/∂x, both to be differentiated again."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = function(x)

    # Not torch.func.vjp, which torch.utils.checkpoint cannot compute again.
    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, z, create_graph=torch.is_grad_enabled(), retain_graph=True)[0]

    return value, gradient


def _draw(x: Tensor, probes: int, probe: str, seed: int) -> Tensor:
    """Probes (P, B, ...) for x (B, ...), in independent blocks."""
    streams, size = Streams(seed, range(len(x)), x.device), block_size(probe, probes)
    return draw_blocks(probe, probes // size, size, x.shape[1:], streams, x.dtype)


def _check(x: Tensor, steps: int, trace: str, probes: int, probe: str) -> None:
    for name, number in (("len(x)", len(x)), ("steps", steps), ("probes", probes)):
        if number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    for name, choice, choices in (("trace", trace, TRACES), ("probe", probe, PROBES)):
        if choice not in choices:
            raise ValueError(f"{name} = {choice!r}: must be one of {', '.join(choices)}")
