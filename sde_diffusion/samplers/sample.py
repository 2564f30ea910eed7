"""``sample``: one call from noise to data with any solver, any model and any SDE."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.model import Model, check_finite, evaluating, slice_cond
from sde_diffusion.samplers.grids import check_log_snr, time_grid
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.samplers.registry import make_solver
from sde_diffusion.samplers.solver import Predict, Problem, Solver
from sde_diffusion.sde import SDE

# By default a batch holds 2²⁰ numbers, but no more samples than whose random streams fit into some 50 MB.
_NUMBERS_A_BATCH = 2**20
_SAMPLES_A_BATCH = 2**14


@dataclass(frozen=True)
class Samples:
    """What ``sample`` returns.

    Attributes:
        samples: (n, *data_shape), distributed as p at times[-1].
        nfe: evaluations of the model that a sample went through; the largest, if batches differ.
        nfe_per_sample: (n,) the same for each.
        seconds: wall-clock time.
        times: the grid of times.
        trajectory: (len(times), n, *data_shape), or None if it was not asked for.
    """

    samples: Tensor
    nfe: int
    nfe_per_sample: Tensor
    seconds: float
    times: list[float]
    trajectory: Tensor | None = None


@torch.no_grad()
def sample(
    model: Model,
    n: int,
    *,
    solver: str = "ode",
    nfe: int | None = None,
    steps: int | None = None,
    grid: str | Sequence[float] | None = None,
    x_start: Tensor | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    cond: Mapping[str, Any] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trajectory: bool = False,
    callback: Callable[[int, float, Tensor], None] | None = None,
    **solver_options: Any,
) -> Samples:
    """Draw samples by solving the reverse diffusion.

    Sample i of a seed draws from a stream of its own, so it is the same whatever n, the batch size or the
    number of processes (up to rounding; with an adaptive "ode", which shares its steps within a batch, up to
    its tolerance).

    Args:
        model: a trained or exact model.
        n: how many.
        solver: a name in ``solvers()``.
        nfe: evaluations of the model allowed; excludes ``steps``.
        steps: steps of the solver; its own default if neither is given. An adaptive method takes its own, and this
            sets the points at which its trajectory is kept.
        grid: a key of ``grids.GRIDS``, or the decreasing times themselves; by default the solver's, or "angle" where
            the log-SNR is infinite.
        x_start: where to start, (n, *data_shape), in place of draws from the prior.
        t_start: the time of x_start; t_max by default. Without x_start it may be after t_max, up to T: where no data
            are left in x_T, as for a ``FlowSDE`` at 1, the prior is exact. A stochastic solver must then have a finite
            noise level.
        t_end: where to stop; t_min by default.
        cond: keyword arguments for the model; tensors of length n are cut into batches.
        guidance: maps the model to the one to be sampled from.
        batch_size: samples solved together; by default as many as hold 2²⁰ numbers, at most 2¹⁴.
        seed: of all random numbers.
        device: where to compute, which for a network is where its parameters are; the model's device by default.
        dtype: of the samples; by default that of x_start, of the model's parameters, or torch's default.
        trajectory: keep the states at all times of the grid.
        callback: called with (i, t, x) after step i of every batch; of an adaptive method, at the points of the grid.
        **solver_options: keyword arguments of the solver's class.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if an adaptive solver cannot go on.
    """
    method = make_solver(solver, solver_options)
    times = _grid(model, method, nfe, steps, grid, t_start, t_end, x_start is not None, trajectory)
    if n < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"n = {n}, batch_size = {batch_size}: must be at least 1")
    device = torch.device(device or model.device)
    dtype = dtype or (model.dtype if x_start is None else x_start.dtype)
    if x_start is not None:
        model.check_data("x_start", x_start)
        check_finite("x_start", x_start)
        if len(x_start) != n:
            raise ValueError(f"x_start holds {len(x_start)} states: must hold n = {n}")
    batch_size = batch_size or max(1, min(_SAMPLES_A_BATCH, _NUMBERS_A_BATCH // math.prod(model.data_shape)))
    guided = guidance(model) if guidance else model
    results, paths, counts = [], [], []
    started = time.perf_counter()
    with evaluating(model):
        for first in range(0, n, batch_size):
            indices = range(first, min(n, first + batch_size))
            streams = Streams(seed, indices, device)
            if x_start is None:
                x = _prior_std(model.sde, times[0]) * streams.normal(model.data_shape, dtype)
            else:
                x = x_start[first : indices.stop].to(device=device, dtype=dtype)
            predict = Predict(guided, slice_cond(cond, n, indices, device))
            path = _Path(x, times, trajectory, callback)
            results.append(method.solve(Problem(model.sde, predict, times, streams, path.observe), x))
            counts.append(predict.nfe_per_sample(len(indices)))
            if trajectory:
                paths.append(torch.stack(path.states))
    nfe_per_sample = torch.cat(counts)
    return Samples(
        torch.cat(results),
        int(nfe_per_sample.max()),
        nfe_per_sample,
        time.perf_counter() - started,
        times,
        torch.cat(paths, 1) if trajectory else None,
    )


def _prior_std(sde: SDE, start: float) -> float:
    """Standard deviation of the noise to start from at t_max, or after it."""
    return sde.prior_std if start <= sde.t_max else float(sde.sigma(torch.tensor(start, dtype=torch.float64)))


class _Path:
    """What is seen of a batch on its way."""

    def __init__(
        self, x: Tensor, times: list[float], keep: bool, callback: Callable[[int, float, Tensor], None] | None
    ):
        self.states, self.times, self.keep, self.callback = [x], times, keep, callback

    def observe(self, i: int, x: Tensor) -> None:
        if self.keep:
            self.states.append(x)
        if self.callback is not None:
            self.callback(i, self.times[i], x)


def _grid(
    model: Model,
    solver: Solver,
    nfe: int | None,
    steps: int | None,
    grid: str | Sequence[float] | None,
    t_start: float | None,
    t_end: float | None,
    has_start: bool,
    trajectory: bool,
) -> list[float]:
    if steps is not None and nfe is not None:
        raise ValueError(f"steps = {steps} and nfe = {nfe}: give one of them")
    if grid is not None and not isinstance(grid, str) and not (steps is nfe is t_start is t_end is None):
        raise ValueError("grid is given as times: steps, nfe, t_start and t_end cannot be given too")
    for name, number in (("steps", steps), ("nfe", nfe)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    sde = model.sde
    start = sde.t_max if t_start is None else sde.check_time("t_start", t_start)
    end = sde.t_min if t_end is None else sde.check_time("t_end", t_end)
    if nfe is not None:
        steps = solver.steps_for(nfe)
    if steps is None:
        # An adaptive method needs no stops on its way but those that are to be looked at.
        steps = 1 if solver.is_adaptive and not trajectory else solver.default_steps
    if grid is None:
        is_finite = math.isfinite(sde.log_noise(start)) and math.isfinite(sde.log_noise(end))
        grid = solver.default_grid if is_finite or solver.in_log_snr else "angle"
    times = time_grid(sde, grid, start, end, steps)
    if solver.in_log_snr:
        check_log_snr(sde, times[0], times[-1])
    model.check_time("t_start", times[0])
    if solver.evaluates_end:
        model.check_time("t_end", times[-1])
    if times[0] < sde.t_max and not has_start:
        raise ValueError(f"t_start = {times[0]}: a start before t_max = {sde.t_max} needs x_start")
    return times
