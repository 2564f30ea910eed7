"""Many batches: one graph for all steps, no wait for the device, shares of ranks, precision; and what goes wrong."""

from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sde_diffusion as sd
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.samplers.grids import time_grid
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.samplers.registry import SOLVERS
from sde_diffusion.samplers.solver import Predict, Problem, StepSolver

# Those with steps of a fixed form; adaptive ones have no graph of a step.
STEP_SOLVERS = [name for name, kind in SOLVERS.items() if issubclass(kind, StepSolver)]


# The steps of a warm-up have another form.
GRAPHS = {"pndm": 2}


def with_network(network, shape):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sd.DiffusionModel(network, sd.VPSDE(), data_shape=shape)


def small_mlp():
    return with_network(MLP((3,), width=8, depth=1), (3,))


def small_unet():
    return with_network(
        UNet((1, 4, 4), base_channels=4, channel_multipliers=(1, 2), attention_resolutions=(2,)), (1, 4, 4)
    )


# One graph.


@pytest.mark.parametrize(("solver", "build"), [*[(name, small_mlp) for name in STEP_SOLVERS], ("ddim", small_unet)])
def test_a_step_is_one_graph_for_all_steps_and_batches(solver, build):
    model = build()
    take = partial(sd.sample, model, 7, solver=solver, steps=5, batch_size=3, dtype=torch.float64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, eager = take(compile=counter), take()
    # The last batch is of one sample, in a graph for three.
    assert counter.frame_count == GRAPHS.get(solver, 1)
    assert compiled.samples.shape == eager.samples.shape
    assert compiled.nfe_per_sample.tolist() == eager.nfe_per_sample.tolist()
    # The network computes in float32, in batches of another size.
    torch.testing.assert_close(compiled.samples, eager.samples, rtol=1e-3, atol=1e-3)


def test_a_graph_takes_conditioning_trajectory_and_callback(conditional):
    cond = {"shift": torch.arange(7.0)}
    take = partial(sd.sample, conditional, 7, solver="dpmpp_2m", steps=4, batch_size=3, cond=cond, trajectory=True)
    torch._dynamo.reset()
    counter, seen = CompileCounterWithBackend("eager"), []
    compiled = take(compile=counter, callback=lambda i, t, x: seen.append(len(x)))
    assert counter.frame_count == 1
    assert seen == [3] * 4 + [3] * 4 + [1] * 4
    torch.testing.assert_close(compiled.trajectory, take().trajectory)


@pytest.mark.slow
def test_the_default_backend_gives_the_eager_result():
    model = small_unet()
    take = partial(sd.sample, model, 5, solver="dpmpp_2m", steps=5, batch_size=2)
    torch.testing.assert_close(take(compile=True).samples, take().samples, rtol=1e-4, atol=1e-4)


def test_an_adaptive_solver_cannot_be_compiled(pointwise):
    with pytest.raises(ValueError, match="compile = True: ODE is no solver of fixed steps"):
        sd.sample(pointwise(sd.VPSDE()), 2, solver="ode", compile=True)


# What waits for a device: the host reads a number of it.
WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_no_step_waits_for_the_device(solver):
    method, model = SOLVERS[solver](), small_mlp()
    times = time_grid(model.sde, "log_snr", model.sde.t_max, model.sde.t_min, 4)
    problem = Problem(model.sde, Predict(model), times, Streams(0, range(2)))
    x = torch.ones(2, 3)
    past, noise = deque([x] * method.memory, maxlen=method.memory), StepNoise(problem.streams, (3,), x.dtype)
    rows = [SimpleNamespace(**row, past=past) for row in method.rows(problem, x)]
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile,
    ):
        for c in rows:
            x = method.step(problem.predict, x, c, noise)
    seen = {event.key for event in profile.key_averages()}
    assert "aten::mul" in seen
    assert not seen & WAITS


def test_a_wait_would_be_seen():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        float(torch.ones(2)[0])
    assert {event.key for event in profile.key_averages()} & WAITS


# Shares.


@pytest.mark.parametrize(("n", "ranks"), [(7, 1), (7, 3), (4, 4)])
def test_the_shares_of_all_ranks_are_the_whole(n, ranks, conditional):
    cond = {"shift": torch.arange(float(n))}
    take = partial(sd.sample, conditional, n, solver="em", steps=3, cond=cond, batch_size=2, trajectory=True)
    whole, parts = take(), [take(shard=(rank, ranks)) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.samples for part in parts]), whole.samples)
    assert torch.equal(torch.cat([part.trajectory for part in parts], 1), whole.trajectory)
    sizes = [len(part.samples) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 3), (0, 0)])
def test_a_share_that_is_none_is_refused(shard, pointwise):
    with pytest.raises(ValueError, match=r"shard = \(.*\): need 0 <= rank < number of ranks <= n = 2"):
        sd.sample(pointwise(sd.VPSDE()), 2, solver="ddim", shard=shard)


# Precision.


class _SeesDtypes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3, 3), []

    def forward(self, x, t):
        y = self.layer(x)
        self.seen.append((x.dtype, t.dtype, y.dtype))
        return y


