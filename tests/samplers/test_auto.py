"""The rules of solver="auto" on small exact models."""

import math
from itertools import pairwise

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.ode import ProbabilityFlow
from sde_diffusion.samplers.auto import RULES, choose
from sde_diffusion.samplers.ode import ODE

SDES = [
    sd.VPSDE(),
    sd.SubVPSDE(),
    sd.VESDE(),
    sd.EDMSDE(),
    sd.CosineVPSDE(),
    sd.ConstantVESDE(),
    sd.FlowSDE(),
]


@pytest.fixture(scope="module")
def mixture():
    """Four modes in the plane, of unit variance a dimension."""
    angle = torch.arange(4, dtype=torch.float64) * (math.pi / 2)
    means = math.sqrt(1.9) * torch.stack([angle.cos(), angle.sin()], 1)
    return sd.GaussianMixture(means, 0.05 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2))


@pytest.fixture(scope="module")
def problem(mixture):
    """The model under the VP SDE, 32 starts at t = 1, and the ends of its ODE at t = 1e-3."""
    model = mixture.under(sd.VPSDE())
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = ProbabilityFlow(model.sde, model.predict)
    return model, x, flow.solve(x, [1.0, 1e-3], method="dopri8", rtol=1e-9, atol=1e-9)


def error(problem, solver, **options):
    """Root mean square distance from the end."""
    model, x, end = problem
    return float((sd.sample(model, len(x), solver=solver, x_start=x, **options).samples - end).square().mean().sqrt())


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_every_number_of_evaluations_on_every_sde(mixture, sde):
    """From 1 to 30 and a hundred, exactly as many as asked, and finite samples of about the data's size."""
    model = mixture.under(sde)
    for nfe in [*range(1, 31), 100]:
        out = sd.sample(model, 4, solver=choose(sde, nfe), dtype=torch.float64)
        assert out.nfe == nfe
        # The modes are 1.4 from the origin and 0.22 wide; a step or two do not reach them.
        assert float(out.samples.abs().max()) < (3 if nfe > 3 else 10)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("nfe", [1, 2, 7, 8, 10, 11, 13, 14, 100])
def test_times_decrease_from_the_start_to_the_end(sde, nfe):
    """Strictly, and the ends are exact."""
    for start, end in ((sde.t_max, sde.t_min), (0.9 * sde.t_max, 0.1 * sde.t_max)):
        times = choose(sde, nfe, start, end).times
        assert len(times) == nfe + 1
        assert (times[0], times[-1]) == (start, end)
        assert all(s < t for t, s in pairwise(times))


@pytest.mark.parametrize("nfe", [1, 5, 10, 20])
def test_infinite_log_snr_at_both_ends(mixture, nfe):
    """The straight path from pure noise to pure data."""
    sde = sd.FlowSDE()
    out = sd.sample(mixture.under(sde), 8, solver=choose(sde, nfe, 1.0, 0.0), dtype=torch.float64)
    assert (out.nfe, out.times[0], out.times[-1]) == (nfe, 1.0, 0.0)
    assert bool(out.samples.isfinite().all())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.fewest}-{rule.dimensions}")
def test_rule_is_one_for_all_sdes(rule):
    """Between the same noise levels, the times are of the same noise levels."""
    levels = [2.0, -3.0]
    grids = []
    for sde in SDES:
        times = rule.times(sde, *(sde.t_from_log_noise(u) for u in levels), 12)
        grids.append(torch.tensor([sde.log_noise(t) for t in times], dtype=torch.float64))
    for grid in grids[1:]:
        # Some SDEs find t by the inverse of a function whose values near 1 carry 1e-16: at u = 2 that is below 1e-12.
        torch.testing.assert_close(grid, grids[0], rtol=0, atol=1e-9)


