"""What the networks are built from: embeddings of time and condition, and the layers of a U-Net.

Time embedding, d numbers a time, i = 0 .. d/2 - 1 (Vaswani et al. 2017, sec. 3.5; Ho et al. 2020, app. B):

    w_i = 10000^(-i / (d/2 - 1)),    embedding(t) = (sin(w_0 s t), ..., cos(w_0 s t), ...)

The factor s brings times in [0, 1] to the range of the discrete steps, 0 to 1000, that the frequencies were
chosen for. Fourier features have random frequencies instead (Tancik et al. 2020; Song et al. 2021, app. H):

    w_i ~ 2π N(0, 16²),    embedding(t) = (sin(w_0 s t), ..., cos(w_0 s t), ...)

Residual block, e its own linear function of the embedding of time and condition (Ho et al. 2020, app. B; after
He et al. 2016), and with e = (scale, shift) the adaptive normalisation of Nichol & Dhariwal (2021):

    h = norm(conv(resample(silu(norm(x)))) + e)    or    h = (1 + scale) norm(conv(resample(silu(norm(x))))) + shift
    block(x, e) = skip(resample(x)) + conv0(dropout(silu(h)))

where resample, if any, halves or doubles each axis: by means and copies, or by the filter (1, 3, 3, 1) along each
axis (BigGAN, Brock et al. 2019; Zhang 2019; Karras et al. 2020).

Self-attention over the positions (Vaswani et al. 2017, sec. 3.2; Wang et al. 2018):

    q, k, v = linear(norm(x)),    attention(x) = x + linear0(softmax(q k^T / sqrt(d)) v)

The layers marked 0 start at zero, so that every block starts as the identity (or its skip) and a deep stack
trains from the first step. Every layer works on data of one, two or three axes, (B, C, L), (B, C, H, W) or
(B, C, D, H, W), and keeps the memory order of torch.channels_last, in which the tokens (B, H W, C) that attention
works on are the same memory as the image (B, C, H, W).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

Layer = TypeVar("Layer", bound=nn.Module)

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MEAN = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def convolution(axes: int, channels_in: int, channels_out: int, size: int = 3) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution of data with `axes` axes, `size` positions wide along each, that keeps their lengths."""
    return CONVOLUTIONS[axes](channels_in, channels_out, size, padding=size // 2)


def zeroed(layer: Layer) -> Layer:
    """The same layer with every parameter set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, ...) with the channels of a position side by side in memory, where torch has such an order."""
    return x.to(memory_format=_CHANNELS_LAST[x.ndim]) if x.ndim in _CHANNELS_LAST else x


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018).

    Unless `groups` is given it is the largest divisor of `channels` that is at most 32 and leaves at least 4
    channels a group: 32 for 128 and 256 channels as in DDPM, 8 for 32 channels. On a CPU a small network
    trains faster with 16 channels a group or more: torch vectorises over the channels of one.
    """

    def __init__(self, channels: int, groups: int | None = None, epsilon: float = 1e-6) -> None:
        """Raise ValueError if `groups` does not divide `channels`."""
        if groups is None:
            groups = next((g for g in range(min(32, channels // 4), 1, -1) if channels % g == 0), 1)
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must be a divisor of the number of channels, {channels}; got {groups}")
        super().__init__(groups, channels, eps=epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, ...) to the same shape."""
        # torch's forward-mode derivative of the layer fails in channels_last.
        return super().forward(x.contiguous() if _has_tangent(x, self.weight, self.bias) else x)


Norm = Callable[[int], GroupNorm]


def _has_tangent(*tensors: Tensor) -> bool:
    """Whether one of them is differentiated in forward mode."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _is_in_torch_func() -> bool:
    """Whether the code runs within a transformation of torch.func, such as vmap."""
    return torch._C._are_functorch_transforms_active()


def norm_silu(norm: GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), (B, C, ...) to the same shape; an eager training step keeps x of it and nothing else.

    Whatever knows better gets the plain expression: a compiler, which decides itself what to keep, and transformations
    of functions and dtypes. (Elsewhere the norm is not called as a module, and its hooks are not.)
    """
    if torch.compiler.is_compiling() or _is_transformed(norm, x):
        return F.silu(norm(x))
    return _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _is_transformed(norm: GroupNorm, x: Tensor) -> bool:
    """Whether norm(x) goes through torch.func, forward-mode differentiation or autocast."""
    kind = x.device.type
    return (
        _is_in_torch_func()
        or _has_tangent(x, norm.weight, norm.bias)
        # The device "meta" has no autocast to ask about.
        or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
    )


