"""``sample``: one call from noise to data with any solver, any model and any SDE."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sde_diffusion.model import Model, Prediction, Wrapped, check_finite, evaluating, slice_cond
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers.auto import choose
from sde_diffusion.samplers.calibrated import Calibrated, find
from sde_diffusion.samplers.grids import check_log_snr, time_grid
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.samplers.registry import check_options, make_solver
from sde_diffusion.samplers.solver import Predict, Problem, Solver, StepSolver, unobserved
from sde_diffusion.samplers.thresholding import Thresholded
from sde_diffusion.sde import SDE

# By default a batch holds 2²⁰ numbers, but no more samples than whose random streams fit into some 50 MB.
_NUMBERS_A_BATCH = 2**20
_SAMPLES_A_BATCH = 2**14


@dataclass(frozen=True)
class Samples:
    """What ``sample`` returns.

    Attributes:
        samples: (n, *data_shape), distributed as p at times[-1]; of a shard, its share of the n.
        nfe: evaluations of the model that a sample went through; the largest, if samples differ.
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
    solver: str | os.PathLike[str] | Solver = "auto",
    nfe: int | None = None,
    steps: int | None = None,
    grid: str | Sequence[float] | None = None,
    x_start: Tensor | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    cond: Mapping[str, Any] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    threshold: str | float | None = None,
    denoise: bool = False,
    batch_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
    compile: bool | str | Callable[..., Any] = False,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trajectory: bool = False,
    callback: Callable[[int, float, Tensor], None] | None = None,
    progress: bool = False,
    **solver_options: Any,
) -> Samples:
    """Draw samples by solving the reverse diffusion.

    Sample i of a seed draws from a stream of its own, so it is the same whatever n, the batch size or the
    number of processes (up to rounding; with an adaptive method of torchdiffeq, which shares its steps within a batch,
    up to its tolerance).

    Args:
        model: a trained or exact model.
        n: how many.
        solver: a name in ``solvers()``, a solver, or the file of a calibrated one. "auto" chooses, for the number of
            evaluations or, without one, for its tolerances rtol and atol; "calibrated" is the one beside the model.
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
        threshold: keeps x̂₀ in the range of ``model.data``: "static", "dynamic", or the quantile of "dynamic".
        denoise: return x̂₀ at t_end, with one more evaluation, in place of the state there with its last noise.
        batch_size: samples solved together; by default as many as hold 2²⁰ numbers, at most 2¹⁴.
        shard: (rank, number of ranks): solve this rank's part of the n samples alone, in order.
        compile: make one graph of a step of fixed shape, for all steps and batches: True, or torch.compile's backend.
        autocast: the dtype that the network's matrix products and convolutions run in, such as torch.bfloat16; the
            state keeps its own.
        seed: of all random numbers.
        device: where to compute, which for a network is where its parameters are; the model's device by default.
        dtype: of the samples; by default that of x_start, of the model's parameters, or torch's default.
        trajectory: keep the states at all times of the grid.
        callback: called with (i, t, x) after step i of every batch; of an adaptive method, at the points of the grid.
        progress: show a bar.
        **solver_options: keyword arguments of the solver's class.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
        SolverError: if an adaptive solver cannot go on, or the model is not finite; names the time and the sample.
    """
    wanted = _Wanted(nfe, steps, grid, t_start, t_end)
    wanted.check()
    method = _solver(solver, solver_options, model, wanted)
    guided = guidance(model) if guidance else model
    method.check_model(guided)
    times = _grid(model, method, wanted, x_start is not None, trajectory)
    if denoise:
        model.check_time("t_end", times[-1])
    if n < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"n = {n}, batch_size = {batch_size}: must be at least 1")
    if x_start is not None:
        model.check_data("x_start", x_start)
        check_finite("x_start", x_start)
        if len(x_start) != n:
            raise ValueError(f"x_start holds {len(x_start)} states: must hold n = {n}")
    run = _Run(
        guided if threshold is None else Thresholded(guided, threshold),
        method,
        times,
        n,
        x_start,
        cond,
        seed,
        torch.device(device or model.device),
        dtype or (model.dtype if x_start is None else x_start.dtype),
        _compiler(compile, method),
    )
    share = share_of(n, shard)
    batch_size = batch_size or max(1, min(_SAMPLES_A_BATCH, _NUMBERS_A_BATCH // math.prod(model.data_shape)))
    batch_size = min(batch_size, len(share))
    results, paths, counts = [], [], []
    started = time.perf_counter()
    bar = tqdm(total=math.ceil(len(share) / batch_size) * (len(times) - 1), unit="step", disable=not progress)
    with evaluating(model), bar, torch.autocast(run.device.type, autocast, enabled=autocast is not None):
        for first in range(share.start, share.stop, batch_size):
            indices = range(first, min(share.stop, first + batch_size))
            path = _Path(len(indices), times, trajectory, callback, bar)
            result, nfe_per_sample = run.solve(indices, batch_size, path, denoise)
            results.append(result)
            counts.append(nfe_per_sample)
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


class _Path:
    """What is seen of a batch on its way."""

    def __init__(
        self,
        size: int,
        times: list[float],
        keep: bool,
        callback: Callable[[int, float, Tensor], None] | None,
        bar: tqdm,
    ):
        self.size, self.times, self.keep, self.callback, self.bar = size, times, keep, callback, bar
        self.states: list[Tensor] = []

    def start(self, x: Tensor) -> None:
        if self.keep:
            self.states = [x[: self.size]]

    def observe(self, i: int, x: Tensor) -> None:
        self.bar.update()
        if self.keep:
            self.states.append(x[: self.size])
        if self.callback is not None:
            self.callback(i, self.times[i], x[: self.size])


@dataclass(frozen=True)
class _Run:
    """What all batches have in common."""

    model: Model
    solver: Solver
    times: list[float]
    n: int
    x_start: Tensor | None
    cond: Mapping[str, Any] | None
    seed: int
    device: torch.device
    dtype: torch.dtype
    compile: Callable[[Callable], Callable] | None

    def solve(self, indices: range, batch_size: int, path: _Path, denoise: bool) -> tuple[Tensor, Tensor]:
        """The samples ``indices``, and the evaluations that each went through."""
        # A graph is for one shape: a batch is filled up with samples that are thrown away.
        size = batch_size if self.compile else len(indices)
        predict = Predict(self.model, _fill(slice_cond(self.cond, self.n, indices, self.device), size))
        problem, x = self._begin(predict, indices, size, path.observe, self.compile)
        path.start(x)
        result = self.solver.solve(problem, x)
        if denoise:
            result = predict(result, result.new_tensor(self.times[-1])).x0
        result = result[: len(indices)]
        if not bool(result.isfinite().all()):
            self._explain(result, indices)
        return result, predict.nfe_per_sample(size)[: len(indices)]

    def _begin(
        self,
        predict: Predict,
        indices: range,
        size: int,
        observe: Callable[[int, Tensor], None] = unobserved,
        compile: Callable[[Callable], Callable] | None = None,
    ) -> tuple[Problem, Tensor]:
        """The problem and the state at its start."""
        streams = Streams(self.seed, range(indices.start, indices.start + size), self.device)
        problem = Problem(self.model.sde, predict, self.times, streams, observe, compile)
        if self.x_start is None:
            x = _prior_std(self.model.sde, self.times[0]) * streams.normal(self.model.data_shape, self.dtype)
        else:
            x = self.x_start[indices.start : indices.stop].to(device=self.device, dtype=self.dtype)
        return problem, _fill({"x": x}, size)["x"]

    def _explain(self, result: Tensor, indices: range) -> None:
        """Solve again, looking at every answer of the model, and raise a SolverError."""
        predict = Predict(_Checked(self.model, indices), slice_cond(self.cond, self.n, indices, self.device))
        self.solver.solve(*self._begin(predict, indices, len(indices)))
        sample = indices[int((~result.flatten(1).isfinite().all(1)).nonzero()[0])]
        raise SolverError(f"sample {sample} left the finite numbers before t = {self.times[-1]:.6g}")


class _Checked(Wrapped):
    """A model that raises a SolverError where it is not finite."""

    def __init__(self, model: Model, indices: range):
        super().__init__(model)
        self.indices = indices

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        prediction = self.model.predict(x, t, **cond)
        finite = torch.stack([part.flatten(1).isfinite().all(1) for part in prediction]).all(0)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            at = float(torch.as_tensor(t).expand(len(x))[row])
            which = f"sample {self.indices[row]}" if len(x) == len(self.indices) else "a sample"
            raise SolverError(f"the model's prediction for {which} is not finite at t = {at:.6g}")
        return prediction


class _Wanted(NamedTuple):
    """Steps and times that the user asks for."""

    nfe: int | None
    steps: int | None
    grid: str | Sequence[float] | None
    t_start: float | None
    t_end: float | None

    def check(self) -> None:
        if self.steps is not None and self.nfe is not None:
            raise ValueError(f"steps = {self.steps} and nfe = {self.nfe}: give one of them")
        for name, number in (("steps", self.steps), ("nfe", self.nfe)):
            if number is not None and number < 1:
                raise ValueError(f"{name} = {number}: must be at least 1")
        given_times = self.grid is not None and not isinstance(self.grid, str)
        if given_times and not (self.steps is self.nfe is self.t_start is self.t_end is None):
            raise ValueError("grid is given as times: steps, nfe, t_start and t_end cannot be given too")


def _solver(
    solver: str | os.PathLike[str] | Solver,
    options: dict[str, Any],
    model: Model,
    wanted: _Wanted,
) -> Solver:
    """The solver that is meant, for a model and a number of evaluations."""
    nfe, grid = wanted.nfe or wanted.steps, wanted.grid
    if isinstance(solver, Solver):
        if options:
            raise ValueError(f"{', '.join(options)}: a solver that is given whole takes no options")
        return solver
    if solver == "auto":
        check_options("auto", choose, options)
        if grid is not None and not isinstance(grid, str):
            nfe = len(grid) - 1
        chosen = choose(model.sde, nfe, wanted.t_start, wanted.t_end, math.prod(model.data_shape), **options)
        if grid is not None:
            chosen.times = None
        return chosen
    if solver == "calibrated":
        check_options("calibrated", find, options)
        return find(model, nfe, **options)
    if Path(solver).suffix == ".safetensors":
        check_options(str(solver), Calibrated.load, options)
        return Calibrated.load(solver, **options)
    return make_solver(str(solver), options)


def share_of(n: int, shard: tuple[int, int]) -> range:
    """The samples of one rank, (rank, number of ranks): parts in order, whose sizes differ by at most one."""
    rank, ranks = shard
    if not 0 <= rank < ranks <= n:
        raise ValueError(f"shard = {shard}: need 0 <= rank < number of ranks <= n = {n}")
    return range(rank * n // ranks, (rank + 1) * n // ranks)


def _compiler(backend: bool | str | Callable[..., Any], solver: Solver) -> Callable[[Callable], Callable] | None:
    if backend is False:
        return None
    if not isinstance(solver, StepSolver):
        raise ValueError(f"compile = {backend!r}: {type(solver).__name__} is no solver of fixed steps")
    options = {} if backend is True else {"backend": backend}
    return partial(torch.compile, fullgraph=True, dynamic=False, **options)


def _fill(values: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Tensors of a batch made ``size`` long by repeating their last row."""
    return {
        name: torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])
        if isinstance(value, Tensor) and value.ndim and len(value) < size
        else value
        for name, value in values.items()
    }


def _prior_std(sde: SDE, start: float) -> float:
    """Standard deviation of the noise to start from at t_max, or after it."""
    return sde.prior_std if start <= sde.t_max else float(sde.sigma(torch.tensor(start, dtype=torch.float64)))


def _grid(model: Model, solver: Solver, wanted: _Wanted, has_start: bool, trajectory: bool) -> list[float]:
    if solver.times is not None:
        _check_own_times(solver.times, wanted)
        wanted = _Wanted(None, None, solver.times, None, None)
    nfe, steps, grid, t_start, t_end = wanted
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


def _check_own_times(times: list[float], wanted: _Wanted) -> None:
    """Raise a ValueError that names what a solver of these times contradicts."""
    has = _Wanted(len(times) - 1, len(times) - 1, times, times[0], times[-1])
    for name, value, own in zip(_Wanted._fields, wanted, has, strict=True):
        if value is not None and value != own:
            raise ValueError(f"{name} = {value}: this solver is made for {name} = {own}")
