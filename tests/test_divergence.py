"""Probes of a trace: what cancels within a block, and the variance of what does not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion.divergence import (
    LARGEST_BLOCK,
    PROBES,
    block_size,
    colours,
    draw_blocks,
    exact_trace,
    trace_estimates,
    vector_jacobian,
)
from sde_diffusion.samplers.noise import Streams

# Every rank of data: vectors, one number, images with and without channels, volumes.
SHAPES = [(1,), (2,), (13,), (4, 5), (1, 4, 4), (3, 2, 2), (3, 4, 5), (2, 3, 2, 2)]
SIZES = [2**k for k in range(LARGEST_BLOCK.bit_length())]


def draw(probe, blocks, size, shape, seed=0, dtype=torch.float64):
    """Probes (blocks, size, *shape) of one example."""
    return draw_blocks(probe, blocks, size, shape, Streams(seed, [0]), dtype)[:, 0].unflatten(0, (blocks, size))


def random_matrix(dimension, seed=0):
    return torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_blocks(matrix, probes):
    """Each block's mean of zᵀJz, (blocks,), for probes (blocks, size, *shape)."""
    z = probes.flatten(2)
    return torch.einsum("bpi,ij,bpj->bp", z, matrix, z).mean(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_of_different_colours_cancel_within_a_block(shape, size):
    """Sums of a power of two of ±1 are exact, and so is their mean."""
    z, colour = draw("orthogonal", 3, size, shape).flatten(2), colours(shape, size).flatten()
    gram = z.mT @ z / size
    has_one_colour = colour[:, None] == colour
    assert torch.equal(gram.abs(), has_one_colour.double().expand_as(gram))
    assert bool((gram.diagonal(dim1=1, dim2=2) == 1).all())
    # Signs of one colour are not all the same: what is left of them is random.
    if bool((off_diagonal := has_one_colour & ~torch.eye(len(colour), dtype=torch.bool)).sum() > 30):
        assert -0.9 < float(gram[:, off_diagonal].mean()) < 0.9


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_has_the_shape_of_data(shape, probe, dtype):
    z = draw_blocks(probe, 2, 4, shape, Streams(0, range(3)), dtype)
    assert z.shape == (8, 3, *shape)
    assert z.dtype == dtype
    if probe != "gaussian":
        assert bool((z.abs() == 1).all())


@pytest.mark.parametrize("probe", PROBES)
def test_an_example_has_probes_of_its_own_stream(probe):
    together = draw_blocks(probe, 2, 4, (2, 3), Streams(3, [5, 8, 2]), torch.float64)
    for row, index in enumerate([5, 8, 2]):
        alone = draw_blocks(probe, 2, 4, (2, 3), Streams(3, [index]), torch.float64)
        assert torch.equal(alone[:, 0], together[:, row])
    assert not torch.equal(together[:, 0], together[:, 1])


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple).filter(lambda s: math.prod(s) <= 32),
    seed=st.integers(0, 10**6),
)
def test_a_block_of_as_many_probes_as_dimensions_is_exact(shape, seed):
    dimension = math.prod(shape)
    size = next(size for size in SIZES if size >= dimension)
    matrix = random_matrix(dimension, seed)
    estimates = of_blocks(matrix, draw("orthogonal", 2, size, shape, seed))
    # A mean of as many sums of D² products.
    bound = size * dimension**2 * torch.finfo(torch.float64).eps * float(matrix.abs().max())
    torch.testing.assert_close(estimates, matrix.trace().expand(2), rtol=0, atol=bound)


@given(
    probe=st.sampled_from(PROBES),
    shape=st.sampled_from(SHAPES),
    size=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 10**6),
)
def test_every_kind_is_unbiased_for_any_matrix(probe, shape, size, seed):
    matrix, blocks = random_matrix(math.prod(shape), seed), 2000
    estimates = of_blocks(matrix, draw(probe, blocks, size, shape, seed))
    # Of 50 examples one passes 5 standard errors in 3e-5; what rounds has no standard error.
    error = float(estimates.std()) / math.sqrt(blocks)
    assert abs(float(estimates.mean() - matrix.trace())) < 5 * error + 1e-11


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("probe", PROBES)
def test_the_variance_is_its_formula(probe, size):
    shape, blocks = (3, 7), 20_000
    matrix = random_matrix(math.prod(shape))
    symmetric = (matrix + matrix.T) / 2
    off_diagonal = symmetric - symmetric.diag().diag()
    colour = colours(shape, size).flatten()
    variance = {
        "gaussian": 2 * symmetric.square().sum() / size,
        "rademacher": 2 * off_diagonal.square().sum() / size,
        "orthogonal": 2 * off_diagonal[colour[:, None] == colour].square().sum(),
    }[probe]
    squares = (of_blocks(matrix, draw(probe, blocks, size, shape)) - matrix.trace()).square()
    # About the known mean, each square is an estimate of the variance: 4 standard errors of their mean, and rounding.
    assert abs(float(squares.mean() - variance)) < 4 * float(squares.std()) / math.sqrt(blocks) + 1e-12


