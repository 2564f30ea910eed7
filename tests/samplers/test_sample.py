import math
from functools import partial

import pytest
import torch
from torch import nn

import sde_diffusion as sd
from sde_diffusion.networks import UNet
from sde_diffusion.samplers.auto import choose
from sde_diffusion.samplers.grids import time_grid
from sde_diffusion.samplers.registry import SOLVERS
from sde_diffusion.samplers.solver import Predict, Problem
from sde_diffusion.sde import expand_to

N = 20_000
SHAPES = {"(B, D)": (2,), "(B, C, H, W)": (1, 2, 2)}

# Steps at which halving the step moves no moment by a standard error: see the slow test. "ode" is adaptive.
STEPS = {"em": 200, "ddim": 140, "ddpm": 250, "heun": 25, "ode": 1, "torchsde": 60}
STEPS |= {"dpmpp_2s": 40, "dpmpp_2m": 60, "dpmpp_3m": 80, "deis": 50, "unipc": 60}
STEPS |= {"sde_dpmpp_2m": 120, "sde_dpmpp_3m": 80, "edm": 200, "pc": 180}
STEPS |= {"dpmpp_1": 140, "dpmpp_3s": 15, "lms": 40, "pndm": 40, "euler": 1250, "adaptive_sde": 1}
# Of methods that are not exponential, or assume equal steps.
ON_LOG_SNR = {"euler", "pndm"}
OTHER_STEPS = 250
# Random numbers a dimension that one step draws, where more than one.
DRAWS = {"torchsde": 2}
# A corrector moves as far in a short step as in a long one: along one path only the predictor converges.
HALVED = {"pc": {"corrector": "none"}}

EVERY_SOLVER = list(SOLVERS)


def end_of_noise(sde):
    """Where σ = α/20: the noise left is a part of p there, and the steps below it change little."""
    return float(sde.t_from_log_snr(torch.tensor(2 * math.log(20), dtype=torch.float64)))


def moment_grid(sde, name, steps):
    """From the prior to the end of noise: for solvers over log-SNR equal steps in it, for others in atan(σ/α).

    Noise turns into data at an even pace over that angle, so that the same bias takes half the steps.
    """
    kind = "log_snr" if SOLVERS[name].in_log_snr or name in ON_LOG_SNR else "angle"
    return time_grid(sde, kind, sde.t_max, end_of_noise(sde), steps)


def covariance_at(sde, t, covariance):
    t = torch.tensor(t, dtype=torch.float64)
    return sde.alpha(t).square() * covariance + sde.sigma(t).square() * torch.eye(len(covariance))


