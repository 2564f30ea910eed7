"""What a solver is: a map from noise to data along a grid of times, over any SDE and any model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_diffusion.model import Model, Prediction, take_cond
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.sde import SDE

Noise = Callable[[], Tensor]
# A tensor () or (B,), or what ``Predict.at`` made of a time.
Time = Tensor | SimpleNamespace


class _Calls:
    """How often a model was called."""

    def __init__(self) -> None:
        self.number = 0


class Predict:
    """A model with its conditioning bound, and its calls counted."""

    def __init__(self, model: Model, cond: Mapping[str, Any] | None = None):
        """Bind them; tensors in ``cond`` are as long as the batch."""
        self.model, self.cond, self.calls = model, dict(cond or {}), _Calls()
        # Those for some samples of the batch alone.
        self._parts: list[tuple[Tensor, _Calls]] = []

    def __call__(self, x: Tensor, t: Time) -> Prediction:
        """x̂₀ and ε̂."""
        self.calls.number += 1
        if isinstance(t, Tensor):
            return self.model.predict(x, t, **self.cond)
        return self.model.predict_at(x, t, **self.cond)

    def combine(self, x: Tensor, t: SimpleNamespace, data: float, noise: float) -> Tensor:
        """data x̂₀ + noise ε̂, in fewer operations than from the pair; a factor of 0 leaves its term out."""
        self.calls.number += 1
        return self.model.combine_at(x, t, data, noise, **self.cond)

    def at(self, times: Tensor, x: Tensor, numbers: Callable[[Tensor], Any]) -> list[SimpleNamespace]:
        """Times (N,) in float64 as this and ``combine`` take them, with all that does not depend on x.

        Args:
            times: on the host.
            x: a state (B, ...), of the device and dtype to come.
            numbers: what turns a column (N,) into N numbers.
        """
        columns = self.model.coefficients(times)
        t = columns.pop("t").to(x.device, torch.promote_types(x.dtype, torch.float32))
        rows = {name: numbers(column) for name, column in columns.items()}
        rows["t"] = t.unbind()
        return [SimpleNamespace(**dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]

    def rows(self, indices: Tensor) -> Predict:
        """The same for the samples ``indices`` (B',) of the batch alone, who are counted apart."""
        part = Predict(self.model, take_cond(self.cond, indices))
        self._parts.append((indices, part.calls))
        return part

    def nfe_per_sample(self, size: int) -> Tensor:
        """Calls that each sample of a batch went through, (size,)."""
        counts = torch.full((size,), self.calls.number)
        for indices, calls in self._parts:
            counts[indices.cpu()] += calls.number
        return counts


def unobserved(i: int, x: Tensor) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Problem:
    """One batch to solve.

    Attributes:
        sde: the noising process.
        predict: the model with its conditioning.
        grid: decreasing times, from where x is given to where it is wanted.
        streams: a random stream a sample.
        observe: to be called with (i, x) at grid[i], i > 0.
        compile: what makes one graph of a step's function; None to run it as it is.
    """

    sde: SDE
    predict: Predict
    grid: list[float]
    streams: Streams
    observe: Callable[[int, Tensor], None] = unobserved
    compile: Callable[[Callable], Callable] | None = None

    def predict_rows(self, rows: Tensor) -> Predict:
        """The model for samples ``rows`` (B',) of the batch: t may be (B',), and each of them is counted."""
        return self.predict.rows(rows)

    def single(self, i: int) -> Problem:
        """The problem of sample i alone; it is observed with its batch."""
        return replace(self, predict=self.predict_rows(torch.tensor([i])))


class Solver(ABC):
    """Base of all solvers; the keyword arguments of a subclass are the user's ``solver_options``."""

    default_steps: ClassVar[int] = 50
    default_grid: ClassVar[str] = "log_snr"
    # The solver's own variable is the log-SNR, which must then be finite at either end.
    in_log_snr: ClassVar[bool] = False
    # The model is asked at the last time of the grid too.
    evaluates_end: ClassVar[bool] = False
    # The only times that it is made for.
    times: list[float] | None = None

    @property
    def convergence_order(self) -> int | None:
        """Nominal order of convergence in the step, in law for a stochastic solver; None where it has none."""
        return None

    @property
    def is_stochastic(self) -> bool:
        """Whether it draws noise on its way."""
        return False

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return False

    def check_model(self, model: Model) -> None:  # noqa: B027
        """Raise a ValueError if it cannot solve this one; most can solve any."""

    def steps_for(self, nfe: int) -> int:
        """Steps that ``nfe`` evaluations of the model allow.

        Raises:
            ValueError: if there is no such number, or it is 0.
        """
        each = self.evaluations_per_step()
        if each is None:
            raise ValueError(f"nfe = {nfe}: this solver chooses its own evaluations; set steps or tolerances")
        if nfe < each:
            raise ValueError(f"nfe = {nfe}: must be at least {each}, the evaluations of one step")
        return nfe // each

    def evaluations_per_step(self) -> int | None:
        """Evaluations of the model in one step; None if their number is not fixed."""
        return 1

    @abstractmethod
    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Take x (B, ...) from grid[0] to grid[-1]."""


class StepSolver(Solver):
    """A solver of fixed steps: all coefficients first, in float64, then one line of arithmetic a step."""

    # How many tensors, such as earlier predictions, a step leaves to those after it.
    memory: int = 0
    # Which of the coefficients are times that the model is asked at.
    model_times: ClassVar[tuple[str, ...]] = ("t",)

    @abstractmethod
    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """Coefficients (N,) or (N, K) by name, for the N steps between decreasing times (N + 1,)."""

    @abstractmethod
    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """One step; c holds its coefficients, numbers or K of them, under the names that ``prepare`` gave them.

        The times of the model are as ``predict`` takes them. c.past is a deque of the last ``memory`` tensors that
        steps have appended to it; it starts full of x.
        """

    @property
    def draws_per_step(self) -> int:
        """How often a step calls ``noise``."""
        return int(self.is_stochastic)

    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Prepare, then step."""
        noise = StepNoise(problem.streams, x.shape[1:], x.dtype)
        # Each a tensor of its own: a graph would be made anew where arguments stop being one.
        past = deque([x.clone() for _ in range(self.memory)], maxlen=self.memory)
        step = self.step if problem.compile is None else self._compiled(problem.compile)
        for i, row in enumerate(self.rows(problem, x), start=1):
            x = step(problem.predict, x, SimpleNamespace(**row, past=past), noise)
            problem.observe(i, x)
        return x

    # The rows of the batch before, and the model, grid and kind of state that they are for.
    _last: tuple[Model, list[float], tuple[Any, ...], list[dict[str, Any]]] | None = None

    def rows(self, problem: Problem, x: Tensor) -> list[dict[str, Any]]:
        """The coefficients of each step in turn, computed once for all batches of a run.

        Raises:
            ValueError: if one is not finite.
        """
        kind = (x.dtype, x.device, problem.compile is None)
        if self._last is None or not (
            self._last[0] is problem.predict.model and self._last[1] is problem.grid and self._last[2] == kind
        ):
            self._last = (problem.predict.model, problem.grid, kind, self._rows(problem, x))
        return self._last[3]

    def _rows(self, problem: Problem, x: Tensor) -> list[dict[str, Any]]:
        times = torch.tensor(problem.grid, dtype=torch.float64)
        columns = self.prepare(problem.sde, times)
        for name, values in columns.items():
            if not bool(values.isfinite().all()):
                t = float(times[int((~values.isfinite()).nonzero()[0, 0])])
                raise ValueError(
                    f"grid: the coefficient {name!r} is not finite at t = {t}: stay within [{problem.sde.t_min}, "
                    f"{problem.sde.t_max}], or take a solver or a noise level that is finite there"
                )

        def numbers(column: Tensor) -> Sequence[Any]:
            # A number goes along with the operation that uses it. A graph would be made anew for each: there they
            # are tensors.
            return column.tolist() if problem.compile is None else column.to(x).unbind()

        table = {
            name: problem.predict.at(values, x, numbers) if name in self.model_times else numbers(values)
            for name, values in columns.items()
        }
        return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]

    def _compiled(self, compile: Callable[[Callable], Callable]) -> Callable[..., Tensor]:
        """``step`` as a graph, to which all that changes from step to step is an argument."""
        advance = compile(self._advance)

        def step(predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
            draws = [noise() for _ in range(self.draws_per_step)]
            x, calls = advance(predict.model, predict.cond, x, c, draws)
            predict.calls.number += calls
            return x

        return step

    def _advance(
        self, model: Model, cond: dict[str, Any], x: Tensor, c: SimpleNamespace, draws: list[Tensor]
    ) -> tuple[Tensor, int]:
        predict, last_first = Predict(model, cond), draws[::-1]
        return self.step(predict, x, c, last_first.pop), predict.calls.number
