import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion.samplers.noise import StepNoise, Streams

MANY = 20_000


@pytest.fixture(scope="module")
def first_numbers():
    """The first four numbers of many neighbouring streams."""
    return Streams(0, range(MANY)).normal((4,), torch.float64)


@given(
    seed=st.integers(0, 2**64),
    indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
    shape=st.sampled_from([(), (3,), (1, 4, 4), (2, 5, 5)]),
)
def test_a_stream_depends_on_seed_and_index_alone(seed, indices, shape):
    together = Streams(seed, indices)
    first, second = together.normal(shape), together.uniform(shape)
    for row, index in enumerate(indices):
        alone = Streams(seed, [index])
        assert torch.equal(alone.normal(shape)[0], first[row])
        assert torch.equal(alone.uniform(shape)[0], second[row])


def test_different_seeds_and_indices_draw_different_numbers():
    rows = torch.cat([Streams(seed, range(20)).normal((2,)) for seed in range(20)])
    assert len(rows.unique(dim=0)) == len(rows)


def test_no_two_of_many_indices_share_a_generator_seed():
    # The CPU's generator reads the low 32 bits of a seed alone.
    low = set()
    for first in range(0, 100_000, 10_000):
        low.update(seed % 2**32 for seed in Streams(3, range(first, first + 10_000)).seeds())
    assert len(low) == 100_000


def test_seeds_stay_the_same_after_drawing():
    streams = Streams(5, range(3))
    before = streams.seeds()
    streams.normal((7,))
    assert streams.seeds() == before
    assert all(0 <= seed < 2**63 for seed in before)


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_numbers_across_streams_have_the_moments_of_a_standard_normal(first_numbers, power):
    # E z^p = (p − 1)!! for even p, 0 for odd; of four columns one passes 4 standard errors in 2.5e-4.
    exact = {1: 0, 2: 1, 3: 0, 4: 3}
    square = {1: 1, 2: 3, 3: 15, 4: 105}
    error = math.sqrt((square[power] - exact[power] ** 2) / MANY)
    assert (first_numbers**power).mean(0).sub(exact[power]).abs().max() < 4 * error


@pytest.mark.parametrize("lag", [1, 2, 3, 5, 8, 64, 2**10])
def test_neighbouring_streams_are_uncorrelated(first_numbers, lag):
    one, other = first_numbers[lag:], first_numbers[:-lag]
    for transform in (torch.clone, lambda z: (z.square() - 1) / math.sqrt(2)):
        correlation = transform(one).T @ transform(other) / len(one)
        # 16 entries of standard error 1/√n, twice, at 7 lags: 5 of them are passed by chance in 1.3e-4.
        assert correlation.abs().max() < 5 / math.sqrt(len(one))


def test_numbers_within_a_stream_are_uncorrelated(first_numbers):
    covariance = first_numbers.T @ first_numbers / MANY
    assert covariance[~torch.eye(4, dtype=torch.bool)].abs().max() < 4 / math.sqrt(MANY)


def test_uniform_numbers_fill_the_unit_interval():
    u = Streams(0, range(100)).uniform((100,), torch.float64)
    assert u.min() >= 0
    assert u.max() < 1
    # Kolmogorov-Smirnov: √n D exceeds 1.95 with a chance of 1e-3.
    grid = torch.arange(1, u.numel() + 1, dtype=torch.float64) / u.numel()
    assert (u.flatten().sort().values - grid).abs().max() < 1.95 / math.sqrt(u.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_have_the_dtype_asked_for(dtype):
    streams = Streams(0, range(2))
    assert len(streams) == 2
    assert streams.normal((3,), dtype).dtype == streams.uniform((3,), dtype).dtype == dtype
    assert StepNoise(streams, (3,), dtype)().dtype == dtype


@pytest.mark.parametrize("seed", [-1, -(2**40)])
def test_a_negative_seed_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed = {seed}: must be at least 0"):
        Streams(seed, range(1))


# From many steps a block to one that is larger than a block.
@pytest.mark.parametrize("shape", [(2,), (3,), (1, 28, 28), (3, 32, 32)], ids=str)
def test_step_noise_of_a_sample_does_not_depend_on_its_batch(shape):
    batch = StepNoise(Streams(1, range(4)), shape, torch.float32)
    alone = StepNoise(Streams(1, [2]), shape, torch.float32)
    for _ in range(600 if len(shape) == 1 else 3):
        assert torch.equal(batch()[2], alone()[0])


def test_step_noise_never_repeats_and_is_standard_normal():
    noise = StepNoise(Streams(1, range(4)), (2,), torch.float64)
    steps = torch.stack([noise() for _ in range(2000)])
    assert len(steps.flatten().unique()) == steps.numel()
    z, n = steps.flatten(), steps.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    # Of each step with the next: across the ends of blocks as within them.
    following = (steps[1:] * steps[:-1]).mean()
    assert abs(float(following)) < 4 / math.sqrt(n)


def test_streams_that_are_taken_go_on_where_they_are():
    streams, alone = Streams(4, range(5)), Streams(4, [3])
    streams.normal((2,))
    alone.normal((2,))
    part = streams.take([3, 1, 3])
    assert len(part) == 3
    drawn = part.normal((4,))
    # A row that is there twice goes on from itself, and what is taken is not drawn again from the whole.
    assert torch.equal(torch.cat([drawn[0], drawn[2]]), torch.cat([alone.normal((4,))[0], alone.normal((4,))[0]]))
    assert torch.equal(streams.uniform((3,))[3], alone.uniform((3,))[0])
    assert len(streams) == 5
