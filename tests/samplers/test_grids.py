import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sde_diffusion as sd
from sde_diffusion.samplers.grids import GRIDS, SPACINGS, check_log_snr, index_times, time_grid

VP = sd.VPSDE()
# Those that have as many steps as are asked for.
DENSE = [kind for kind in GRIDS if kind != "indices"]


@pytest.mark.parametrize(
    ("kind", "steps"), [*((kind, n) for kind in DENSE for n in (1, 2, 17, 1000)), ("indices", 1), ("indices", 750)]
)
def test_a_grid_falls_from_start_to_end_exactly(any_sde, kind, steps):
    start, end = any_sde.t_max, any_sde.t_min
    times = time_grid(any_sde, kind, start, end, steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (start, end)
    assert all(s < t for t, s in pairwise(times))


@given(fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)), steps=st.integers(1, 50))
def test_every_part_of_the_range_has_its_grid(fractions, steps):
    start, end = (VP.t_min + f * (VP.t_max - VP.t_min) for f in sorted(fractions, reverse=True))
    assume(start - end > 1e-6)
    for kind in DENSE:
        times = time_grid(VP, kind, start, end, steps)
        assert (times[0], times[-1], len(times)) == (start, end, steps + 1)
        assert all(s < t for t, s in pairwise(times))


def test_log_snr_rises_by_equal_steps(any_sde):
    times = torch.tensor(time_grid(any_sde, "log_snr", any_sde.t_max, any_sde.t_min, 40), dtype=torch.float64)
    log_snr = any_sde.log_snr(times)
    steps = log_snr.diff()
    # A time near T = 1 is rounded by 1e-16, and the log-SNR's slope there is below 1e4: 1e-12 at most.
    torch.testing.assert_close(steps, (log_snr[-1] - log_snr[0]).expand(40) / 40, rtol=0, atol=1e-10)


def test_noise_falls_by_equal_factors_under_its_other_name(any_sde):
    ends = any_sde.t_max, any_sde.t_min
    assert time_grid(any_sde, "exponential", *ends, 40) == time_grid(any_sde, "log_snr", *ends, 40)


def test_angle_falls_by_equal_steps(any_sde):
    times = torch.tensor(time_grid(any_sde, "angle", any_sde.t_max, any_sde.t_min, 40), dtype=torch.float64)
    steps = torch.atan2(any_sde.sigma(times), any_sde.alpha(times)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(40), rtol=0, atol=1e-10)


