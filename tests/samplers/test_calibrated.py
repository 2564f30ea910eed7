"""Calibrated solvers: better than what they begin with on trajectories of other seeds, and for their model alone."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.ode import ProbabilityFlow
from sde_diffusion.samplers.calibrated import Calibrated, CalibratedError, calibrated_path, find
from sde_diffusion.samplers.calibration import (
    HAND_MADE,
    _one_a_grid,
    _published,
    _read_off,
    _Steps,
    _Trajectories,
    calibrate,
)
from sde_diffusion.samplers.grids import GRIDS, time_grid

FEW = {"trajectories": 24, "validation": 12, "starts": 1, "iterations": 3}


class Narrow(torch.nn.Module):
    """A network of float64 matrices that depends on time and, if given, on a label."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(8, 3, generator=generator, dtype=torch.float64))
        self.last = torch.nn.Parameter(torch.randn(2, 8, generator=generator, dtype=torch.float64) / 4)

    def forward(self, x, t, label=None):
        hidden = torch.tanh(torch.cat([x, t[:, None].to(x)], 1) @ self.first.T)
        return hidden @ self.last.T + (0 if label is None else label.to(x)[:, None])


@pytest.fixture(scope="module")
def mixture():
    angle = torch.arange(5, dtype=torch.float64)
    means = 1.3 * torch.stack([angle.cos(), angle.sin()], 1)
    return sd.GaussianMixture(means, 0.04 * torch.eye(2, dtype=torch.float64).expand(5, 2, 2))


@pytest.fixture(scope="module")
def model(mixture):
    return mixture.under(sd.VPSDE())


@pytest.fixture(scope="module")
def solver(model):
    return calibrate(model, 5, trajectories=96, validation=48, starts=1, iterations=12, dtype=torch.float64)


@pytest.fixture(scope="module")
def unseen(model):
    """Starts that ``sample`` draws, and where their ODE ends."""
    start = sd.sample(model, 256, solver="ddim", steps=1, seed=3, dtype=torch.float64, trajectory=True).trajectory[0]
    flow = ProbabilityFlow(model.sde, model.predict)
    return start, flow.solve(start, [model.sde.t_max, model.sde.t_min], method="dopri8", rtol=1e-9, atol=1e-9)


def typical(samples, end):
    """Mean distance."""
    return float((samples - end).square().mean(1).sqrt().mean())


def test_it_is_better_than_every_method_it_knows_on_starts_it_has_not_seen(model, solver, unseen):
    start, end = unseen
    ours = sd.sample(model, 256, solver=solver, x_start=start)
    assert ours.nfe == 5
    error = typical(ours.samples, end)
    for make in HAND_MADE.values():
        for grid in GRIDS:
            theirs = sd.sample(model, 256, solver=make(), nfe=5, grid=grid, x_start=start)
            # The grid and all 20 coefficients are free: on this mixture it gains far more than this.
            assert error < typical(theirs.samples, end) / 4


def test_the_report_tells_the_error_of_unseen_starts(model, solver, unseen):
    report = solver.report
    assert report.hand_made.split(", ")[0] in ("ddim", "deis", "dpmpp_2m", "dpmpp_3m", "unipc")
    assert report.median_error < report.error
    assert report.error < report.hand_made_error / 2
    start, end = unseen
    errors = (sd.sample(model, 256, solver=solver, x_start=start).samples - end).square().mean(1).sqrt()
    # A median of 48 has a standard error of 1.25/√48 of the spread about it, which is of its own size.
    assert 0.4 < float(errors.median()) / report.median_error < 2.5


def test_evaluations_and_products_are_counted(model, counting):
    counted = counting(model)
    report = calibrate(counted, 3, **FEW).report
    # Those that are not part of the fit are the fingerprint's, of two states at three times.
    assert report.evaluations == counted.rows - 6
    assert report.gradients % (FEW["trajectories"] * 3 * 2) == 0
    assert report.gradients > 0


