r"""Exact log-likelihood through the probability-flow ODE, and bits per dimension, with what they may be wrong by.

With v the velocity dx/dt of the ODE that carries p_t along,

    log p_{t_min}(x) = log p_T(x(T)) + ∫_{t_min}^{T} ∇·v(x(t), t) dt

The divergence is exact (D products with unit vectors), or estimated by zᵀ(∂v/∂x)z with probes z, E[zzᵀ] = I:

    decoupled    x(t) first, forward only, then the integral by a quadrature with fresh probes at every node
                 (``sde_diffusion.decoupled``)
    adaptive     both together, over an angle in place of t (``sde_diffusion.ode``), with probes frozen for the solve

Both are unbiased in the probes; the first costs a fraction for the same standard error, as its errors average over the
nodes and its step size does not know of the probes. The density is that of data noised up to t_min, which is part of
the number; t_min is in the result.

b-bit data k are dequantised, y = low + (high − low)(k + u)/2ᵇ with u ~ U[0, 1), and

    bits/dim = −(log p(y) + D log((high − low)/2ᵇ))/(D log 2)

is in expectation an upper bound on −log₂ P(k)/D. So is, for K draws of u, that of log((1/K) Σ p(y_j)) in place of
log p(y), and the tighter the larger K. It takes p itself: noise in log p makes its exponential, on average, too large.

Sources: Song et al. 2021 (arXiv:2011.13456), appendix D.2; Grathwohl et al. 2019 (arXiv:1810.01367);
Theis et al. 2016 (arXiv:1511.01844), section 3.1; Burda et al. 2016 (arXiv:1509.00519) for the K draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from sde_diffusion import decoupled
from sde_diffusion.decoupled import Estimate, Plan
from sde_diffusion.divergence import PROBES, block_size, draw_blocks, exact_trace, trace_estimates, vector_jacobian
from sde_diffusion.model import Model, Prediction, check_finite, evaluating, slice_cond
from sde_diffusion.ode import ADAPTIVE_METHODS, Divergence, ProbabilityFlow, Velocity
from sde_diffusion.samplers.noise import Streams

METHODS = ("decoupled", "adaptive")
TRACES = ("hutchinson", "exact")


@dataclass(frozen=True)
class LogLikelihood:
    """What ``log_likelihood`` returns, (B,) each unless it says otherwise.

    Attributes:
        log_prob: log density of p at t_min, in nats.
        std_error: its standard error over the probes; 0 for the exact trace, NaN for a single probe.
        degrees_of_freedom: of that standard error; infinite for the exact trace.
        solver_error: estimate of what the path and the quadrature may be wrong by, in nats; NaN for "adaptive", whose
            tolerances stand for it.
        latent: x(T), of x's shape.
        nfe: forward evaluations of the model.
        derivative_evaluations: products with its Jacobian, each a backward pass.
        t_min: the time whose density this is.
        seconds: wall-clock time.
    """

    log_prob: Tensor
    std_error: Tensor
    degrees_of_freedom: Tensor
    solver_error: Tensor
    latent: Tensor
    nfe: Tensor
    derivative_evaluations: Tensor
    t_min: float
    seconds: float

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of Student's interval for the log density, over the probes; the solver's error is not in it.

        Raises:
            ValueError: for a level that is not in (0, 1).
        """
        return _interval(self.log_prob, self.std_error, self.degrees_of_freedom, level)