def test_time_falls_by_equal_steps(any_sde):
    times = torch.tensor(time_grid(any_sde, "t", any_sde.t_max, any_sde.t_min, 40), dtype=torch.float64)
    expected = (any_sde.t_min - any_sde.t_max) / 40
    torch.testing.assert_close(times.diff(), torch.full((40,), expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_root_of_time_falls_by_equal_steps(any_sde):
    times = torch.tensor(time_grid(any_sde, "quadratic", any_sde.t_max, any_sde.t_min, 40), dtype=torch.float64)
    steps = times.sqrt().diff()
    torch.testing.assert_close(steps, steps.mean().expand(40), rtol=0, atol=1e-14 * math.sqrt(any_sde.T))


def test_noise_falls_as_published(any_sde):
    """σ_i = (σ_max^{1/ρ} + i/N (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ with ρ = 7, of data at scale 1."""
    times = torch.tensor(time_grid(any_sde, "karras", any_sde.t_max, any_sde.t_min, 40), dtype=torch.float64)
    noise = any_sde.sigma(times) / any_sde.alpha(times)
    first, last = noise[0] ** (1 / 7), noise[-1] ** (1 / 7)
    published = (first + torch.arange(41, dtype=torch.float64) / 40 * (last - first)) ** 7
    # As for the log-SNR, of which this is the exponential of half.
    torch.testing.assert_close(noise, published, rtol=1e-10, atol=0)


def test_a_grid_of_noise_ends_where_there_is_none():
    times = time_grid(sd.EDMSDE(), "karras", 80.0, 0.0, 10)
    assert times == pytest.approx([80 * (1 - i / 10) ** 7 for i in range(11)], rel=1e-12)


# Indices of a chain.


@pytest.mark.parametrize(
    ("spacing", "states"),
    [
        ("trailing", [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]),
        ("leading", [1000, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("linspace", [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]),
    ],
)
def test_a_chain_of_1000_has_the_published_states(spacing, states):
    """Lin et al. 2024, table 2, which counts them from 0 or from 1; but it starts where it is told to."""
    times = index_times(VP, 1.0, 0.0, 10, spacing)
    torch.testing.assert_close(times, torch.tensor([*states, 0], dtype=torch.float64) / 1000, rtol=1e-15, atol=0)


def test_the_grid_of_indices_trails():
    assert time_grid(VP, "indices", 1.0, 0.0, 20) == index_times(VP, 1.0, 0.0, 20, "trailing").tolist()


def test_a_whole_chain_is_one_of_equal_steps_in_time():
    times = time_grid(VP, "indices", 1.0, 0.0, 1000)
    assert times == pytest.approx(time_grid(VP, "t", 1.0, 0.0, 1000), rel=1e-12)


@given(
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    steps=st.integers(1, 1000),
    spacing=st.sampled_from(SPACINGS),
    sde=st.sampled_from([VP, sd.EDMSDE()]),
)
def test_every_part_of_a_chain_has_its_grid(fractions, steps, spacing, sde):
    start, end = (f * sde.T for f in sorted(fractions, reverse=True))
    states = math.ceil(1000 * start / sde.T - 1e-9) - math.floor(1000 * end / sde.T + 1e-9)
    assume(end < start and steps <= states)
    times = index_times(sde, start, end, steps, spacing).tolist()
    assert (times[0], times[-1], len(times)) == (start, end, steps + 1)
    assert all(s < t for t, s in pairwise(times))
    for t in times[1:-1]:
        assert 1000 * t / sde.T == pytest.approx(round(1000 * t / sde.T), abs=1e-9)


def test_a_chain_has_so_many_states():
    with pytest.raises(ValueError, match="steps = 1001: must be at most 1000, the steps of a chain of 1000 from t = 1"):
        time_grid(VP, "indices", 1.0, 0.0, 1001)
    with pytest.raises(ValueError, match=r"steps = 31: must be at most 30, .* from t = 0\.5 to 0\.4705"):
        time_grid(VP, "indices", 0.5, 0.4705, 31)
    with pytest.raises(ValueError, match="spacing = 'even': must be one of trailing, leading, linspace"):
        index_times(VP, 1.0, 0.0, 10, "even")


@pytest.mark.parametrize(
    "times", [[1.0, 0.5, 0.1], (0.9, 0.0), torch.tensor([1.0, 0.25])], ids=["list", "tuple", "tensor"]
)
def test_given_times_are_kept(times):
    assert time_grid(VP, times, 1.0, 0.0, 99) == [float(t) for t in times]


@pytest.mark.parametrize(
    ("kind", "start", "end", "message"),
    [
        (
            "cosine",
            1.0,
            0.1,
            "grid = 'cosine': must be one of log_snr, exponential, angle, t, karras, quadratic, indices, or decreasing",
        ),
        ([0.1, 0.5], 1.0, 0.1, r"grid = \[0.1, 0.5\]: needs at least two strictly decreasing times"),
        ([0.5, 0.5], 1.0, 0.1, r"grid = \[0.5, 0.5\]: needs at least two strictly decreasing times"),
        ([0.5], 1.0, 0.1, r"grid = \[0.5\]: needs at least two"),
        ([], 1.0, 0.1, r"grid = \[\]: needs at least two"),
        ([1.5, 0.5], 1.0, 0.1, r"grid = 1.5 is outside the range \[0, 1.0\]"),
        ([0.5, -0.5], 1.0, 0.1, r"grid = -0.5 is outside the range \[0, 1.0\]"),
        ([0.5, float("nan")], 1.0, 0.1, "grid = nan is outside the range"),
        ("t", 0.1, 0.5, "t_start = 0.1, t_end = 0.5: t_start must be the larger"),
        ("t", 0.5, 0.5, "t_start = 0.5, t_end = 0.5: t_start must be the larger"),
        ("t", float("nan"), 0.5, "t_start = nan, t_end = 0.5: t_start must be the larger"),
        ([float("inf"), 0.5], 1.0, 0.1, "grid = inf is outside the range"),
        ("log_snr", 1.0, 0.0, "t_end = 0.0: the log-SNR is infinite there"),
        ("exponential", 1.0, 0.0, "t_end = 0.0: the log-SNR is infinite there"),
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_errors_name_the_argument(kind, start, end, message, steps):
    with pytest.raises(ValueError, match=message):
        time_grid(VP, kind, start, end, steps)


def test_a_start_without_signal_has_no_log_snr():
    class Straight(sd.SDE):
        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t

    with pytest.raises(ValueError, match=r"t_start = 1\.0: the log-SNR is infinite there"):
        check_log_snr(Straight(), 1.0, 0.5)
    check_log_snr(Straight(), 0.999, 0.5)
    with pytest.raises(ValueError, match=r"t_start = 1\.0: the log-SNR is infinite there"):
        time_grid(Straight(), "karras", 1.0, 0.5, 4)
