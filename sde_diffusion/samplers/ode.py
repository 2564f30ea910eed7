r"""The probability-flow ODE handed to torchdiffeq; ``sde_diffusion.ode`` has the equation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sde_diffusion.ode import ADAPTIVE_METHODS, FIXED_METHODS, ProbabilityFlow
from sde_diffusion.samplers.solver import Problem, Solver

_EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


class ODE(Solver):
    """Any method of torchdiffeq, adaptive or of fixed steps, by its name."""

    # Adams methods need steps that are equal in the solver's own variable.
    default_grid: ClassVar[str] = "angle"
    evaluates_end: ClassVar[bool] = True

    def __init__(self, method: str = "dopri5", rtol: float = 1e-4, atol: float = 1e-4):
        """Choose method and tolerances; see ``sde_diffusion.ode.integrate`` for both and for the errors."""
        known = ADAPTIVE_METHODS + FIXED_METHODS
        if method not in known:
            raise ValueError(f"method = {method!r}: must be one of {', '.join(known)}")
        self.method, self.rtol, self.atol = method, rtol, atol

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE_METHODS

    def evaluations_per_step(self) -> int | None:
        """Those of a method of fixed steps."""
        return _EVALUATIONS.get(self.method)

    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Integrate from grid[0] to grid[-1]."""
        flow = ProbabilityFlow(problem.sde, problem.predict)
        return flow.solve(x, problem.grid, problem.observe, method=self.method, rtol=self.rtol, atol=self.atol)
