r"""Using a trained model: latents, interpolation between data, and generation seen step by step.

* ``encode`` and ``decode`` follow the probability-flow ODE from data to noise and back. It is invertible, so the
  latent keeps everything, and decoding it returns the data (Song et al. 2021, arXiv:2011.13456, section 4.3).
  Forwards it is solved over u = log(σ/α): on the way up an error made at σ grows like 1/σ, so that the small σ, where
  the finest structure turns into noise, need a fair share of the steps.
* ``interpolate`` mixes two examples at one noise level and decodes the mixture, with weights w from 0 to 1:

      ode             the latents x_t of both, mixed on the great circle between them        (Song et al., as above)
      shared_noise    x_t = α x₀ + σ ε with one ε for both, (1 − w) x_t,a + w x_t,b          (Ho et al. 2020,
                                                                           arXiv:2006.11239, section 4.4)

  One ε, because then the mixture α ((1 − w) x₀,a + w x₀,b) + σ ε has the noise that the model expects at t; that of two
  would have (1 − w)² + w² of its variance. A larger t leaves less of the two, for the model to invent more.
* ``slerp`` turns a towards b by the angle θ between them: [sin((1 − w)θ) â + sin(wθ) b̂]/sin θ, at the norm
  (1 − w)‖a‖ + w‖b‖. Noise in many dimensions lies near a sphere, which a straight line would leave.
* ``progressive`` keeps x̂₀, what the model expects of the data, on the way from noise to data: the coarse features
  come first (Ho et al. 2020, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import runge_kutta
from sde_diffusion.model import Model, Prediction, Wrapped, check_finite, evaluating, slice_cond
from sde_diffusion.ode import ADAPTIVE_METHODS, PER_SAMPLE_METHODS, integrate
from sde_diffusion.samplers import SOLVERS, sample
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.samplers.solver import Predict
from sde_diffusion.sde import SDE, drift_in_log_noise

METHODS = ("ode", "shared_noise")


@torch.no_grad()
def encode(
    model: Model,
    x: Tensor,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    method: str = "dormand_prince",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Latents of data: where the probability-flow ODE takes x from t_start up to t_end.

    Args:
        model: a trained or exact model.
        x: (B, *data_shape), floating, in the model's units.
        t_start: the time of x; t_min by default.
        t_end: the time of the latents; t_max by default, where they are distributed as the prior.
        method: "dormand_prince", or an adaptive method of torchdiffeq, whose steps a batch shares: up to the tolerance,
            an example then depends on its neighbours.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        cond: keyword arguments for the model; tensors of length B are cut into batches.
        batch_size: examples solved together; all by default.

    Returns:
        (B, *data_shape), of x's dtype.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if the solver cannot meet the tolerance.
    """
    model.check_data("x", x)
    check_finite("x", x)
    _check_method(method)
    if len(x) == 0 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{len(x)} examples, batch_size = {batch_size}: both must be at least 1")
    sde = model.sde
    start = sde.t_min if t_start is None else sde.check_time("t_start", t_start)
    end = sde.t_max if t_end is None else sde.check_time("t_end", t_end)
    if not start < end:
        raise ValueError(f"t_start = {start}, t_end = {end}: to encode, t_end must be the larger")
    for name, t in (("t_start", start), ("t_end", end)):
        if not math.isfinite(sde.log_noise(t)):
            raise ValueError(f"{name} = {t}: the log-SNR is infinite there; choose from [{sde.t_min}, {sde.t_max}]")
    batch_size = batch_size or len(x)
    latents = []
    with evaluating(model):
        for first in range(0, len(x), batch_size):
            indices = range(first, min(len(x), first + batch_size))
            predict = Predict(model, slice_cond(cond, len(x), indices, model.device))
            batch = x[first : indices.stop].to(model.device)
            latents.append(_rise(sde, predict, batch, start, end, method, rtol=rtol, atol=atol))
    return torch.cat(latents)


