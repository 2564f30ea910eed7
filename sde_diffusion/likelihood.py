r"""Exact log-likelihood through the probability-flow ODE, and bits per dimension.

With v the velocity dx/dt of the ODE that carries p_t along,

    log p_{t_min}(x) = log p_T(x(T)) + ∫_{t_min}^{T} ∇·v(x(t), t) dt

solved together with x(t), over an angle in place of t (``sde_diffusion.ode``). The divergence is exact (D products with
unit vectors) or Hutchinson's estimate zᵀ(∂v/∂x)z with probes z, E[zzᵀ] = I, each frozen for the whole solve: the mean
over probes is unbiased, and their spread its standard error. Value and products come from one evaluation of the model.

The density is that of data noised up to t_min, which is part of the number; t_min is in the result.

b-bit data k are dequantised, y = low + (high − low)(k + u)/2ᵇ with u ~ U[0, 1), and

    bits/dim = −(log p(y) + D log((high − low)/2ᵇ))/(D log 2)

is in expectation an upper bound on −log₂ P(k)/D.

Sources: Song et al. 2021 (arXiv:2011.13456), appendix D.2; Grathwohl et al. 2019 (arXiv:1810.01367);
Theis et al. 2016 (arXiv:1511.01844), section 3.1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.model import Model, Prediction, check_finite, evaluating, slice_cond
from sde_diffusion.ode import ADAPTIVE_METHODS, Divergence, ProbabilityFlow, Velocity
from sde_diffusion.samplers.noise import Streams

METHODS = ("adaptive",)
TRACES = ("hutchinson", "exact")
PROBES = ("rademacher", "gaussian")


@dataclass(frozen=True)
class LogLikelihood:
    """What ``log_likelihood`` returns.

    Attributes:
        log_prob: (B,) log density of p at t_min, in nats.
        std_error: (B,) its standard error over the probes; 0 for the exact trace, NaN for a single probe.
        latent: x(T), of x's shape.
        nfe: evaluations of the model for each example; the largest, if batches differ.
        t_min: the time whose density this is.
        seconds: wall-clock time.
    """

    log_prob: Tensor
    std_error: Tensor
    latent: Tensor
    nfe: int
    t_min: float
    seconds: float


@dataclass(frozen=True)
class BitsPerDim:
    """What ``bits_per_dim`` returns, all in bits a dimension.

    Attributes:
        per_example: (B,).
        per_example_std_error: (B,) the estimator's, over probes.
        mean: over the examples.
        std_error: of the mean, from the estimator alone: how far a repeat with other probes would be.
        sampling_error: of the mean, from one example to another: how far other examples would be; NaN for one.
        nfe, t_min, seconds: as in ``LogLikelihood``.
    """

    per_example: Tensor
    per_example_std_error: Tensor
    mean: float
    std_error: float
    sampling_error: float
    nfe: int
    t_min: float
    seconds: float


@torch.no_grad()
def log_likelihood(
    model: Model,
    x: Tensor,
    *,
    method: str = "adaptive",
    trace: str = "hutchinson",
    probes: int = 2,
    probe: str = "rademacher",
    t_min: float | None = None,
    solver: str = "dopri5",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> LogLikelihood:
    """Log density of continuous data under a model.

    Example i's probes come from stream i of the seed, whatever the batch size.

    Args:
        model: a trained or exact model.
        x: (B, *data_shape), floating, in the model's units; ``bits_per_dim`` takes integer data.
        method: "adaptive", the augmented ODE with probes frozen.
        trace: "hutchinson" or "exact".
        probes: number of probes of the estimate.
        probe: their distribution, "rademacher" or "gaussian".
        t_min: time whose density is wanted; the SDE's t_min by default.
        solver: an adaptive method of torchdiffeq.
        rtol: relative tolerance, of x and of the log-determinant a dimension.
        atol: absolute tolerance, likewise; in nats a dimension for the latter.
        cond: keyword arguments for the model; tensors of length B are cut into batches.
        batch_size: examples solved together; all by default.
        seed: of the probes.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if the solver cannot meet the tolerance.
    """
    model.check_data("x", x)
    check_finite("x", x)
    options = _Options(method, trace, probes, probe, t_min, solver, rtol, atol)
    return _evaluate(model, x, lambda batch, streams: batch, options, cond, batch_size, seed)


@torch.no_grad()
def bits_per_dim(
    model: Model,
    images: Tensor,
    *,
    method: str = "adaptive",
    trace: str = "hutchinson",
    probes: int = 2,
    probe: str = "rademacher",
    t_min: float | None = None,
    solver: str = "dopri5",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> BitsPerDim:
    """Bits per dimension of discrete data, uniformly dequantised, under a model that knows its bit depth.

    Args:
        model: one with ``model.data.bits``.
        images: integer codes (B, *data_shape), 0 to 2ᵇ − 1.
        method, trace, probes, probe, t_min, solver, rtol, atol, cond, batch_size: as in ``log_likelihood``.
        seed: of the dequantisation and the probes.

    Raises:
        ValueError: for codes that are not integers in range, a model of continuous data, or as ``log_likelihood``.
        SolverError: if the solver cannot meet the tolerance.
    """
    info = model.data
    if info.bits is None:
        raise ValueError("model.data.bits is None: bits/dim needs discrete data; use log_likelihood")
    info.check_codes("images", images)
    if images.shape[1:] != model.data_shape:
        raise ValueError(f"images has shape {tuple(images.shape)}: need (B, *{tuple(model.data_shape)})")

    def dequantize(codes: Tensor, streams: Streams) -> Tensor:
        return info.dequantize(codes, streams.uniform(codes.shape[1:]))

    options = _Options(method, trace, probes, probe, t_min, solver, rtol, atol)
    result = _evaluate(model, images, dequantize, options, cond, batch_size, seed)
    dimension = math.prod(model.data_shape)
    per_example = -(result.log_prob / dimension + info.log_scale) / math.log(2)
    std_error = result.std_error / (dimension * math.log(2))
    count = len(images)
    return BitsPerDim(
        per_example,
        std_error,
        float(per_example.double().mean()),
        float(std_error.double().square().sum().sqrt() / count),
        float(per_example.double().std() / math.sqrt(count)) if count > 1 else math.nan,
        result.nfe,
        result.t_min,
        result.seconds,
    )


@dataclass(frozen=True)
class _Options:
    """The arguments that the two public functions share, checked."""

    method: str
    trace: str
    probes: int
    probe: str
    t_min: float | None
    solver: str
    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("trace", TRACES), ("probe", PROBES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(choices)}")
        if self.probes < 1:
            raise ValueError(f"probes = {self.probes}: must be at least 1")
        if self.solver not in ADAPTIVE_METHODS:
            raise ValueError(f"solver = {self.solver!r}: must be one of {', '.join(ADAPTIVE_METHODS)}")


def _evaluate(
    model: Model,
    data: Tensor,
    to_model_space: Callable[[Tensor, Streams], Tensor],
    options: _Options,
    cond: Mapping[str, Any] | None,
    batch_size: int | None,
    seed: int,
) -> LogLikelihood:
    """Batch by batch: bring the data to where the model lives, solve, add the prior."""
    sde = model.sde
    t_min = sde.t_min if options.t_min is None else sde.check_time("t_min", options.t_min)
    if not t_min < sde.t_max:
        raise ValueError(f"t_min = {t_min}: must be below t_max = {sde.t_max}")
    if not math.isfinite(sde.log_noise(t_min)):
        raise ValueError(f"t_min = {t_min}: the noise is 0 there; the smallest safe time is {sde.t_min}")
    if len(data) == 0 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{len(data)} examples, batch_size = {batch_size}: both must be at least 1")
    batch_size = batch_size or len(data)
    log_probs, latents, nfe, started = [], [], 0, time.perf_counter()
    with evaluating(model):
        for first in range(0, len(data), batch_size):
            indices = range(first, min(len(data), first + batch_size))
            streams = Streams(seed, indices, model.device)
            x = to_model_space(data[first : indices.stop].to(model.device), streams)
            batch_cond = slice_cond(cond, len(data), indices, model.device)
            log_prob, latent, calls = _solve(model, x, streams, options, t_min, batch_cond)
            log_probs.append(log_prob)
            latents.append(latent)
            nfe = max(nfe, calls)
    log_prob = torch.cat(log_probs)
    std_error = torch.zeros_like(log_prob[:, 0])
    if options.trace == "hutchinson":
        std_error = log_prob.std(1) / math.sqrt(options.probes) if options.probes > 1 else std_error + math.nan
    return LogLikelihood(log_prob.mean(1), std_error, torch.cat(latents), nfe, t_min, time.perf_counter() - started)


def _solve(
    model: Model, x: Tensor, streams: Streams, options: _Options, t_min: float, cond: dict[str, Any]
) -> tuple[Tensor, Tensor, int]:
    """Log density by each probe (B, probes), or (B, 1) with the exact trace; x(T); evaluations of the model."""
    calls = 0

    def predict(x: Tensor, t: Tensor) -> Prediction:
        nonlocal calls
        calls += 1
        return model.predict(x, t, **cond)

    latent, change = ProbabilityFlow(model.sde, predict).solve_with_density(
        x,
        (t_min, model.sde.t_max),
        _exact_divergence if options.trace == "exact" else _hutchinson(x, streams, options),
        estimates=1 if options.trace == "exact" else options.probes,
        method=options.solver,
        rtol=options.rtol,
        atol=options.atol,
    )
    return model.sde.prior_log_prob(latent)[:, None] + change, latent, calls


def _hutchinson(x: Tensor, streams: Streams, options: _Options) -> Divergence:
    """Draw the probes; the result maps (velocity, x) to its value and zᵀ(∂v/∂x)z by each, (B, probes)."""
    shape = (options.probes, *x.shape[1:])
    if options.probe == "gaussian":
        z = streams.normal(shape, x.dtype)
    else:
        z = torch.where(streams.uniform(shape, x.dtype) < 0.5, -1.0, 1.0).to(x.dtype)
    z = z.transpose(0, 1)

    def estimate(velocity: Velocity, x: Tensor) -> tuple[Tensor, Tensor]:
        value, product = _with_products(velocity, x)
        return value, torch.stack([(probe * product(probe)[0]).flatten(1).sum(1) for probe in z], 1)

    return estimate


def _with_products(velocity: Velocity, x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """v(x), and the map z -> zᵀ ∂v/∂x that shares its forward pass."""
    value, product, *_ = torch.func.vjp(velocity, x)
    return value, product


def _exact_divergence(velocity: Velocity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and the trace of ∂v/∂x (B, 1) by a product with every unit vector."""
    value, product = _with_products(velocity, x)
    units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
    # One product after another: batched by vmap they do not go through a network in channels_last.
    entries = [(unit * product(unit.expand_as(x))[0]).flatten(1).sum(1) for unit in units]
    return value, torch.stack(entries, 1).sum(1, keepdim=True)