class _NormSiLU(torch.autograd.Function):
    """silu(norm(x)) that keeps x alone for the backward pass, and computes norm(x) again from its moments there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        sizes = x.shape[0], x.shape[1], x.shape[2:].numel()
        y, mean, rstd = torch.native_group_norm(
            x.contiguous(memory_format=_layout(x)), weight, bias, *sizes, groups, epsilon
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.groups, ctx.epsilon = sizes, groups, epsilon
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_in_torch_func():
            return *_norm_silu_gradients(grad, x, weight, bias, ctx.groups, ctx.epsilon), None, None
        x = x.contiguous(memory_format=_layout(x))
        scale = rstd[..., None] * weight.view(ctx.groups, -1)
        shift = bias.view(ctx.groups, -1) - mean[..., None] * scale
        per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
        y = torch.addcmul(shift.view(per_channel), x, scale.view(per_channel))
        grad = torch.ops.aten.silu_backward(grad, y).contiguous(memory_format=_layout(x))
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, *ctx.sizes, ctx.groups, needed
        )
        return *gradients, None, None


def _layout(x: Tensor) -> torch.memory_format:
    """The order of memory that torch's group normalisation gets x in: contiguous, or on a CPU channels_last."""
    order = _CHANNELS_LAST.get(x.ndim, torch.contiguous_format)
    # The kernel also looks at the stride from one image to the next where there is but one, and it may be any.
    is_dense = len(x) != 1 or x.stride(0) == x.numel()
    return order if x.is_cpu and is_dense and x.is_contiguous(memory_format=order) else torch.contiguous_format