def test_it_depends_on_the_seed_alone(model):
    one, two, other = (calibrate(model, 3, seed=seed, **FEW) for seed in (1, 1, 2))
    assert one.times == two.times
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.weights, two.weights)
    assert one.times != other.times


def test_starts_are_not_those_of_sample(model):
    data = _Trajectories(model, (1.0, 0.1), 4, 2, None, 0, 6, torch.device("cpu"), torch.float64)
    drawn = sd.sample(model, 6, solver="ddim", steps=1, dtype=torch.float64, trajectory=True).trajectory[0]
    assert float((data.start[:, None] - drawn[None]).abs().amin()) > 1e-6


def test_a_batch_changes_no_sample_of_it(pointwise):
    solver = calibrate(pointwise(sd.VPSDE()), 4, **FEW)
    whole = sd.sample(solver_model := pointwise(sd.VPSDE()), 7, solver=solver)
    parts = sd.sample(solver_model, 7, solver=solver, batch_size=2)
    assert torch.equal(whole.samples, parts.samples)


def test_the_batches_of_the_fit_change_rounding_alone(model):
    data = [
        _Trajectories(model, (1.0, 0.01), 6, 2, None, 0, size, torch.device("cpu"), torch.float64) for size in (8, 3)
    ]
    steps = _read_off(HAND_MADE["unipc, order 2"](), model.sde, time_grid(model.sde, "angle", 1.0, 0.01, 4))
    one, two = (each.errors(steps, each.fitted) for each in data)
    # The tight solution shares its steps within a batch, at 1e-8.
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("grid", ["log_snr", "angle", "quadratic"])
@pytest.mark.parametrize("name", list(HAND_MADE))
def test_a_method_that_is_read_off_is_that_method(model, name, grid):
    times = time_grid(model.sde, grid, 1.0, 0.01, 6)
    steps = _read_off(HAND_MADE[name](), model.sde, times)
    data = _Trajectories(model, (1.0, 0.01), 4, 1, None, 0, 5, torch.device("cpu"), torch.float64)
    norm = float(torch.hypot(*(f(torch.tensor(0.01, dtype=torch.float64)) for f in (model.sde.alpha, model.sde.sigma))))
    state = data.roll_out(steps, range(4))[0][-1] * norm
    start = data.start[:4] * float(torch.hypot(model.sde.alpha(torch.tensor(1.0)), model.sde.sigma(torch.tensor(1.0))))
    expected = sd.sample(model, 4, solver=HAND_MADE[name](), grid=times, x_start=start).samples
    # y is of order 1, and the coefficients of a step of the order of some tens.
    assert torch.allclose(state, expected, rtol=0, atol=1e-6)


def test_the_jacobian_is_that_of_the_whole_rollout(any_sde, two_modes):
    tolerance = 1e-2 if isinstance(any_sde, sd.RateSDE | sd.LogSNRSDE) else 1e-5
    model = two_modes((2,), torch.float64).distribution.under(any_sde)
    span = (any_sde.t_max, any_sde.t_min)
    data = _Trajectories(model, span, 3, 1, None, 0, 4, torch.device("cpu"), torch.float64)
    steps = _read_off(HAND_MADE["deis, order 2"](), any_sde, time_grid(any_sde, "angle", *span, 3))
    batch = range(3)
    states, slopes = data.roll_out(steps, batch)
    direction = torch.ones_like(states[0])
    rows = data.rows(steps, batch, states, slopes, direction[None])[0] @ steps.jacobian()
    small = 1e-5
    for k in range(rows.shape[1]):
        change = torch.zeros(rows.shape[1], dtype=torch.float64)
        change[k] = small
        up, down = (data.roll_out(steps.moved(sign * change), batch)[0][-1].sum(1) for sign in (1, -1))
        assert torch.allclose((up - down) / (2 * small), rows[:, k], rtol=tolerance, atol=tolerance)


