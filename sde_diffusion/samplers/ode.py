r"""The probability-flow ODE handed to torchdiffeq, over u = log(σ/α):  dx/du = (α̇ x̂₀ + σ̇ ε̂) dt/du.

In u the problem looks the same for every SDE, and stays finite where σ̇ or g does not.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sde_diffusion.ode import ADAPTIVE_METHODS, FIXED_METHODS, integrate
from sde_diffusion.samplers.solver import Problem, Solver
from sde_diffusion.sde import drift_in_log_noise

_EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


class ODE(Solver):
    """Any method of torchdiffeq, adaptive or of fixed steps, by its name."""

    in_log_snr: ClassVar[bool] = True

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

        def velocity(state: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
            return (drift_in_log_noise(problem.sde, problem.predict, state[0], u),)

        grid = [problem.sde.log_noise(t) for t in problem.grid]
        return integrate(
            velocity,
            (x,),
            grid,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            to_time=problem.sde.t_from_log_noise,
            observe=problem.observe,
        )[0]
