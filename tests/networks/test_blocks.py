"""The layers against their formulas, computed independently."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sde_diffusion.networks import UNet
from sde_diffusion.networks.blocks import (
    ConditionEmbedding,
    Downsample,
    FilteredDownsample,
    FourierEmbedding,
    GroupNorm,
    NearestConvolution,
    ResidualBlock,
    SelfAttention,
    SinusoidalEmbedding,
    convolution,
    double,
    halve,
    initialise,
    norm_silu,
    residual_sum,
    to_channels_last,
    zeroed,
)

TAPS = {"average": [0.5, 0.5], "fir": [0.125, 0.375, 0.375, 0.125]}
AXES = [1, 2, 3]
SIZES = {1: (10,), 2: (4, 6), 3: (2, 4, 6)}


def images(axes, channels=2, batch=2, dtype=torch.float64, seed=0):
    """(batch, channels, ...) of a different length along each of the axes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *SIZES[axes], generator=generator, dtype=dtype)


def randomised(layer, seed=1):
    """The same layer in float64, with every parameter drawn: none is at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def along(axis, function, x):
    """function of every line of x along an axis, in numpy."""
    return np.apply_along_axis(function, axis, x)


def sinusoids(t, dim, scale):
    """DDPM's embedding in numpy's float64."""
    frequencies = np.geomspace(1.0, 1e-4, dim // 2)
    phase = scale * np.asarray(t)[:, None] * frequencies
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=1)


@pytest.mark.parametrize("dim", [4, 6, 128])
def test_sinusoidal_embedding_is_the_formula_in_float64(dim):
    t = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    embedding = SinusoidalEmbedding(dim, scale=1000.0).double()
    # A phase of at most 1000 has an error of a few times 1000 * 2^-53, and so has its sine.
    np.testing.assert_allclose(embedding(t).numpy(), sinusoids(t, dim, 1000.0), rtol=0, atol=1e-12)


def test_sinusoidal_embedding_in_float32_errs_by_the_rounding_of_the_phase():
    t = torch.linspace(0.0, 1.0, 101)
    error = SinusoidalEmbedding(32, scale=1000.0)(t).double().numpy() - sinusoids(t.double(), 32, 1000.0)
    # Two products and a rounded frequency: three relative errors of 2^-24 in a phase of at most 1000.
    assert np.abs(error).max() < 4 * 1000 * 2.0**-24


def test_sinusoidal_embedding_survives_casts_and_materialisation():
    t = torch.linspace(0.0, 1.0, 5)
    expected = SinusoidalEmbedding(8)(t)
    with torch.device("meta"):
        embedding = SinusoidalEmbedding(8)
    assert torch.equal(embedding.to_empty(device=t.device)(t), expected)
    assert torch.equal(embedding.bfloat16()(t), expected)
    assert not embedding.state_dict()


@pytest.mark.parametrize("dim", [0, 2, 5])
def test_sinusoidal_embedding_refuses_odd_or_tiny_dim(dim):
    with pytest.raises(ValueError, match=f"dim must be even and at least 4; got {dim}"):
        SinusoidalEmbedding(dim)


@pytest.mark.parametrize("dim", [4, 6, 128])
def test_sinusoidal_embedding_without_its_endpoint(dim):
    t = np.linspace(0.0, 1.0, 7)
    phase = 1000.0 * np.outer(t, 10_000.0 ** (-2 * np.arange(dim // 2) / dim))
    embedding = SinusoidalEmbedding(dim, endpoint=False).double()(torch.tensor(t))
    np.testing.assert_allclose(embedding.numpy(), np.concatenate([np.sin(phase), np.cos(phase)], 1), rtol=0, atol=1e-12)


def test_fourier_embedding_is_the_formula():
    torch.manual_seed(0)
    embedding, t = FourierEmbedding(8, scale=0.25).double(), torch.linspace(-5, 5, 7, dtype=torch.float64)
    phase = 0.25 * np.outer(t, embedding.frequencies)
    np.testing.assert_allclose(embedding(t), np.concatenate([np.sin(phase), np.cos(phase)], 1), rtol=0, atol=1e-12)


def test_fourier_frequencies_are_normal_with_deviation_16_cycles():
    torch.manual_seed(0)
    count = 4096
    cycles = FourierEmbedding(2 * count).frequencies / (2 * math.pi)
    # The relative standard error of a standard deviation is 1/sqrt(2 n), and that of a mean 16/sqrt(n).
    assert abs(cycles.std() / 16 - 1) < 5 / (2 * count) ** 0.5
    assert abs(cycles.mean()) < 5 * 16 / count**0.5


def test_fourier_frequencies_are_kept_with_the_weights_and_never_coarser_than_float32():
    torch.manual_seed(0)
    embedding, t = FourierEmbedding(8), torch.linspace(-5, 5, 7)
    expected = embedding(t)
    other = FourierEmbedding(8)
    assert not torch.equal(other(t), expected)
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(t), expected)
    assert torch.equal(embedding.bfloat16()(t), expected)
    assert embedding.double()(t).dtype == torch.float64


def test_condition_embedding_is_a_row_and_a_linear_function():
    torch.manual_seed(0)
    embedding = ConditionEmbedding(classes=3, vector=2, dim=5)
    label, vector = torch.tensor([2, 0, 3, 0]), torch.randn(4, 2)
    table, weight = embedding.table.weight, embedding.linear.weight
    torch.testing.assert_close(embedding(label, vector), table[label] + vector @ weight.T)
    assert torch.equal(embedding(label, None), table[label])
    torch.testing.assert_close(embedding(None, vector), table[3] + vector @ weight.T)


def test_no_label_is_the_last_row_and_no_vector_is_zero():
    embedding = ConditionEmbedding(classes=3, vector=2, dim=5)
    none = embedding(None, None)
    assert none.shape == (1, 5)
    assert torch.equal(none, embedding(torch.tensor([3]), torch.zeros(1, 2)))
    assert not torch.equal(none, embedding(torch.tensor([2]), None))
    without = ConditionEmbedding(classes=0, vector=0, dim=5)
    assert without(None, None) == 0
    assert not list(without.parameters())


@given(st.integers(1, 2048))
def test_group_norm_rule(channels):
    groups = GroupNorm(channels).num_groups
    assert channels % groups == 0
    assert groups == 1 or (groups <= 32 and channels // groups >= 4)
    assert not any(channels % g == 0 for g in range(groups + 1, min(32, channels // 4) + 1))


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (64, 16), (96, 24), (128, 32), (256, 32), (7, 1)])
def test_group_norm_rule_examples(channels, groups):
    assert GroupNorm(channels).num_groups == groups


@pytest.mark.parametrize("groups", [0, 5])
def test_group_norm_refuses_groups_that_do_not_divide(groups):
    with pytest.raises(ValueError, match=f"groups must be a divisor of the number of channels, 16; got {groups}"):
        GroupNorm(16, groups)


def test_group_norm_is_the_formula_with_its_forward_derivative_in_both_memory_orders():
    torch.manual_seed(0)
    norm = GroupNorm(8, groups=2).double()
    nn.init.normal_(norm.weight)
    x, tangent = torch.randn(2, 3, 8, 4, 4, dtype=torch.float64)

    def formula(x):
        grouped = x.reshape(3, 2, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        unit = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        return unit.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]

    expected = torch.func.jvp(formula, (x,), (tangent,))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        torch.testing.assert_close(torch.func.jvp(norm, (x,), (tangent,)), expected, rtol=0, atol=1e-12)


@given(
    resampling=st.sampled_from(list(TAPS)),
    halves=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    channels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_halving_is_filtering_and_leaving_out(resampling, halves, channels, seed):
    taps = TAPS[resampling]
    x = np.random.default_rng(seed).normal(size=(2, channels, *(2 * n for n in halves)))

    def line(values):
        filtered = np.convolve(values, taps)
        return filtered[len(taps) // 2 :: 2][: len(values) // 2]

    expected = x
    for axis in range(2, x.ndim):
        expected = along(axis, line, expected)
    np.testing.assert_allclose(halve(torch.tensor(x), resampling), expected, rtol=0, atol=1e-13)


@given(
    resampling=st.sampled_from(list(TAPS)),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    channels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_doubling_is_putting_zeros_between_and_filtering(resampling, lengths, channels, seed):
    taps = 2 * np.array(TAPS[resampling])
    x = np.random.default_rng(seed).normal(size=(2, channels, *lengths))

    def line(values):
        spread = np.zeros(2 * len(values))
        spread[::2] = values
        first = len(taps) // 2 - 1
        return np.convolve(spread, taps)[first : first + len(spread)]

    expected = x
    for axis in range(2, x.ndim):
        expected = along(axis, line, expected)
    np.testing.assert_allclose(double(torch.tensor(x), resampling), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("resampling", TAPS)
@pytest.mark.parametrize("axes", AXES)
def test_a_constant_image_stays_constant_inside(axes, resampling):
    x = torch.full((1, 2, *[8] * axes), 3.0)
    for result in (halve(x, resampling), double(x, resampling)):
        inside = result[(..., *[slice(1, -1)] * axes)]
        torch.testing.assert_close(inside, torch.full_like(inside, 3.0))


@pytest.mark.parametrize("resampling", TAPS)
@pytest.mark.parametrize("axes", AXES)
def test_halving_and_doubling_are_transposes(axes, resampling):
    fine, coarse = images(axes), halve(images(axes, seed=1), resampling)
    # The mean's transpose has 2^-axes in each place, where doubling has 1.
    left, right = (halve(fine, resampling) * coarse).sum(), (fine * double(coarse, resampling)).sum()
    torch.testing.assert_close(left * 2**axes, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resampling", TAPS)
def test_resampling_keeps_dtype_and_memory_order(resampling, dtype):
    x = to_channels_last(images(2, dtype=dtype))
    for result in (halve(x, resampling), double(x, resampling)):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("channels_in", "channels_out"), [(2, 3), (3, 1), (1, 1)])
def test_nearest_convolution_is_enlarging_and_convolving_with_its_gradients(axes, channels_in, channels_out):
    layer, x = randomised(NearestConvolution(axes, channels_in, channels_out)), images(axes, channels_in)
    x.requires_grad_()
    enlarged = x
    for axis in range(2, x.ndim):
        enlarged = enlarged.repeat_interleave(2, axis)
    output, expected = layer(x), layer.conv(enlarged)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    variables = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((result * weight).sum(), variables) for result in (output, expected)]
    # Sums of up to a few hundred products.
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", AXES)
def test_downsample_is_every_other_position_of_a_convolution(axes):
    layer, x = randomised(Downsample(axes, 2)), images(axes)
    full = convolution(axes, 2, 2).double()
    full.load_state_dict(layer.conv.state_dict())
    every_other = (..., *[slice(None, None, 2)] * axes)
    torch.testing.assert_close(layer(x, torch.empty(2, 0)), full(x)[every_other], rtol=0, atol=1e-13)

    shifted = Downsample(axes, 2, shifted=True).double()
    shifted.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        shifted(x, torch.empty(2, 0)), full(x)[(..., *[slice(1, None, 2)] * axes)], rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("resampling", TAPS)
@pytest.mark.parametrize("axes", AXES)
def test_filtered_downsample_is_filtering_and_a_convolution_of_stride_2(axes, resampling):
    layer, x = randomised(FilteredDownsample(axes, 2, 3, resampling)), images(axes)
    filtered, taps = x.numpy(), TAPS[resampling]

    def line(values):
        # Centred between positions, from half a position before the first to half a position after the last.
        return np.convolve(values, taps)[len(taps) // 2 - 1 :][: len(values) + 1]

    for axis in range(2, x.ndim):
        filtered = along(axis, line, filtered)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    expected = convolve(torch.tensor(filtered), layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert expected.shape[2:] == tuple(n // 2 for n in SIZES[axes])


def resampled(x, resample, resampling):
    return {"down": halve, "up": double}[resample](x, resampling) if resample else x


RESIDUAL_OPTIONS = [
    {},
    {"scale_shift": True},
    {"rescale": True},
    {"norm": lambda channels: GroupNorm(channels, 2, epsilon=0.1)},
    *(
        {"resample": resample, "resampling": resampling, "project_resampled": project}
        for resample, resampling, project in itertools.product(("down", "up"), TAPS, (False, True))
    ),
    {"resample": "down", "resampling": "fir", "scale_shift": True, "rescale": True, "project_resampled": True},
    {"resample": "up", "resampling": "average", "scale_shift": True, "rescale": True},
]


@pytest.mark.parametrize("options", RESIDUAL_OPTIONS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("channels_out", [4, 6])
@pytest.mark.parametrize("axes", AXES)
def test_residual_block_is_the_formula(axes, channels_out, options):
    block, x = randomised(ResidualBlock(axes, 4, channels_out, **options)), images(axes, channels=4)
    scale_shift, resampling = options.get("scale_shift", False), options.get("resampling")
    width = 2 * channels_out if scale_shift else channels_out
    assert block.embedding_channels == width
    embedding = torch.randn(2, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    conv_in = getattr(block.conv_in, "conv", block.conv_in)
    h = conv_in(resampled(F.silu(block.norm_in(x)), options.get("resample"), resampling))
    e = embedding.reshape(2, width, *[1] * axes)
    scale, shift = (1 + e[:, :channels_out], e[:, channels_out:]) if scale_shift else (1, 0)
    h = scale * block.norm_out(h if scale_shift else h + e) + shift
    skip = resampled(x, options.get("resample"), resampling)
    if channels_out != 4 or options.get("project_resampled"):
        # A convolution of size 1 is a matrix.
        matrix = block.skip.weight.flatten(1)
        skip = torch.einsum("oi,bi...->bo...", matrix, skip) + block.skip.bias.reshape(-1, *[1] * axes)
    else:
        assert not list(block.skip.parameters())
    expected = skip + block.conv_out(F.silu(h))
    if options.get("rescale"):
        expected = expected / 2**0.5
    torch.testing.assert_close(block(x, embedding), expected, rtol=0, atol=1e-12)


def test_residual_block_drops_out_what_its_last_convolution_sees():
    block, x = ResidualBlock(2, 4, 4, dropout=0.25), images(2, channels=4, dtype=torch.float32)
    seen = []
    block.conv_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    embedding = torch.ones(2, 4)
    torch.manual_seed(0)
    block(x, embedding)
    block.eval()
    block(x, embedding)
    dropped, whole = seen
    kept = dropped != 0
    # 192 values of which a quarter is dropped, with a standard error of 3 %.
    assert abs(kept.float().mean() - 0.75) < 5 * 0.032
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("axes", AXES)
def test_self_attention_is_the_formula(axes, rescale, heads):
    attention = randomised(SelfAttention(axes, 8, heads, rescale=rescale))
    x = images(axes, channels=8)
    tokens = attention.norm(x).flatten(2).mT
    positions = tokens.shape[1]
    weight, output = attention.qkv.weight.flatten(1), attention.output.weight.flatten(1)
    q, k, v = (tokens @ weight.T + attention.qkv.bias).split(8, dim=2)
    attended = []
    for head in range(heads):
        part = slice(head * 8 // heads, (head + 1) * 8 // heads)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / (8 / heads) ** 0.5, dim=2)
        attended.append(weights @ v[..., part])
    h = torch.cat(attended, dim=2) @ output.T + attention.output.bias
    assert h.shape == (2, positions, 8)
    expected = x + h.mT.reshape(x.shape)
    expected = expected / 2**0.5 if rescale else expected
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_self_attention_in_channels_last_copies_no_image():
    attention, x = SelfAttention(2, 8, heads=2), to_channels_last(images(2, channels=8, dtype=torch.float32))
    seen = []
    for layer in (attention.norm, attention.qkv, attention.output):
        layer.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    seen.append(attention(x))
    assert len(seen) == 7
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in seen)
    with torch.autograd.profiler.profile() as profile:
        attention(x)
    copies = [event.key for event in profile.key_averages() if event.key in ("aten::clone", "aten::contiguous")]
    assert not copies


@pytest.mark.parametrize("heads", [0, 3])
def test_self_attention_refuses_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f"heads must be a divisor of the number of channels, 8; got {heads}"):
        SelfAttention(2, 8, heads=heads)


def test_residual_sum_with_rescale_keeps_the_variance():
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(2, 10_000, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(residual_sum(x, h, rescale=False), x + h)
    # The relative standard error of a variance is sqrt(2 / n).
    assert abs(residual_sum(x, h, rescale=True).var() - 1) < 5 * (2 / 10_000) ** 0.5


@pytest.mark.parametrize("axes", AXES)
def test_to_channels_last_puts_the_channels_of_a_position_side_by_side(axes):
    x = images(axes, channels=3)
    same = to_channels_last(x)
    assert torch.equal(same, x)
    assert same.stride(1) == (x.stride(1) if axes == 1 else 1)


@pytest.fixture
def small_network():
    torch.manual_seed(0)
    layers = {
        "stem": nn.Conv2d(2, 64, 3),
        "block": ResidualBlock(2, 64, 32),
        "attention": SelfAttention(2, 32),
        "up": NearestConvolution(2, 32, 64),
        "linear": nn.Linear(100, 60),
        "last": nn.Conv2d(64, 2, 3),
    }
    return nn.ModuleDict(layers)


def zeros_of(network):
    return {name for name, parameter in network.named_parameters() if not parameter.any()}


BLOCK_ENDS = {f"{layer}.{kind}" for layer in ("block.conv_out", "attention.output") for kind in ("weight", "bias")}
LAST = {"last.weight", "last.bias"}
NORM_BIASES = {"block.norm_in.bias", "block.norm_out.bias", "attention.norm.bias"}


def assert_variance(weight, variance):
    # A uniform value's square has the standard deviation sqrt(4/5) of its mean.
    standard_error = (0.8 / weight.numel()) ** 0.5
    assert abs(weight.square().mean() / variance - 1) < 5 * standard_error
    assert weight.abs().max() <= (3 * variance) ** 0.5


@pytest.mark.parametrize(("scheme", "attention"), [("fan_average", 1.0), ("fan_average_small_attention", 0.1)])
def test_initialise_by_the_average_of_the_fans(small_network, scheme, attention):
    initialise(small_network, scheme, [small_network["last"]])
    biases = {name for name, _ in small_network.named_parameters() if name.endswith("bias")}
    assert zeros_of(small_network) == BLOCK_ENDS | LAST | biases
    for name, fan_in, fan_out in [
        ("stem", 2 * 9, 64 * 9),
        ("block.conv_in", 64 * 9, 32 * 9),
        ("block.skip", 64, 32),
        ("up.conv", 32 * 9, 64 * 9),
        ("linear", 100, 60),
    ]:
        assert_variance(small_network.get_submodule(name).weight, 2 / (fan_in + fan_out))
    assert_variance(small_network["attention"].qkv.weight, attention * 2 / (32 + 32))


def test_initialise_draws_joined_layers_each_by_its_own_fans(small_network):
    linear = small_network["linear"]
    initialise(small_network, "fan_average", joined={linear: [20, 40]})
    for part, size in zip(linear.weight.split([20, 40]), (20, 40), strict=True):
        assert_variance(part, 2 / (100 + size))


def test_initialise_as_torch_does_leaves_all_but_the_last_layers(small_network):
    before = {name: parameter.clone() for name, parameter in small_network.named_parameters()}
    initialise(small_network, "torch", [small_network["last"]])
    assert zeros_of(small_network) == BLOCK_ENDS | LAST | NORM_BIASES
    for name, parameter in small_network.named_parameters():
        assert name in BLOCK_ENDS | LAST or torch.equal(parameter, before[name])


def test_initialised_blocks_start_as_their_skips(small_network):
    initialise(small_network, "fan_average")
    x, embedding = torch.randn(2, 64, 4, 4), torch.randn(2, 32)
    block, attention = small_network["block"], small_network["attention"]
    assert torch.equal(block(x, embedding), block.skip(x))
    x = block.skip(x)
    assert torch.equal(attention(x), x)


def test_zeroed():
    layer = nn.Linear(2, 3)
    assert zeroed(layer) is layer
    assert zeros_of(layer) == {"weight", "bias"}


def apart(norm, x):
    return nn.functional.silu(nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_norm_silu_has_the_derivatives_of_its_two_steps(axes, is_frozen):
    torch.manual_seed(0)
    norm = GroupNorm(6, groups=2).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.requires_grad_(not is_frozen)
    for layout in (to_channels_last, lambda x: x, lambda x: x.mT.contiguous().mT if axes > 1 else x):
        x = layout(torch.randn(2, 6, *[4] * axes, dtype=torch.float64)).requires_grad_()
        y, expected = norm_silu(norm, x), apart(norm, x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        inputs = [tensor for tensor in (x, norm.weight, norm.bias) if tensor.requires_grad]
        # A gradient in another order of memory than x is one too.
        for grad in (torch.randn_like(y), torch.randn(y.shape, dtype=torch.float64)):
            found = torch.autograd.grad(y, inputs, grad, retain_graph=True)
            torch.testing.assert_close(
                found, torch.autograd.grad(expected, inputs, grad, retain_graph=True), rtol=0, atol=1e-12
            )
        assert torch.autograd.gradgradcheck(lambda x, *_: norm_silu(norm, x), (x, *inputs[1:]))


def test_norm_silu_keeps_its_input_alone():
    norm, x = GroupNorm(8), to_channels_last(torch.randn(2, 8, 16, 16)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_silu(norm, x)
    assert sum(tensor.numel() for tensor in kept if tensor.numel() >= x.numel()) == x.numel()


def test_norm_silu_has_rows_of_a_jacobian_at_once_and_forward_derivatives_by_its_weight():
    torch.manual_seed(0)
    norm, x = GroupNorm(4, groups=2).double(), torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y = norm_silu(norm, x).flatten()
    eye = torch.eye(len(y), dtype=torch.float64)
    rows = torch.autograd.grad(y, x, eye, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in eye])
    torch.testing.assert_close(rows, one_by_one, rtol=0, atol=1e-12)

    def by_weight(weight):
        return torch.func.functional_call(norm, {"weight": weight}, (to_channels_last(x.detach()[..., None]),))

    tangent = torch.randn(4, dtype=torch.float64)
    pushed = torch.func.jvp(by_weight, (norm.weight.detach(),), (tangent,))[1]
    h = 1e-5
    difference = (by_weight(norm.weight + h * tangent) - by_weight(norm.weight - h * tangent)) / (2 * h)
    torch.testing.assert_close(pushed, difference, rtol=0, atol=1e-9)


def test_times_of_few_bits_meet_the_frequencies_in_float32():
    t = torch.tensor([0.3333], dtype=torch.bfloat16)
    torch.manual_seed(0)
    for embedding in (FourierEmbedding(16, scale=8.5), SinusoidalEmbedding(16)):
        assert torch.equal(embedding(t), embedding(t.float()))


def test_labels_are_whole_numbers():
    network = UNet((1, 4, 4), 4, (1,), 1, (), classes=2)
    with pytest.raises(ValueError, match=r"label must be int64, the number of a class; got torch.float32"):
        network(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1))
