"""The diffusion transformer DiT with adaLN-Zero (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

The data are cut into patches, each of which becomes a token of `width` numbers (Dosovitskiy et al. 2021), and the time
and the condition become one vector c:

    z = convolution(x) + position,    c = linear(silu(linear(sinusoids(t)))) + embedding of the condition

Every block changes the tokens twice, each change with shift β, scale γ and gate α of its own, all linear in silu(c),
the same for every token (adaptive layer normalisation, sec. 3.2):

    z <- z + α₁ attention((1 + γ₁) norm(z) + β₁)
    z <- z + α₂ mlp((1 + γ₂) norm(z) + β₂),    mlp(h) = linear(gelu(linear(h)))

    output = patches of linear0((1 + γ) norm(z) + β)

The layers that give α, β and γ start at zero, so that every block starts as the identity, and so does linear0, so that
the network starts as the zero function. The position of a patch is told by sines and cosines of its place along each
axis, fixed (Vaswani et al. 2017, sec. 3.5; in the plane as by He et al. 2022).

`published.PUBLISHED` has the sizes of DiT-S, B, L and XL.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sde_diffusion.networks.blocks import (
    CONVOLUTIONS,
    ConditionEmbedding,
    SinusoidalEmbedding,
    attend,
    check_at_least,
    check_data_shape,
    check_inputs,
    initialise,
    to_channels_last,
)

_norm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


class PositionEmbedding(nn.Module):
    """Where each patch of a grid is: a fixed table (positions, width), the positions in row-major order.

    Each axis has an equal part of the width, the last axis the first part, for the ``SinusoidalEmbedding`` of the
    patch's place along it, which is 0, 1, 2, ...
    """

    table: Tensor

    def __init__(self, grid: Sequence[int], width: int) -> None:
        """Make the table for `grid` patches along each axis; `width` is even and at least 4 for each of them."""
        super().__init__()
        self.grid = tuple(grid)
        self.features = SinusoidalEmbedding(width // len(self.grid), scale=1.0, endpoint=False)
        self.register_buffer("table", self._table(), persistent=False)

    def _table(self) -> Tensor:
        """The table on the device of the features' frequencies, in their dtype."""
        like = self.features.frequencies
        along = [torch.arange(size, dtype=like.dtype, device=like.device) for size in self.grid]
        places = torch.meshgrid(*along, indexing="ij")
        return torch.cat([self.features(place.flatten()) for place in reversed(places)], dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast to float64 would keep the roundings of float32; to_empty() would leave the buffer unfilled.
        super()._apply(fn, recurse)
        self.table = self._table().to(self.table.dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, positions, width) to tokens that hold their positions too."""
        return x + self.table


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) x + shift, for x (B, T, width) with one shift and one scale (B, 1, width) for all its tokens."""
    return torch.addcmul(shift, x, 1 + scale)


class TransformerBlock(nn.Module):
    """Tokens (B, T, width) and their modulation (B, 6, 1, width) to tokens (B, T, width)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        """Attention with `heads` heads, and a multilayer perceptron with `hidden` hidden units."""
        super().__init__()
        self.heads = heads
        self.attention_norm = _norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = _norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The formula at the top of this module; the modulation is β₁, γ₁, α₁, β₂, γ₂, α₂."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(1)
        x = torch.addcmul(x, gate, self._attention(modulate(self.attention_norm(x), shift, scale)))
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale)))

    def _attention(self, x: Tensor) -> Tensor:
        return self.output(attend(self.qkv(x), self.heads))


class DiT(nn.Module):
    """A transformer of patches, called as network(x, t, label, vector); it starts out as the zero function.

    Under autocast the sum of tokens and changes keeps the weights' dtype, and the answer has autocast's.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        classes: int = 0,
        time_scale: float = 1000.0,
        out_channels: int | None = None,
        *,
        vector: int = 0,
        checkpointing: bool = False,
    ) -> None:
        """Build the network.

        Args:
            data_shape: (C, L), (C, H, W) or (C, D, H, W); every length must be divisible by `patch`.
            patch: length of a patch along every axis. Half of it makes four times as many tokens of images.
            width: numbers a token; `heads` must divide it, and an even number, at least 4, must fall to each axis.
            depth: number of blocks.
            heads: heads of every attention.
            mlp_ratio: hidden units of every multilayer perceptron, as a multiple of width.
            classes: number of class labels; 0 for a network that takes none.
            time_scale: factor on t before its sinusoids; 1000 suits times in [0, 1].
            out_channels: channels of the output; None for those of the data.
            vector: length of the vector that each datum is conditioned on; 0 for none.
            checkpointing: whether training keeps only the tokens between blocks for the backward pass, which computes
                the rest of every block again: less memory, a third more time.

        Raises:
            ValueError: for an argument out of its range.
        """
        super().__init__()
        self.data_shape, self.classes, self.vector = tuple(data_shape), classes, vector
        self.patch, self.checkpointing = patch, checkpointing
        hidden = int(mlp_ratio * width)
        check_at_least(
            patch=(patch, 1),
            depth=(depth, 1),
            heads=(heads, 1),
            classes=(classes, 0),
            vector=(vector, 0),
            out_channels=(1 if out_channels is None else out_channels, 1),
        )
        check_data_shape(self.data_shape, patch, "the patch")
        grid = [size // patch for size in self.data_shape[1:]]
        axes = len(grid)
        if width < 4 * axes or width % (2 * axes):
            least = 4 * axes
            raise ValueError(f"width must be a multiple of {2 * axes}, at least {least}, for {axes} axes; got {width}")
        if width % heads:
            raise ValueError(f"heads must divide width, {width}; got {heads}")
        if hidden < 1:
            raise ValueError(f"mlp_ratio must give at least one hidden unit for width {width}; got {mlp_ratio}")

        channels = self.data_shape[0]
        self.out_channels = channels if out_channels is None else out_channels
        self.patches = CONVOLUTIONS[axes](channels, width, patch, stride=patch)
        self.position = PositionEmbedding(grid, width)
        self.time_features = SinusoidalEmbedding(256, time_scale, endpoint=False)
        self.time_embedding = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = ConditionEmbedding(classes, vector, width)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, hidden) for _ in range(depth)])
        self.norm = _norm(width)
        self.output = nn.Linear(width, patch**axes * self.out_channels)
        self.modulation = nn.Linear(width, (6 * depth + 2) * width)

        initialise(self, "fan_average", [self.modulation, self.output])
        # As a linear layer of the numbers of a patch, which the convolution is.
        nn.init.xavier_uniform_(self.patches.weight.data.flatten(1))
        self.patches.weight.data = to_channels_last(self.patches.weight.data)
        for layer in (self.time_embedding[0], self.time_embedding[2], self.condition.table):
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def units(self) -> Iterator[nn.Module]:
        """The parts that are called as a whole, and only so: what can have its weights gathered for the call."""
        yield from self.blocks

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        """Data (B, C, H, W), times (B,) and conditions, where it has them, to (B, out_channels, H, W).

        A label (B,) in [0, classes) names a class; None for the batch, or `classes` for a datum, means no label. The
        vectors are (B, vector); None means zeros.

        Raises:
            ValueError: if a shape is wrong, or for a label without classes.
        """
        check_inputs(self, x, t, label, vector)
        embedding = self.time_embedding(self.time_features(t).to(x.dtype)) + self.condition(label, vector)
        # The modulation of each block is a linear function of its own: all of them are one product.
        modulations = self.modulation(F.silu(embedding)).unflatten(1, (-1, 1, self.modulation.in_features))
        *of_blocks, of_output = modulations.split([6] * len(self.blocks) + [2], dim=1)

        # A convolution along one axis has its channels apart in memory.
        x = self.position(self.patches(x).flatten(2).transpose(1, 2)).contiguous()
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, modulation, use_reentrant=False)
            else:
                x = block(x, modulation)
        return self._join(self.output(modulate(self.norm(x), *of_output.unbind(1))))

    def _join(self, patches: Tensor) -> Tensor:
        """Patches (B, T, patch * patch * out_channels), channels last, to (B, out_channels, H, W)."""
        sizes = self.data_shape[1:]
        axes = len(sizes)
        x = patches.unflatten(2, (*[self.patch] * axes, self.out_channels)).unflatten(1, self.position.grid)
        # (B, h, w, patch, patch, C) to (B, C, h, patch, w, patch), and so for any number of axes.
        pairs = [axis for i in range(1, axes + 1) for axis in (i, axes + i)]
        return x.permute(0, 2 * axes + 1, *pairs).reshape(len(x), self.out_channels, *sizes)
