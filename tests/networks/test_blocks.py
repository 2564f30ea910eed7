"""The layers against their formulas, computed independently."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sde_diffusion.networks.blocks import (
    Downsample,
    GroupNorm,
    LabelEmbedding,
    ResidualBlock,
    SelfAttention,
    SinusoidalEmbedding,
    Upsample,
)


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


def test_no_label_is_the_last_row():
    embedding = LabelEmbedding(classes=3, dim=5)
    assert torch.equal(embedding(None), embedding(torch.tensor([3])))
    assert not torch.equal(embedding(None), embedding(torch.tensor([2])))


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


@pytest.mark.parametrize("channels_out", [8, 12])
def test_residual_block_starts_as_its_skip(channels_out):
    torch.manual_seed(0)
    block = ResidualBlock(8, channels_out, embedding_channels=6)
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    assert torch.equal(block(x, embedding), block.skip(x))


def test_residual_block_adds_the_embedding_before_the_second_normalisation():
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, embedding_channels=6, groups=2).double()
    nn.init.normal_(block.conv_out.weight)
    x, embedding = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 6).double()
    h = block.conv_in(nn.functional.silu(block.norm_in(x)))
    h = h + (embedding @ block.embedding.weight.T + block.embedding.bias)[:, :, None, None]
    expected = x + block.conv_out(nn.functional.silu(block.norm_out(h)))
    torch.testing.assert_close(block(x, embedding), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_self_attention_is_the_formula(heads):
    torch.manual_seed(0)
    attention = SelfAttention(8, heads).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    assert torch.equal(attention(x), x)

    nn.init.normal_(attention.output.weight)
    tokens = attention.norm(x).permute(0, 2, 3, 1).reshape(2, 15, 8)
    q, k, v = (tokens @ attention.qkv.weight.T + attention.qkv.bias).split(8, dim=2)
    attended = []
    for head in range(heads):
        part = slice(head * 8 // heads, (head + 1) * 8 // heads)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / (8 / heads) ** 0.5, dim=2)
        attended.append(weights @ v[..., part])
    output = torch.cat(attended, dim=2) @ attention.output.weight.T
    expected = x + output.reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_self_attention_in_channels_last_copies_no_image():
    attention = SelfAttention(8)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    tokens = []
    attention.qkv.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    assert attention(x).is_contiguous(memory_format=torch.channels_last)
    assert tokens[0].is_contiguous()


def test_self_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="heads must be a divisor of the number of channels, 8; got 3"):
        SelfAttention(8, heads=3)


def test_upsample_repeats_each_pixel_and_downsample_takes_every_other():
    up, down = Upsample(2), Downsample(2)
    for layer in (up, down):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.get_parameter("bias"))
    x = torch.arange(2 * 2 * 3 * 4.0).reshape(2, 2, 3, 4)
    assert torch.equal(up(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(down(up(x)), x)