def _norm_silu_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, as an expression that can be differentiated again, as torch's kernels cannot.

    With u = (x - mean(x)) / std(x), y = w u + b and g = grad silu'(y), they are sums of g u and of g, and by x

        (w g - mean(w g) - u mean(w g u)) / std(x)
    """
    per_channel = (1, -1, *[1] * (x.ndim - 2))

    def mean(of: Tensor) -> Tensor:
        means = of.unflatten(1, (groups, -1)).flatten(2).mean(2)
        return means.repeat_interleave(x.shape[1] // groups, dim=1).unflatten(1, per_channel[1:])

    centred = x - mean(x)
    rstd = (mean(centred.square()) + epsilon).rsqrt()
    unit = centred * rstd
    y = unit * weight.view(per_channel) + bias.view(per_channel)
    grad = grad * y.sigmoid() * (1 + y * (-y).sigmoid())
    others = [axis for axis in range(x.ndim) if axis != 1]
    weight_grad, bias_grad = (grad * unit).sum(others), grad.sum(others)
    grad = grad * weight.view(per_channel)
    return rstd * (grad - mean(grad) - unit * mean(grad * unit)), weight_grad, bias_grad


class _TimeFeatures(nn.Module):
    """Sines and cosines of frequencies times t."""

    frequencies: Tensor

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be even and at least 4; got {dim}")
        self.dim, self.scale = dim, scale

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to (B, dim), in the finer of t's dtype and the module's, at least float32."""
        phase = self.scale * t.to(torch.promote_types(t.dtype, self.frequencies.dtype))[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class SinusoidalEmbedding(_TimeFeatures):
    """Times (B,) to features (B, dim): dim/2 sines, then dim/2 cosines, of scale * t (the formula above).

    The frequencies fall geometrically from exactly 1 to exactly 1/10000, which is DDPM's convention. Without
    `endpoint` they stop one step short of 1/10000, as those of Vaswani et al. and of ADM and DiT.
    """

    def __init__(self, dim: int, scale: float = 1000.0, endpoint: bool = True) -> None:
        """Raise ValueError unless `dim` is even and at least 4."""
        super().__init__(dim, scale)
        self.endpoint = endpoint
        self.register_buffer("frequencies", self._frequencies(torch.empty(0)), persistent=False)

    def _frequencies(self, like: Tensor) -> Tensor:
        """(dim/2,) frequencies on the device of `like`, in its dtype or float32, whichever is the finer."""
        half = self.dim // 2
        frequencies = [10000.0 ** (-i / (half - self.endpoint)) for i in range(half)]
        return torch.tensor(frequencies, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast to float64 would keep the roundings of float32; to_empty() would leave the buffer unfilled.
        super()._apply(fn, recurse)
        self.frequencies = self._frequencies(self.frequencies)
        return self


class FourierEmbedding(_TimeFeatures):
    """Times (B,) to features (B, dim): dim/2 sines, then dim/2 cosines, of random frequencies (the formula above).

    The frequencies are drawn once and kept with the weights. They are meant for the logarithm of the noise level.
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        """Raise ValueError unless `dim` is even and at least 4."""
        super().__init__(dim, scale)
        self.register_buffer("frequencies", 2 * math.pi * 16.0 * torch.randn(dim // 2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # In bfloat16 a phase of some hundred radians would have no digit left.
        before = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype.itemsize < torch.float32.itemsize:
            self.frequencies = before.to(self.frequencies.device)
        return self


class ConditionEmbedding(nn.Module):
    """Class labels (B,) int64 in [0, classes] and vectors (B, vector) to features (B, dim).

    None, or the label `classes`, means no label; it has a learned row of its own, as classifier-free guidance
    needs (Ho & Salimans 2022). No vector is the vector of zeros.
    """

    def __init__(self, classes: int, vector: int, dim: int) -> None:
        """Make the table of classes + 1 rows, the last of which is "no label", and the map of vectors."""
        super().__init__()
        self.table = nn.Embedding(classes + 1, dim) if classes else None
        self.linear = nn.Linear(vector, dim, bias=False) if vector else None

    def forward(self, label: Tensor | None, vector: Tensor | None) -> Tensor | float:
        """Labels (B,) and vectors (B, vector) to (B, dim); (1, dim) or 0 if there is neither."""
        features: Tensor | float = 0.0
        if self.table is not None:
            features = self.table.weight[-1:] if label is None else self.table(label)
        if self.linear is not None and vector is not None:
            features = features + self.linear(vector)
        return features


def check_at_least(**bounds: tuple[float, float]) -> None:
    """Raise ValueError for an argument whose value, the first of its pair, is below the second or no whole number."""
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
        if value != int(value):
            raise ValueError(f"{name} must be whole; got {value}")


def check_data_shape(data_shape: Sequence[int], divisor: int, reason: str) -> None:
    """Raise ValueError unless data have channels and one to three axes, of lengths that `divisor` divides."""
    if len(data_shape) not in (2, 3, 4) or min(data_shape) < 1 or any(size % divisor for size in data_shape[1:]):
        raise ValueError(
            "data_shape must be (C, L), (C, H, W) or (C, D, H, W) with lengths divisible by "
            f"{divisor}, {reason}; got {tuple(data_shape)}"
        )


def check_inputs(network: Any, x: Tensor, t: Tensor, label: Tensor | None, vector: Tensor | None) -> None:
    """Raise ValueError unless x is (B, *data_shape), t (B,), label None or (B,), vector None or (B, network.vector).

    A label outside [0, classes] raises RuntimeError, on an accelerator when the device gets there: no call waits
    for it.
    """
    data_shape, classes = network.data_shape, network.classes
    if x.shape[1:] != torch.Size(data_shape):
        raise ValueError(f"x must be (B, *data_shape) with data_shape {tuple(data_shape)}; got {tuple(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be ({len(x)},), one time for each x; got {tuple(t.shape)}")
    if label is not None:
        if not classes:
            raise ValueError("label must be None for a network built with classes=0")
        if label.shape != x.shape[:1]:
            raise ValueError(f"label must be ({len(x)},), one label for each x; got {tuple(label.shape)}")
        if label.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"label must be int64, the number of a class; got {label.dtype}")
        # vmap has no rule for the assertion.
        if torch.compiler.is_compiling() or not _is_in_torch_func():
            is_known = ((label >= 0) & (label <= classes)).all()
            torch._assert_async(is_known, f"label must be in [0, {classes}], where {classes} means no label")
    if vector is not None:
        if not network.vector:
            raise ValueError("vector must be None for a network built with vector=0")
        if vector.shape != (len(x), network.vector):
            raise ValueError(f"vector must be {(len(x), network.vector)}, a row for each x; got {tuple(vector.shape)}")


def _kernel(x: Tensor, resampling: str) -> Tensor:
    """(C, 1, ...): the filter (1, 1)/2 or (1, 3, 3, 1)/8 along every axis, for each channel of x (B, C, ...)."""
    length = {"average": 2, "fir": 4}[resampling]
    # Computed where x is, as a triangle of unit sum: numbers from the host would have to be waited for.
    distance = (torch.arange(length, dtype=x.dtype, device=x.device) - (length - 1) / 2).abs()
    taps = (length / 2 - distance) / (length * length / 4)
    kernel = taps
    for _ in range(x.ndim - 3):
        kernel = kernel[..., None] * taps
    return kernel.expand(x.shape[1], 1, *kernel.shape)


def halve(x: Tensor, resampling: str) -> Tensor:
    """(B, C, H, W) to (B, C, H/2, W/2): filtered, then every other position kept; "average" or "fir"."""
    if resampling == "average":
        return _MEAN[x.ndim - 2](x, 2)
    return _CONVOLVE[x.ndim - 2](x, _kernel(x, resampling), stride=2, padding=1, groups=x.shape[1])


def double(x: Tensor, resampling: str) -> Tensor:
    """(B, C, H, W) to (B, C, 2H, 2W): zeros put between positions, then filtered, at the brightness of x."""
    if resampling == "average":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    kernel = 2 ** (x.ndim - 2) * _kernel(x, resampling)
    return _CONVOLVE_TRANSPOSED[x.ndim - 2](x, kernel, stride=2, padding=1, groups=x.shape[1])


RESAMPLE: dict[str, Callable[..., Tensor]] = {"down": halve, "up": double}


class NearestConvolution(nn.Module):
    """(B, C, H, W) to (B, C', 2H, 2W): each position becomes a block of copies, then a convolution of size 3.

    A position of the result sees two of the original along each axis, so that the two steps are one transposed
    convolution of stride 2 and size 4, whose taps are sums of the convolution's: with 4/9 of the products, in the
    plane, and no enlarged copy of x. Along an axis,

        taps (a, b, c)  become  (c, b + c, a + b, a)

    It is what doubles a U-Net's features where no residual block does (Odena et al. 2016).
    """

    embedding_channels = 0

    def __init__(self, axes: int, channels_in: int, channels_out: int) -> None:
        """Make the convolution."""
        super().__init__()
        self.conv = convolution(axes, channels_in, channels_out)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, 2H, 2W); it has no use for the embedding."""
        kernel = self.conv.weight
        for axis in range(2, x.ndim):
            a, b, c = kernel.unbind(axis)
            kernel = torch.stack([c, b + c, a + b, a], axis)
        return _CONVOLVE_TRANSPOSED[x.ndim - 2](x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Downsample(nn.Module):
    """(B, C, H, W) to (B, C, H/2, W/2) by a learned convolution of stride 2.

    It is centred on every other position, the first one included, with a zero put before it; or, `shifted` by one
    position, with the zero put after the last one. That is what TensorFlow's padding does, and so DDPM.
    """

    embedding_channels = 0

    def __init__(self, axes: int, channels: int, shifted: bool = False) -> None:
        """Make a convolution of size 3 of `channels` to `channels`."""
        super().__init__()
        self.conv = CONVOLUTIONS[axes](channels, channels, 3, stride=2, padding=0 if shifted else 1)
        self.padding = (0, 1) * axes if shifted else ()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2); called like a residual block, it has no use for the embedding."""
        return self.conv(F.pad(x, self.padding) if self.padding else x)


class FilteredDownsample(nn.Module):
    """(B, C, H, W) to (B, C', H/2, W/2): filtered, then a learned convolution of stride 2 (Karras et al. 2020)."""

    def __init__(self, axes: int, channels_in: int, channels_out: int, resampling: str) -> None:
        """Make a convolution of size 3; `resampling` is "average" or "fir"."""
        super().__init__()
        self.resampling = resampling
        self.conv = CONVOLUTIONS[axes](channels_in, channels_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H/2, W/2)."""
        kernel = _kernel(x, self.resampling)
        filtered = _CONVOLVE[x.ndim - 2](x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1])
        return self.conv(filtered)


class ResidualBlock(nn.Module):
    """(B, channels_in, H, W) and (B, embedding_channels) to (B, channels_out, H, W), or half or twice H and W."""

    def __init__(
        self,
        axes: int,
        channels_in: int,
        channels_out: int,
        *,
        dropout: float = 0.0,
        resample: str | None = None,
        resampling: str = "average",
        project_resampled: bool = False,
        scale_shift: bool = False,
        rescale: bool = False,
        norm: Norm = GroupNorm,
    ) -> None:
        """Build the block.

        Args:
            axes: number of axes of the data besides their channels.
            channels_in: channels of the input.
            channels_out: channels of the output.
            dropout: probability of a zero.
            resample: "down", "up" or None.
            resampling: "average" or "fir", how it resamples.
            project_resampled: whether a skip that is resampled has a convolution of size 1, even if the number of
                channels stays.
            scale_shift: whether the embedding scales and shifts the second normalisation, rather than being added
                before it.
            rescale: whether the sum is divided by √2, so that its variance is that of its terms.
            norm: makes the normalisation of a number of channels.
        """
        super().__init__()
        self.scale_shift, self.rescale = scale_shift, rescale
        self.embedding_channels = 2 * channels_out if scale_shift else channels_out
        self.resample = partial(RESAMPLE[resample], resampling=resampling) if resample else None
        self.norm_in = norm(channels_in)
        self.is_fused = (resample, resampling) == ("up", "average")
        self.conv_in = (NearestConvolution if self.is_fused else convolution)(axes, channels_in, channels_out)
        self.norm_out = norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = convolution(axes, channels_out, channels_out)
        is_projected = channels_in != channels_out or (resample and project_resampled)
        self.skip = convolution(axes, channels_in, channels_out, 1) if is_projected else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The formula at the top of this module."""
        h = norm_silu(self.norm_in, x)
        if self.resample is not None:
            x = self.resample(x)
            h = h if self.is_fused else self.resample(h)
        h = self.conv_in(h)
        embedding = embedding.unflatten(1, (-1, *[1] * (x.ndim - 2)))
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        else:
            h = norm_silu(self.norm_out, h + embedding)
        h = self.conv_out(self.dropout(h))
        return residual_sum(self.skip(x), h, self.rescale)


def residual_sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, or with `rescale` (x + h)/√2."""
    return (x + h) * 0.5**0.5 if rescale else x + h


def attend(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head: q, k and v of tokens (B, T, 3 C), one after the other, to (B, T, C)."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """(B, C, H, W) to (B, C, H, W): each position attends to all, by `heads` heads of C / heads channels."""

    def __init__(
        self, axes: int, channels: int, heads: int = 1, *, rescale: bool = False, norm: Norm = GroupNorm
    ) -> None:
        """Raise ValueError if `heads` does not divide `channels`; `rescale` and `norm` as in ``ResidualBlock``."""
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must be a divisor of the number of channels, {channels}; got {heads}")
        self.heads, self.rescale = heads, rescale
        self.norm = norm(channels)
        # Convolutions of size 1, that work in channels_last as the others do.
        self.qkv = convolution(axes, channels, 3 * channels, 1)
        self.output = convolution(axes, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The formula at the top of this module."""
        attended = attend(self.qkv(self.norm(x)).flatten(2).transpose(1, 2), self.heads)
        h = self.output(attended.transpose(1, 2).unflatten(2, x.shape[2:]))
        return residual_sum(x, h, self.rescale)


INITIALISATIONS = ("fan_average", "fan_average_small_attention", "torch")


def initialise(
    network: nn.Module,
    scheme: str,
    last: Sequence[nn.Module] = (),
    joined: Mapping[nn.Module, Sequence[int]] | None = None,
) -> None:
    """Draw the weights of a network of blocks anew, and set to zero those of the last layer of every block.

    Args:
        network: its convolutions and linear layers are drawn.
        scheme: "fan_average", uniform with variance 2/(fan in + fan out) and zero biases (Glorot & Bengio 2010; Ho
            et al. 2020); "fan_average_small_attention", the same but for a tenth of the variance of the maps to q, k
            and v (Song et al. 2021; Karras et al. 2022); or "torch", which leaves what torch drew: uniform with
            variance 1/(3 fan in), biases too (Dhariwal & Nichol 2021).
        last: further layers that start at zero.
        joined: for each layer that is several in one, how many outputs each of them has: each has its own fan out.
    """
    attentions = [module for module in network.modules() if isinstance(module, SelfAttention)]
    if scheme != "torch":
        parts = dict(joined or {}) | {attention.qkv: 3 * [attention.output.out_channels] for attention in attentions}
        for module in network.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                for part in module.weight.data.split(parts.get(module, len(module.weight))):
                    nn.init.xavier_uniform_(part)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    for attention in attentions:
        if scheme == "fan_average_small_attention":
            attention.qkv.weight.data *= 0.1**0.5
        zeroed(attention.output)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            zeroed(module.conv_out)
    for layer in last:
        zeroed(layer)
