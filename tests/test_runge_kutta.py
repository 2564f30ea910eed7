import math
import re
from fractions import Fraction

import pytest
import torch

from sde_diffusion import SolverError
from sde_diffusion.runge_kutta import ERROR, INTERPOLANT, NODES, STAGES, _Tolerance, solve, walk
from sde_diffusion.sde import expand_to

FORWARDS, BACKWARDS = [0.0, 2.0], [2.0, 0.0]


def trees(order):
    """Rooted trees of so many nodes, each the sorted tuple of its root's subtrees."""
    return {()} if order == 1 else {larger for tree in trees(order - 1) for larger in grown(tree)}


def grown(tree):
    yield tuple(sorted((*tree, ())))
    for i, subtree in enumerate(tree):
        for larger in grown(subtree):
            yield tuple(sorted((*tree[:i], larger, *tree[i + 1 :])))


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def elementary(tree):
    """What a tree's derivative weighs in each of the seven stages, exactly."""
    values = [1] * 7
    for subtree in tree:
        below = elementary(subtree)
        inner = [0, *(sum(a * value for a, value in zip(row, below, strict=False)) for row in STAGES)]
        values = [value * factor for value, factor in zip(values, inner, strict=True)]
    return values


def weigh(weights, tree):
    return sum(weight * value for weight, value in zip(weights, elementary(tree), strict=True))


FIFTH = [*STAGES[-1], Fraction(0)]
FOURTH = [b - d for b, d in zip(FIFTH, ERROR, strict=True)]


@pytest.mark.parametrize(("weights", "order"), [(FIFTH, 5), (FOURTH, 4)], ids=["fifth", "fourth"])
def test_order_conditions(weights, order):
    conditions = [tree for n in range(1, order + 1) for tree in trees(n)]
    assert len(conditions) == {4: 8, 5: 17}[order]
    for tree in conditions:
        assert weigh(weights, tree) * density(tree) == 1
    assert any(weigh(weights, tree) * density(tree) != 1 for tree in trees(order + 1))


def test_order_conditions_of_the_interpolant():
    """Σ b_j(ϑ) φ_j = ϑⁿ/γ for a tree of n nodes: a condition for every power of ϑ."""
    for tree in (tree for n in range(1, 5) for tree in trees(n)):
        for power in range(1, 5):
            total = weigh([row[power - 1] for row in INTERPOLANT], tree)
            assert total * density(tree) == (1 if power == size(tree) else 0)
    assert [sum(row) for row in INTERPOLANT] == FIFTH


def test_the_last_stage_is_the_next_step_s_first():
    assert NODES[-1] == 1
    assert len(STAGES[-1]) == len(STAGES)


def wave(rates):
    """dx/ds = r cos(r s) x with a rate r a sample, solved by exp(sin(r s)); of a field for rows, with its record."""

    def slope_of(rows):
        r = rates[rows]

        def slope(x, s):
            slope_of.asked.append((rows, s))
            return expand_to(r * torch.cos(r * s), x).to(x.dtype) * x

        return slope

    slope_of.asked = []
    return slope_of


def counts(asked, n):
    return torch.bincount(torch.cat([rows for rows, _ in asked]), minlength=n)


def spread_rates(n):
    return torch.linspace(0.1, 20, n, dtype=torch.float64)


def draws(*shape, dtype=torch.float64):
    return 1 + torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("grid", [FORWARDS, BACKWARDS], ids=str)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_every_sample_holds_the_tolerance(tolerance, grid):
    rates = spread_rates(20)
    x = draws(20, 3)
    out = solve(wave(rates), x, grid, rtol=tolerance, atol=tolerance)[-1]
    exact = x * torch.exp(torch.sin(rates * grid[1]) - torch.sin(rates * grid[0]))[:, None]
    # A step errs by less than (1 + |x|) tolerances, in a time of 2 over which x moves by factors of up to e², 13 times.
    assert ((out - exact).abs() < 13 * math.exp(2) * (1 + exact) * tolerance).all()
    # The tolerance is not held by steps that are far too short.
    assert (out - exact).abs().max() > tolerance / 100


