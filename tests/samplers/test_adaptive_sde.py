"""Adaptive steps of the SDE: their law, the path that rejections keep, and one sample's independence of the others."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers import adaptive_sde
from sde_diffusion.samplers.adaptive_sde import AdaptiveSDE, _BrownianPath
from sde_diffusion.samplers.noise import StepNoise, Streams

VP = sd.VPSDE()


def marginal_variance(sde, t, variance):
    t = torch.tensor(t, dtype=torch.float64)
    return sde.alpha(t).square() * variance + sde.sigma(t).square()


@pytest.fixture
def attempts(monkeypatch):
    """Numbers of attempts that were accepted and of all."""
    counts = {"accepted": 0, "all": 0}
    settle = _BrownianPath.settle

    def counting(self, rows, end, increment, accepted):
        counts["accepted"] += int(accepted.sum())
        counts["all"] += len(accepted)
        settle(self, rows, end, increment, accepted)

    monkeypatch.setattr(_BrownianPath, "settle", counting)
    return counts


@pytest.mark.parametrize(
    ("options", "rejected"),
    [
        ({"eta": 0.5, "rtol": 0.05, "atol": 0.02}, 0.2),
        ({"eta": 1.5, "rtol": 0.1, "atol": 0.05}, 0.2),
        # The steps leap to and fro.
        ({"eta": 0.5, "rtol": 0.05, "atol": 0.02, "exponent": 8.0, "safety": 0.99}, 0.3),
    ],
    ids=str,
)
def test_rejections_do_not_move_the_law(options, rejected, attempts, pointwise, deviations):
    """Increments drawn anew at every attempt make these variances too large, by a fifth or more."""
    out = sd.sample(pointwise(VP), 20_000, solver="adaptive_sde", t_end=0.05, seed=7, **options)
    assert 1 - attempts["accepted"] / attempts["all"] > rejected
    exact = marginal_variance(VP, 0.05, 0.5) * torch.eye(3, dtype=torch.float64)
    assert deviations(out.samples, exact).abs().max() < 4


def test_an_attempt_is_the_published(any_sde, pointwise, monkeypatch):
    """Euler-Maruyama, and the mean of it and of a step with the rates at its end, over −log(σ/α)."""
    monkeypatch.setattr(adaptive_sde, "_FIRST_STEP", 1.0)
    model, eta = pointwise(any_sde), 0.7
    x = any_sde.prior_std * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = any_sde.t_from_log_snr(torch.tensor([-1.0, -0.8], dtype=torch.float64))
    options = {"x_start": x, "grid": times.tolist(), "dtype": torch.float64, "seed": 5}
    out = sd.sample(model, 4, solver="adaptive_sde", eta=eta, rtol=1e9, **options)
    assert out.nfe == 2
    # dx/du of dx/dt, and noise at the rate 2 σ² over u.
    h, noise = 0.1, math.sqrt(0.1) * StepNoise(Streams(5, range(4)), (3,), torch.float64)()

    def move(x, t):
        _, dt_du = any_sde.time_change(any_sde.log_snr(t) / -2)
        drift = any_sde.reverse(model, eta).drift(x, t) * dt_du
        return -h * drift + eta * math.sqrt(2) * any_sde.sigma(t) * noise

    first = move(x, times[0])
    torch.testing.assert_close(out.samples, x + (first + move(x + first, times[1])) / 2, rtol=1e-9, atol=1e-9)


def test_a_rejected_increment_is_kept_until_it_is_reached(moments):
    """Of attempts at 1, ¼, 0.1, then ¼, 0.6, 1 and 2, of which the first two are rejected."""
    n = 20_000
    path = _BrownianPath(StepNoise(Streams(0, range(n)), (1,), torch.float64), torch.zeros(n, 1, dtype=torch.float64))
    rows = torch.arange(n)
    taken, ahead, rejected = [], [], None
    s = 0.0
    for end, accepted in ((1, 0), (0.25, 0), (0.1, 1), (0.25, 1), (0.6, 1), (1, 1), (2, 1)):
        ahead.append(float(path.known_until(rows)[0]))
        ends = torch.full((n,), float(end), dtype=torch.float64)
        increment = path.increment(rows, torch.full_like(ends, s), ends)
        path.settle(rows, ends, increment, torch.full((n,), bool(accepted)))
        if end == 1 and not accepted:
            rejected = increment
        if accepted:
            taken.append(increment)
            s = end
    assert ahead == [math.inf, 1, 0.25, 0.25, 1, 1, math.inf]
    # All of them are differences of a few numbers of the size of one.
    torch.testing.assert_close(sum(taken[:4]), rejected, rtol=0, atol=1e-14)
    mean, error = moments(torch.cat(taken, 1))
    lengths = torch.diag(torch.tensor([0.1, 0.15, 0.35, 0.4, 1.0], dtype=torch.float64))
    row, column = torch.triu_indices(5, 5)
    exact = torch.cat([torch.zeros(5, dtype=torch.float64), lengths[row, column]])
    assert ((mean - exact) / error).abs().max() < 4


def test_samples_on_their_own_ways_keep_their_own_paths():
    """Of two samples the first is rejected at 1 and the second at ½: each finds its own point ahead of it."""
    path = _BrownianPath(StepNoise(Streams(0, range(3)), (1,), torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    rows, start = torch.tensor([0, 2]), torch.zeros(2, dtype=torch.float64)
    ends = torch.tensor([1.0, 0.5], dtype=torch.float64)
    increment = path.increment(rows, start, ends)
    path.settle(rows, ends, increment, torch.tensor([False, False]))
    assert path.known_until(torch.arange(3)).tolist() == [1.0, math.inf, 0.5]
    assert torch.equal(path.increment(torch.tensor([2]), start[:1], ends[1:]), increment[1:])


class Recording(sd.Model):
    """N(0, ½ I) in three dimensions at a sample's own distance from 0, its label; keeps what it is asked."""

    def __init__(self):
        self.sde, self.data_shape, self.asked = VP, (3,), []

    def predict(self, x, t, label):
        assert len(label) == len(x)
        self.asked.extend(zip(label.tolist(), t.expand(len(x)).tolist(), strict=True))
        alpha, sigma = (f(t).reshape(-1, 1) for f in (VP.alpha, VP.sigma))
        whitened = (x - alpha * label[:, None]) / (0.5 * alpha.square() + sigma.square())
        return sd.Prediction(label[:, None] + 0.5 * alpha * whitened, sigma * whitened)