@pytest.mark.parametrize("is_autocast", [True, False])
def test_a_bfloat16_network_leaves_the_state_in_float32(is_autocast):
    torch.manual_seed(0)
    network = _SeesDtypes()
    model = sd.DiffusionModel(network, sd.VPSDE(), data_shape=(3,))
    exact = sd.sample(model, 64, solver="ddim", steps=10).samples
    network.seen.clear()
    if is_autocast:
        result = sd.sample(model, 64, solver="ddim", steps=10, autocast=torch.bfloat16).samples
        assert set(network.seen) == {(torch.float32, torch.float32, torch.bfloat16)}
    else:
        x_start = sd.sample(model, 64, solver="ddim", steps=10, trajectory=True).trajectory[0]
        network.seen.clear()
        result = sd.sample(model.bfloat16(), 64, solver="ddim", steps=10, x_start=x_start).samples
        # Times too keep the bits that tell them apart.
        assert set(network.seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    assert result.dtype == torch.float32
    # Eight bits in each of ten outputs; a state of eight bits would be of no more values than that.
    assert 0 < (result - exact).abs().max() < 10 * 2**-8 * exact.abs().max()
    assert (result != result.bfloat16()).any()


# The end.


@pytest.mark.parametrize("solver", ["ddim", "em", "ode"])
def test_denoising_at_the_end_takes_one_evaluation_more(solver, counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    state = sd.sample(model, 3, solver=solver, steps=4)
    calls, model.calls = model.calls, 0
    out = sd.sample(model, 3, solver=solver, steps=4, denoise=True)
    assert (model.calls, out.nfe) == (calls + 1, calls + 1)
    expected = model.denoise(state.samples, torch.tensor(state.times[-1]))
    assert torch.equal(out.samples, expected)
    assert not torch.equal(out.samples, state.samples)


def test_progress_is_shown_on_request(capsys, pointwise):
    sd.sample(pointwise(sd.VPSDE()), 3, solver="ddim", steps=4, batch_size=2)
    assert capsys.readouterr().err == ""
    sd.sample(pointwise(sd.VPSDE()), 3, solver="ddim", steps=4, batch_size=2, progress=True)
    assert "8/8" in capsys.readouterr().err


# What goes wrong.


class _Broken(sd.Model):
    """The exact model, but for sample ``index``, whose prediction is not finite before t = ½."""

    data_shape = (3,)

    def __init__(self, model, cond_index):
        self.model, self.sde, self.index = model, model.sde, cond_index

    def predict(self, x, t, which):
        x0, eps = self.model.predict(x, t)
        bad = (which == self.index) & (torch.as_tensor(t) < 0.5)
        return sd.Prediction(torch.where(bad[:, None], torch.nan, x0), eps)


@pytest.mark.parametrize("solver", ["ddim", "em", "dpmpp_2m"])
def test_a_prediction_that_is_not_finite_is_named(solver, pointwise):
    model = _Broken(pointwise(sd.VPSDE()), 5)
    take = partial(sd.sample, model, 8, solver=solver, steps=10, grid="t", batch_size=3)
    times = sd.sample(pointwise(sd.VPSDE()), 1, solver=solver, steps=10, grid="t").times
    t = next(t for t in times if t < 0.5)
    with pytest.raises(sd.SolverError, match=f"prediction for sample 5 is not finite at t = {t:.6g}"):
        take(cond={"which": torch.arange(8)})
    assert take(cond={"which": torch.arange(8) + 6}).samples.isfinite().all()


def test_a_state_that_overflows_is_named():
    class Growing(sd.Model):
        data_shape, sde = (3,), sd.VPSDE()

        def predict(self, x, t):
            return sd.Prediction(1e30 * x, x)

    with pytest.raises(sd.SolverError, match="sample 0"):
        sd.sample(Growing(), 2, solver="ddim", steps=10)


def test_a_solver_may_be_given_whole(pointwise):
    model = pointwise(sd.VPSDE())
    whole = sd.sample(model, 3, solver=SOLVERS["deis"](order=2), steps=5).samples
    assert torch.equal(whole, sd.sample(model, 3, solver="deis", order=2, steps=5).samples)
    with pytest.raises(ValueError, match="order: a solver that is given whole takes no options"):
        sd.sample(model, 3, solver=SOLVERS["deis"](), order=2)


def test_a_solver_with_times_of_its_own_takes_no_others(pointwise):
    model, solver = pointwise(sd.VPSDE()), SOLVERS["ddim"]()
    solver.times = [1.0, 0.5, 0.1]
    assert sd.sample(model, 2, solver=solver).times == solver.times
    assert sd.sample(model, 2, solver=solver, nfe=2).nfe == 2
    for name, value in (("nfe", 3), ("steps", 3), ("t_end", 0.2), ("t_start", 0.9), ("grid", "t")):
        with pytest.raises(ValueError, match=f"{name} = {value}: this solver is made for {name} = "):
            sd.sample(model, 2, solver=solver, **{name: value})


@pytest.fixture
def conditional(pointwise):
    class Shifted(sd.Model):
        """N(shift, ½), of a shift a sample."""

        def __init__(self, model):
            self.model, self.sde, self.data_shape = model, model.sde, model.data_shape

        def predict(self, x, t, shift):
            centre = shift[:, None].to(x)
            x0, eps = self.model.predict(x - self.sde.alpha(torch.as_tensor(t)) * centre, t)
            return sd.Prediction(x0 + centre, eps)

    return Shifted(pointwise(sd.VPSDE()))
