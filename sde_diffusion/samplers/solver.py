"""What a solver is: a map from noise to data along a grid of times, over any SDE and any model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from sde_diffusion.model import Prediction
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.sde import SDE

Predict = Callable[[Tensor, Tensor], Prediction]
Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """One batch to solve.

    Attributes:
        sde: the noising process.
        predict: (x, t) -> (x̂₀, ε̂), with its conditioning bound and its calls counted.
        grid: decreasing times, from where x is given to where it is wanted.
        streams: a random stream a sample.
        observe: to be called with (i, x) at grid[i], i > 0.
        predict_alone: i -> predict for sample i of the batch alone.
    """

    sde: SDE
    predict: Predict
    grid: list[float]
    streams: Streams
    observe: Callable[[int, Tensor], None]
    predict_alone: Callable[[int], Predict]

    def single(self, i: int) -> Problem:
        """The problem of sample i alone; it is observed with its batch."""
        return replace(self, predict=self.predict_alone(i))


class Solver(ABC):
    """Base of all solvers; the keyword arguments of a subclass are the user's ``solver_options``."""

    default_steps: ClassVar[int] = 50
    default_grid: ClassVar[str] = "log_snr"
    # The solver's own variable is the log-SNR, which must then be finite at either end.
    in_log_snr: ClassVar[bool] = False
    # The model is asked at the last time of the grid too.
    evaluates_end: ClassVar[bool] = False

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

    # How many tensors, such as earlier predictions, a step may leave to those after it.
    memory: int = 0

    @abstractmethod
    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """Coefficients (N,) or (N, K) by name, for the N steps between decreasing times (N + 1,)."""

    @abstractmethod
    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """One step; c holds its coefficients, () or (K,) each, under the names that ``prepare`` gave them.

        c.past is a deque of the last ``memory`` tensors that steps have appended to it, empty at first.
        """

    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Prepare, then step."""
        times = torch.tensor(problem.grid, dtype=torch.float64)
        coefficients = self.prepare(problem.sde, times)
        for name, values in coefficients.items():
            if not bool(values.isfinite().all()):
                t = float(times[int((~values.isfinite()).nonzero()[0, 0])])
                raise ValueError(
                    f"grid: the coefficient {name!r} is not finite at t = {t}: stay within [{problem.sde.t_min}, "
                    f"{problem.sde.t_max}], or take a solver or a noise level that is finite there"
                )
        columns = [value.to(device=x.device, dtype=x.dtype).unbind() for value in coefficients.values()]
        noise = StepNoise(problem.streams, x.shape[1:], x.dtype)
        past: deque[Tensor] = deque(maxlen=self.memory)
        for i, row in enumerate(zip(*columns, strict=True), start=1):
            c = SimpleNamespace(**dict(zip(coefficients, row, strict=True)), past=past)
            x = self.step(problem.predict, x, c, noise)
            problem.observe(i, x)
        return x