def test_each_sample_takes_its_own_steps_with_its_own_condition():
    model, label = Recording(), torch.arange(6, dtype=torch.float64) * 10
    out = sd.sample(model, 6, solver="adaptive_sde", t_end=0.3, cond={"label": label}, dtype=torch.float64)
    counts = [sum(asked == own for asked, _ in model.asked) for own in label.tolist()]
    assert out.nfe_per_sample.tolist() == counts
    assert len(set(counts)) > 1
    mean, variance = VP.alpha(torch.tensor(0.3)) * label[:, None], float(marginal_variance(VP, 0.3, 0.5))
    assert (out.samples - mean).abs().max() < 5 * math.sqrt(variance)


def test_it_stops_at_every_point_of_the_grid(deviations):
    model, n = Recording(), 4000
    grid = [1.0, 0.7, 0.4, 0.1]
    seen = []
    out = sd.sample(
        model,
        n,
        solver="adaptive_sde",
        grid=grid,
        cond={"label": torch.zeros(n)},
        trajectory=True,
        callback=lambda i, t, x: seen.append((i, t)),
    )
    assert seen == [(1, 0.7), (2, 0.4), (3, 0.1)]
    asked = torch.tensor([t for _, t in model.asked])
    for t, x in zip(grid[1:], out.trajectory[1:], strict=True):
        assert int(torch.isclose(asked, torch.tensor(t), rtol=1e-6).sum()) >= n
        exact = marginal_variance(VP, t, 0.5) * torch.eye(3, dtype=torch.float64)
        assert deviations(x, exact).abs().max() < 4


