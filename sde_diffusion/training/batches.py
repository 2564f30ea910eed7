"""The batches of a run: which examples each step sees, and how they are fetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from sde_diffusion.data.datasets import DataSource
from sde_diffusion.training.config import ConfigError
from sde_diffusion.training.distributed import Ranks
from sde_diffusion.training.run_directory import outlast_a_signal


class Order(Sampler[list[int]]):
    """Indices of each batch: one permutation an epoch, of (seed, epoch) alone; batches run across epochs.

    A rank has its share of every batch, so that all ranks together see what one would.
    """

    def __init__(self, size: int, seed: int, first_step: int, steps: int, batch_size: int, ranks: Ranks):
        """Of a data set of this size, the batches of the steps from ``first_step`` to before ``steps``."""
        self.size, self.seed, self.steps, self.batch_size = size, seed, range(first_step, steps), batch_size
        self.share = ranks.share(batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of this rank's examples, step by step."""
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            batch = []
            for place in self.share:
                position = step * self.batch_size + place
                if position // self.size != epoch:
                    epoch = position // self.size
                    permutation = np.random.default_rng((self.seed, epoch)).permutation(self.size)
                batch.append(int(permutation[position % self.size]))
            yield batch

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.steps)


def batches(
    dataset: DataSource, config: ConfigDict, first_step: int, ranks: Ranks, device: torch.device, has_label: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's share of the batches that remain, on ``device``: values, and labels or None.

    Raises:
        ValueError: for values that are not finite, naming the step, and for labels that are needed and not there.
    """
    options = config.train
    order = Order(len(dataset), config.seed, first_step, options.steps, options.batch_size, ranks)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=order,
        num_workers=options.workers,
        prefetch_factor=options.prefetch if options.workers else None,
        pin_memory=device.type != "cpu",
        collate_fn=_collate,
        worker_init_fn=outlast_a_signal,
    )
    for step, (values, label) in zip(order.steps, loader, strict=True):
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ValueError(f"dataset: a value in the batch of step {step} is NaN or infinite")
        if has_label and label is None:
            raise ConfigError("network.classes is set, but the data set has no labels")
        label = label.to(device, non_blocking=True) if has_label and label is not None else None
        yield values.to(device, non_blocking=True), label


def _collate(items: list[Any]) -> tuple[Tensor, Tensor | None]:
    batch = default_collate(items)
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
