"""Predictor and corrector: each as published, their order, the law that a corrector keeps, and few steps."""

import math
from types import SimpleNamespace

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.ddim import DDPM
from sde_diffusion.samplers.euler_maruyama import EulerMaruyama
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.samplers.predictor_corrector import CORRECTORS, PREDICTORS, PredictorCorrector
from sde_diffusion.samplers.solver import Predict, Problem, StepSolver


def solve(solver, model, x, times, seed=5):
    problem = Problem(model.sde, Predict(model), times, Streams(seed, range(len(x))))
    return solver.solve(problem, x)


def start(sde, n=4, seed=0):
    return sde.prior_std * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Stay(StepSolver):
    """A predictor that does nothing, so that the corrector acts alone."""

    def prepare(self, sde, times):
        return {"t": times[:-1]}

    def step(self, predict, x, c, noise):
        return x


@pytest.fixture
def alone(monkeypatch):
    """alone(**options): a corrector without a predictor."""
    monkeypatch.setitem(PREDICTORS, "stay", Stay)
    return lambda **options: PredictorCorrector("stay", **options)


# Predictors.


def test_reverse_diffusion_is_the_published_step(any_sde, pointwise):
    """x − [λ − 1] x + v s + √v z, of the forward step x_t = λ x_s + √v z."""
    model, t, s = pointwise(any_sde), 0.6 * any_sde.t_max, 0.55 * any_sde.t_max
    chain = sd.GaussianChain.from_sde(any_sde, [s, t])
    scale, v = chain.scales[1], chain.stds[1].square()
    x, noise = start(any_sde), StepNoise(Streams(5, range(4)), (3,), torch.float64)()
    expected = x - (scale - 1) * x + v * model.score(x, chain.times[2]) + v.sqrt() * noise
    out = solve(PredictorCorrector("reverse_diffusion", "none"), model, x, [t, s])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("predictor", "other"), [("em", EulerMaruyama()), ("ancestral", DDPM("posterior"))])
def test_the_other_predictors_are_solvers_of_their_own(any_sde, predictor, other, pointwise):
    times = torch.linspace(any_sde.t_max, any_sde.t_min, 6, dtype=torch.float64).tolist()
    model, x = pointwise(any_sde), start(any_sde)
    assert torch.equal(solve(PredictorCorrector(predictor, "none"), model, x, times), solve(other, model, x, times))


@pytest.mark.parametrize("corrector", ["none", "annealed_langevin"])
def test_reverse_diffusion_converges_at_first_order(any_sde, corrector, variance_error):
    # A corrector's own error does not vanish with the step, but with r.
    solver = PredictorCorrector("reverse_diffusion", corrector, snr=1e-3)
    grids = (any_sde.t_from_log_snr(torch.linspace(-7, 4, n + 1, dtype=torch.float64)) for n in (400, 800))
    coarse, fine = (variance_error(any_sde, solver, grid) for grid in grids)
    assert math.log2(abs(coarse / fine)) == pytest.approx(1, abs=0.2)


# Correctors.


def test_langevin_is_the_published_step(any_sde, pointwise, alone):
    """x + ε s + √(2ε) z with ε = 2 λ² (r ‖z‖/‖s‖)²: of every sample's own score, and √D for ‖z‖."""
    model, t, s, r = pointwise(any_sde), 0.5 * any_sde.t_max, 0.45 * any_sde.t_max, 0.16
    at = torch.tensor([t, s], dtype=torch.float64)
    scale = any_sde.alpha(at[0]) / any_sde.alpha(at[1])
    std = torch.sqrt(0.5 * any_sde.alpha(at[1]) ** 2 + any_sde.sigma(at[1]) ** 2)
    # Of scores that are not so small that the largest step size counts.
    x = std * torch.tensor([[1.0, -2.0, 0.5], [0.7, 1.1, 1.3]], dtype=torch.float64)
    noise = StepNoise(Streams(5, range(2)), (3,), torch.float64)()
    score = model.score(x, at[1])
    for corrector, size in (
        ("langevin", 2 * scale**2 * r**2 * 3 / score.square().sum(1, keepdim=True)),
        ("annealed_langevin", 2 * scale**2 * r**2 * any_sde.sigma(at[1]) ** 2),
    ):
        out = solve(alone(corrector=corrector, snr=r), model, x, [t, s])
        torch.testing.assert_close(out, x + size * score + torch.sqrt(2 * size) * noise, rtol=1e-9, atol=1e-9)


def test_a_corrector_keeps_the_law_to_first_order_in_its_step(any_sde, pointwise, alone):
    """Of N(0, v) the variance becomes (1 − ε/v)² v + 2ε: relative to v it is (ε/v)² too large, and ε is of r²."""
    model = pointwise(any_sde)
    s = any_sde.t_from_log_snr(torch.zeros((), dtype=torch.float64))
    times = torch.stack([1.01 * s, s])
    v = 0.5 * any_sde.alpha(s) ** 2 + any_sde.sigma(s) ** 2
    errors = []
    for r in (0.2, 0.1):
        solver = alone(snr=r)
        c = SimpleNamespace(**{name: value[0] for name, value in solver.prepare(any_sde, times).items()})
        # The start and the noise, each alone: their squares add up.
        x = torch.stack([v.sqrt(), torch.zeros_like(v)])[:, None]
        x = solver.step(model.predict, x, c, lambda: torch.tensor([[0.0], [1.0]], dtype=torch.float64))
        errors.append(float(x.square().sum() / v) - 1)
        step = 2 * (r * any_sde.alpha(times[0]) / any_sde.alpha(s) * any_sde.sigma(s)) ** 2
        assert errors[-1] == pytest.approx(float((step / v) ** 2), rel=1e-6)
    assert errors[0] / errors[1] == pytest.approx(16, rel=1e-3)