def _rise(sde: SDE, predict: Predict, x: Tensor, start: float, end: float, method: str, **tolerances: Any) -> Tensor:
    """Solve dx/du from one time to a later one."""
    grid = [sde.log_noise(start), sde.log_noise(end)]

    def slope_of(rows: Tensor) -> runge_kutta.Slope:
        part = predict.rows(rows)
        return lambda x, u: drift_in_log_noise(sde, part, x, u)

    if method in PER_SAMPLE_METHODS:
        return runge_kutta.solve(slope_of, x, grid, to_time=sde.t_from_log_noise, **tolerances)[-1]

    def rates(state: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        return (drift_in_log_noise(sde, predict, state[0], u),)

    return integrate(rates, (x,), grid, method=method, to_time=sde.t_from_log_noise, **tolerances)[0]


def decode(
    model: Model,
    z: Tensor,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    method: str = "dormand_prince",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Data of latents, the inverse of ``encode``: ``sample`` with solver "ode" from z at t_start down to t_end.

    Args:
        model: a trained or exact model.
        z: (B, *data_shape), floating.
        t_start: the time of z; t_max by default.
        t_end: the time of the data; t_min by default.
        method, rtol, atol, cond: as in ``encode``.
        batch_size: latents solved together; as in ``sample``.

    Returns:
        (B, *data_shape), of z's dtype.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if the solver cannot meet the tolerance.
    """
    model.check_data("z", z)
    check_finite("z", z)
    _check_method(method)
    return sample(
        model,
        len(z),
        x_start=z,
        t_start=t_start,
        t_end=t_end,
        cond=cond,
        batch_size=batch_size,
        solver="ode",
        method=method,
        rtol=rtol,
        atol=atol,
    ).samples


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each a (B, ...) towards its b: directions by angle, norms linearly.

    Args:
        a: (B, ...), where weight 0 stays.
        b: of a's shape, where weight 1 arrives.
        weight: share of the angle and of the difference of norms, in [0, 1].

    Raises:
        ValueError: for unequal shapes, a weight out of range, an example that is 0 and so has no direction, or two in
            opposite directions, between which there is no one great circle.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}: must be equal")
    _check_weights([weight])
    axes = tuple(range(1, a.ndim))
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (a, b))
    for name, norm in (("a", norm_a), ("b", norm_b)):
        if not bool((norm > 0).all()):
            raise ValueError(f"{name} holds an example of norm 0 or NaN: it has no direction")
    difference, total = (
        torch.linalg.vector_norm(a / norm_a + sign * b / norm_b, dim=axes, keepdim=True) for sign in (-1, 1)
    )
    # Below this, more than half of the digits of the great circle's plane are rounding.
    if not bool((total > math.sqrt(torch.finfo(a.dtype).eps)).all()):
        raise ValueError("a and b hold examples in opposite directions: there is no one great circle between them")
    angle = 2 * torch.atan2(difference, total)
    norm = (1 - weight) * norm_a + weight * norm_b
    # sin(wθ)/sin θ, which is w at θ = 0.
    share_a, share_b = (w * torch.sinc(w * angle / math.pi) / torch.sinc(angle / math.pi) for w in (1 - weight, weight))
    return share_a * norm / norm_a * a + share_b * norm / norm_b * b


@torch.no_grad()
def interpolate(
    model: Model,
    x_a: Tensor,
    x_b: Tensor,
    weights: int | Sequence[float] = 9,
    *,
    method: str = "ode",
    t: float | None = None,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Interpolate between each example of x_a and its partner in x_b.

    Pair i of "shared_noise" draws from streams of its own, the same for all weights: along a row only the weight
    changes. Its ends are new data near x_a and x_b; those of "ode" are x_a and x_b, up to the tolerance.

    Args:
        model: a trained or exact model.
        x_a: (B, *data_shape), floating, in the model's units.
        x_b: of x_a's shape.
        weights: shares of x_b in [0, 1], or how many of them, equally spaced from 0 to 1.
        method: "ode" or "shared_noise".
        t: the time at which the two are mixed; t_max by default for "ode", needed for "shared_noise".
        cond: keyword arguments for the model; tensors of length B are cut into batches.
        batch_size: pairs solved together.
        seed: of the noise of "shared_noise".
        **options: for "ode", ``rtol`` and ``atol`` of ``encode``; for "shared_noise" those of ``sample``, as ``solver``
            (by default "ddpm") and ``steps``.

    Returns:
        (K, B, *data_shape), one row of B a weight.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if an adaptive solver cannot go on.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    for name, x in (("x_a", x_a), ("x_b", x_b)):
        model.check_data(name, x)
        check_finite(name, x)
    if len(x_a) != len(x_b):
        raise ValueError(f"x_a holds {len(x_a)} examples, x_b {len(x_b)}: must be as many")
    if isinstance(weights, int):
        if weights < 2:
            raise ValueError(f"weights = {weights}: must be at least 2, or the weights themselves")
        weights = [i / (weights - 1) for i in range(weights)]
    _check_weights(weights)
    if t is not None:
        model.sde.check_time("t", t)
    shared: dict[str, Any] = {"cond": cond, "batch_size": batch_size, **options}
    if method == "ode":
        a, b = (encode(model, x, t_end=t, **shared) for x in (x_a, x_b))
        return torch.stack([decode(model, slerp(a, b, weight), t_start=t, **shared) for weight in weights])
    if t is None:
        raise ValueError("t = None: method 'shared_noise' needs the time at which the two are mixed")
    # Decoding draws from streams 0, 1, ...
    streams = Streams(seed, [-1 - i for i in range(len(x_a))], model.device)
    noise = streams.normal(model.data_shape, x_a.dtype)
    a, b = (model.sde.perturb(x.to(noise), t, noise) for x in (x_a, x_b))
    shared = {"solver": "ddpm", "t_start": t, "seed": seed, **shared}
    return torch.stack(
        [sample(model, len(a), x_start=torch.lerp(a, b, weight), **shared).samples for weight in weights]
    )


@dataclass(frozen=True)
class Progression:
    """What ``progressive`` returns.

    Attributes:
        x0: (K, n, *data_shape), x̂₀ at K times, from coarse to fine.
        times: those times, K of them, decreasing.
        samples: (n, *data_shape), where the process ended.
        nfe: evaluations of the model for each sample; x̂₀ comes out of them and takes none of its own.
        seconds: wall-clock time.
    """

    x0: Tensor
    times: list[float]
    samples: Tensor
    nfe: int
    seconds: float


def progressive(
    model: Model,
    n: int,
    levels: int = 10,
    *,
    steps: int = 1000,
    solver: str = "ddpm",
    grid: str = "angle",
    guidance: Callable[[Model], Model] | None = None,
    **options: Any,
) -> Progression:
    """Draw samples, and keep the model's estimate of each of them at several times on the way.

    Args:
        model: a trained or exact model.
        n: how many samples.
        levels: K >= 2, the number of times: equally spaced among the steps, the first and the last of them included.
        steps: steps of the solver, at least ``levels``.
        solver: a name in ``solvers()``, of a solver with one evaluation a step.
        grid: the solver's steps; "angle" has the levels at an even pace from noise to data.
        guidance: maps the model to the one to be sampled from.
        **options: those of ``sample``, as ``seed`` and ``cond``.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
    """
    if not 2 <= levels <= steps:
        raise ValueError(f"levels = {levels}, steps = {steps}: need 2 <= levels <= steps")
    if solver in SOLVERS and SOLVERS[solver]().evaluations_per_step() != 1:
        raise ValueError(f"solver = {solver!r}: must be one with one evaluation a step, such as 'ddpm' or 'ddim'")
    kept = [round(i * (steps - 1) / (levels - 1)) for i in range(levels)]
    watched = _Watched(guidance(model) if guidance else model, kept, steps)
    out = sample(model, n, steps=steps, solver=solver, grid=grid, guidance=lambda _: watched, **options)
    batches = [torch.stack(watched.x0[i : i + levels]) for i in range(0, len(watched.x0), levels)]
    return Progression(torch.cat(batches, 1), [out.times[i] for i in kept], out.samples, out.nfe, out.seconds)


class _Watched(Wrapped):
    """A model called once a step of one batch after another, with the x̂₀ of the steps to be kept."""

    def __init__(self, model: Model, kept: Sequence[int], steps: int):
        super().__init__(model)
        self.kept, self.steps = kept, steps
        self.calls, self.x0 = 0, list[Tensor]()

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        prediction = self.model.predict(x, t, **cond)
        if self.calls % self.steps in self.kept:
            self.x0.append(prediction.x0)
        self.calls += 1
        return prediction


def _check_method(method: str) -> None:
    known = PER_SAMPLE_METHODS + ADAPTIVE_METHODS
    if method not in known:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(known)}")


def _check_weights(weights: Sequence[float]) -> None:
    if len(weights) == 0 or not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"weights = {list(weights)}: must be at least one, all in [0, 1]")