@dataclass(frozen=True)
class BitsPerDim:
    """What ``bits_per_dim`` returns, all in bits a dimension; (B,) for single examples.

    Attributes:
        per_example: the mean over the draws of the dequantisation, or of their importance-weighted bound.
        per_example_std_error: the estimator's, over probes.
        degrees_of_freedom: (B,) of that standard error.
        per_example_solver_error: estimate of what the path and the quadrature may be wrong by.
        dequantization_error: (B,) standard error of that mean over the draws, probes included; NaN for one draw, and
            for the bound.
        mean: over the examples.
        std_error: of the mean, from the estimator alone: how far a repeat with other probes would be.
        solver_error: of the mean, as if all examples' had one sign.
        sampling_error: of the mean, from one example to another: how far other examples would be; NaN for one.
        nfe, derivative_evaluations, t_min, seconds: as in ``LogLikelihood``.
    """

    per_example: Tensor
    per_example_std_error: Tensor
    degrees_of_freedom: Tensor
    per_example_solver_error: Tensor
    dequantization_error: Tensor
    mean: float
    std_error: float
    solver_error: float
    sampling_error: float
    nfe: Tensor
    derivative_evaluations: Tensor
    t_min: float
    seconds: float

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """As ``LogLikelihood.interval``, in bits a dimension."""
        return _interval(self.per_example, self.per_example_std_error, self.degrees_of_freedom, level)


@torch.no_grad()
def log_likelihood(
    model: Model,
    x: Tensor,
    *,
    method: str = "decoupled",
    trace: str = "hutchinson",
    probes: int = 8,
    probe: str = "orthogonal",
    target_std_error: float | None = None,
    t_min: float | None = None,
    steps: int | None = None,
    nodes: int | None = None,
    solver: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    rows: int | None = None,
    compile: bool | str | Callable[..., Any] = False,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    allow_discrete: bool = False,
) -> LogLikelihood:
    """Log density of continuous data under a model.

    An example's value does not depend, to the stated tolerance, on those that it is computed with.

    Args:
        model: a trained or exact model.
        x: (B, *data_shape), floating, in the model's units; ``bits_per_dim`` takes integer data.
        method: "decoupled", or "adaptive": the augmented ODE with frozen probes.
        trace: "hutchinson" or "exact".
        probes: of the estimate: a node in the mean, at least 2, or for "adaptive" frozen ones in all. The trace is
            exact where "decoupled" may take as many as there are dimensions.
        probe: "orthogonal" in blocks, "rademacher" or "gaussian".
        target_std_error: of each example, in nats: as many probes are taken as it needs, in place of ``probes``.
            Only "decoupled".
        t_min: time whose density is wanted; the SDE's t_min by default.
        steps: of the path, equal ones of log(σ/α); by default of at most 1 each. Only "decoupled".
        nodes: of the quadrature in each step; 4 by default. Only "decoupled".
        solver: an adaptive method of torchdiffeq; "dopri5" by default. Only "adaptive".
        rtol: relative tolerance of x and of the log-determinant a dimension; 1e-6 by default. Only "adaptive".
        atol: absolute tolerance in nats a dimension: for "decoupled", 1e-2 by default, steps are halved where the
            estimate of the solver's error is above it, which it corrects for as well; for "adaptive", 1e-6 by default,
            it is that of a step, and of x too, whose error near the data counts beside the little noise there.
        cond: keyword arguments for the model; tensors of length B are cut into batches.
        batch_size: examples solved together; all by default.
        rows: evaluations with products made together, each of a node of some example; as many as there are examples
            in a batch, or 64 if they are fewer, by default. Only "decoupled".
        compile: make one graph of an evaluation with its products: True, or torch.compile's backend. Only "decoupled".
        seed: of the probes.
        indices: example j draws from stream indices[j] of the seed; 0…B − 1 by default.
        allow_discrete: whether data that are still on the lattice of ``model.data``'s codes are taken as they are.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if the solver cannot meet the tolerance.
    """
    check_continuous(model, x, allow_discrete)
    options = _Options(
        method, trace, probes, probe, target_std_error, t_min, steps, nodes, solver, rtol, atol, rows, compile
    )
    (log_prob,), estimate, seconds = _evaluate(
        model, x, lambda batch, streams: batch, 1, options, cond, batch_size, seed, indices
    )
    return LogLikelihood(log_prob, *estimate[1:], t_min=start_time(model, options.t_min), seconds=seconds)


