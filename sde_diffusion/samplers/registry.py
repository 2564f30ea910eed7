"""Solvers by name, with what is known of each before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from sde_diffusion.samplers.brownian import TorchSDE
from sde_diffusion.samplers.ddim import DDIM, DDPM
from sde_diffusion.samplers.euler_maruyama import EulerMaruyama
from sde_diffusion.samplers.exponential import Exponential, SDEDPMSolver2M, SDEDPMSolver3M
from sde_diffusion.samplers.heun import EDM, Heun
from sde_diffusion.samplers.multistep import DEIS, DPMSolver2M, DPMSolver2S, DPMSolver3M, UniPC
from sde_diffusion.samplers.ode import ODE
from sde_diffusion.samplers.predictor_corrector import PredictorCorrector
from sde_diffusion.samplers.singlestep import DPMSolver1, DPMSolver3S
from sde_diffusion.samplers.solver import Solver

SOLVERS: dict[str, type[Solver]] = {
    "em": EulerMaruyama,
    "ode": ODE,
    "heun": Heun,
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp_1": DPMSolver1,
    "dpmpp_2s": DPMSolver2S,
    "dpmpp_3s": DPMSolver3S,
    "dpmpp_2m": DPMSolver2M,
    "dpmpp_3m": DPMSolver3M,
    "deis": DEIS,
    "unipc": UniPC,
    "torchsde": TorchSDE,
    "exponential": Exponential,
    "sde_dpmpp_2m": SDEDPMSolver2M,
    "sde_dpmpp_3m": SDEDPMSolver3M,
    "pc": PredictorCorrector,
    "edm": EDM,
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
    table = {}
    for name, kind in SOLVERS.items():
        solver = kind()
        options = {option: parameter.default for option, parameter in inspect.signature(kind).parameters.items()}
        table[name] = SolverInfo(solver.convergence_order, solver.is_stochastic, solver.evaluations_per_step(), options)
    return table


def make_solver(name: str, options: dict[str, Any]) -> Solver:
    """The solver of that name with its options.

    Raises:
        ValueError: for an unknown name or option, or a value of the wrong type.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver = {name!r}: must be one of {', '.join(SOLVERS)}")
    parameters = inspect.signature(SOLVERS[name]).parameters
    annotations = get_type_hints(SOLVERS[name].__init__)
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(f"{option}: solver {name!r} takes {', '.join(parameters) or 'no options'}")
        kinds = get_args(annotations[option]) or (annotations[option],)
        if not any(_is_a(value, kind) for kind in kinds):
            raise ValueError(f"{option} = {value!r}: solver {name!r} takes a {parameters[option].annotation} there")
    return SOLVERS[name](**options)


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Callable:
        return callable(value)
    return isinstance(value, int | float if kind is float else get_origin(kind) or kind)
