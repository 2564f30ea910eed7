"""Our U-Net against that of diffusers with the same weights."""

import logging

import pytest
import torch
from diffusers_weights import unet_from_diffusers
from torch import nn

from sde_diffusion.networks.blocks import FilteredDownsample, double, halve

LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SMALL = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": None, **LEVELS}
DDPM = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
ADM = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "attention_head_dim": 4,
}
THREE_LEVELS = {
    "block_out_channels": (8, 24, 16),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
}
CONFIGURATIONS = {
    "ddpm, padded on both sides": {"flip_sin_to_cos": False, "freq_shift": 1},
    "ddpm, padded after": {"downsample_padding": 0, "norm_eps": 1e-3},
    "several heads, three levels": {**THREE_LEVELS, "attention_head_dim": 8, "freq_shift": 1, "norm_num_groups": 4},
    "adm": ADM,
    "not square, other channels out": {"sample_size": (8, 12), "in_channels": 1, "out_channels": 2, "act_fn": "swish"},
}


@pytest.fixture(scope="module")
def build():
    """build(options): a peer with no parameter at a value, 0 or 1, that would hide a mistake."""
    # Its import takes seconds, which only the process that runs these tests should wait for.
    peer_class = pytest.importorskip("diffusers").UNet2DModel

    def network(options):
        torch.manual_seed(0)
        peer = peer_class(**options).eval()
        with torch.no_grad():
            for parameter in peer.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return peer

    return network


def inputs(peer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    size = peer.config.sample_size
    shape = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, peer.config.in_channels, *shape, generator=generator, dtype=dtype)
    return x, torch.tensor([3.0, 977.0], dtype=dtype)


def largest_difference(peer, x, t):
    """As a multiple of the spread of the peer's answer."""
    with torch.no_grad():
        expected = peer(x, t).sample
        return (unet_from_diffusers(peer)(x, t) - expected).abs().max() / expected.std()


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_outputs_are_equal(build, options):
    peer = build(SMALL | options)
    # Each side has about 40 layers with rounding errors of 2^-24 and more, and phases of 977 radians, 1000 * 2^-24.
    assert largest_difference(peer, *inputs(peer)) < 1e-5


def test_the_network_of_ddpm_for_cifar10_is_equal(build):
    peer = build(DDPM)
    assert sum(parameter.numel() for parameter in peer.parameters()) == 35_746_307
    network = unet_from_diffusers(peer)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    assert largest_difference(peer, *inputs(peer)) < 1e-5


class Sinusoids(nn.Module):
    """The peer's features of the time in the precision of t, of which it would leave float32's."""

    def __init__(self, dim, cosines_first, shift):
        super().__init__()
        self.half, self.cosines_first, self.shift = dim // 2, cosines_first, shift

    def forward(self, t):
        exponents = -torch.arange(self.half, dtype=t.dtype) / (self.half - self.shift)
        phase = torch.outer(t, 10_000**exponents)
        return torch.cat([phase.cos(), phase.sin()] if self.cosines_first else [phase.sin(), phase.cos()], dim=1)


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_outputs_are_equal_in_float64(build, options, caplog):
    # diffusers logs a warning about its list of modules to be kept in float32, which is empty.
    with caplog.at_level(logging.CRITICAL, logger="diffusers"):
        peer = build(SMALL | options).double()
    config = peer.config
    peer.time_proj = Sinusoids(config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
    # Phases of up to 977 radians have errors of 1e-13.
    assert largest_difference(peer, *inputs(peer, torch.float64)) < 1e-12


def test_gradients_of_the_input_are_equal(build):
    peer = build(SMALL)
    x, t = inputs(peer)
    x.requires_grad_()
    network = unet_from_diffusers(peer)
    ours, theirs = (torch.autograd.grad(output.square().sum(), x)[0] for output in (network(x, t), peer(x, t).sample))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.std()


def test_mode_dropout_and_dtype_are_the_peers(build):
    network = unet_from_diffusers(build(SMALL | {"dropout": 0.25}).train().bfloat16())
    assert network.training
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center_input_sample": True}, "center_input_sample must be False; got True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional'; got 'fourier'"),
        ({"freq_shift": 2}, "freq_shift must be 0 or 1; got 2"),
        ({"mid_block_type": None}, "mid_block_type must be 'UNetMidBlock2D'; got None"),
        ({"mid_block_scale_factor": 2**0.5}, "mid_block_scale_factor must be 1; got 1.414"),
        ({"add_attention": False}, "add_attention must be True; got False"),
        ({"act_fn": "relu"}, "act_fn must be 'silu' or 'swish'; got 'relu'"),
        ({"num_class_embeds": 3}, "num_class_embeds must be None; got 3"),
        ({"class_embed_type": "identity"}, "class_embed_type must be None; got 'identity'"),
        ({"sample_size": None}, "sample_size must be given; got None"),
        ({"block_out_channels": (16, 24)}, r"block_out_channels must be multiples of the first; got \(16, 24\)"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "up_block_types must be with attention on the levels"),
        (
            {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
            "down_block_types must be among DownBlock2D, AttnDownBlock2D; got SkipDownBlock2D",
        ),
        ({"time_embedding_dim": 48}, "time_embedding_dim must be 64; got 48"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups must be norm_num_groups, 8; got 4"),
        (ADM | {"attn_norm_num_groups": None}, "attn_norm_num_groups must be norm_num_groups, 8; got None"),
        ({"upsample_type": "resnet"}, "upsample_type must be downsample_type, 'conv'; got 'resnet'"),
        ({"sample_size": 9}, r"data_shape must be .* divisible by 2, for 2 levels; got \(3, 9, 9\)"),
    ],
)
def test_what_has_no_counterpart_is_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        unet_from_diffusers(build(SMALL | options))


def test_the_filter_is_the_peers():
    down, up = (pytest.importorskip(f"diffusers.models.{name}sampling") for name in ("down", "up"))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 12)
    peer, ours = down.FirDownsample2D(3, 5, use_conv=True), FilteredDownsample(2, 3, 5, "fir")
    ours.conv.load_state_dict(peer.Conv2d_0.state_dict())
    taps = [1, 3, 3, 1]
    torch.testing.assert_close(halve(x, "fir"), down.downsample_2d(x, taps))
    torch.testing.assert_close(double(x, "fir"), up.upsample_2d(x, taps))
    torch.testing.assert_close(ours(x), peer(x))
