"""The U-Net of DDPM (Ho, Jain & Abbeel 2020, app. B; after Ronneberger et al. 2015 and PixelCNN++).

    down     at each level blocks_per_level residual blocks, then a halving of height and width
    middle   residual block, self-attention, residual block at the coarsest level
    up       at each level blocks_per_level + 1 residual blocks, then a doubling of height and width;
             each block is also fed one feature map of the way down, the last made first

Level l has base_channels * channel_multipliers[l] channels. Every residual block is told the time, and the
label if the network has classes, through one embedding of 4 * base_channels numbers. The default arguments
with data_shape (3, 32, 32) are DDPM's network for CIFAR-10, 35.7 million parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.blocks import (
    Downsample,
    GroupNorm,
    LabelEmbedding,
    ResidualBlock,
    SelfAttention,
    SinusoidalEmbedding,
    Upsample,
    check_inputs,
    zeroed,
)


class Stage(nn.Module):
    """A residual block and the modules that follow it: attention, upsampling, both or neither."""

    def __init__(self, residual: ResidualBlock, *after: nn.Module) -> None:
        """Join the modules."""
        super().__init__()
        self.residual, self.after = residual, nn.Sequential(*after)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Images (B, C, H, W) and embedding (B, E) to images."""
        return self.after(self.residual(x, embedding))


class UNet(nn.Module):
    """A network of images, called as network(x, t, label); it starts out as the zero function.

    Inside, and in what it returns, images are in the memory order of torch.channels_last. Under autocast the
    answer has autocast's dtype.
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
        out_channels: int | None = None,
    ) -> None:
        """Build the network.

        Args:
            data_shape: (C, H, W); H and W must be divisible by 2 ** (levels - 1).
            base_channels: channels at the first level, even and at least 4; heads and groups must divide it.
            channel_multipliers: channels of each level, as multiples of base_channels.
            blocks_per_level: residual blocks of a level on the way down; the way up has one more.
            attention_resolutions: heights of the feature maps whose residual blocks are followed by
                self-attention; the middle has it always.
            dropout: probability of a zero before the last convolution of a residual block.
            classes: number of class labels; 0 for a network that takes none.
            time_scale: factor on t before the sinusoidal embedding; 1000 suits times in [0, 1].
            heads: heads of every self-attention.
            groups: groups of every group normalisation; None for the rule of `blocks.GroupNorm`.
            out_channels: channels of the output; None for those of the data.

        Raises:
            ValueError: for arguments that do not fit together.
        """
        super().__init__()
        self.data_shape, self.classes = tuple(data_shape), classes
        if out_channels is not None and out_channels < 1:
            raise ValueError(f"out_channels must be at least 1; got {out_channels}")
        heights = _heights(self.data_shape, len(channel_multipliers))
        if absent := sorted(set(attention_resolutions) - set(heights)):
            raise ValueError(f"attention_resolutions must be among the heights {heights} of the levels; got {absent}")
        if base_channels < 4 or base_channels % 2:
            raise ValueError(f"base_channels must be even and at least 4; got {base_channels}")
        for name, divisor in (("heads", heads), ("groups", 1 if groups is None else groups)):
            if divisor < 1 or base_channels % divisor:
                raise ValueError(f"{name} must divide base_channels, {base_channels}; got {divisor}")
        for name, least, value in (
            ("blocks_per_level", 1, blocks_per_level),
            ("channel_multipliers", 1, min(channel_multipliers)),
            ("classes", 0, classes),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")

        embedding_channels = 4 * base_channels
        self.time_features = SinusoidalEmbedding(base_channels, time_scale)
        self.time_embedding = nn.Sequential(
            nn.Linear(base_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        if classes:
            self.label_embedding = LabelEmbedding(classes, embedding_channels)

        def stage(channels_in: int, channels_out: int, attend: bool, upsample: bool = False) -> Stage:
            after: list[nn.Module] = []
            if attend:
                after.append(SelfAttention(channels_out, heads, groups))
            if upsample:
                after.append(Upsample(channels_out))
            return Stage(ResidualBlock(channels_in, channels_out, embedding_channels, dropout, groups), *after)

        levels = [
            (base_channels * multiplier, height in attention_resolutions)
            for multiplier, height in zip(channel_multipliers, heights, strict=True)
        ]
        self.stem = nn.Conv2d(self.data_shape[0], base_channels, 3, padding=1)
        width = base_channels
        skips = [width]

        self.down = nn.ModuleList()
        for level, (level_width, attend) in enumerate(levels):
            if level:
                self.down.append(Downsample(width))
                skips.append(width)
            for _ in range(blocks_per_level):
                self.down.append(stage(width, level_width, attend))
                width = level_width
                skips.append(width)

        self.middle = nn.ModuleList([stage(width, width, attend=True), stage(width, width, attend=False)])

        self.up = nn.ModuleList()
        for level, (level_width, attend) in reversed(list(enumerate(levels))):
            for block in range(blocks_per_level + 1):
                upsample = level > 0 and block == blocks_per_level
                self.up.append(stage(width + skips.pop(), level_width, attend, upsample))
                width = level_width

        channels = self.data_shape[0] if out_channels is None else out_channels
        self.head = nn.Sequential(GroupNorm(width, groups), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), times (B,) and labels (B,), where there are classes, to (B, out_channels, H, W).

        A label in [0, classes) names a class; None for the batch, or `classes` for an image, means no label.

        Raises:
            ValueError: if a shape is wrong, or for a label without classes.
        """
        check_inputs(x, t, label, self.data_shape, self.classes)
        embedding = self.time_embedding(self.time_features(t).to(x.dtype))
        if self.classes:
            embedding = embedding + self.label_embedding(label)
        # Each residual block applies silu and its own linear layer; silu is the same for all.
        embedding = F.silu(embedding)

        x = self.stem(x.to(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.head(x)


def _heights(data_shape: tuple[int, ...], levels: int) -> list[int]:
    """Height of the feature maps of each level; ValueError unless each level halves the one before it."""
    if not levels:
        raise ValueError("channel_multipliers must name at least one level; got none")
    divisor = 2 ** (levels - 1)
    if len(data_shape) != 3 or min(data_shape) < 1 or any(size % divisor for size in data_shape[1:]):
        raise ValueError(
            f"data_shape must be (C, H, W) with H and W divisible by {divisor}, for {levels} levels; got {data_shape}"
        )
    return [data_shape[1] // 2**level for level in range(levels)]
