"""The U-Net of DDPM and its successors (Ho, Jain & Abbeel 2020, app. B; after Ronneberger et al. 2015).

    down     at each level blocks_per_level residual blocks, then a halving of height and width
    middle   residual block, self-attention, residual block at the coarsest level
    up       at each level blocks_per_level + 1 residual blocks, then a doubling of height and width;
             each block is also fed one feature map of the way down, the last made first

Level l has base_channels * channel_multipliers[l] channels. Every residual block is told the time, and the
condition if there is one, through one embedding of 4 * base_channels numbers. The default arguments with
data_shape (3, 32, 32) are DDPM's network for CIFAR-10, 35.7 million parameters, but for where its strided
convolutions are centred; `published.PUBLISHED` has the arguments of DDPM, DDPM++, NCSN++, improved DDPM and ADM.

With progressive input the image itself, halved level by level, is added to the features; with progressive output
the image is a sum of parts, each doubled to the next level (Karras et al. 2020; Song et al. 2021, app. H).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sde_diffusion.networks.blocks import (
    INITIALISATIONS,
    ConditionEmbedding,
    Downsample,
    FilteredDownsample,
    FourierEmbedding,
    GroupNorm,
    NearestConvolution,
    Norm,
    ResidualBlock,
    SelfAttention,
    SinusoidalEmbedding,
    check_at_least,
    check_data_shape,
    check_inputs,
    convolution,
    double,
    halve,
    initialise,
    norm_silu,
    residual_sum,
    to_channels_last,
)

_IN_BLOCK = ("average", "fir")

_TIME_FEATURES: dict[str, Callable[[int, float], nn.Module]] = {
    "ddpm": SinusoidalEmbedding,
    "transformer": partial(SinusoidalEmbedding, endpoint=False),
    "fourier": FourierEmbedding,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "time_features": tuple(_TIME_FEATURES),
    "resampling": ("conv", "conv_shifted", "average", "fir"),
    "up_attention": ("every", "last"),
    "progressive_input": ("none", "skip", "residual"),
    "progressive_output": ("none", "skip"),
    "initialisation": INITIALISATIONS,
}


class Stage(nn.Module):
    """A block, self-attention after it, and what it takes from an image or adds to one.

    The network calls `image` itself, after the stage: what it puts out is not computed again under checkpointing.
    """

    def __init__(
        self,
        block: nn.Module,
        attention: nn.Module | None = None,
        image: nn.Module | None = None,
        takes_skip: bool = False,
    ) -> None:
        """Join the modules; `takes_skip` says whether it is fed a feature map of the way down."""
        super().__init__()
        self.block: Any = block
        self.attention, self.takes_skip = attention, takes_skip
        self.image: Any = image

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None) -> Tensor:
        """Features (B, C, H, W), the block's part of the embedding (B, E) and a feature map, or None, to features."""
        x = self.block(x if skip is None else torch.cat([x, skip], dim=1), embedding)
        return x if self.attention is None else self.attention(x)


