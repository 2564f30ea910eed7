"""The U-Net of DDPM (Ho, Jain & Abbeel 2020, app. B; after Ronneberger et al. 2015 and PixelCNN++).

    down     at each level blocks_per_level residual blocks, then a halving of height and width
    middle   residual block, self-attention, residual block at the coarsest level
    up       at each level blocks_per_level + 1 residual blocks, each fed with one feature map of the way down, the last
             made first; then a doubling of height and width

Level l has base_channels * channel_multipliers[l] channels. Every residual block is told the time, and the label if the
network has classes, through one embedding of 4 * base_channels numbers. The default arguments with data_shape (3, 32, 32) are
DDPM's network for CIFAR-10, 35.7 million parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.blocks import (
    Downsample,
    LabelEmbedding,
    ResidualBlock,
    SelfAttention,
    SinusoidalEmbedding,
    Upsample,
    check_inputs,
    group_norm,
    zeroed,
)


class Stage(nn.Module):
    """A residual block, then self-attention where `heads` is not 0."""

    def __init__(
        self, channels_in: int, channels_out: int, embedding_channels: int, dropout: float, heads: int, groups: int | None
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, embedding_channels, dropout, groups)
        self.attention = SelfAttention(channels_out, heads, groups) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """A network of images: (B, C, H, W), times (B,) and, with `classes`, labels (B,) to (B, C, H, W).

    It starts out as the zero function. The answer is in the memory order of torch.channels_last.

    Args:
        data_shape: (C, H, W); H and W must be divisible by 2 ** (levels - 1).
        base_channels: channels at the first level; a multiple of 2 from 4 on, for the time embedding.
        channel_multipliers: a multiple of base_channels for each level.
        blocks_per_level: residual blocks of a level on the way down; the way up has one more.
        attention_resolutions: heights of the feature maps that get self-attention after each residual block; the middle
            always has it.
        dropout: probability of a zero before the last convolution of each residual block.
        classes: number of class labels, 0 for a network without.
        time_scale: factor on t before the sinusoidal embedding; 1000 suits times in [0, 1].
        heads: heads of each self-attention.
        groups: groups of every group normalisation; None for the rule of `blocks.group_norm`.

    Raises ValueError for arguments that do not fit together, naming the argument.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        classes: int = 0,
        time_scale: float = 1000.0,
        heads: int = 1,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.data_shape, self.classes = tuple(data_shape), classes
        heights = _heights(self.data_shape, len(channel_multipliers))
        if unknown := set(attention_resolutions) - set(heights):
            raise ValueError(f"attention_resolutions must be among the heights {heights}; got {sorted(unknown)}")
        if base_channels % heads or base_channels % (groups or 1):
            raise ValueError(f"base_channels must be divisible by heads and groups; got {base_channels}, {heads}, {groups}")

        channels = data_shape[0]
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        embedding_channels = 4 * base_channels

        def stage(channels_in: int, channels_out: int, attention: bool) -> Stage:
            return Stage(channels_in, channels_out, embedding_channels, dropout, heads if attention else 0, groups)

        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(base_channels, time_scale),
            nn.Linear(base_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        if classes:
            self.label_embedding = LabelEmbedding(classes, embedding_channels)

        self.stem = nn.Conv2d(channels, base_channels, 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        skips = [width := base_channels]
        for level, (level_width, height) in enumerate(zip(widths, heights, strict=True)):
            if level:
                self.downsample.append(Downsample(width))
                skips.append(width)
            blocks = nn.ModuleList()
            for _ in range(blocks_per_level):
                blocks.append(stage(width, level_width, height in attention_resolutions))
                skips.append(width := level_width)
            self.down.append(blocks)

        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level_width, height in zip(reversed(widths), reversed(heights), strict=True):
            if self.up:
                self.upsample.append(Upsample(width))
            blocks = nn.ModuleList()
            for _ in range(blocks_per_level + 1):
                blocks.append(stage(width + skips.pop(), level_width, height in attention_resolutions))
                width = level_width
            self.up.append(blocks)

        self.head = nn.Sequential(
            group_norm(width, groups), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_inputs(x, t, label, self.data_shape, self.classes)
        embedding = self.time_embedding(t)
        if self.classes:
            embedding = embedding + self.label_embedding(label)
        embedding = F.silu(embedding)

        x = self.stem(x.to(memory_format=torch.channels_last))
        skips = [x]
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(x := self.downsample[level - 1](x))
            for block in blocks:
                skips.append(x := block(x, embedding))
        for block in self.middle:
            x = block(x, embedding)
        for level, blocks in enumerate(self.up):
            if level:
                x = self.upsample[level - 1](x)
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.head(x)


def _heights(data_shape: tuple[int, ...], levels: int) -> list[int]:
    """Height of the feature maps of each level; ValueError unless each level halves the one before it."""
    divisor = 2 ** (levels - 1)
    if len(data_shape) != 3 or any(size < 1 or size % divisor for size in data_shape[1:]) or data_shape[0] < 1:
        raise ValueError(
            f"data_shape must be (C, H, W) with H and W divisible by {divisor} for {levels} levels; got {data_shape}"
        )
    return [data_shape[1] // 2**level for level in range(levels)]
