import math
import re
from itertools import pairwise

import pytest
import torch

from sde_diffusion import RateSDE, SolverError
from sde_diffusion.ode import ADAPTIVE_METHODS, FIXED_METHODS, ONE_STEP_METHODS, ProbabilityFlow, integrate
from sde_diffusion.sde import expand_to

METHODS = ADAPTIVE_METHODS + FIXED_METHODS
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
FORWARDS, BACKWARDS = [0.0, 2.0], [2.0, 0.0]


def ones(*shape, dtype=torch.float64):
    return torch.ones(*shape, dtype=dtype)


def decay(state, s):
    return tuple(-x for x in state)


def oscillate(state, s):
    """dx/ds = cos(s) x, solved by exp(sin s)."""
    return (torch.cos(s) * state[0],)


def even(count, first=0.0, last=2.0):
    return [first + (last - first) * i / count for i in range(count + 1)]


def errors_in_tolerances(method, tolerance):
    """How many tolerances a method may err over a time of 2 in which nothing grows by more than e.

    A few, as each step's estimate is below it, and of the lower of two orders: more would mean that the end is
    interpolated. Fehlberg's estimate h² x″/512 allows h = √(1024 tolerance), of which the second order makes an
    error of h²/6.
    """
    return (170 if method == "fehlberg2" else 10) * tolerance


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods_hold_the_tolerance(method, tolerance):
    options = {"method": method, "rtol": tolerance, "atol": tolerance}
    bound = errors_in_tolerances(method, tolerance)
    (x,) = integrate(decay, (ones(3, 2),), FORWARDS, **options)
    assert ((x - math.exp(-2)).abs() <= bound).all()
    (x,) = integrate(decay, (math.exp(-2) * ones(3, 2),), BACKWARDS, **options)
    # Backwards the solution grows by e², and each error with it.
    assert ((x - 1).abs() <= math.exp(2) * bound).all()
    (x,) = integrate(oscillate, (ones(3, 2),), FORWARDS, **options)
    assert ((x - math.exp(math.sin(2))).abs() <= math.e * bound).all()


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize(("method", "order"), [("explicit_adams", 4), ("implicit_adams", 5)])
def test_adams_methods_show_their_order(method, order):
    def error(count):
        (x,) = integrate(oscillate, (ones(1, 1),), even(count), method=method, rtol=1e-12, atol=1e-12)
        return abs(float(x) - math.exp(math.sin(2)))

    # They start with Runge-Kutta steps, whose share of the error is still felt at h = 1/80.
    assert math.log2(error(160) / error(320)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_fixed_methods_show_their_order(method):
    def error(count):
        (x,) = integrate(oscillate, (ones(1, 1),), even(count), method=method)
        return abs(float(x) - math.exp(math.sin(2)))

    # The next term of the error is h = 1/20 to 1/40 of the first.
    assert math.log2(error(40) / error(80)) == pytest.approx(ORDERS[method], abs=0.2)


@pytest.mark.parametrize("grid", [[0.0, 0.1, 0.5, 0.6, 2.0], [2.0, 1.9, 0.7, 0.0]])
def test_fixed_methods_step_along_the_grid(grid):
    seen = []

    def velocity(state, s):
        seen.append(float(s))
        return decay(state, s)

    (x,) = integrate(velocity, (ones(2, 3),), grid, method="euler")
    assert seen == grid[:-1]
    product = math.prod(1 - (after - before) for before, after in pairwise(grid))
    torch.testing.assert_close(x, product * ones(2, 3))


@pytest.mark.parametrize("grid", [FORWARDS, BACKWARDS, [0.1, 0.1 + 1e-3], even(7, 0.7, 0.1)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_time_stays_in_the_interval(method, grid, dtype):
    seen = []

    def velocity(state, s):
        seen.append(s)
        # So slow that the first step is guessed to be a hundred times the state over its rate.
        return (1e-3 * torch.cos(s).to(state[0]) * state[0],)

    (x,) = integrate(velocity, (ones(4, 2, dtype=dtype),), grid, method=method)
    assert x.dtype == dtype
    assert x.shape == (4, 2)
    for s in seen:
        assert s.dtype == torch.float64
        assert s.shape == ()
        assert min(grid) <= float(s) <= max(grid)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_one_hard_sample_decides_the_steps(method):
    """The root mean square over the batch would make its error 30 times smaller."""
    rates = torch.zeros(1000, dtype=torch.float64)
    rates[137] = 20.0

    def velocity(rates):
        return lambda state, s: (rates[:, None] * torch.cos(20 * s) * state[0],)

    options = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    (together,) = integrate(velocity(rates), (ones(1000, 2),), FORWARDS, **options)
    (alone,) = integrate(velocity(rates[137:138]), (ones(1, 2),), FORWARDS, **options)
    torch.testing.assert_close(together[137:138], alone, rtol=1e-12, atol=0)
    assert (together[:137] == 1).all()


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_every_tensor_of_the_state_counts(method):
    """Easy images beside a hard number for each."""

    def velocity(state, s):
        images, number = state
        return -images, 20 * torch.cos(20 * s) * number

    tolerance = 1e-4
    images, number = integrate(
        velocity, (ones(3, 2, 4, 4), ones(3)), FORWARDS, method=method, rtol=tolerance, atol=tolerance
    )
    assert images.shape == (3, 2, 4, 4)
    assert number.shape == (3,)
    # Over 13 periods in which the number grows by e² and shrinks again, errors of tolerance times e may add up.
    bound = 20 * math.exp(2) * errors_in_tolerances(method, tolerance)
    assert ((number - math.exp(math.sin(40))).abs() <= bound).all()
    assert ((images - math.exp(-2)).abs() <= bound).all()


@pytest.mark.parametrize("method", ADAPTIVE_METHODS + ONE_STEP_METHODS)
def test_observe(method):
    grid, seen = even(20), []
    tolerance = 1e-6
    (x,) = integrate(
        decay,
        (ones(2, 3),),
        grid,
        method=method,
        rtol=tolerance,
        atol=tolerance,
        observe=lambda i, state: seen.append((i, state)),
    )
    assert [i for i, _ in seen] == list(range(1, 21))
    assert torch.equal(seen[-1][1], x)
    if method in ADAPTIVE_METHODS:
        # Between its steps a method interpolates, by the order of Heun's at the least: h³ = 1e-3 at h < 0.1.
        for i, state in seen:
            assert ((state - math.exp(-grid[i])).abs() <= 1e-3).all()
    else:
        growth = float(seen[0][1][0, 0])
        for i, state in seen:
            torch.testing.assert_close(state, growth**i * ones(2, 3))


@pytest.mark.parametrize("method", METHODS)
def test_an_exploding_state_is_an_error(method):
    calls = 0

    def velocity(state, s):
        nonlocal calls
        calls += 1
        return (state[0] ** 2,)

    # x = 1/(1 - s) leaves the finite numbers at s = 1.
    with pytest.raises(SolverError) as failure:
        integrate(velocity, (ones(2, 2),), even(50), method=method, max_steps=1000)
    message = str(failure.value)
    assert message.startswith(method)
    assert f"{calls} evaluations" in message
    if method in ADAPTIVE_METHODS:
        where = re.search(r"stopped at t = (\S+) after", message)
        assert where is not None
        assert float(where[1]) == pytest.approx(1, abs=0.01)
    else:
        assert "before t = 2" in message


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_is_not_a_number_is_an_error(method):
    def broken(state, s):
        return (torch.where(s > 1, math.nan, -state[0]),)

    with pytest.raises(SolverError, match=method):
        integrate(broken, (ones(2, 2),), even(10), method=method)
    with pytest.raises(SolverError, match=method):
        integrate(decay, (math.nan * ones(2, 2),), even(10), method=method)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_too_many_steps_are_an_error(method):
    with pytest.raises(SolverError, match=rf"{method} stopped at t = \S+ after \d+ evaluations: max_num_steps"):
        integrate(oscillate, (ones(2, 2),), [0.0, 200.0], method=method, max_steps=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk45"}, "method = 'rk45': must be one of dopri5, .*rk4"),
        ({"method": "explicit_adams", "grid": [0.0, 1.0, 3.0]}, r"grid = \[0\.0, 1\.0, 3\.0\]: .*equal steps"),
        ({"rtol": 0.0}, r"rtol = 0\.0"),
        ({"rtol": -1e-3}, r"rtol = -0\.001"),
        ({"atol": 0.0}, r"atol = 0\.0"),
        ({"atol": math.nan}, "atol = nan"),
        ({"grid": []}, r"grid = \[\]: needs at least two points"),
        ({"grid": [0.0]}, r"grid = \[0\.0\]"),
        ({"grid": [0.0, 0.0]}, r"grid = \[0\.0, 0\.0\]"),
        ({"grid": [0.0, 1.0, 0.5]}, r"grid = \[0\.0, 1\.0, 0\.5\]"),
        ({"grid": [0.0, 1.0, 1.0]}, r"grid = \[0\.0, 1\.0, 1\.0\]"),
        ({"grid": [0.0, math.nan]}, r"grid = \[0\.0, nan\]"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        integrate(decay, (ones(2, 2),), **({"grid": FORWARDS} | options))


@pytest.mark.parametrize("method", ["dormand_prince", "dopri5"])
def test_the_flow_runs_either_way(any_sde, method):
    """N(0, 1/2) under the flow: x in proportion to its standard deviation, at every time."""

    def predict(x, t):
        alpha, sigma = expand_to(any_sde.alpha(t), x), expand_to(any_sde.sigma(t), x)
        whitened = x / (0.5 * alpha.square() + sigma.square())
        return 0.5 * alpha * whitened, sigma * whitened

    flow, options = ProbabilityFlow(any_sde, predict), {"method": method, "rtol": 1e-8, "atol": 1e-8}
    times = torch.tensor([any_sde.t_max, 0.5 * (any_sde.t_max + any_sde.t_min), any_sde.t_min], dtype=torch.float64)
    std = torch.sqrt(0.5 * any_sde.alpha(times).square() + any_sde.sigma(times).square())
    x = std[0] * torch.tensor([[-2.0, 0.1], [0.5, 1.0], [0.01, 3.0]], dtype=torch.float64)
    for path in (times, times.flip(0)):
        exact = {i: x * (any_sde_std / std[0]) for i, any_sde_std in enumerate(std if path is times else std.flip(0))}
        seen = []
        end = flow.solve(exact[0], path.tolist(), lambda i, y, seen=seen: seen.append((i, y)), **options)
        assert [i for i, _ in seen] == [1, 2]
        assert torch.equal(seen[-1][1], end)
        for i, y in seen:
            # In tolerances of the scaled state, which on the way up errs by what grows with its scale.
            assert (y - exact[i]).abs().max() < 1e-4 * exact[i].abs().max()


def test_a_time_does_not_depend_on_its_place_in_the_batch(any_sde):
    if isinstance(any_sde, RateSDE):
        pytest.skip("its quadrature is a matrix product, which rounds each batch in its own way")
    seen = []

    def predict(x, t):
        seen.append(t)
        return x, x

    slope = ProbabilityFlow(any_sde, predict)._slope_of(torch.arange(133))
    angles = torch.linspace(0.1, 1.4, 133, dtype=torch.float64)
    y = torch.ones(133, 2, dtype=torch.float64)
    together = slope(y, angles)
    for i in range(133):
        assert torch.equal(slope(y[:1], angles[i : i + 1])[0], together[i])
        assert torch.equal(seen[-1][0], seen[0][i])


def test_a_walk_over_log_noise_is_the_flow(any_sde):
    """N(0, 1/2): the scaled state in proportion to √(cos²θ/2 + sin²θ), in steps of 1/4, either way."""

    def predict(x, t):
        alpha, sigma = expand_to(any_sde.alpha(t), x), expand_to(any_sde.sigma(t), x)
        whitened = x / (0.5 * alpha.square() + sigma.square())
        return 0.5 * alpha * whitened, sigma * whitened

    u = torch.linspace(-3, 3, 25, dtype=torch.float64)
    for grid in (u, u.flip(0)):
        std = torch.sqrt(1 - torch.sigmoid(-2 * grid) / 2)
        y = std[0] * torch.tensor([[-2.0, 0.1], [0.5, 1.0]], dtype=torch.float64)
        for i, step in enumerate(ProbabilityFlow(any_sde, predict).walk(y, grid.tolist())):
            end, _ = step.at(torch.ones(2, dtype=torch.float64))
            torch.testing.assert_close(end, y * std[i + 1] / std[0], rtol=0, atol=1e-5)
        assert i == 23