class ImageInput(nn.Module):
    """Halves the image and adds it to the features; in a residual pyramid the sum then takes the place of the image."""

    def __init__(
        self, axes: int, image_channels: int, channels: int, *, resampling: str, residual: bool, rescale: bool
    ) -> None:
        """Make the convolution, of size 1 after the halving, or in a residual pyramid of size 3 and part of it."""
        super().__init__()
        self.resampling, self.residual, self.rescale = resampling, residual, rescale
        self.conv = (
            FilteredDownsample(axes, image_channels, channels, resampling)
            if residual
            else convolution(axes, image_channels, channels, 1)
        )

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, H, W) and the image at twice their size to features and the image at their size."""
        if self.residual:
            x = residual_sum(x, self.conv(image), self.rescale)
            return x, x
        image = halve(image, self.resampling)
        return x + self.conv(image), image


class ImageOutput(nn.Module):
    """The image that the features hold, added to the doubled one of the coarser level if there is one."""

    def __init__(self, axes: int, channels: int, image_channels: int, *, resampling: str, norm: Norm) -> None:
        """Make the normalisation and the convolution, which starts at zero."""
        super().__init__()
        self.resampling = resampling
        self.norm = norm(channels)
        self.conv = convolution(axes, channels, image_channels)

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        """Features (B, C, H, W) and an image of half their size, or None, to an image."""
        part = self.conv(norm_silu(self.norm, x))
        return part if image is None else double(image, self.resampling) + part


@dataclass(frozen=True)
class _Layers:
    """What all layers of a U-Net have in common; the arguments are those of ``UNet``."""

    axes: int
    heads: int
    head_channels: int | None
    resampling: str
    rescale: bool
    norm: Norm
    of_blocks: dict[str, Any]

    def residual(self, channels_in: int, channels_out: int, resample: str | None = None) -> ResidualBlock:
        """A residual block."""
        return ResidualBlock(
            self.axes,
            channels_in,
            channels_out,
            resample=resample,
            resampling=self.resampling,
            rescale=self.rescale,
            norm=self.norm,
            **self.of_blocks,
        )

    def attention(self, width: int) -> SelfAttention:
        """Self-attention."""
        heads = width // self.head_channels if self.head_channels else self.heads
        return SelfAttention(self.axes, width, heads, rescale=self.rescale, norm=self.norm)

    def halving(self, width: int) -> nn.Module:
        """What leads from a level to the coarser one."""
        if self.resampling in _IN_BLOCK:
            return self.residual(width, width, "down")
        return Downsample(self.axes, width, shifted=self.resampling == "conv_shifted")

    def doubling(self, width: int) -> nn.Module:
        """What leads from a level to the finer one."""
        return (
            self.residual(width, width, "up")
            if self.resampling in _IN_BLOCK
            else NearestConvolution(self.axes, width, width)
        )

    def way_down(
        self,
        image_channels: int,
        base_channels: int,
        widths: Sequence[int],
        attends: Sequence[bool],
        blocks: int,
        progressive_input: str,
    ) -> tuple[list[Stage], list[int]]:
        """The stages of the way down, and the channels of every feature map that it leaves for the way up."""
        stages: list[Stage] = []
        skips = [width := base_channels]
        is_residual = progressive_input == "residual"
        for level, level_width in enumerate(widths):
            if level:
                image = None
                if progressive_input != "none":
                    image = ImageInput(
                        self.axes,
                        image_channels,
                        width,
                        resampling=self.resampling,
                        residual=is_residual,
                        rescale=self.rescale,
                    )
                    image_channels = width if is_residual else image_channels
                stages.append(Stage(self.halving(width), image=image))
                skips.append(width)
            for _ in range(blocks):
                attention = self.attention(level_width) if attends[level] else None
                stages.append(Stage(self.residual(width, level_width), attention))
                skips.append(width := level_width)
        return stages, skips

    def way_up(
        self,
        image_channels: int,
        skips: Sequence[int],
        widths: Sequence[int],
        attends: Sequence[bool],
        only_last_attends: bool,
        is_progressive: bool,
    ) -> list[Stage]:
        """The stages of the way up, of which each but the doublings takes the last of the feature maps in `skips`."""
        stages: list[Stage] = []
        skips, width = list(skips), widths[-1]
        blocks = len(skips) // len(widths)
        for level, level_width in reversed(list(enumerate(widths))):
            for block in range(blocks):
                is_last = block == blocks - 1
                residual = self.residual(width + skips.pop(), level_width)
                width = level_width
                attention = self.attention(width) if attends[level] and (is_last or not only_last_attends) else None
                image = None
                if is_last and (level == 0 or is_progressive):
                    image = ImageOutput(self.axes, width, image_channels, resampling=self.resampling, norm=self.norm)
                stages.append(Stage(residual, attention, image, takes_skip=True))
            if level:
                stages.append(Stage(self.doubling(width)))
        return stages


class UNet(nn.Module):
    """A network of images, called as network(x, t, label, vector); it starts out as the zero function.

    Inside, and in what it returns, images are in the memory order of torch.channels_last, and so are its weights,
    whose gradients then need no copy. Under autocast the answer has autocast's dtype.
    """

    # Lists of `Stage`, which is more than the type of their entries tells.
    down: Any
    middle: Any
    up: Any

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
        *,
        vector: int = 0,
        head_channels: int | None = None,
        time_features: str = "ddpm",
        resampling: str = "conv",
        project_resampled: bool = False,
        scale_shift: bool = False,
        rescale: bool = False,
        up_attention: str = "every",
        progressive_input: str = "none",
        progressive_output: str = "none",
        norm_epsilon: float = 1e-6,
        initialisation: str = "fan_average",
        checkpointing: bool = False,
    ) -> None:
        """Build the network.

        Args:
            data_shape: (C, L), (C, H, W) or (C, D, H, W); every length must be divisible by 2 ** (levels - 1).
            base_channels: channels at the first level, even and at least 4; groups must divide it.
            channel_multipliers: channels of each level, as multiples of base_channels.
            blocks_per_level: residual blocks of a level on the way down; the way up has one more.
            attention_resolutions: heights (the first axis) of the feature maps whose residual blocks are followed by
                self-attention; the middle has it always.
            dropout: probability of a zero before the last convolution of a residual block.
            classes: number of class labels; 0 for a network that takes none.
            time_scale: factor on t before its features; 1000 suits times in [0, 1] with sinusoidal ones.
            heads: heads of every self-attention, whose channels they must divide.
            groups: groups of every group normalisation; None for the rule of `blocks.GroupNorm`.
            out_channels: channels of the output; None for those of the data.
            vector: length of the vector that each image is conditioned on; 0 for none.
            head_channels: channels of every head, in place of their number.
            time_features: "ddpm" or "transformer", sinusoids with the frequencies of `SinusoidalEmbedding`, with or
                without its endpoint; or "fourier", with those of `FourierEmbedding`.
            resampling: "conv" or "conv_shifted", by layers of their own, `Downsample` and `NearestConvolution`; or
                "average" or "fir", within residual blocks, as these resample.
            project_resampled: whether a residual block that resamples has a convolution in its skip.
            scale_shift: whether the embedding scales and shifts a residual block's normalised features.
            rescale: whether every sum of a block and its skip is divided by √2.
            up_attention: "every" or "last", after which blocks of a level of the way up self-attention is.
            progressive_input: "none", "skip" or "residual", how the halved image is added to the features.
            progressive_output: "none", or "skip" for an image at every level, each added to the doubled one before.
            norm_epsilon: what every group normalisation adds to the variance.
            initialisation: "fan_average" (DDPM), "fan_average_small_attention" (DDPM++) or "torch" (ADM), see
                `blocks.initialise`.
            checkpointing: whether training keeps the input of each block alone, and computes the rest again.

        Raises:
            ValueError: for arguments that do not fit together.
        """
        super().__init__()
        self.data_shape, self.classes, self.vector = tuple(data_shape), classes, vector
        self.checkpointing = checkpointing
        heights = _heights(self.data_shape, len(channel_multipliers))
        _check_choices(
            time_features=time_features,
            resampling=resampling,
            up_attention=up_attention,
            progressive_input=progressive_input,
            progressive_output=progressive_output,
            initialisation=initialisation,
        )
        check_at_least(
            blocks_per_level=(blocks_per_level, 1),
            classes=(classes, 0),
            vector=(vector, 0),
            out_channels=(1 if out_channels is None else out_channels, 1),
        )
        for multiplier in channel_multipliers:
            check_at_least(channel_multipliers=(multiplier, 1))
        if base_channels < 4 or base_channels % 2:
            raise ValueError(f"base_channels must be even and at least 4; got {base_channels}")
        if absent := sorted(set(attention_resolutions) - set(heights)):
            raise ValueError(f"attention_resolutions must be among the heights {heights} of the levels; got {absent}")
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        attends = [height in attention_resolutions for height in heights]
        _check_divisors(widths, attends, base_channels, heads, head_channels, groups)

        layers = _Layers(
            len(self.data_shape) - 1,
            heads,
            head_channels,
            resampling,
            rescale,
            partial(GroupNorm, groups=groups, epsilon=norm_epsilon),
            {"dropout": dropout, "project_resampled": project_resampled, "scale_shift": scale_shift},
        )
        embedding_channels = 4 * base_channels
        feature_channels = 2 * base_channels if time_features == "fourier" else base_channels
        self.time_features = _TIME_FEATURES[time_features](feature_channels, time_scale)
        self.time_embedding = nn.Sequential(
            nn.Linear(feature_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        self.condition = ConditionEmbedding(classes, vector, embedding_channels)
        self.stem = convolution(layers.axes, self.data_shape[0], base_channels)
        down, skips = layers.way_down(
            self.data_shape[0], base_channels, widths, attends, blocks_per_level, progressive_input
        )
        width = widths[-1]
        middle = [Stage(layers.residual(width, width), layers.attention(width)), Stage(layers.residual(width, width))]
        image_channels = self.data_shape[0] if out_channels is None else out_channels
        up = layers.way_up(image_channels, skips, widths, attends, up_attention == "last", progressive_output != "none")
        self.down, self.middle, self.up = nn.ModuleList(down), nn.ModuleList(middle), nn.ModuleList(up)
        self._sizes = [stage.block.embedding_channels for stage in [*down, *middle, *up]]
        self.projection = nn.Linear(embedding_channels, sum(self._sizes))

        outputs = [stage.image.conv for stage in up if stage.image is not None]
        initialise(self, initialisation, outputs, joined={self.projection: self._sizes})
        for parameter in self.parameters():
            parameter.data = to_channels_last(parameter.data)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), times (B,) and conditions, where it has them, to (B, out_channels, H, W).

        A label (B,) in [0, classes) names a class; None for the batch, or `classes` for an image, means no label. The
        vectors are (B, vector); None means zeros.

        Raises:
            ValueError: if a shape is wrong, or for a label without classes.
        """
        check_inputs(self, x, t, label, vector)
        embedding = self.time_embedding(self.time_features(t).to(x.dtype)) + self.condition(label, vector)
        # What each block takes of the embedding is a linear function of its own: all of them are one product.
        embeddings = iter(self.projection(F.silu(embedding)).split(self._sizes, dim=1))

        image = x = to_channels_last(x)
        x = self.stem(x)
        skips = [x]
        for stage in self.down:
            x = self._run(stage, x, next(embeddings))
            if stage.image is not None:
                x, image = stage.image(x, image)
            skips.append(x)
        for stage in self.middle:
            x = self._run(stage, x, next(embeddings))
        output: Any = None
        for stage in self.up:
            x = self._run(stage, x, next(embeddings), skips.pop() if stage.takes_skip else None)
            if stage.image is not None:
                output = stage.image(x, output)
        return output

    def units(self) -> Iterator[nn.Module]:
        """The parts that are called as a whole, and only so: what can have its weights gathered for the call."""
        for stage in [*self.down, *self.middle, *self.up]:
            yield from stage.children()

    def _run(self, stage: Stage, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Any:
        if self.checkpointing and self.training:
            return checkpoint(stage, x, embedding, skip, use_reentrant=False)
        return stage(x, embedding, skip)


def _check_choices(**chosen: str) -> None:
    """Refuse a choice that there is not, or a progressive image with layers that cannot resample one."""
    for name, choice in chosen.items():
        if choice not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}; got {choice!r}")
        if name.startswith("progressive") and choice != "none" and chosen["resampling"] not in _IN_BLOCK:
            raise ValueError(f"{name} must be none with resampling {chosen['resampling']!r}; got {choice!r}")