def test_a_sample_is_bitwise_the_same_in_any_batch(pointwise):
    options = {"solver": "adaptive_sde", "t_end": 0.1, "rtol": 0.2, "trajectory": True}
    whole = sd.sample(pointwise(VP), 12, **options, steps=3)
    parts = sd.sample(pointwise(VP), 12, **options, steps=3, batch_size=5)
    assert torch.equal(parts.trajectory, whole.trajectory)
    assert torch.equal(parts.nfe_per_sample, whole.nfe_per_sample)


def test_a_finer_tolerance_takes_more_steps(pointwise):
    counts = [
        sd.sample(pointwise(VP), 20, solver="adaptive_sde", rtol=rtol, atol=rtol).nfe_per_sample.sum()
        for rtol in (0.3, 0.1, 0.03)
    ]
    # Errors grow with h to the power of 1.5: of a tolerance 3.2 times finer steps are some 2.2 times shorter.
    assert 1.5 < counts[1] / counts[0] < 3
    assert 1.5 < counts[2] / counts[1] < 3


# What it says of itself, and where it gives up.


def test_it_says_what_it_is(pointwise):
    solver = AdaptiveSDE()
    assert solver.is_adaptive
    assert solver.is_stochastic
    assert solver.convergence_order is None
    with pytest.raises(ValueError, match=r"nfe = 20: .* set steps or tolerances"):
        sd.sample(pointwise(VP), 2, solver="adaptive_sde", nfe=20)


class Breaking(sd.Model):
    """From t = ½ on the noise predicted of the samples whose x[0] > 0 is ``value``; of all others it is 0."""

    def __init__(self, value):
        self.sde, self.data_shape, self.value = VP, (2,), value

    def predict(self, x, t):
        is_broken = ((t < 0.5) & (x[:, 0] > 0))[:, None]
        return sd.Prediction(torch.zeros_like(x), torch.where(is_broken, self.value, torch.zeros_like(x)))


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (math.nan, {}, r"t = 0\.[5-7]\d*, sample 2 of its batch, after \d+ evaluations: the state is not finite"),
        # No step is so short that such a jump would pass for smooth.
        (1e100, {}, r"t = 0\.5, sample 2 of its batch, after \d+ evaluations: the step size underflows"),
        (0.0, {"max_attempts": 3}, r"t = \S+, sample 0 of its batch, after 8 evaluations: max_attempts = 3 is reached"),
    ],
)
def test_errors_say_where_which_and_after_how_many_evaluations(value, options, message):
    x = torch.tensor([[-1e3, 0], [-1e3, 0], [1e3, 0]], dtype=torch.float64)
    with pytest.raises(SolverError, match="adaptive_sde stopped at " + message):
        sd.sample(Breaking(value), 3, solver="adaptive_sde", x_start=x, t_start=0.8, t_end=0.2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta = 0.0"),
        ({"eta": math.inf}, "eta = inf"),
        ({"rtol": 0.0}, "rtol = 0.0"),
        ({"atol": -1.0}, "atol = -1.0"),
        ({"safety": 1.0}, "safety = 1.0, exponent = 0.9: need 0 < safety < 1"),
        ({"exponent": 0.1}, "exponent = 0.1: need .* exponent >= 0.5"),
        ({"max_attempts": 0}, "max_attempts = 0: must be at least 1"),
        ({"t_end": 0.0}, r"t_end = 0\.0: the log-SNR is infinite there"),
    ],
)
def test_wrong_options_are_named(options, message, pointwise):
    with pytest.raises(ValueError, match=message):
        sd.sample(pointwise(VP), 2, solver="adaptive_sde", **options)
