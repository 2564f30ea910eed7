import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sde_diffusion.data import DataInfo


def codes_and_extreme_noise(bits, dtype, seed):
    """Random codes, with noise from torch.rand and its two extremes, 0 and the largest number below 1."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (3, 500), generator=generator)
    uniform = torch.rand(3, 500, generator=generator, dtype=dtype)
    uniform[1] = 0
    uniform[2] = math.nextafter(1, 0) if dtype == torch.float64 else 1 - 2**-24
    assert uniform.max() < 1
    return values, uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    low=st.floats(-10, 10),
    width=st.floats(1, 20),
    bits=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_is_exact_whatever_the_noise(dtype, low, width, bits, seed):
    data = DataInfo(low, low + width, bits)
    values, uniform = codes_and_extreme_noise(bits, dtype, seed)
    y = data.dequantize(values, uniform)
    assert y.dtype == dtype
    assert torch.equal(data.quantize(y).long(), values)


def test_every_byte_survives_every_extreme():
    data = DataInfo()
    values = torch.arange(256, dtype=torch.uint8)
    for noise in (0.0, 0.5, 1 - 2**-24):
        codes = data.quantize(data.dequantize(values, torch.full((256,), noise)))
        assert codes.dtype == torch.uint8
        assert torch.equal(codes, values)


def test_dequantize_is_its_formula_away_from_the_edges():
    data = DataInfo(low=-0.5, high=1.5, bits=4)
    uniform = torch.linspace(0.01, 0.99, 16, dtype=torch.float64)
    expected = -0.5 + 2 * (torch.arange(16) + uniform) / 16
    torch.testing.assert_close(data.dequantize(torch.arange(16), uniform), expected)


def test_quantize_clamps():
    codes = DataInfo(0.0, 1.0, bits=3).quantize(torch.tensor([-9.0, 0.0, 0.99, 1.0, 9.0]))
    assert codes.tolist() == [0, 0, 7, 7, 7]
    assert DataInfo(bits=9).quantize(torch.tensor([1.0])).dtype == torch.int32


def test_log_scale_is_the_derivative_of_dequantize():
    data = DataInfo(low=-2.0, high=1.0, bits=5)
    step = data.dequantize(torch.tensor([7, 8]), torch.full((2,), 0.5, dtype=torch.float64)).diff()
    assert data.log_scale == pytest.approx(math.log(step.item()), rel=1e-12)
    assert DataInfo(bits=None).log_scale == 0


def test_dequantize_compiles_to_one_graph():
    data = DataInfo()
    values, uniform = codes_and_extreme_noise(8, torch.float32, seed=0)
    compiled = torch.compile(data.dequantize, backend="eager", fullgraph=True)
    assert torch.equal(compiled(values, uniform), data.dequantize(values, uniform))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"low": math.nan}, "low < high"),
        ({"high": math.inf}, "low < high"),
        ({"bits": 0}, "from 1 to 16"),
        ({"bits": 17}, "from 1 to 16"),
        ({"bits": True}, "from 1 to 16"),
        ({"bits": 8.0}, "from 1 to 16"),
    ],
)
def test_bad_fields_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataInfo(**arguments)


def test_continuous_data_have_no_codes():
    data = DataInfo(bits=None)
    with pytest.raises(ValueError, match="continuous"):
        data.quantize(torch.zeros(2))
    with pytest.raises(ValueError, match="continuous"):
        data.dequantize(torch.zeros(2, dtype=torch.uint8), torch.zeros(2))


@pytest.mark.parametrize(
    ("values", "uniform", "message"),
    [
        (torch.zeros(2), torch.zeros(2), "integer codes"),
        (torch.zeros(2, dtype=torch.uint8), torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "floating"),
        (torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.bfloat16), "too coarse"),
    ],
)
def test_bad_input_to_dequantize_is_refused(values, uniform, message):
    with pytest.raises(ValueError, match=message):
        DataInfo().dequantize(values, uniform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", [DataInfo(), DataInfo(0.0, 1.0, bits=5), DataInfo(-0.5, 3.0, bits=1)], ids=str)
def test_codes_are_on_their_lattice_and_dequantised_data_are_not(data, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(2**data.bits, (6, 1, 5, 5), generator=generator)
    points = [data.points(values, kind, dtype) for kind in ("centres", "endpoints")]
    lower_edges = data.points(values, "centres", dtype) - (data.high - data.low) / 2 ** (data.bits + 1)
    for x in (*points, lower_edges):
        assert bool(data.is_on_lattice(x).all())
    x = data.dequantize(values, torch.rand(values.shape, generator=generator, dtype=dtype))
    assert not bool(data.is_on_lattice(x).any())
    # Each example by itself, and all values of it.
    x[4], x[2, :, :, 1:] = points[0][4], points[0][2, :, :, 1:]
    assert data.is_on_lattice(x).tolist() == [False, False, False, False, True, False]


def test_continuous_data_have_no_lattice():
    with pytest.raises(ValueError, match="continuous"):
        DataInfo(bits=None).is_on_lattice(torch.zeros(2, 3))