def test_blocks_are_independent():
    """The covariance of neighbouring blocks' estimates is 0."""
    shape, blocks = (3, 7), 20_000
    matrix = random_matrix(21)
    for probe in PROBES:
        estimates = of_blocks(matrix, draw(probe, blocks, 4, shape)) - matrix.trace()
        products = estimates[0::2] * estimates[1::2]
        assert abs(float(products.mean())) < 4 * float(products.std()) / math.sqrt(blocks / 2)


# No lattice of b entries a point has a shortest distance above (2b/√3)^½, which none of these passes.
@pytest.mark.parametrize(("count", "squared"), [(2, 2), (4, 4), (8, 8), (16, 16), (64, 65)])
def test_entries_of_one_colour_are_far_apart(count, squared):
    assert shortest_squared(colours((28, 28), count)) == squared


@pytest.mark.parametrize("count", SIZES[1:])
@pytest.mark.parametrize("shape", [(28,), (28, 28), (3, 9, 8), (5, 6, 7), (2, 3, 4, 5)], ids=str)
def test_neighbours_differ(shape, count):
    colour = colours(shape, count)
    assert colour.shape == shape
    assert 0 <= int(colour.min()) <= int(colour.max()) < count
    assert shortest_squared(colour) >= 2


def test_one_colour_is_for_all():
    assert not bool(colours((3, 4), 1).any())


def shortest_squared(colour):
    """Squared distance of the nearest two entries of one colour; infinite if there are none."""
    entries, flat = torch.ones_like(colour).nonzero().double(), colour.flatten()
    squared = (entries[:, None] - entries).square().sum(2)
    squared[flat[:, None] != flat] = math.inf
    return float(squared.fill_diagonal_(math.inf).min())


@pytest.mark.parametrize(
    ("probe", "probes", "size"),
    [
        ("orthogonal", 1, 1),
        ("orthogonal", 2, 1),
        ("orthogonal", 3, 1),
        ("orthogonal", 4, 2),
        ("orthogonal", 6, 2),
        ("orthogonal", 8, 4),
        ("orthogonal", 12, 4),
        ("orthogonal", 128, 64),
        ("orthogonal", 1024, 64),
        ("rademacher", 8, 1),
        ("gaussian", 8, 1),
    ],
)
def test_size_of_a_block(probe, probes, size):
    assert block_size(probe, probes) == size


def nonlinear(x):
    """Each example by itself, of a Jacobian that is not symmetric."""
    flat = x.flatten(1)
    mixed = torch.sin(flat) * flat.roll(1, 1) + flat.square().sum(1, keepdim=True)
    return mixed.reshape(x.shape), flat.sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_the_exact_trace_are_autograds(shape, dtype):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    gradient, other = vector_jacobian(nonlinear, x)
    assert torch.equal(other, x.flatten(1).sum(1))
    dimension = math.prod(shape)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda y: nonlinear(y[None])[0][0], row).reshape(dimension, dimension)
            for row in x
        ]
    )
    # Of sums of D terms, each rounded.
    rounding = {"rtol": 0, "atol": 8 * dimension * torch.finfo(dtype).eps * float(jacobian.abs().sum((1, 2)).max())}
    torch.testing.assert_close(exact_trace(gradient, x), torch.einsum("bii->b", jacobian), **rounding)
    z = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected = torch.einsum("pbi,bij,pbj->pb", z.flatten(2), jacobian, z.flatten(2))
    rounding["atol"] *= float(z.abs().max()) ** 2
    torch.testing.assert_close(trace_estimates(gradient, z), expected, **rounding)
