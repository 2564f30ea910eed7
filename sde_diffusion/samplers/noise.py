"""Random numbers by (seed, index): sample i draws from a stream of its own, whatever batch or rank it is in.

A 64-bit generator seed per sample: the high half hashes the run's seed; the low half, all that torch's CPU
generator reads, is (hash + index · odd) mod 2³², which gives no two indices of a run the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy

import numpy as np
import torch
from torch import Tensor

_ODD = 0x9E3779B1  # 2³²/golden ratio, rounded to odd: neighbouring indices land far apart
_BLOCK = 2**10  # numbers a sample drawn at a time: 4 KiB of float32


class Streams:
    """One random generator per index, all derived from one seed."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str | None = None):
        """Make the generators on ``device``.

        Raises:
            ValueError: for a negative seed.
        """
        if seed < 0:
            raise ValueError(f"seed = {seed}: must be at least 0")
        low, high = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
        self.device = torch.device(device or "cpu")
        self._generators = [
            torch.Generator(self.device).manual_seed((high << 32 | (low + index * _ODD) % 2**32) % 2**63)
            for index in indices
        ]

    def take(self, rows: Sequence[int]) -> Streams:
        """The streams of these rows, in this order, each going on from where it is; a row may be there twice."""
        part = copy(self)
        part._generators = [self._generators[row] for row in rows]
        return part

    def __len__(self) -> int:
        """Number of streams."""
        return len(self._generators)

    def normal(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        size = tuple(shape)
        return torch.stack([torch.randn(size, generator=g, device=self.device, dtype=dtype) for g in self._generators])

    def uniform(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Numbers uniform on [0, 1), (B, *shape)."""
        size = tuple(shape)
        return torch.stack([torch.rand(size, generator=g, device=self.device, dtype=dtype) for g in self._generators])

    def seeds(self) -> list[int]:
        """One integer per stream, for a library that wants a seed rather than numbers; repeatable."""
        return [g.initial_seed() for g in self._generators]


def unmixed_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Within a with statement torch's own generators, of the CPU and the device, are free to use; then as before."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


class StepNoise:
    """Standard normal noise (B, *shape) for one solver step after another.

    Several steps are drawn at once, a number that depends on the shape alone: one call a sample and step
    would cost more than the numbers, and a number that depended on the batch would change them.
    """

    def __init__(self, streams: Streams, shape: Sequence[int], dtype: torch.dtype):
        """Draw for samples of ``shape``, without the batch axis."""
        self._streams, self._shape, self._dtype = streams, tuple(shape), dtype
        self._steps = max(1, _BLOCK // max(1, int(np.prod(self._shape))))
        self._block: Tensor | None = None
        self._next = self._steps

    def __call__(self) -> Tensor:
        """The next step's noise (B, *shape)."""
        if self._next == self._steps or self._block is None:
            self._block, self._next = self._streams.normal((self._steps, *self._shape), self._dtype), 0
        self._next += 1
        return self._block[:, self._next - 1]