@torch.no_grad()
def bits_per_dim(
    model: Model,
    images: Tensor,
    *,
    draws: int = 1,
    importance_weighted: bool = False,
    method: str = "decoupled",
    trace: str = "hutchinson",
    probes: int = 8,
    probe: str = "orthogonal",
    target_std_error: float | None = None,
    t_min: float | None = None,
    steps: int | None = None,
    nodes: int | None = None,
    solver: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    rows: int | None = None,
    compile: bool | str | Callable[..., Any] = False,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> BitsPerDim:
    """Bits per dimension of discrete data, uniformly dequantised, under a model that knows its bit depth.

    Args:
        model: one with ``model.data.bits``.
        images: integer codes (B, *data_shape), 0 to 2ᵇ − 1.
        draws: K, of the dequantisation for each example.
        importance_weighted: the bound of log((1/K) Σ p(y_j)), with trace="exact", in place of the draws' mean.
        target_std_error: of each example and draw, in bits a dimension; else as in ``log_likelihood``.
        method, trace, probes, probe, t_min, steps, nodes, solver, rtol, atol: as in ``log_likelihood``.
        cond, batch_size, rows, compile, indices: likewise.
        seed: of the dequantisation and the probes.

    Raises:
        ValueError: for codes that are not integers in range, a model of continuous data, or as ``log_likelihood``.
        SolverError: if the solver cannot meet the tolerance.
    """
    info, dimension = model.data, math.prod(model.data_shape)
    if info.bits is None:
        raise ValueError("model.data.bits is None: bits/dim needs discrete data; use log_likelihood")
    info.check_codes("images", images)
    if images.shape[1:] != model.data_shape:
        raise ValueError(f"images has shape {tuple(images.shape)}: need (B, {', '.join(map(str, model.data_shape))})")
    if draws < 1:
        raise ValueError(f"draws = {draws}: must be at least 1")
    if importance_weighted and trace != "exact":
        raise ValueError(
            f"importance_weighted = True: needs trace = 'exact', got {trace!r}; the noise of probes makes the log of a "
            "mean of densities too large"
        )

    def dequantize(codes: Tensor, streams: Streams) -> Tensor:
        # The network may compute in fewer bits than tell neighbouring codes apart.
        return info.dequantize(codes, streams.uniform(codes.shape[1:], torch.promote_types(model.dtype, torch.float32)))

    nats = dimension * math.log(2)
    target = None if target_std_error is None else target_std_error * nats
    options = _Options(method, trace, probes, probe, target, t_min, steps, nodes, solver, rtol, atol, rows, compile)
    log_probs, estimate, seconds = _evaluate(model, images, dequantize, draws, options, cond, batch_size, seed, indices)
    log_prob = log_probs.double().logsumexp(0) - math.log(draws) if importance_weighted else log_probs.double().mean(0)
    per_example = -(log_prob / nats + info.log_scale / math.log(2)).to(log_probs.dtype)
    std_error, solver_error = estimate.std_error / nats, estimate.solver_error / nats
    has_error = draws > 1 and not importance_weighted
    draw_error = log_probs.std(0) / (nats * math.sqrt(draws)) if has_error else torch.full_like(std_error, math.nan)
    count = len(images)
    return BitsPerDim(
        per_example,
        std_error,
        estimate.degrees_of_freedom,
        solver_error,
        draw_error,
        float(per_example.double().mean()),
        float(std_error.double().square().sum().sqrt() / count),
        float(solver_error.double().mean()),
        float(per_example.double().std() / math.sqrt(count)) if count > 1 else math.nan,
        estimate.nfe,
        estimate.derivative_evaluations,
        start_time(model, options.t_min),
        seconds,
    )


def check_continuous(model: Model, x: Tensor, allow_discrete: bool) -> None:
    """Raise a ValueError unless x (B, *data_shape) is finite and, if it once was codes, dequantised."""
    model.check_data("x", x)
    check_finite("x", x)
    if model.data.bits is not None and not allow_discrete and len(x):
        is_code = model.data.is_on_lattice(x)
        if bool(is_code.any()):
            raise ValueError(
                f"x[{int(is_code.nonzero()[0])}] holds only values that codes of {model.data.bits} bits have: a "
                "density is no probability of them; give the codes to bits_per_dim, or allow_discrete=True"
            )


def start_time(model: Model, t_min: float | None) -> float:
    """The time whose density is wanted, the SDE's t_min by default; a ValueError if there is none."""
    sde = model.sde
    t_min = sde.t_min if t_min is None else sde.check_time("t_min", t_min)
    if not t_min < sde.t_max:
        raise ValueError(f"t_min = {t_min}: must be below t_max = {sde.t_max}")
    if not math.isfinite(sde.log_noise(t_min)):
        raise ValueError(f"t_min = {t_min}: the noise is 0 there; the smallest safe time is {sde.t_min}")
    return t_min


def _interval(mean: Tensor, std_error: Tensor, degrees: Tensor, level: float) -> tuple[Tensor, Tensor]:
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must be between 0 and 1")
    quantile = stats.t.ppf(0.5 + level / 2, degrees.double().cpu().numpy())
    half = std_error * torch.as_tensor(quantile).to(std_error)
    return mean - half, mean + half


@dataclass(frozen=True)
class _Options:
    """The arguments that the two public functions share, checked."""

    method: str
    trace: str
    probes: int
    probe: str
    target_std_error: float | None
    t_min: float | None
    steps: int | None
    nodes: int | None
    solver: str | None
    rtol: float | None
    atol: float | None
    rows: int | None
    compile: bool | str | Callable[..., Any]

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("trace", TRACES), ("probe", PROBES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(choices)}")
        is_decoupled, is_exact = self.method == "decoupled", self.trace == "exact"
        least = 2 if is_decoupled and not is_exact else 1
        if self.probes < least:
            raise ValueError(f"probes = {self.probes}: must be at least {least}")
        for name in ("steps", "nodes", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.solver is not None and self.solver not in ADAPTIVE_METHODS:
            raise ValueError(f"solver = {self.solver!r}: must be one of {', '.join(ADAPTIVE_METHODS)}")
        of_others = ("solver", "rtol") if is_decoupled else ("steps", "nodes", "rows", "compile", "target_std_error")
        for name in of_others:
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name} = {getattr(self, name)!r}: method {self.method!r} takes none")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: must be positive")
        if self.target_std_error is not None and (is_exact or not 0 < self.target_std_error < math.inf):
            raise ValueError(
                f"target_std_error = {self.target_std_error}: must be positive and finite, and the trace estimated"
            )

    def plan(self, model: Model, size: int) -> Plan:
        """What is asked of ``decoupled.estimate`` for batches of some size."""
        compiled = None
        if self.compile:
            backend: dict[str, Any] = {} if self.compile is True else {"backend": self.compile}
            compiled = torch.compile(decoupled.evaluate, fullgraph=True, dynamic=False, **backend)
        length = model.sde.log_noise(model.sde.t_max) - model.sde.log_noise(start_time(model, self.t_min))
        return Plan(
            self.trace,
            self.probe,
            self.probes,
            self.target_std_error,
            self.steps or math.ceil(length),
            self.nodes or 4,
            self.rows or max(size, 64),
            compiled,
        )


