"""The ranks of a run, as torchrun starts them, and the two ways in which they share a network.

    B examples a step, global; rank r of N takes those from r B/N on, in ``accumulation`` parts of equal size
    gradient = mean over ranks of the mean over parts of the mean over examples: the mean over the batch

    ddp    each rank has all weights; gradients are averaged during the last part's backward pass
    fsdp   each rank has an N-th of the rows of every weight, gradient, moment and average. A block's weights are
           gathered where it is called, and its gradients averaged and scattered; PyTorch's fully_shard

Everything is torch.distributed itself. Buffers of a network are taken for constants.

Sources: Li et al. 2020 (arXiv:2006.15704) for ddp, Zhao et al. 2023 (arXiv:2304.11277) for fsdp.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sde_diffusion.model import DiffusionModel
from sde_diffusion.samplers.sample import share_of


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        sharded: whether each has a part of the weights only.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

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
        collected[torch.tensor(places, device=values.device)] = values
        dist.all_reduce(collected)
        return collected

    def largest(self, number: int, group: Any = None) -> int:
        """The largest of the ranks' numbers; the slowest process is waited for, but no device."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group)
        return int(numbers)

    def first(self, action: Callable[[], int]) -> int:
        """What the first rank's action returns, on all; the others wait for it.

        Raises:
            RuntimeError: on the other ranks, if it fails on the first, which raises its own error.
        """
        if self.size == 1:
            return action()
        answer = torch.zeros(2, dtype=torch.int64)
        try:
            if self.is_first:
                answer = torch.tensor([1, action()])
        finally:
            dist.broadcast(answer, 0)
        if not answer[0]:
            raise RuntimeError(f"rank {self.rank}: rank 0 has failed, and says why")
        return int(answer[1])

    def group_of_cpus(self) -> Any:
        """A further group of all ranks, for a thread whose waiting is not to mix with the run's own."""
        return dist.new_group(backend="gloo")


@contextmanager
def launched(sharded: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, one process each, or the one of a process on its own.

    Joins them, and leaves them in the end, unless the caller has called ``torch.distributed.init_process_group``.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), sharded)
        return
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(sharded=sharded)
        return
    use_own_device()
    dist.init_process_group()
    try:
        yield Ranks(dist.get_rank(), size, sharded)
    finally:
        dist.destroy_process_group()


def use_own_device() -> None:
    """Of the accelerators of this machine, have each process that torchrun started take one."""
    if "LOCAL_RANK" in os.environ and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())


def shard(network: Any, ranks: Ranks, device: torch.device) -> None:
    """Leave each rank its rows of every weight, on ``device``; weights are gathered unit by unit, if it names any."""
    mesh = init_device_mesh(device.type, (ranks.size,))
    for weight in network.parameters():
        # Rows are contiguous only in the usual memory order.
        weight.data = weight.data.contiguous()
    units: Callable[[], Iterator[nn.Module]] = getattr(network, "units", lambda: iter(()))
    for unit in units():
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
        """Remember a model's structure before it is sharded; no weight takes memory."""
        self._structure = copy.deepcopy(model).to("meta")

    def of(self, model: DiffusionModel) -> DiffusionModel:
        """A copy of the sharded model as it is now, in evaluation mode. All ranks must ask for it."""
        gathered = copy.deepcopy(self._structure).to_empty(device=model.device)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                is_weight = isinstance(tensor, nn.Parameter)
                named = gathered.get_parameter(name) if is_weight else gathered.get_buffer(name)
                named.copy_(whole(tensor))
        return gathered.eval().requires_grad_(False)
