"""What the table of solvers claims, held for each registered: its order, in law or along a path; finite in few steps.

The numbers are those of ``benchmarks/orders.py``, in fewer steps and for one SDE. A new solver is among them at once.
"""

import pytest
import torch
from orders import STRONG, TOLERANCE, Case, cases, measure, strong_convergence

import sde_diffusion as sd
from sde_diffusion.samplers.registry import SOLVERS

# Their orders are asserted, for more options and every SDE, where the solvers are tested.
TESTED_THERE = {
    "heun",
    "dpmpp_1",
    "dpmpp_2s",
    "dpmpp_3s",
    "dpmpp_2m",
    "dpmpp_3m",
    "deis",
    "unipc",
    "lms",
    "pndm",
    "ode",
}
TESTED_THERE |= {"em", "exponential", "sde_dpmpp_2m", "sde_dpmpp_3m", "sde_adams", "edm", "torchsde"}
WITH_ORDER = [case for case in cases() if case.solver.convergence_order is not None]
# A solver of its own steps has tests of its own.
STOCHASTIC = [name for name, solver in SOLVERS.items() if solver().is_stochastic and not solver().is_adaptive]


@pytest.mark.parametrize("case", [case for case in WITH_ORDER if case.name not in TESTED_THERE], ids=str)
def test_a_solver_has_its_nominal_order(case):
    order = case.solver.convergence_order
    # With the first step cut, which is of first order in a method of several, a third order shows early.
    result = measure(case, sd.VPSDE(), graded=order > 2, fewest=80, most=160)
    assert result.slope == pytest.approx(order, abs=TOLERANCE)


def test_a_solver_without_an_order_chooses_its_steps():
    measured = {case.name for case in WITH_ORDER}
    assert measured >= TESTED_THERE
    assert all(SOLVERS[name]().is_adaptive for name in SOLVERS.keys() - measured)


@pytest.mark.parametrize(("name", "options", "order"), [row for row in STRONG if row[1].get("method") in (None, "srk")])
def test_a_solver_along_a_path_has_its_strong_order(name, options, order):
    result = strong_convergence(Case(name, options), sd.VPSDE(), most=200)
    assert result.slope == pytest.approx(order, abs=TOLERANCE)


@pytest.mark.parametrize(
    "counts", [(1, 2, 3, 5, 8, 13, 20), pytest.param(range(1, 21), marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solver_is_finite_in_any_number_of_steps(any_sde, name, counts, pointwise):
    """In float32, from the prior to t_min, over steps that are equal in t if it takes them: few near the data."""
    grid = "log_snr" if SOLVERS[name].in_log_snr else "t"
    for steps in counts:
        out = sd.sample(pointwise(any_sde), 3, solver=name, steps=steps, grid=grid, dtype=torch.float32)
        assert out.samples.isfinite().all(), steps