def test_steps_are_of_fifth_order():
    """An error of a step that goes with h⁵ lets h, and so 1/evaluations, go with the fifth root of the tolerance."""
    evaluations = []
    for tolerance in (1e-6, 1e-11):
        slope_of = wave(torch.tensor([20.0], dtype=torch.float64))
        solve(slope_of, draws(1, 2), FORWARDS, rtol=tolerance, atol=tolerance)
        evaluations.append(len(slope_of.asked))
    assert math.log(evaluations[1] / evaluations[0]) / math.log(1e5) == pytest.approx(1 / 5, abs=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (64,), (1, 28, 28)], ids=str)
def test_a_sample_is_bitwise_the_same_alone_and_among_256(shape, dtype):
    rates, x = spread_rates(256), draws(256, *shape, dtype=dtype)
    grid = [2.0, 1.5, 0.3, 0.0]
    slope_of = wave(rates)
    together = solve(slope_of, x, grid)
    assert together.shape == (4, 256, *shape)
    assert together.dtype == dtype
    evaluations = counts(slope_of.asked, 256)
    for i in (0, 1, 77, 128, 254, 255):
        slope_of = wave(rates[i : i + 1])
        assert torch.equal(solve(slope_of, x[i : i + 1], grid)[:, 0], together[:, i])
        assert len(slope_of.asked) == evaluations[i]


