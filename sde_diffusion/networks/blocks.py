"""What the networks are built from: time and label embeddings, and the layers of a U-Net.

Time embedding, d numbers a time, i = 0 .. d/2 - 1 (Vaswani et al. 2017, sec. 3.5; Ho et al. 2020, app. B):

    w_i = 10000^(-i / (d/2 - 1)),    embedding(t) = (sin(w_0 s t), ..., cos(w_0 s t), ...)

The factor s brings times in [0, 1] to the range of the discrete steps, 0 to 1000, that the frequencies were
chosen for.

Residual block, e the embedding of time and label (Ho et al. 2020, app. B; after He et al. 2016):

    h = conv(silu(norm(x))) + linear(e),    block(x, e) = skip(x) + conv0(dropout(silu(norm(h))))

Self-attention over the H W positions (Vaswani et al. 2017, sec. 3.2; Wang et al. 2018):

    q, k, v = linear(norm(x)),    attention(x) = x + linear0(softmax(q k^T / sqrt(d)) v)

The layers marked 0 start at zero, so that every block starts as the identity (or its skip) and a deep stack
trains from the first step. Every layer keeps the memory order of torch.channels_last, in which the tokens
(B, H W, C) that attention works on are the same memory as the image (B, C, H, W). Weights stay contiguous:
converting them gains nothing, and sharded training refuses it.
"""

from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

Layer = TypeVar("Layer", bound=nn.Module)


def zeroed(layer: Layer) -> Layer:
    """The same layer with every parameter set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018).

    Unless `groups` is given it is the largest divisor of `channels` that is at most 32 and leaves at least 4
    channels a group: 32 for 128 and 256 channels as in DDPM, 8 for 32 channels. On a CPU a small network
    trains faster with 16 channels a group or more: torch vectorises over the channels of one.
    """

    def __init__(self, channels: int, groups: int | None = None) -> None:
        """Raise ValueError if `groups` does not divide `channels`."""
        if groups is None:
            groups = next((g for g in range(min(32, channels // 4), 1, -1) if channels % g == 0), 1)
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must be a divisor of the number of channels, {channels}; got {groups}")
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, H, W)."""
        # torch's forward-mode derivative of the layer fails in channels_last.
        if forward_ad.unpack_dual(x).tangent is not None:
            x = x.contiguous()
        return super().forward(x)


class SinusoidalEmbedding(nn.Module):
    """Times (B,) to features (B, dim): dim/2 sines, then dim/2 cosines, of scale * t (the formula above).

    The frequencies fall geometrically from exactly 1 to exactly 1/10000, which is DDPM's convention (that of
    Vaswani et al. stops one step short of 1/10000 and interleaves sines and cosines).
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float = 1000.0) -> None:
        """Raise ValueError unless `dim` is even and at least 4."""
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be even and at least 4; got {dim}")
        self.dim, self.scale = dim, scale
        self.register_buffer("frequencies", self._frequencies(torch.empty(0)), persistent=False)

    def _frequencies(self, like: Tensor) -> Tensor:
        """(dim/2,) frequencies on the device of `like`, in its dtype or float32, whichever is the finer."""
        last = self.dim // 2 - 1
        frequencies = [10000.0 ** (-i / last) for i in range(last + 1)]
        return torch.tensor(frequencies, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast to float64 would keep the roundings of float32; to_empty() would leave the buffer unfilled.
        super()._apply(fn, recurse)
        self.frequencies = self._frequencies(self.frequencies)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to (B, dim), in the finer of t's dtype and the module's, at least float32."""
        phase = (self.scale * t)[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class LabelEmbedding(nn.Module):
    """Class labels (B,) int64 in [0, classes] to features (B, dim).

    None, or the label `classes`, means no label; it has a learned row of its own, as classifier-free guidance
    needs (Ho & Salimans 2022).
    """

    def __init__(self, classes: int, dim: int) -> None:
        """Make the table of classes + 1 rows; the last is "no label"."""
        super().__init__()
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, label: Tensor | None) -> Tensor:
        """Labels (B,) to (B, dim), None to (1, dim)."""
        return self.table.weight[-1:] if label is None else self.table(label)


def check_inputs(x: Tensor, t: Tensor, label: Tensor | None, data_shape: Sequence[int], classes: int) -> None:
    """Raise ValueError unless x is (B, *data_shape), t (B,) and label None or, for classes > 0, (B,)."""
    if x.shape[1:] != torch.Size(data_shape):
        raise ValueError(f"x must be (B, *data_shape) with data_shape {tuple(data_shape)}; got {tuple(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be ({len(x)},), one time for each x; got {tuple(t.shape)}")
    if label is not None and not classes:
        raise ValueError("label must be None for a network built with classes=0")
    if label is not None and label.shape != x.shape[:1]:
        raise ValueError(f"label must be ({len(x)},), one label for each x; got {tuple(label.shape)}")


class ResidualBlock(nn.Module):
    """(B, channels_in, H, W) and (B, embedding_channels) to (B, channels_out, H, W)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding_channels: int,
        dropout: float = 0.0,
        groups: int | None = None,
    ) -> None:
        """`dropout` is the probability of a zero; `groups` as in `GroupNorm`."""
        super().__init__()
        self.norm_in = GroupNorm(channels_in, groups)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embedding = nn.Linear(embedding_channels, channels_out)
        self.norm_out = GroupNorm(channels_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The formula at the top of this module."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.embedding(embedding)[:, :, None, None]
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h))))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """(B, C, H, W) to (B, C, H, W): each position attends to all, by `heads` heads of C / heads channels."""

    def __init__(self, channels: int, heads: int = 1, groups: int | None = None) -> None:
        """Raise ValueError if `heads` does not divide `channels`; `groups` as in `GroupNorm`."""
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must be a divisor of the number of channels, {channels}; got {heads}")
        self.heads = heads
        self.norm = GroupNorm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.output = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """The formula at the top of this module."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.output(attended).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Conv2d):
    """(B, C, H, W) to (B, C, H/2, W/2) by a learned convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        """Make a 3x3 convolution of `channels` to `channels`."""
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2); called like a residual block, it has no use for the embedding."""
        return super().forward(x)


class Upsample(nn.Conv2d):
    """(B, C, H, W) to (B, C, 2H, 2W): each pixel becomes four, then a convolution (Odena et al. 2016)."""

    def __init__(self, channels: int) -> None:
        """Make a 3x3 convolution of `channels` to `channels`."""
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
