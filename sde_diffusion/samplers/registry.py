"""Solvers by name, with what is known of each before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_origin

from sde_diffusion.samplers.adaptive_sde import AdaptiveSDE
from sde_diffusion.samplers.auto import choose
from sde_diffusion.samplers.brownian import TorchSDE
from sde_diffusion.samplers.calibrated import find
from sde_diffusion.samplers.ddim import DDIM, DDPM
from sde_diffusion.samplers.euler_maruyama import Euler, EulerMaruyama
from sde_diffusion.samplers.exponential import Exponential, SDEAdams, SDEDPMSolver2M, SDEDPMSolver3M
from sde_diffusion.samplers.heun import EDM, Heun
from sde_diffusion.samplers.multistep import DEIS, DPMSolver2M, DPMSolver3M, UniPC
from sde_diffusion.samplers.ode import ODE
from sde_diffusion.samplers.predictor_corrector import PredictorCorrector
from sde_diffusion.samplers.pseudo_linear import LMS, PNDM
from sde_diffusion.samplers.singlestep import DPMSolver1, DPMSolver2S, DPMSolver3S
from sde_diffusion.samplers.solver import Solver

SOLVERS: dict[str, type[Solver]] = {
    "em": EulerMaruyama,
    "ode": ODE,
    "euler": Euler,
    "heun": Heun,
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp_1": DPMSolver1,
    "dpmpp_2s": DPMSolver2S,
    "dpmpp_3s": DPMSolver3S,
    "dpmpp_2m": DPMSolver2M,
    "dpmpp_3m": DPMSolver3M,
    "lms": LMS,
    "pndm": PNDM,
    "deis": DEIS,
    "unipc": UniPC,
    "torchsde": TorchSDE,
    "exponential": Exponential,
    "sde_dpmpp_2m": SDEDPMSolver2M,
    "sde_dpmpp_3m": SDEDPMSolver3M,
    "sde_adams": SDEAdams,
    "pc": PredictorCorrector,
    "edm": EDM,
    "adaptive_sde": AdaptiveSDE,
}


class SolverInfo(NamedTuple):
    """What is known of a solver with its default options.

    Attributes:
        order: nominal order of convergence, in law for a stochastic solver; None where steps are adaptive.
        is_stochastic: whether it draws noise.
        evaluations_per_step: of the model; None if their number is not fixed.
        options: names of its ``solver_options`` with their defaults.
    """

    order: int | None
    is_stochastic: bool
    evaluations_per_step: int | None
    options: dict[str, Any]


def solvers() -> dict[str, SolverInfo]:
    """Names that ``sample`` takes as ``solver``, and what is known of each."""
    table = {
        "auto": SolverInfo(None, False, None, _defaults(choose)),
        "calibrated": SolverInfo(None, False, 1, _defaults(find)),
    }
    for name, kind in SOLVERS.items():
        solver = kind()
        each = solver.evaluations_per_step()
        table[name] = SolverInfo(solver.convergence_order, solver.is_stochastic, each, _defaults(kind))
    return table


def _defaults(maker: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in _options(maker).items()}


def make_solver(name: str, options: dict[str, Any]) -> Solver:
    """The solver of that name with its options.

    Raises:
        ValueError: for an unknown name or option, or a value of the wrong type.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver = {name!r}: must be one of {', '.join(solvers())}, or the file of a calibrated one")
    check_options(name, SOLVERS[name], options)
    return SOLVERS[name](**options)


def check_options(name: str, maker: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise a ValueError for an option that what makes the solver does not take, or of the wrong type."""
    parameters = _options(maker)
    evaluated = inspect.signature(maker, eval_str=True).parameters
    for option, value in options.items():
        if option not in parameters:
            takers = [other for other, kind in SOLVERS.items() if option in _options(kind)]
            hint = f"; {option} is for {', '.join(takers)}" if takers else ""
            raise ValueError(f"{option}: solver {name!r} takes {', '.join(parameters) or 'no options'}{hint}")
        kinds = get_args(evaluated[option].annotation) or (evaluated[option].annotation,)
        if not any(_is_a(value, kind) for kind in kinds):
            raise ValueError(f"{option} = {value!r}: solver {name!r} takes a {parameters[option].annotation} there")


def _options(maker: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters with a default of their own: of a function the others are what ``sample`` hands it."""
    parameters = inspect.signature(maker).parameters
    return {name: value for name, value in parameters.items() if value.default not in (inspect.Parameter.empty, None)}


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Callable:
        return callable(value)
    return isinstance(value, int | float if kind is float else get_origin(kind) or kind)
