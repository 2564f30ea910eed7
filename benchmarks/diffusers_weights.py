"""A diffusers UNet2DModel of DDPM's architecture, or of ADM's, as our U-Net, of equal outputs.

    network = unet_from_diffusers(peer)
    network(x, t)    is    peer(x, t).sample,    t (B,) the peer's timesteps, 0 to 999

The layers and their order are the same (Ho et al. 2020, app. B; Dhariwal & Nichol 2021). Here the linear functions of
the time of all blocks are one, and those that make queries, keys and values are one. The peer may have the cosines of
the time first. Its features of the time are float32 whatever its dtype; ours are as fine as t.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sde_diffusion.networks import UNet
from sde_diffusion.networks.blocks import NearestConvolution, ResidualBlock, SelfAttention

# The blocks of a level, without and with attention, that resample by layers of their own or by residual blocks.
_KINDS: dict[str, dict[str, tuple[str, str]]] = {
    "conv": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "resnet": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    },
}
# What a peer must have for there to be a network of ours that is equal to it.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "add_attention": (True,),
    "downsample_padding": (0, 1),
    "downsample_type": tuple(_KINDS),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}


def unet_from_diffusers(peer: Any) -> UNet:
    """Our U-Net with the weights of a UNet2DModel, and its dtype, device and mode; called with its timesteps.

    Raises:
        ValueError: naming the option of the peer's configuration that ours has no counterpart of.
    """
    options = unet_options(peer.config)
    network = UNet(**options).to(peer.device, peer.dtype).train(peer.training)
    with torch.no_grad():
        _fill(network, peer)
    return network


def unet_options(config: Any) -> dict[str, Any]:
    """The arguments of our U-Net for a peer's configuration; ValueError if there are none."""
    for name, allowed in _ALLOWED.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}; got {config[name]!r}")
    widths, sample_size, head_channels = config.block_out_channels, config.sample_size, config.attention_head_dim
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    for name, allowed in _KINDS[config.downsample_type].items():
        if unknown := sorted(set(config[name]) - set(allowed)):
            raise ValueError(f"{name} must be among {', '.join(allowed)}; got {', '.join(unknown)}")
    down, up = (["Attn" in kind for kind in config[name]] for name in ("down_block_types", "up_block_types"))
    for name, is_met, needed in (
        ("sample_size", sample_size is not None, "given"),
        ("block_out_channels", all(width % widths[0] == 0 for width in widths), "multiples of the first"),
        ("up_block_types", up == down[::-1], "with attention on the levels that down_block_types have it on"),
        ("time_embedding_dim", config.time_embedding_dim in (None, 4 * widths[0]), f"{4 * widths[0]}"),
        (
            "upsample_type",
            config.upsample_type == config.downsample_type,
            f"downsample_type, {config.downsample_type!r}",
        ),
        ("norm_num_groups", config.norm_num_groups is not None, "given"),
        (
            "attn_norm_num_groups",
            config.attn_norm_num_groups in (config.norm_num_groups, config.norm_num_groups if scale_shift else None),
            f"norm_num_groups, {config.norm_num_groups}",
        ),
    ):
        if not is_met:
            raise ValueError(f"{name} must be {needed}; got {config[name]!r}")
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    strided = "conv" if config.downsample_padding else "conv_shifted"
    return {
        "data_shape": (config.in_channels, height, width),
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": config.layers_per_block,
        "attention_resolutions": [height // 2**level for level, here in enumerate(down) if here],
        "dropout": config.dropout,
        "time_scale": 1.0,
        "time_features": "ddpm" if config.freq_shift else "transformer",
        "groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "head_channels": head_channels,
        "resampling": strided if config.downsample_type == "conv" else "average",
        "scale_shift": scale_shift,
        "norm_epsilon": config.norm_eps,
    }


def _stages(peer: Any) -> Iterator[tuple[Any, Any]]:
    """The peer's blocks, each with the attention after it, in the order of ours."""
    for group in [*peer.down_blocks, peer.mid_block, *peer.up_blocks]:
        attentions = list(getattr(group, "attentions", []))
        yield from zip(group.resnets, attentions + [None] * (len(group.resnets) - len(attentions)), strict=True)
        for name in ("downsamplers", "upsamplers"):
            for layer in getattr(group, name, None) or []:
                yield layer, None


def _fill(network: Any, peer: Any) -> None:
    first, second = network.time_embedding[0], network.time_embedding[2]
    _copy(first, peer.time_embedding.linear_1)
    _copy(second, peer.time_embedding.linear_2)
    if peer.config.flip_sin_to_cos:
        first.weight.copy_(first.weight.roll(first.in_features // 2, dims=1))
    _copy(network.stem, peer.conv_in)
    projections = []
    for ours, (block, attention) in zip([*network.down, *network.middle, *network.up], _stages(peer), strict=True):
        if isinstance(ours.block, ResidualBlock):
            _fill_residual(ours.block, block)
            projections.append(block.time_emb_proj)
        else:
            _copy(ours.block.conv, block.conv)
        if attention is not None:
            _fill_attention(ours.attention, attention)
    for name in ("weight", "bias"):
        getattr(network.projection, name).copy_(torch.cat([getattr(layer, name) for layer in projections]))
    (image,) = (stage.image for stage in network.up if stage.image is not None)
    _copy(image.norm, peer.conv_norm_out)
    _copy(image.conv, peer.conv_out)


def _fill_residual(ours: ResidualBlock, peer: Any) -> None:
    conv_in = ours.conv_in.conv if isinstance(ours.conv_in, NearestConvolution) else ours.conv_in
    pairs = [
        (ours.norm_in, peer.norm1),
        (conv_in, peer.conv1),
        (ours.norm_out, peer.norm2),
        (ours.conv_out, peer.conv2),
    ]
    for layer, theirs in pairs if peer.conv_shortcut is None else [*pairs, (ours.skip, peer.conv_shortcut)]:
        _copy(layer, theirs)


def _fill_attention(ours: SelfAttention, peer: Any) -> None:
    _copy(ours.norm, peer.group_norm)
    for name in ("weight", "bias"):
        queries, keys, values, output = (
            getattr(layer, name) for layer in (peer.to_q, peer.to_k, peer.to_v, peer.to_out[0])
        )
        for layer, theirs in ((ours.qkv, torch.cat([queries, keys, values])), (ours.output, output)):
            parameter = getattr(layer, name)
            parameter.copy_(theirs.view_as(parameter))


def _copy(ours: nn.Module, peer: nn.Module) -> None:
    ours.load_state_dict(peer.state_dict())
