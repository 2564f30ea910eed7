r"""The probability-flow ODE, its steps chosen for each sample or left to torchdiffeq; ``sde_diffusion.ode`` has it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sde_diffusion.ode import ADAPTIVE_METHODS, FIXED_METHODS, PER_SAMPLE_METHODS, ProbabilityFlow
from sde_diffusion.samplers.solver import Problem, Solver

# None of these takes more evaluations a step than it has order.
_ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


class ODE(Solver):
    """Any method by its name: of steps that fit each sample, of steps that a batch shares, or of fixed steps."""

    # Adams methods need steps that are equal in the solver's own variable.
    default_grid: ClassVar[str] = "angle"
    evaluates_end: ClassVar[bool] = True

    def __init__(self, method: str = "dormand_prince", rtol: float = 1e-4, atol: float = 1e-4):
        """Choose method and tolerances.

        Args:
            method: "dormand_prince", of orders 5 and 4, adapts its steps to each sample, which is the same in any batch
                and no longer evaluated when it has arrived; or an adaptive or fixed method of torchdiffeq.
            rtol: relative tolerance of an adaptive step.
            atol: absolute tolerance of an adaptive step.
        """
        known = PER_SAMPLE_METHODS + ADAPTIVE_METHODS + FIXED_METHODS
        if method not in known:
            raise ValueError(f"method = {method!r}: must be one of {', '.join(known)}")
        self.method, self.rtol, self.atol = method, rtol, atol

    @property
    def convergence_order(self) -> int | None:
        """That of a one-step method of fixed steps."""
        return _ORDERS.get(self.method)

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method not in FIXED_METHODS

    def evaluations_per_step(self) -> int | None:
        """Those of a one-step method of fixed steps."""
        return _ORDERS.get(self.method)

    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Integrate from grid[0] to grid[-1]."""
        flow = ProbabilityFlow(problem.sde, problem.predict, problem.predict_rows)
        return flow.solve(x, problem.grid, problem.observe, method=self.method, rtol=self.rtol, atol=self.atol)