def test_a_move_keeps_the_ends_and_the_order_of_the_grid():
    angles = torch.tensor([1.5, 1.0, 0.7, 0.1], dtype=torch.float64)
    steps = _Steps(angles, torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    moved = steps.moved(torch.tensor([5.0, -4.0, *[1.0] * 9], dtype=torch.float64))
    assert moved.angles[0] == 1.5
    assert moved.angles[-1] == 0.1
    assert bool((moved.angles.diff() < 0).all())
    assert torch.equal(moved.weights, moved.weights.tril())


def test_never_worse_than_the_method_it_began_with(model):
    data = _Trajectories(model, (1.0, 0.01), 8, 16, None, 0, 24, torch.device("cpu"), torch.float64)
    candidates = sorted(_published(data, 4), key=lambda candidate: candidate.errors.mean())
    assert len({candidate.grid for candidate in _one_a_grid(candidates)}) == len(_one_a_grid(candidates))
    assert _one_a_grid(candidates)[0] is candidates[0]
    # Eight trajectories are few enough to be fitted at the cost of all others.
    report = calibrate(model, 4, trajectories=8, validation=16, starts=1).report
    assert report.median_error < 2 * report.hand_made_median_error


def test_it_works_on_every_sde(any_sde, two_modes):
    model = two_modes().distribution.under(any_sde)
    solver = calibrate(model, 4, **FEW)
    assert solver.report.error <= solver.report.hand_made_error
    out = sd.sample(model, 16, solver=solver)
    assert out.nfe == 4
    assert bool(out.samples.isfinite().all())


def test_from_a_time_where_no_data_are_left(two_modes):
    model = two_modes((2,), torch.float64).distribution.under(sd.FlowSDE())
    solver = calibrate(model, 4, t_start=1.0, t_end=0.0, dtype=torch.float64, **FEW)
    assert solver.times[0] == 1.0
    assert solver.times[-1] == 0.0
    assert solver.report.error < solver.report.hand_made_error
    assert bool(sd.sample(model, 4, solver=solver).samples.isfinite().all())


@pytest.mark.parametrize("shape", [(1,), (2, 2), (1, 2, 2)])
def test_data_of_any_shape(two_modes, shape):
    model = two_modes(shape).distribution.under(sd.VPSDE())
    solver = calibrate(model, 3, **FEW)
    assert sd.sample(model, 3, solver=solver).samples.shape == (3, *shape)


def test_one_evaluation(model):
    solver = calibrate(model, 1, **FEW)
    assert len(solver.times) == 2
    assert solver.report.error <= solver.report.hand_made_error
    assert sd.sample(model, 2, solver=solver).nfe == 1


def test_a_network_with_labels():
    network = sd.DiffusionModel(Narrow(), sd.VPSDE(), data_shape=(2,))
    labels = torch.arange(36) % 3
    solver = calibrate(network, 3, cond={"label": labels}, **FEW)
    assert torch.equal(solver.fingerprint.cond["label"], labels[:2])
    assert sd.sample(network, 4, solver=solver, cond={"label": torch.zeros(4)}).samples.shape == (4, 2)
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(ValueError, match="label"):
        calibrate(network, 3, cond={"label": labels[:5]}, **FEW)


def test_what_is_saved_is_what_is_loaded(model, solver, tmp_path):
    path = solver.save(tmp_path / "new" / "calibrated_5.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["calibrated_5.safetensors"]
    again = Calibrated.load(path)
    assert again.report == solver.report
    assert again.times == solver.times
    one, two = (sd.sample(model, 8, solver=each).samples for each in (solver, again))
    assert torch.equal(one, two)


def test_another_model_is_refused_with_the_way_to_override(mixture, solver, tmp_path):
    path = solver.save(tmp_path / "calibrated_5.safetensors")
    other = sd.GaussianMixture(1.2 * mixture.means, 0.04 * torch.eye(2, dtype=torch.float64).expand(5, 2, 2))
    with pytest.raises(CalibratedError, match=r"calibrated_5.*answers differ by \S+ of their size.*check=False"):
        sd.sample(other.under(sd.VPSDE()), 2, solver=Calibrated.load(path))
    for given in ({"solver": Calibrated.load(path, check=False)}, {"solver": path, "check": False}):
        assert sd.sample(other.under(sd.VPSDE()), 2, **given).nfe == 5


def test_a_model_in_another_dtype_is_the_same():
    network = sd.DiffusionModel(Narrow(), sd.VPSDE(), data_shape=(2,))
    solver = calibrate(network, 3, **FEW)
    for dtype in (torch.float32, torch.bfloat16):
        assert sd.sample(network.to(dtype), 2, solver=solver).samples.dtype == dtype
    trained = sd.DiffusionModel(Narrow(seed=1), sd.VPSDE(), data_shape=(2,))
    with pytest.raises(CalibratedError, match="another model"):
        solver.check_model(trained)


def test_what_does_not_fit_the_model_is_named(mixture, model, solver, two_modes):
    with pytest.raises(CalibratedError, match=r"is for VPSDE.*the model has VPSDE\(beta_min=0.2"):
        sd.sample(mixture.under(sd.VPSDE(beta_min=0.2)), 2, solver=solver)
    with pytest.raises(ValueError, match=r"data_shape = \(2,\): the model has \(4,\)"):
        sd.sample(two_modes((4,)).distribution.under(sd.VPSDE()), 2, solver=solver)
    for wrong in ({"nfe": 6}, {"t_end": 0.01}, {"grid": "t"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sd.sample(model, 2, solver=solver, **wrong)


def test_it_is_found_beside_its_model(model, solver, tmp_path, counting):
    kept = counting(model)
    with pytest.raises(CalibratedError, match="not loaded from a file"):
        find(kept, 5)
    kept.directory = tmp_path
    with pytest.raises(CalibratedError, match="nfe = none"):
        find(kept, 5)
    solver.save(calibrated_path(tmp_path, 5))
    assert find(kept, 5).times == solver.times
    assert sd.sample(kept, 2, solver="calibrated", nfe=5).times == solver.times
    with pytest.raises(CalibratedError, match=r"nfe = 7: .*nfe = 5"):
        find(kept, 7)


def test_a_damaged_file_is_an_error_that_names_it(solver, tmp_path):
    path = solver.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibratedError, match=r"a\.safetensors: cannot be read"):
        Calibrated.load(path)
    with pytest.raises(CalibratedError, match=r"b\.safetensors: cannot be read"):
        Calibrated.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nfe": 0}, "nfe = 0"),
        ({"trajectories": -1}, "trajectories = -1"),
        ({"probes": 0}, "probes = 0"),
        ({"t_start": 0.5}, "t_start = 0.5: must be at least"),
        ({"t_end": 2.0}, "t_end = 2.0"),
        ({"t_end": 1.0}, "t_start must be the larger"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_input_is_named(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, **({"nfe": 3} | wrong))


def test_progress_is_told(model):
    told = []
    solver = calibrate(model, 3, callback=lambda *values: told.append(values), **FEW)
    assert [i for i, _, _ in told] == list(range(1, len(told) + 1))
    norm = math.hypot(*(float(level[-1]) for level in solver.levels))
    assert min(held_out for _, _, held_out in told) * norm <= solver.report.hand_made_error


@pytest.mark.parametrize("backend", ["eager"])
def test_one_graph(model, solver, backend):
    torch._dynamo.reset()
    plain, graph = (sd.sample(model, 4, solver=solver, compile=compile).samples for compile in (False, backend))
    # Coefficients are tensors of the state's dtype in a graph.
    assert torch.allclose(plain, graph, atol=1e-5)


def test_a_solver_for_a_guided_model_is_checked_with_its_guidance(model, mixture, solver):
    other = sd.GaussianMixture(mixture.means * 1.2, 0.04 * torch.eye(2, dtype=torch.float64).expand(5, 2, 2))
    other_model = other.under(sd.VPSDE())
    drawn = sd.sample(other_model, 3, solver=solver, guidance=lambda _: model, seed=5)
    assert torch.equal(drawn.samples, sd.sample(model, 3, solver=solver, seed=5).samples)
    with pytest.raises(CalibratedError, match="is for another model"):
        sd.sample(model, 3, solver=solver, guidance=lambda _: other_model)