def test_steps_are_equal_in_the_variable_of_the_rule():
    """w = log(1 + e^{d (u − c)})^p at the times themselves."""
    sde, rule = sd.VPSDE(), RULES[-1]
    u = torch.tensor([sde.log_noise(t) for t in choose(sde, 20, 1.0, 1e-3).times], dtype=torch.float64)
    steps = (torch.log1p(torch.exp(rule.sharpness * (u - rule.centre))) ** rule.power).diff()
    torch.testing.assert_close(steps, steps.mean().expand(20), rtol=1e-9, atol=0)


def test_quadratic_grid_of_the_vp_sde_is_one_of_the_family():
    """(2, ¼, 0) is equal steps in √t for β_min = 0."""
    sde = sd.VPSDE(beta_min=1e-9, beta_max=20.0)
    rule = type(RULES[0])(1, RULES[0].solver, sharpness=2.0, power=0.25, centre=0.0)
    t = torch.tensor(rule.times(sde, 1.0, 0.01, 10), dtype=torch.float64)
    expected = torch.linspace(1.0, 0.1, 11, dtype=torch.float64).square()
    # β_min enters B(t) = β_min t + ½ (β_max − β_min) t² with 1e-9/10 t of it, at most 1e-8 at t = 0.01.
    torch.testing.assert_close(t, expected, rtol=1e-7, atol=0)


def test_error_falls_with_evaluations(problem):
    """Doubling them at least halves it, until 40, and it gets small."""
    errors = [error(problem, choose(problem[0].sde, nfe, 1.0, 1e-3)) for nfe in (5, 10, 20, 40)]
    assert all(after < before / 2 for before, after in pairwise(errors))
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("nfe", range(1, 31))
def test_no_worse_than_ddim(problem, nfe):
    """At any number; with one evaluation it is DDIM."""
    auto = error(problem, choose(problem[0].sde, nfe, 1.0, 1e-3))
    assert auto <= error(problem, "ddim", nfe=nfe, t_start=1.0, t_end=1e-3) * (1 + 1e-12)


def test_nothing_is_random():
    """Two choices are the same, and draw no random numbers."""
    state = torch.get_rng_state()
    first, second = choose(sd.VPSDE(), 17), choose(sd.VPSDE(), 17)
    assert first.times == second.times
    assert type(first) is type(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(choose(sd.VPSDE(), nfe).is_stochastic for nfe in range(1, 60))


def test_order_of_convergence(problem):
    """Of the last rule: 4 of the predictor, or above."""
    coarse, fine = (error(problem, choose(problem[0].sde, nfe, 1.0, 1e-3)) for nfe in (80, 160))
    assert math.log2(coarse / fine) > 3.8


def test_tolerance_takes_the_adaptive_solver():
    """With the tolerances given."""
    solver = choose(sd.VPSDE(), rtol=1e-6, atol=1e-7)
    assert isinstance(solver, ODE)
    assert (solver.rtol, solver.atol, solver.times) == (1e-6, 1e-7, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "nfe = 0"),
        ((5, 2.0), "t_start = 2.0"),
        ((5, 0.5, 0.5), "t_start = 0.5, t_end = 0.5"),
        ((5, 1.0, -1.0), "t_end = -1.0"),
    ],
)
def test_bad_arguments(arguments, words):
    """Are named."""
    with pytest.raises(ValueError, match=words):
        choose(sd.VPSDE(), *arguments)


@pytest.mark.parametrize("nfe", [1, 5, 10, 13])
def test_images_have_rules_of_their_own_in_few_steps(nfe):
    sde = sd.VPSDE()
    few, image = choose(sde, nfe), choose(sde, nfe, dimensions=28 * 28)
    assert choose(sde, nfe, dimensions=64).times == few.times
    if nfe > 1:
        # More of the steps are where there is noise.
        assert image.times[-2] > few.times[-2]
    assert choose(sde, 14, dimensions=28 * 28).times == choose(sde, 14).times


def test_sample_tells_the_rules_the_size_of_the_data(pointwise):
    model = pointwise(sd.VPSDE())
    assert sd.sample(model, 2, nfe=5).times == choose(model.sde, 5, dimensions=3).times
    model.data_shape = (16, 16)
    assert sd.sample(model, 2, nfe=5).times == choose(model.sde, 5, dimensions=256).times