def _evaluate(
    model: Model,
    data: Tensor,
    to_model_space: Callable[[Tensor, Streams], Tensor],
    draws: int,
    options: _Options,
    cond: Mapping[str, Any] | None,
    batch_size: int | None,
    seed: int,
    indices: Sequence[int] | None,
) -> tuple[Tensor, Estimate, float]:
    """Log densities (draws, B), the estimate of their mean, and seconds: batch by batch, from where the model lives."""
    times = (start_time(model, options.t_min), model.sde.t_max)
    if len(data) == 0 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{len(data)} examples, batch_size = {batch_size}: both must be at least 1")
    indices = range(len(data)) if indices is None else indices
    if len(indices) != len(data):
        raise ValueError(f"indices has length {len(indices)}: must be {len(data)}, one for each example")
    batch_size = batch_size or len(data)
    plan = options.plan(model, min(batch_size, len(data)))
    allowed = math.prod(model.data_shape) * (1e-2 if options.atol is None else options.atol)
    batches, started = [], time.perf_counter()
    with evaluating(model):
        for first in range(0, len(data), batch_size):
            batch = range(first, min(len(data), first + batch_size))
            streams = Streams(seed, indices[first : batch.stop], model.device)
            batch_cond = slice_cond(cond, len(data), batch, model.device)
            codes = data[first : batch.stop].to(model.device)
            estimates = []
            for _ in range(draws):
                x = to_model_space(codes, streams)
                if options.method == "decoupled":
                    estimates.append(decoupled.estimate(model, x, streams, times, plan, batch_cond, allowed))
                else:
                    estimates.append(_adaptive(model, x, streams, times, options, batch_cond))
            batches.append(Estimate(*(torch.stack(values) for values in zip(*estimates, strict=True))))
    every = Estimate(*(torch.cat(values, 1) for values in zip(*batches, strict=True)))
    return every.log_prob, _mean(every), time.perf_counter() - started