def test_the_law_that_correctors_settle_at_is_p_as_r_vanishes(pointwise, alone):
    """(1 − ε/v)² u + 2ε = u at u = v/(1 − ε/2v): as far from v as ε is large, that is by r²."""
    sde = sd.VESDE()
    model, s = pointwise(sde), torch.tensor(0.5, dtype=torch.float64)
    ratio = float(sde.sigma(s) ** 2 / (0.5 + sde.sigma(s) ** 2))
    for r in (0.3, 0.15):
        n = 400
        solver = alone(snr=r, corrector_steps=n)
        c = SimpleNamespace(**{name: v[0] for name, v in solver.prepare(sde, torch.stack([1.01 * s, s])).items()})
        x, draws = torch.zeros(n, 1, dtype=torch.float64), iter(torch.eye(n, dtype=torch.float64)[:, :, None])
        x = solver.step(model.predict, x, c, lambda draws=draws: next(draws))
        step = 2 * r**2 * ratio
        settled = float(x.square().sum()) / (0.5 + float(sde.sigma(s)) ** 2)
        assert settled == pytest.approx(1 / (1 - step / 2), rel=1e-6)


@pytest.mark.parametrize("dimension", [8, 32])
def test_langevin_errs_by_two_in_the_dimension(dimension, pointwise, alone):
    """Its step is longer where the score is small: it settles at a density p ‖s‖², with E‖x‖² = (D + 2) v."""
    n, r = 2000, 0.1
    x = torch.randn(n, dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = alone(corrector="langevin", snr=r, corrector_steps=400)
    out = solve(solver, pointwise(sd.EDMSDE(), variance=0.0), x, [1.0 + 1e-9, 1.0])
    # The step's own error is of the order of ε/2 = r² of the variance; the estimate's standard error √(2/nD).
    assert float(out.square().mean()) == pytest.approx(
        1 + 2 / dimension, abs=5 * math.sqrt(2 / (n * dimension)) + 2 * r**2
    )


@pytest.mark.parametrize("corrector", ["langevin", "annealed_langevin"])
def test_a_sample_does_not_depend_on_its_batch(any_sde, corrector, pointwise):
    model, x = pointwise(any_sde), start(any_sde, 6)
    times = torch.linspace(any_sde.t_max, any_sde.t_min, 6, dtype=torch.float64).tolist()
    solver = PredictorCorrector(corrector=corrector, corrector_steps=2)
    first = solve(solver, model, x, times)
    other = solve(solver, model, torch.cat([x[:3], 100 * x[3:]]), times)
    assert torch.equal(other[:3], first[:3])


# Any pair on any SDE.


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_pair_is_finite_in_few_steps(any_sde, predictor, corrector, pointwise):
    """Also to the end without noise, where ε̂ is 0."""
    solver, x = PredictorCorrector(predictor, corrector), start(any_sde).float()
    for steps in (1, 2, 5):
        for end in (any_sde.t_min, 0.0):
            times = torch.linspace(any_sde.t_max, end, steps + 1, dtype=torch.float64).tolist()
            assert solve(solver, pointwise(any_sde), x, times).isfinite().all()


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_few_steps_do_not_blow_up(any_sde, predictor, corrector, pointwise):
    """A step multiplies x by 0 to 2 − λ, a corrector's by 0 to 1; they add noise of at most (1 + √2) σ_t."""
    times = torch.linspace(any_sde.t_max, any_sde.t_min, 6, dtype=torch.float64).tolist()
    out = solve(PredictorCorrector(predictor, corrector), pointwise(any_sde), start(any_sde, 64), times)
    # Normal numbers of five standard deviations, doubled by each of five steps.
    assert out.abs().max() < 5 * any_sde.prior_std * 2**5 * (1 + 1 + math.sqrt(2))


def test_evaluations_are_counted(counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    for options, each in (({}, 2), ({"corrector": "none"}, 1), ({"corrector_steps": 3}, 4)):
        assert PredictorCorrector(**options).evaluations_per_step() == each
        model.calls = 0
        solve(PredictorCorrector(**options), model, start(model.sde), [1.0, 0.6, 0.3])
        assert model.calls == 2 * each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "euler"}, "predictor = 'euler': must be one of reverse_diffusion, ancestral, em"),
        ({"corrector": "mala"}, "corrector = 'mala': must be one of langevin, annealed_langevin, none"),
        ({"corrector_steps": 0}, "corrector_steps = 0: must be at least 1"),
        ({"snr": 0.0}, "snr = 0.0: must be positive and finite"),
        ({"snr": math.nan}, "snr = nan: must be positive and finite"),
        ({"snr": math.inf}, "snr = inf: must be positive and finite"),
    ],
    ids=str,
)
def test_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrector(**options)
