"""How discrete data sit on the real line: b-bit codes v in {0, ..., 2^b - 1} and uniform dequantisation.

    y = low + (high - low) (v + u) / 2^b,      u ~ U[0, 1)          dequantise
    v = floor(2^b (y - low) / (high - low))                         quantise

A density p(y) learnt on dequantised data bounds the probability of the codes, per dimension by

    log P(v) >= E_u log p(y) + log |dy/dv|,    log |dy/dv| = log((high - low) / 2^b)

which is the constant that turns a log-likelihood into bits per dimension.

A decoder that gives probability to codes themselves wants each as one point, in a bin whose edges are half a
spacing away; the first and the last bin have none on the outside:

    centres      low + (high - low) (v + 1/2) / 2^b      the middles of the bins above
    endpoints    low + (high - low) v / (2^b - 1)        the first code at low, the last at high

Sources: Theis, van den Oord & Bethge, "A note on the evaluation of generative models" (2016), section 3.1;
for endpoints and the edge bins, Ho, Jain & Abbeel, "Denoising diffusion probabilistic models" (2020), section 3.3.
"""

import math
from dataclasses import dataclass

import torch

MAX_BITS = 16
CODE_POINTS = ("centres", "endpoints")


@dataclass(frozen=True)
class DataInfo:
    """The range that a model sees its data in, and the bit depth of what they were made from.

    Attributes:
        low: The model-space value of the lower edge of code 0.
        high: The model-space value of the upper edge of the last code.
        bits: Bits a dimension, 1 to 16; None for continuous data, which are used as they are.

    Raises:
        ValueError: if not low < high, both finite, or bits is out of range.
    """

    low: float = -1.0
    high: float = 1.0
    bits: int | None = 8

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low < high must hold and both be finite, got low={self.low}, high={self.high}")
        if self.bits is None:
            return
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, or None, got {self.bits!r}")

    @property
    def log_scale(self) -> float:
        """log |dy/dv| a dimension in nats, y in model space and v in codes; 0 for continuous data."""
        return 0.0 if self.bits is None else math.log(self._bin_width(self.bits))

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer type that holds a code: uint8 up to 8 bits, else int32.

        Raises:
            ValueError: if the data are continuous.
        """
        return torch.uint8 if self._discrete_bits() <= 8 else torch.int32

    def dequantize(self, values: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Spread codes over their bins: low + (high - low) (values + uniform) / 2**bits.

        Args:
            values: Integer codes in [0, 2**bits), any shape; the range is not checked, as that stalls a GPU.
            uniform: Uniform noise in [0, 1), the shape of values; its dtype is the result's.

        Returns:
            Model-space values that `quantize` takes back to the same codes, whatever the noise: it is kept
            from the bin's edges by the rounding error of the dtype, 1.4e-4 of a bin for 8 bits in float32.

        Raises:
            ValueError: for continuous data, values that are not integers, unequal shapes, or a dtype too
                coarse to tell the bins apart.
        """
        bits = self._discrete_bits()
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"values must be integer codes in [0, {2**bits}), got dtype {values.dtype}")
        if not uniform.is_floating_point() or uniform.shape != values.shape:
            raise ValueError(
                f"uniform must be floating and shaped like values, {tuple(values.shape)}; "
                f"got {uniform.dtype}, shape {tuple(uniform.shape)}"
            )
        margin = self._rounding_error(bits, uniform.dtype)
        if margin >= 0.5:
            raise ValueError(f"uniform has dtype {uniform.dtype}, too coarse for {bits}-bit data in {self}")
        position = values.to(uniform.dtype) + uniform.clamp(margin, 1 - margin)
        return self.low + self._bin_width(bits) * position

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """The code of the bin that each value of x (any shape) lies in, clamped to the codes there are.

        Returns:
            Codes of dtype `code_dtype`, the shape of x.

        Raises:
            ValueError: for continuous data.
        """
        bits = self._discrete_bits()
        position = torch.floor((x - self.low) / self._bin_width(bits))
        return position.clamp(0, 2**bits - 1).to(self.code_dtype)

    def check_codes(self, name: str, values: torch.Tensor) -> None:
        """Raise a ValueError that names the argument unless it holds codes of this depth; waits for the device."""
        bits = self._discrete_bits()
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} has dtype {values.dtype}: need integer codes")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
            raise ValueError(f"{name} has values in [{values.min()}, {values.max()}]: need 0 to {2**bits - 1}")

    def is_on_lattice(self, x: torch.Tensor) -> torch.Tensor:
        """Whether all values of an example (B, ...) are points of codes, of either kind, or lower edges of their bins.

        Returns:
            Booleans (B,). Of dequantised data few values are, and hardly ever all.

        Raises:
            ValueError: for continuous data.
        """
        bits = self._discrete_bits()
        margin, answer = 2 * self._rounding_error(bits, x.dtype), torch.zeros_like(x.flatten(1)[:, 0], dtype=torch.bool)
        for first, spacing in (*(self._lattice(kind) for kind in CODE_POINTS), (self.low, self._bin_width(bits))):
            position = (x - first) / spacing
            answer |= ((position - position.round()).abs() <= margin).flatten(1).all(1)
        return answer

    def points(self, values: torch.Tensor, kind: str = "centres", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The model-space value that stands for each code.

        Args:
            values: Integer codes in [0, 2**bits), any shape.
            kind: One of `CODE_POINTS`.
            dtype: The result's, torch's default if None.

        Raises:
            ValueError: for continuous data or an unknown kind.
        """
        first, spacing = self._lattice(kind)
        return first + spacing * values.to(dtype or torch.get_default_dtype())

    def bin_edges(self, values: torch.Tensor, points: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper edge of each code's bin, infinite on the outside of the first and the last.

        Args:
            values: Integer codes in [0, 2**bits), any shape.
            points: What `points` gives for them, which is the middle of the bin.
            kind: The same kind.

        Raises:
            ValueError: for continuous data or an unknown kind.
        """
        half = self._lattice(kind)[1] / 2
        lower = torch.where(values == 0, -math.inf, points - half)
        return lower, torch.where(values == 2 ** self._discrete_bits() - 1, math.inf, points + half)

    def _lattice(self, kind: str) -> tuple[float, float]:
        """The first code's point, and the spacing from one to the next."""
        bits = self._discrete_bits()
        if kind not in CODE_POINTS:
            raise ValueError(f"kind = {kind!r}: must be one of {', '.join(CODE_POINTS)}")
        if kind == "endpoints":
            return self.low, (self.high - self.low) / (2**bits - 1)
        return self.low + self._bin_width(bits) / 2, self._bin_width(bits)

    def _discrete_bits(self) -> int:
        if self.bits is None:
            raise ValueError(f"{self} is continuous: codes need a bit depth, e.g. DataInfo(bits=8)")
        return self.bits

    def _bin_width(self, bits: int) -> float:
        return (self.high - self.low) / 2**bits

    def _rounding_error(self, bits: int, dtype: torch.dtype) -> float:
        """An upper bound, in bins, on the rounding error of a dequantise-quantise round trip.

        Each of its four operations on numbers up to 2**bits bins adds half an eps of that, and so does the
        sum that lands at most max(|low|, |high|) from zero. The bound doubles it: a device may divide by
        multiplying with a reciprocal.
        """
        offset = max(abs(self.low), abs(self.high)) / (self.high - self.low)
        return torch.finfo(dtype).eps * 2**bits * (4 + offset)