def test_the_norm_of_a_large_sample_is_bitwise_the_same_alone():
    """torch's own sum over one row is split among threads, where that over four is not."""
    x, threads = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = _Tolerance(1e-3, 1e-3).ratio(x, x, x)
        alone = torch.cat([_Tolerance(1e-3, 1e-3).ratio(row, row, row) for row in x.split(1)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)
    exact = (x.double() / (1e-3 + 1e-3 * x.double().abs())).square().mean(1).sqrt()
    # Pairwise sums round 18 times on the way, the quotients a few times.
    torch.testing.assert_close(together, exact, rtol=25 * torch.finfo(x.dtype).eps, atol=0)


def test_who_has_arrived_is_not_evaluated():
    slope_of = wave(spread_rates(50))
    solve(slope_of, draws(50, 2), BACKWARDS)
    evaluations = counts(slope_of.asked, 50)
    # Two for the first step, then six a step; those that swing more take more.
    assert ((evaluations - 2) % 6 == 0).all()
    assert evaluations[-1] > 5 * evaluations[0]
    sizes = [len(rows) for rows, _ in slope_of.asked]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == evaluations.max()
    assert sum(sizes) < 0.7 * 50 * len(sizes)


@pytest.mark.parametrize("grid", [FORWARDS, BACKWARDS, [0.1, 0.1 + 1e-3], [0.7, 0.3, 0.1]], ids=str)
@pytest.mark.parametrize("rates", [1e-3, 0.0, 3.0])
def test_every_sample_has_a_time_of_its_own_in_the_interval(grid, rates):
    # So slow that the first step is guessed to be a hundred times the interval, constant, and neither.
    slope_of = wave(rates * spread_rates(5))
    solve(slope_of, draws(5, 2), grid)
    for rows, s in slope_of.asked:
        assert s.dtype == torch.float64
        assert s.shape == rows.shape
        assert bool(((s >= min(grid)) & (s <= max(grid))).all())


@pytest.mark.parametrize("ends", [FORWARDS, BACKWARDS], ids=str)
def test_dense_output(ends):
    rates, x, tolerance = spread_rates(20), draws(20, 3), 1e-8
    grid = torch.linspace(*ends, 101, dtype=torch.float64)
    plain, watched = wave(rates), wave(rates)
    end = solve(plain, x, ends, rtol=tolerance, atol=tolerance)[-1]
    states = solve(watched, x, grid.tolist(), rtol=tolerance, atol=tolerance)
    # It takes no evaluations, and changes no step.
    assert len(watched.asked) == len(plain.asked)
    assert torch.equal(states[-1], end)
    assert torch.equal(states[0], x)
    phase = torch.sin(grid[:, None] * rates)
    exact = x * torch.exp(phase - phase[:1])[..., None]
    # As above, with a factor of ten for an interpolant of the lower order.
    assert ((states - exact).abs() < 10 * 13 * math.exp(2) * (1 + exact) * tolerance).all()


def test_points_of_the_grid_closer_than_steps_are_all_reached():
    grid = [0.0, 1e-9, 2e-9, 1.0, 1.0 + 1e-9, 2.0 - 1e-12, 2.0]
    states = solve(wave(torch.ones(3, dtype=torch.float64)), torch.ones(3, 1, dtype=torch.float64), grid)
    exact = torch.exp(torch.sin(torch.tensor(grid, dtype=torch.float64)))
    assert (states - exact[:, None, None]).abs().max() < 1e-4


def explode(rows):
    """x = 1/(1/x₀ − s), for all but sample 0, which stays."""
    moves = (rows > 0).double()[:, None]
    return lambda x, s: moves * x.square()


def break_down(rows):
    """Not a number after s = 1 for sample 2."""
    breaks = rows == 2
    return lambda x, s: torch.where((breaks & (s > 1))[:, None], math.nan, -x)


@pytest.mark.parametrize(
    ("slope_of", "sample", "reason"),
    [(explode, 1, "its step size underflows"), (break_down, 2, "its velocity is not finite")],
)
def test_a_failure_names_the_sample_where_and_when(slope_of, sample, reason):
    evaluations = torch.zeros(4, dtype=torch.long)

    def counted(rows):
        slope = slope_of(rows)

        def counting(x, s):
            evaluations[rows] += 1
            return slope(x, s)

        return counting

    with pytest.raises(SolverError) as failure:
        solve(counted, torch.ones(4, 2, dtype=torch.float64), FORWARDS, to_time=lambda s: 10 * s)
    match = re.fullmatch(
        r"dormand_prince stopped at t = (\S+) after (\d+) evaluations of sample (\d): (.*)", str(failure.value)
    )
    assert match is not None
    assert float(match[1]) == pytest.approx(10, abs=0.01)
    assert int(match[2]) == evaluations[sample]
    assert int(match[3]) == sample
    assert match[4] == reason


def test_a_state_that_is_not_a_number_is_an_error():
    x = torch.ones(3, 2, dtype=torch.float64)
    x[1] = math.nan
    with pytest.raises(SolverError, match="sample 1: its velocity is not finite"):
        solve(wave(spread_rates(3)), x, FORWARDS)


def test_too_many_steps_are_an_error():
    message = "after 62 evaluations of sample 1: max_steps = 10 are not enough"
    with pytest.raises(SolverError, match=message):
        solve(wave(torch.tensor([0.0, 20.0, 20.0], dtype=torch.float64)), draws(3, 2), FORWARDS, max_steps=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, r"rtol = 0\.0, atol = 1e-05: must be positive"),
        ({"atol": -1e-3}, r"atol = -0\.001"),
        ({"atol": math.nan}, "atol = nan"),
        ({"grid": []}, r"grid = \[\]: needs at least two points"),
        ({"grid": [0.0]}, r"grid = \[0\.0\]"),
        ({"grid": [0.0, 1.0, 0.5]}, r"grid = \[0\.0, 1\.0, 0\.5\]"),
        ({"grid": [0.0, math.nan]}, r"grid = \[0\.0, nan\]"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        solve(wave(spread_rates(2)), draws(2, 2), **({"grid": FORWARDS} | options))


def test_a_walk_is_of_order_five_and_its_polynomials_of_order_four():
    """dx/ds = cos(s) x from exp(sin s); a derivative is of an order less."""
    errors = []
    for count in (8, 16):
        grid = torch.linspace(0, 2, count + 1, dtype=torch.float64)
        x = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
        steps = list(walk(lambda x, s: torch.cos(s)[:, None] * x, x, grid.tolist()))
        assert [float(step.s[0]) for step in steps] == grid[:-1].tolist()
        assert [float(step.s_next[1]) for step in steps] == grid[1:].tolist()
        worst = [0.0, 0.0, 0.0]
        for step in steps:
            for share in (0.0, 0.3, 0.7, 1.0):
                state, rate = step.at(torch.full((2,), share, dtype=torch.float64))
                s = step.s + share * (step.s_next - step.s)
                exact = x * torch.exp(torch.sin(s))[:, None]
                error = float((state - exact).abs().max())
                worst[0 if share in (0.0, 1.0) else 1] = max(worst[0 if share in (0.0, 1.0) else 1], error)
                worst[2] = max(worst[2], float((rate - torch.cos(s)[:, None] * exact).abs().max()))
        errors.append(worst)
    for coarse, fine, order in zip(*errors, (5, 4, 3), strict=True):
        # An order more gains twice as much; half an order is allowed for what is left of higher terms.
        assert coarse > 2 ** (order - 0.5) * fine
    assert max(errors[1]) < 1e-3