def _mean(draws: Estimate) -> Estimate:
    """Of estimates (K, B, ...) that are independent, with what all of them cost."""
    count = len(draws.log_prob)
    if count == 1:
        return Estimate(*(values[0] for values in draws))
    variance = draws.std_error.double().square()
    degrees = variance.sum(0).square() / (variance.square() / draws.degrees_of_freedom).sum(0)
    return Estimate(
        draws.log_prob.mean(0),
        (variance.sum(0).sqrt() / count).to(draws.std_error.dtype),
        torch.where(variance.sum(0) == 0, math.inf, degrees).to(draws.std_error.dtype),
        draws.solver_error.mean(0),
        draws.latent[0],
        draws.nfe.sum(0),
        draws.derivative_evaluations.sum(0),
    )


def _adaptive(
    model: Model, x: Tensor, streams: Streams, times: tuple[float, float], options: _Options, cond: dict[str, Any]
) -> Estimate:
    """The augmented ODE of x and of an integral for each block of probes."""
    calls = 0

    def predict(x: Tensor, t: Tensor) -> Prediction:
        nonlocal calls
        calls += 1
        return model.predict(x, t, **cond)

    is_exact = options.trace == "exact"
    size = 1 if is_exact else block_size(options.probe, options.probes)
    blocks = 1 if is_exact else options.probes // size
    latent, change = ProbabilityFlow(model.sde, predict).solve_with_density(
        x,
        times,
        _exact_divergence if is_exact else _hutchinson(x, streams, options.probe, size, blocks),
        estimates=blocks,
        method=options.solver or "dopri5",
        rtol=1e-6 if options.rtol is None else options.rtol,
        atol=1e-6 if options.atol is None else options.atol,
    )
    log_prob = model.sde.prior_log_prob(latent) + change.mean(1)
    every = torch.full((len(x),), calls, device=x.device)
    std_error = change.std(1) / math.sqrt(blocks) if blocks > 1 else torch.full_like(log_prob, math.nan)
    return Estimate(
        log_prob,
        torch.zeros_like(log_prob) if is_exact else std_error,
        torch.full_like(log_prob, math.inf if is_exact else blocks - 1),
        torch.full_like(log_prob, math.nan),
        latent,
        every,
        every * (x[0].numel() if is_exact else options.probes),
    )


def _hutchinson(x: Tensor, streams: Streams, probe: str, size: int, blocks: int) -> Divergence:
    """Draw the probes; the result maps (velocity, x) to its value and an estimate by each block, (B, blocks)."""
    draws = draw_blocks(probe, blocks, size, x.shape[1:], streams, x.dtype)

    def estimate(velocity: Velocity, x: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = vector_jacobian(lambda x: (velocity(x),) * 2, x)
        return value, trace_estimates(gradient, draws).unflatten(0, (blocks, size)).mean(1).T

    return estimate


def _exact_divergence(velocity: Velocity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and the trace of ∂v/∂x (B, 1)."""
    gradient, value = vector_jacobian(lambda x: (velocity(x),) * 2, x)
    return value, exact_trace(gradient, x)[:, None]