def _check_divisors(
    widths: Sequence[int],
    attends: Sequence[bool],
    base_channels: int,
    heads: int,
    head_channels: int | None,
    groups: int | None,
) -> None:
    """Refuse heads and groups that do not divide the channels they are of."""
    if head_channels is not None and heads != 1:
        raise ValueError(f"heads must be left at 1 where head_channels is given; got {heads}")
    if groups is not None and (groups < 1 or base_channels % groups):
        raise ValueError(f"groups must divide base_channels, {base_channels}; got {groups}")
    attended = {width for width, has_attention in zip(widths, attends, strict=True) if has_attention} | {widths[-1]}
    for width in sorted(attended):
        for name, divisor in (("heads", heads), ("head_channels", 1 if head_channels is None else head_channels)):
            if divisor < 1 or width % divisor:
                raise ValueError(f"{name} must divide the channels of every attention, {width}; got {divisor}")


def _heights(data_shape: tuple[int, ...], levels: int) -> list[int]:
    """Height of the feature maps of each level; ValueError unless each level halves the one before it."""
    if not levels:
        raise ValueError("channel_multipliers must name at least one level; got none")
    check_data_shape(data_shape, 2 ** (levels - 1), f"for {levels} levels")
    return [data_shape[1] // 2**level for level in range(levels)]