# The moments of p, for every SDE, solver and rank of data.


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_samples_have_the_moments_of_p(any_sde, solver, shape, two_modes, deviations):
    target = two_modes(shape)
    grid = moment_grid(any_sde, solver, STEPS.get(solver, OTHER_STEPS))
    out = sd.sample(target.distribution.under(any_sde), N, solver=solver, grid=grid)
    assert out.samples.shape == (N, *shape)
    score = deviations(out.samples, covariance_at(any_sde, out.times[-1], target.covariance))
    assert score.abs().max() < 4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_prior_of_every_sde_is_close_enough_to_p(any_sde, shape, two_modes):
    # |E_p f − E_q f| ≤ √χ² std_q f with χ² = E_q (p/q − 1)², which no map from noise to data raises: starting from
    # the prior moves every moment of N samples by less than √(N χ²) standard errors.
    model = two_modes(shape, torch.float64).distribution.under(any_sde)
    x = any_sde.sample_prior((N, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = torch.exp(model.log_prob(x, any_sde.t_max) - any_sde.prior_log_prob(x))
    assert math.sqrt(N * float((ratio - 1).square().mean())) < 1


class CoupledStreams:
    """The same Brownian path at any step size: a step's noise sums that of ``parts`` finer steps."""

    def __init__(self, parts, draws):
        self.parts, self.draws = parts, draws
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, shape, dtype):
        calls, *rest = shape
        fine = [torch.randn(N, *rest, generator=self.generator, dtype=dtype) for _ in range(calls * self.parts)]
        by_step = torch.stack(fine).reshape(calls // self.draws, self.parts, self.draws, N, *rest)
        return (by_step.sum(1) / math.sqrt(self.parts)).reshape(calls, N, *rest).transpose(0, 1)


def solve_coupled(model, solver, grid, streams):
    sde = model.sde
    x = sde.sample_prior((N, *model.data_shape), generator=torch.Generator().manual_seed(0))
    problem = Problem(sde, Predict(model), grid, streams)
    with torch.no_grad():
        return solver.solve(problem, x)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
# The paths of adaptive steps with noise cannot be had at another step.
@pytest.mark.parametrize("name", [name for name in EVERY_SOLVER if name != "adaptive_sde"])
def test_halving_the_step_moves_no_moment_by_a_standard_error(
    any_sde, name, shape, two_modes, moments, deviations, capsys
):
    target = two_modes(shape)
    model = target.distribution.under(any_sde)
    steps, draws = STEPS.get(name, OTHER_STEPS), DRAWS.get(name, 1)
    solver = finer = SOLVERS[name](**HALVED.get(name, {}))
    grid, finer_grid = (moment_grid(any_sde, name, n) for n in (steps, 2 * steps))
    if solver.is_adaptive:
        finer, finer_grid = SOLVERS[name](rtol=solver.rtol / 100, atol=solver.atol / 100), grid
    coarse = solve_coupled(model, solver, grid, CoupledStreams(2, draws))
    fine = solve_coupled(model, finer, finer_grid, CoupledStreams(1, draws))
    (one, error), (other, _) = moments(coarse), moments(fine)
    move = ((one - other) / error).abs().max()
    deviation = deviations(coarse, covariance_at(any_sde, grid[-1], target.covariance)).abs().max()
    with capsys.disabled():
        row = f"{type(any_sde).__name__:14}{name:14}{math.prod(shape)}-D {steps:4} steps"
        print(f"\n{row}  deviation {deviation:.2f}  move {move:.2f}")
    assert move < 1


# A sample depends on its seed and index alone.


def draw(model, n, solver, **options):
    options = {"steps": 3, "dtype": torch.float64, "seed": 3} | options
    return sd.sample(model, n, solver=solver, **options).samples


# Solved a sample at a time.
ALONE = {"adaptive": True, "method": "heun", "rtol": 0.05, "atol": 0.05}
# A new solver is among them.
BY_ROW = [*[(name, {}) for name in EVERY_SOLVER], ("ode", {"method": "rk4"}), ("ddim", {"eta": 1.0})]


def check_batches(take, n=70):
    # More samples than the largest batch, so that one of 64 is really solved.
    whole = take(n=n, batch_size=64)
    assert torch.equal(take(n=n, batch_size=1), whole)
    assert torch.equal(take(n=n, batch_size=7), whole)
    assert torch.equal(take(n=5), whole[:5])
    assert len(whole.unique(dim=0)) == n
    assert not (take(n=n, seed=4) == whole).any()


@pytest.mark.parametrize(("solver", "options"), BY_ROW, ids=str)
def test_a_sample_is_bitwise_the_same_in_any_batch(any_sde, solver, options, pointwise):
    check_batches(partial(draw, pointwise(any_sde), solver=solver, **options))


def test_a_sample_solved_alone_is_bitwise_the_same_in_any_batch(pointwise):
    check_batches(partial(draw, pointwise(sd.VPSDE()), solver="torchsde", **ALONE), n=12)


@pytest.mark.parametrize("sde", [sd.VPSDE(), sd.EDMSDE()], ids=["vp", "edm"])
def test_an_adaptive_ode_gives_the_same_sample_in_any_batch_to_its_tolerance(sde, pointwise):
    # The flow takes the prior to narrower data, and a step's error with it: errors add up to less than their sum.
    tolerance = 1e-7
    options = {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
    take = partial(sd.sample, pointwise(sde), solver="ode", dtype=torch.float64, **options)
    whole = take(n=12)
    bound = whole.nfe * tolerance * (1 + sde.prior_std)
    for out in (take(n=12, batch_size=1), take(n=12, batch_size=7)):
        assert (out.samples - whole.samples).abs().max() < bound
    assert (take(n=5).samples - whole.samples[:5]).abs().max() < bound


@pytest.mark.parametrize(("solver", "options"), BY_ROW, ids=str)
def test_an_exact_mixture_gives_the_same_sample_in_any_batch_to_rounding(solver, options, two_modes):
    model = two_modes((2,), torch.float64).distribution.under(sd.VPSDE())
    whole = draw(model, 12, solver, **options)
    torch.testing.assert_close(draw(model, 12, solver, batch_size=7, **options), whole, rtol=1e-9, atol=1e-9)


SLOW_BY_ROW = [pytest.param(*row, marks=pytest.mark.slow) if row[0] == "adaptive_sde" else row for row in BY_ROW]


@pytest.mark.parametrize(("solver", "options"), SLOW_BY_ROW, ids=str)
def test_a_network_gives_the_same_sample_in_any_batch_to_rounding(solver, options):
    torch.manual_seed(0)
    network = UNet((1, 4, 4), base_channels=4, channel_multipliers=(1, 2), attention_resolutions=(2,))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = sd.DiffusionModel(network, sd.VPSDE(), data_shape=(1, 4, 4)).double()
    whole = draw(model, 70, solver, batch_size=64, **options)
    for batch_size in (1, 7):
        part = draw(model, 70, solver, batch_size=batch_size, **options)
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


# What is counted, kept and handed on.


@pytest.mark.parametrize("solver", [name for name in EVERY_SOLVER if not SOLVERS[name]().is_adaptive])
def test_evaluations_are_counted_where_the_model_is_called(solver, counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    out = sd.sample(model, 7, solver=solver, steps=5)
    assert out.nfe == model.calls > 0
    assert out.nfe_per_sample.tolist() == [model.calls] * 7
    assert out.seconds > 0


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_evaluations_of_a_sample_are_those_of_its_batch(solver, counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    out = sd.sample(model, 7, solver=solver, steps=5, batch_size=3)
    assert int(out.nfe_per_sample.sum()) == model.rows
    assert out.nfe == int(out.nfe_per_sample.max())


def test_evaluations_of_samples_solved_alone_are_their_own(counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    out = sd.sample(model, 5, solver="torchsde", adaptive=True, steps=4, rtol=1e-2, atol=1e-2, batch_size=3)
    assert int(out.nfe_per_sample.sum()) == model.rows == model.calls
    assert len(set(out.nfe_per_sample.tolist())) > 1
    assert out.nfe == int(out.nfe_per_sample.max())


@pytest.mark.parametrize(
    ("solver", "options", "nfe", "steps", "used"),
    [
        ("em", {}, 10, 10, 10),
        ("ddim", {}, 1, 1, 1),
        ("ddpm", {}, 7, 7, 7),
        ("heun", {}, 21, 10, 20),
        ("heun", {}, 2, 1, 2),
        ("ode", {"method": "euler"}, 9, 9, 9),
        ("ode", {"method": "midpoint"}, 9, 4, 8),
        ("ode", {"method": "heun2"}, 9, 4, 8),
        ("ode", {"method": "heun3"}, 9, 3, 9),
        ("ode", {"method": "rk4"}, 9, 2, 8),
    ],
)
def test_evaluations_are_turned_into_steps(solver, options, nfe, steps, used, counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    out = sd.sample(model, 2, solver=solver, nfe=nfe, **options)
    assert len(out.times) == steps + 1
    assert out.nfe == model.calls == used


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_a_solver_has_default_steps(solver, pointwise):
    out = sd.sample(pointwise(sd.VPSDE()), 2, solver=solver)
    expected = 1 if SOLVERS[solver]().is_adaptive else SOLVERS[solver].default_steps
    assert len(out.times) == expected + 1


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_the_trajectory_leads_from_start_to_samples(any_sde, solver, pointwise):
    model = pointwise(any_sde)
    x_start = any_sde.sample_prior((5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"solver": solver, "steps": 4, "dtype": torch.float64, "x_start": x_start, "batch_size": 2}
    out = sd.sample(model, 5, trajectory=True, **options)
    assert out.trajectory.shape == (5, 5, 3)
    assert torch.equal(out.trajectory[0], x_start)
    assert torch.equal(out.trajectory[-1], out.samples)
    assert len(out.trajectory.unique(dim=0)) == 5
    without = sd.sample(model, 5, **options)
    assert without.trajectory is None
    assert torch.equal(without.samples, out.samples)


def test_an_adaptive_solver_stops_at_its_default_grid_for_a_trajectory(pointwise):
    out = sd.sample(pointwise(sd.VPSDE()), 2, trajectory=True)
    assert len(out.trajectory) == len(out.times) == SOLVERS["ode"].default_steps + 1


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_the_callback_sees_every_step_of_every_batch(solver, pointwise):
    seen = []
    model = pointwise(sd.VPSDE())
    out = sd.sample(
        model,
        3,
        solver=solver,
        steps=4,
        batch_size=2,
        trajectory=True,
        callback=lambda i, t, x: seen.append((i, t, x)),
    )
    assert [i for i, _, _ in seen] == [1, 2, 3, 4] * 2
    assert [t for _, t, _ in seen] == out.times[1:] * 2
    for i, _, x in seen[:4]:
        assert torch.equal(x, out.trajectory[i, :2])
    for i, _, x in seen[4:]:
        assert torch.equal(x, out.trajectory[i, 2:])


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_times_end_exactly_where_asked(any_sde, solver, pointwise):
    model = pointwise(any_sde)
    out = sd.sample(model, 2, solver=solver, steps=3)
    assert (out.times[0], out.times[-1]) == (any_sde.t_max, any_sde.t_min)
    start, end = any_sde.T / 2, any_sde.T / 3
    out = sd.sample(model, 2, solver=solver, steps=3, x_start=torch.zeros(2, 3), t_start=start, t_end=end)
    assert (out.times[0], out.times[-1]) == (start, end)


def test_given_times_are_the_grid(any_sde, pointwise):
    times = [any_sde.t_max, any_sde.T / 2, any_sde.T / 5]
    assert sd.sample(pointwise(any_sde), 2, solver="ddim", grid=times).times == times


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_a_start_on_the_way_reaches_p(any_sde, solver, pointwise, deviations):
    n, variance = 5000, 0.5
    start, end = (float(any_sde.t_from_log_snr(torch.tensor(r))) for r in (-1.0, 1.0))
    model = pointwise(any_sde, variance)
    scale = torch.tensor(covariance_at(any_sde, start, torch.tensor([[variance]])).sqrt().item())
    x_start = scale * torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    out = sd.sample(model, n, solver=solver, steps=50, x_start=x_start, t_start=start, t_end=end)
    # A step of 1/50 in log-SNR is under 1 % of the variance off, whose standard error is 2 %.
    exact = covariance_at(any_sde, end, variance * torch.eye(3, dtype=torch.float64))
    assert deviations(out.samples, exact).abs().max() < 4


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("n", [1, 3])
def test_float64_and_a_batch_of_one_work_throughout(any_sde, solver, n, pointwise):
    for dtype in (torch.float32, torch.float64):
        out = sd.sample(pointwise(any_sde), n, solver=solver, steps=5, dtype=dtype)
        assert out.samples.dtype == dtype
        assert out.samples.shape == (n, 3)
        assert out.samples.isfinite().all()


STOCHASTIC = [name for name, kind in SOLVERS.items() if kind().is_stochastic]


# Noise differs between the dtypes' streams: these draw none.
@pytest.mark.parametrize("solver", [name for name in EVERY_SOLVER if name not in STOCHASTIC])
def test_float32_follows_float64(any_sde, solver, pointwise):
    x_start = any_sde.prior_std * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    single, double = (
        sd.sample(pointwise(any_sde), 4, solver=solver, steps=20, x_start=x_start, dtype=dtype).samples
        for dtype in (torch.float32, torch.float64)
    )
    # Rounding of x at 2⁻²⁴ of the largest state, added over some twenty operations a step.
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


# Conditioning and guidance.


class Labelled(sd.Model):
    """Every label is one point, label + offset."""

    def __init__(self, offset=0.0):
        self.sde, self.data_shape, self.offset = sd.VPSDE(), (1, 1, 2), offset

    def predict(self, x, t, label, shift=0.0):
        assert len(label) == len(x)
        x0 = (label.to(x.dtype) + self.offset + shift).reshape(-1, 1, 1, 1).expand_as(x)
        alpha, sigma = (expand_to(value, x) for value in (self.sde.alpha(t), self.sde.sigma(t)))
        return sd.Prediction(x0, (x - alpha * x0) / sigma)


# The default lets a step miss by a twentieth of the state.
CLOSE = {"adaptive_sde": {"rtol": 0.005}}
BY_SAMPLE: list[tuple[str, dict]] = [(name, CLOSE.get(name, {})) for name in EVERY_SOLVER] + [("torchsde", ALONE)]


@pytest.mark.parametrize(("solver", "options"), BY_SAMPLE, ids=str)
def test_conditioning_is_cut_into_batches(solver, options):
    label = torch.arange(5)
    out = sd.sample(
        Labelled(), 5, solver=solver, steps=40, batch_size=2, cond={"label": label, "shift": 0.5}, **options
    )
    # At t_min a sample is its point with noise of a thousandth, and no solver misses it by a tenth.
    assert (out.samples - (label + 0.5).reshape(5, 1, 1, 1)).abs().max() < 0.1


def test_guidance_replaces_the_model():
    given = []

    def guidance(model):
        given.append(model)
        return Labelled(offset=10.0)

    model = Labelled()
    out = sd.sample(model, 3, solver="ddim", steps=5, cond={"label": torch.arange(3)}, guidance=guidance)
    assert given == [model]
    assert out.nfe == 5
    assert (out.samples - (torch.arange(3) + 10.0).reshape(3, 1, 1, 1)).abs().max() < 0.1


# The network's mode and gradients.


class Watching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)
        self.seen = []

    def forward(self, x, t):
        self.seen.append((self.training, self.dropout.training, torch.is_grad_enabled(), x.dtype))
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_evaluated_without_dropout_or_gradients(solver, training):
    network = Watching()
    model = sd.DiffusionModel(network, sd.VPSDE(), data_shape=(2,)).train(training)
    out = sd.sample(model, 2, solver=solver, steps=3)
    assert set(network.seen) == {(False, False, False, torch.float32)}
    assert network.training == network.dropout.training == model.training == training
    assert not out.samples.requires_grad
    assert torch.is_grad_enabled()


def test_a_network_is_back_in_its_mode_after_an_error():
    model = sd.DiffusionModel(Watching(), sd.VPSDE(), data_shape=(2,)).train()

    def stop(i, t, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd.sample(model, 2, solver="ddim", steps=3, callback=stop)
    assert model.training
    assert model.network.dropout.training


def test_samples_are_of_the_networks_dtype():
    model = sd.DiffusionModel(Watching().double(), sd.VPSDE(), data_shape=(2,))
    assert sd.sample(model, 2, solver="ddim", steps=3).samples.dtype == torch.float64
    assert sd.sample(model, 2, solver="ddim", steps=3, dtype=torch.float32).samples.dtype == torch.float32


def test_the_seed_alone_decides(pointwise):
    model = pointwise(sd.VPSDE())
    first = sd.sample(model, 3, solver="em", steps=3).samples
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(sd.sample(model, 3, solver="em", steps=3).samples, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_solver_is_listed():
    assert list(sd.solvers()) == ["auto", "calibrated", *SOLVERS]
    assert {"em", "ddpm", "ddim", "heun", "ode", "torchsde"} <= set(sd.solvers())


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"steps": -3}, "steps = -3: must be at least 1"),
        ({"nfe": 0}, "nfe = 0: must be at least 1"),
        ({"steps": 3, "nfe": 3}, "steps = 3 and nfe = 3: give one of them"),
        ({"solver": "heun", "nfe": 1}, "nfe = 1: must be at least 2"),
        ({"solver": "ode", "method": "rk4", "nfe": 3}, "nfe = 3: must be at least 4"),
        ({"solver": "ode", "nfe": 20}, "nfe = 20: .* set steps or tolerances"),
        ({"solver": "torchsde", "nfe": 20}, "nfe = 20: .* set steps or tolerances"),
        ({"solver": "ddmi"}, f"solver = 'ddmi': must be one of auto, calibrated, {', '.join(EVERY_SOLVER)}"),
        ({"solver": "ddim", "etta": 1.0}, "etta: solver 'ddim' takes eta"),
        ({"solver": "heun", "eta": 1.0}, "eta: solver 'heun' takes no options; eta is for em, ddim, torchsde"),
        ({"solver": "auto", "eta": 1.0}, "eta: solver 'auto' takes rtol, atol; eta is for em, ddim, torchsde"),
        ({"solver": "ode", "tol": 1.0}, "tol: solver 'ode' takes method, rtol, atol"),
        ({"grid": "log-snr"}, "grid = 'log-snr': must be one of log_snr, exponential, angle, t"),
        ({"grid": [0.2, 0.5]}, r"grid = \[0.2, 0.5\]: needs at least two strictly decreasing times"),
        ({"grid": [1.2, 0.5]}, r"grid = 1.2 is outside the range \[0, 1.0\]"),
        ({"grid": [1.0, 0.5], "steps": 3}, "grid is given as times: steps, nfe, t_start and t_end"),
        ({"grid": [1.0, 0.5], "t_end": 0.5}, "grid is given as times: steps, nfe, t_start and t_end"),
        ({"grid": [0.5, 0.2]}, "t_start = 0.5: a start before t_max = 1.0 needs x_start"),
        ({"t_end": -0.1}, r"t_end = -0.1 is outside the range \[0, 1.0\]"),
        ({"t_end": 2.0}, r"t_end = 2.0 is outside the range \[0, 1.0\]"),
        ({"t_end": float("nan")}, "t_end = nan is outside the range"),
        ({"t_start": 1.1, "x_start": torch.zeros(2, 3)}, "t_start = 1.1 is outside the range"),
        ({"t_start": 0.3, "t_end": 0.3, "x_start": torch.zeros(2, 3)}, "t_start = 0.3, t_end = 0.3"),
        ({"t_start": 0.3, "t_end": 0.5, "x_start": torch.zeros(2, 3)}, "t_start = 0.3, t_end = 0.5"),
        ({"t_start": 0.3}, "t_start = 0.3: a start before t_max = 1.0 needs x_start"),
        ({"x_start": torch.zeros(2, 4)}, r"x_start has shape \(2, 4\): need \(B, 3\)"),
        ({"x_start": torch.zeros(3)}, r"x_start has shape \(3,\): need \(B, 3\)"),
        (
            {"x_start": torch.zeros(2, 3, dtype=torch.int64)},
            "x_start has dtype torch.int64: need a floating dtype",
        ),
        ({"x_start": torch.zeros(5, 3)}, "x_start holds 5 states: must hold n = 2"),
        ({"cond": {"label": torch.zeros(3)}}, r"cond\['label'\] has length 3: must be 2"),
        ({"n": 0}, "n = 0, .*: must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
    ],
    ids=str,
)
def test_errors_name_the_argument_its_value_and_what_is_allowed(options, message, pointwise):
    options = {"n": 2, "solver": "ddim"} | options
    with pytest.raises(ValueError, match=message):
        sd.sample(pointwise(sd.VPSDE()), options.pop("n"), **options)


@pytest.mark.parametrize("solver", [name for name in EVERY_SOLVER if SOLVERS[name].in_log_snr])
@pytest.mark.parametrize(
    "options", [{"grid": "t"}, {"grid": "t", "steps": 1}, {"steps": 1}, {"grid": [1.0, 0.5, 0.0]}], ids=str
)
def test_a_solver_in_log_snr_cannot_end_without_noise(solver, options, pointwise):
    options = options if isinstance(options.get("grid"), list) else options | {"t_end": 0.0}
    with pytest.raises(ValueError, match=r"t_end = 0\.0: the log-SNR is infinite there"):
        sd.sample(pointwise(sd.VPSDE()), 2, solver=solver, **options)


@pytest.mark.parametrize("solver", [name for name in EVERY_SOLVER if not SOLVERS[name].in_log_snr])
def test_any_other_solver_ends_without_noise_on_a_grid_in_t(any_sde, solver, pointwise):
    out = sd.sample(pointwise(any_sde), 2, solver=solver, steps=5, grid="t", t_end=0.0)
    assert out.times[-1] == 0
    assert out.samples.isfinite().all()


# The end of the straight path, where no data are left.

SINGULAR = {
    "ode": {},
    "heun": {"steps": 40},
    "ddim": {"steps": 300},
    "ddpm": {"steps": 300},
    "em": {"steps": 300, "eta": lambda t: torch.sqrt(2 * t)},
}


@pytest.mark.parametrize("solver", SINGULAR)
def test_a_flow_starts_where_no_data_are_left(solver, two_modes, deviations):
    target = two_modes()
    model = target.distribution.under(sd.FlowSDE())
    out = sd.sample(model, N, solver=solver, t_start=1.0, t_end=0.05, **SINGULAR[solver])
    assert out.times[0] == 1.0
    score = deviations(out.samples, covariance_at(model.sde, out.times[-1], target.covariance))
    assert score.abs().max() < 4


def test_an_infinite_noise_level_is_an_error(two_modes):
    model = two_modes().distribution.under(sd.FlowSDE())
    with pytest.raises(ValueError, match=r"the coefficient 'noise' is not finite at t = 1\.0: stay within"):
        sd.sample(model, 2, solver="em", t_start=1.0)
    with pytest.raises(ValueError, match=r"t_start = 1\.0: the log-SNR is infinite there"):
        sd.sample(model, 2, solver="torchsde", t_start=1.0)


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_a_model_that_cannot_start_there_says_so(prediction):
    model = sd.DiffusionModel(lambda x, t: x, sd.FlowSDE(), prediction, data_shape=(2,))
    with pytest.raises(ValueError, match=r"t_start = 1\.0"):
        sd.sample(model, 2, solver="ddim", t_start=1.0)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "edm"])
@pytest.mark.parametrize("solver", ["ode", "heun", "ddim"])
def test_other_predictions_start_there(prediction, solver):
    model = sd.DiffusionModel(lambda x, t: 0.1 * x, sd.FlowSDE(), prediction, data_shape=(2,))
    assert bool(sd.sample(model, 2, solver=solver, t_start=1.0).samples.isfinite().all())


def test_the_angle_is_the_grid_where_the_log_snr_is_infinite(two_modes):
    model = two_modes().distribution.under(sd.FlowSDE())
    times = sd.sample(model, 2, solver="ddim", steps=3, t_start=1.0).times
    assert times == time_grid(model.sde, "angle", 1.0, model.sde.t_min, 3)


# Which solver it is.


def test_by_default_the_solver_is_chosen_for_the_evaluations(counting, pointwise):
    model = counting(pointwise(sd.VPSDE()))
    out = sd.sample(model, 3, nfe=9, dtype=torch.float64)
    assert out.nfe == model.calls == 9
    chosen = sd.sample(model.model, 3, solver=choose(model.sde, 9), dtype=torch.float64)
    assert torch.equal(out.samples, chosen.samples)
    assert torch.equal(sd.sample(model.model, 3, steps=9, dtype=torch.float64).samples, chosen.samples)


def test_by_default_a_tolerance_is_met_without_a_number_of_evaluations(pointwise):
    model = pointwise(sd.VPSDE())
    for options in ({}, {"rtol": 1e-6, "atol": 1e-6}):
        expected = sd.sample(model, 3, solver="ode", **options)
        assert torch.equal(sd.sample(model, 3, **options).samples, expected.samples)


def test_a_chosen_solver_takes_the_grid_that_is_given(pointwise):
    model, solver = pointwise(sd.VPSDE()), choose(sd.VPSDE(), 4)
    solver.times = None
    times = [1.0, 0.7, 0.4, 0.2, 0.1]
    expected = sd.sample(model, 3, solver=solver, grid=times).samples
    assert torch.equal(sd.sample(model, 3, grid=times).samples, expected)
    assert sd.sample(model, 3, nfe=4, grid="t").times == time_grid(model.sde, "t", model.sde.t_max, model.sde.t_min, 4)
