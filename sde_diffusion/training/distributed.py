"""The ranks of a run, as torchrun starts them, and the two ways in which they share a network.

    B examples a step, global; rank r of N takes those from r B/N on, in ``accumulation`` parts of equal size
    gradient = mean over ranks of the mean over parts of the mean over examples: the mean over the batch

    ddp    each rank has all weights; gradients are averaged during the last part's backward pass
    fsdp   each rank has an N-th of the rows of every weight, gradient, moment and average. A block's weights are
           gathered where it is called, and its gradients averaged and scattered with the last part, until which they
           are whole; PyTorch's fully_shard

Everything is torch.distributed itself. All ranks begin with the first one's network, whose buffers are taken for
constants. Whatever is agreed upon between processes goes through a group of CPUs, and waits for no device.

Sources: Li et al. 2020 (arXiv:2006.15704) for ddp, Zhao et al. 2023 (arXiv:2304.11277) for fsdp.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sde_diffusion.model import DiffusionModel
from sde_diffusion.samplers.sample import share_of

# Ranks may wait as long for one that decodes a folder of images, or writes a checkpoint.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        sharded: whether each has a part of the weights only.
        group: through which their CPUs speak.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """The places, of ``total``, that are this rank's; errors as for ``share_of``."""
        return share_of(total, (self.rank, self.size))

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def collect(self, values: Tensor, places: range, total: int) -> Tensor:
        """All (total, ...) values, of which this rank has those at ``places`` (P, ...), and the others the rest."""
        if self.size == 1:
            return values
        collected = values.new_zeros(total, *values.shape[1:])
        collected[places.start : places.stop] = values
        dist.all_reduce(collected)
        return collected

    def largest(self, number: int, group: Any = None) -> int:
        """The largest of the ranks' numbers; the slowest process is waited for, but no device."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group or self.group)
        return int(numbers)

    def first(self, action: Callable[[], int | None]) -> int:
        """What the first rank's action returns, or 0, on all; the others wait for it.

        Raises:
            RuntimeError: on the other ranks, if it fails on the first, which raises its own error.
        """
        if self.size == 1:
            return action() or 0
        answer = torch.zeros(2, dtype=torch.int64)
        try:
            if self.is_first:
                answer = torch.tensor([1, action() or 0])
        finally:
            dist.broadcast(answer, 0, self.group)
        if not answer[0]:
            raise RuntimeError(f"rank {self.rank}: rank 0 has failed, and says why")
        return int(answer[1])

    def begin_alike(self, network: Any) -> None:
        """Give all ranks the first one's weights and buffers."""
        for tensor in [*network.parameters(), *network.buffers()] if self.size > 1 else ():
            dist.broadcast(tensor.data, 0, self.group)

    def further_group(self) -> Any:
        """Another group of CPUs, for a thread whose waiting is not to mix with the run's own."""
        return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def launched(sharded: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, one process each, or the one of a process on its own.

    Joins them, and leaves them in the end, unless the caller has called ``torch.distributed.init_process_group``.
    """
    rank, size = place_of_launcher()
    if size == 1 and not dist.is_initialized():
        yield Ranks(sharded=sharded)
        return
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group(timeout=_PATIENCE)
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        yield Ranks(rank, size, sharded, dist.new_group(backend="gloo", timeout=_PATIENCE))
    except SystemExit:
        _leave(joins)
        raise
    # After an error of one rank it would wait for the others, and torchrun for it.
    _leave(joins)


def _leave(joined: bool) -> None:
    if joined:
        dist.destroy_process_group()


def place_of_launcher() -> tuple[int, int]:
    """The rank of this process among those that torchrun started, and their number; each takes a device of its own."""
    if "LOCAL_RANK" in os.environ and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def shard(network: Any, mesh: DeviceMesh) -> None:
    """Leave each rank its rows of every weight, on its device; weights are gathered unit by unit, if it names any.

    Raises:
        ValueError: for a weight that two units share.
    """
    for weight in network.parameters():
        # Rows are contiguous only in the usual memory order.
        weight.data = weight.data.contiguous()
    units = list(network.units()) if callable(getattr(network, "units", None)) else []
    weights = [weight for unit in units for weight in unit.parameters()]
    if len(set(weights)) < len(weights):
        raise ValueError("network: its units() share a weight, which can be sharded with one of them only")
    for unit in units:
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


def replicate(objective: nn.Module) -> DistributedDataParallel:
    """Have the gradients of a module averaged over ranks."""
    with warnings.catch_warnings():
        # Of its name, which is another in some of the releases that the library runs on.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded, or is a sum over shards; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def exchanging(objective: nn.Module, network: Any, is_exchanged: bool) -> AbstractContextManager[None]:
    """Within a with statement, backward passes leave gradients to be added to, or exchange them with other ranks."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(is_exchanged)
    elif isinstance(objective, DistributedDataParallel) and not is_exchanged:
        return objective.no_sync()
    return nullcontext()


class Gathered:
    """A model whose weights are sharded, gathered on each rank: to be evaluated there, without waiting on another."""

    def __init__(self, model: DiffusionModel):
        """Remember a model's structure before it is sharded; its weights take memory only for that moment."""
        self._structure = copy.deepcopy(model).to("meta")

    def of(self, model: DiffusionModel, device: torch.device | str) -> DiffusionModel:
        """A copy of the sharded model as it is now, on a device, in evaluation mode. All ranks must ask for it."""
        gathered = copy.deepcopy(self._structure).to_empty(device=device)
        with torch.no_grad():
            # Those that share memory are apart once they have been on "meta".
            for name, weight in model.named_parameters(remove_duplicate=False):
                gathered.get_parameter(name).copy_(whole(weight))
            for name, buffer in model.named_buffers(remove_duplicate=False):
                gathered.get_buffer(name).copy_(buffer)
        return gathered.eval().requires_grad_(False)
