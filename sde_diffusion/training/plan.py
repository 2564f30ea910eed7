"""What a training run will take on devices that are not at hand: memory, time, communication and cost.

The network is run forward and backward on fake tensors, as for its account, and every kernel is written down: its
FLOPs F, the bytes D that it reads and writes, and the bytes A that are held when it is done besides weights and
gradients. All three are affine in the batch: two batches give them for any. A kernel takes (the roofline of Williams
et al. 2009, with the time to launch it as a third bound)

    max(F/(share · peak), D/(share · bandwidth), launch),    a share for convolutions, products, attention and memory

For N devices, b = batch size/(N · accumulation) images at a time, weights of W bytes, gradients of G, n averages:

    step      accumulation · (Σ kernels(b) + max A(b)/fresh) + update + max(communication − hidden, last)
              fresh: the rate at which a CPU's system hands out memory anew; accelerators keep theirs
    update    (3 (accumulation − 1) G + 3 G + 7 G + 3 n W)/(share · bandwidth): gradients are added up and clipped,
              AdamW, averages; each reads and writes what it is of. fsdp: an N-th of it
    memory    ddp     W + G + 2 G + n W + max A(b), AdamW having two moments
              fsdp    (W + G + 2 G + n W)/N + 3 L + max A(b), L the weights of the largest unit: they, those of the
                      next one and their gradients are whole; of several parts, so are all gradients, G and not G/N
    communication, what a device sends in a ring, over the bandwidth to the next one
              ddp     2 (N − 1)/N G: gradients are averaged after the last part
              fsdp    (N − 1)/N (2 W accumulation + G): weights are gathered twice a part, gradients scattered once
    hidden    ddp: behind the last backward pass; fsdp: behind all passes
    last      of the communication, what nothing is left to hide: of ddp 25 MiB, a bucket; of fsdp L

Not counted: data and noise, which are drawn on the side, checkpoints, pictures, the latency of messages, slow devices
that others wait for, and what the kernels themselves and the allocator take of memory. The rates are of
``training/devices.py``, which says what of them is a datum and what assumed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sde_diffusion.data.info import DataInfo
from sde_diffusion.networks.account import FLOPS, Account, account, conditions, fake_copy, quantity
from sde_diffusion.training.checkpoint import build_model
from sde_diffusion.training.config import ConfigError, autocast_dtype
from sde_diffusion.training.devices import Device

_BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once


def empty_network(settings: Mapping[str, Any], data_shape: tuple[int, ...]) -> nn.Module:
    """The network of a resolved config, on the device "meta": of large ones, too, no weight takes memory.

    Raises:
        ConfigError: for an option of the wrong type.
    """
    try:
        with torch.device("meta"):
            return cast(nn.Module, build_model(settings, data_shape, DataInfo(bits=None), None).network)
    except TypeError as error:
        raise ConfigError(f"network, sde or model: an option is of the wrong type: {error}") from error


class Workload:
    """The kernels of a network's forward and backward pass.

    Attributes:
        costs: the network's account.
        largest_unit: bytes of weights of the largest part that fsdp makes whole at once.
        kinds: of each kernel, its kind of arithmetic and the dtype of what it computes.
        forward: how many of the kernels are of the forward pass.
    """

    def __init__(self, network: nn.Module, data_shape: tuple[int, ...], autocast: torch.dtype | None):
        """Trace a network, whose parameters may be on the device "meta"."""
        self.costs: Account = account(network, data_shape, autocast=autocast)
        units: Callable[[], Iterable[nn.Module]] = getattr(network, "units", lambda: ())
        sizes = [sum(weight.nbytes for weight in unit.parameters()) for unit in units()]
        # What is in no unit is one.
        self.largest_unit = max(*sizes, self.costs.weight_bytes - sum(sizes), 0)
        two, three = (_trace(network, data_shape, batch_size, autocast) for batch_size in (2, 3))
        self.kinds, self.forward = two.kinds, two.forward
        self._of_two, self._of_three = np.array(two.numbers), np.array(three.numbers)

    def kernels(self, batch_size: int) -> np.ndarray:
        """(K, 3): FLOPs, bytes read and written, and bytes held when it is done, of each kernel for a batch."""
        return self._of_two + (batch_size - 2) * (self._of_three - self._of_two)

    def seconds(self, batch_size: int, device: Device) -> tuple[float, float]:
        """Of the forward and of the backward pass of a batch."""
        flops, traffic, _ = self.kernels(batch_size).T
        rates = np.array([device.rate(*kind) for kind in self.kinds])
        bandwidth = device.shares["memory"] * device.bandwidth
        times = np.maximum(np.maximum(flops / rates, traffic / bandwidth), device.launch)
        return float(times[: self.forward].sum()), float(times[self.forward :].sum())

    def held_bytes(self, batch_size: int) -> float:
        """The most that is held at any time of a batch's passes, besides weights and their gradients."""
        return float(self.kernels(batch_size)[:, 2].max())


class _Trace(TorchDispatchMode):
    """Writes down every kernel; views and allocations are none."""

    def __init__(self, outside: Sequence[Tensor]):
        """``outside`` are tensors that are not counted as held."""
        super().__init__()
        self.kinds: list[tuple[str, torch.dtype]] = []
        self.numbers: list[tuple[int, int, int]] = []
        self.forward = 0
        # Used as a table only: as a context it would hold on to the outputs of modules until the garbage is collected.
        self._flops = FlopCounterMode(display=False, custom_mapping=FLOPS).flop_registry
        self._held = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in outside:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = ([x for x in tree_leaves(of) if isinstance(x, Tensor)] for of in ((args, kwargs), result))
        given = {x.untyped_storage()._cdata for x in inputs}
        is_view = all(x.untyped_storage()._cdata in given for x in outputs) and not func._schema.is_mutable
        for tensor in outputs:
            self._watch(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        if outputs and not is_view and "empty" not in func.name():
            traffic = sum(x.numel() * x.element_size() for x in [*inputs, *outputs])
            count = self._flops.get(func.overloadpacket)
            self.numbers.append((count(*args, **kwargs, out_val=result) if count else 0, traffic, self._held))
            self.kinds.append((_kind(func.name()), outputs[0].dtype))
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage as held for as long as it lives."""
        key = storage._cdata
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self._held -= size
            del self._storages[key]

        self._held += size
        self._storages[key] = weakref.ref(storage, gone)


def _kind(name: str) -> str:
    if "convolution" in name:
        return "convolution"
    return "attention" if "scaled_dot_product" in name else "product"


def _trace(network: nn.Module, data_shape: tuple[int, ...], batch_size: int, autocast: torch.dtype | None) -> _Trace:
    """The kernels of a batch's way forward and back."""
    cpu = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fake_copy(network, cpu)
        for parameter in fake.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        x = torch.empty(batch_size, *data_shape, dtype=next(fake.parameters()).dtype, device=cpu)
        t, given = x.new_empty(batch_size), conditions(network, x)
        trace = _Trace([*fake.parameters(), *fake.buffers()])
        with trace:
            with torch.autocast(cpu.type, autocast, enabled=autocast is not None):
                output = fake(x, t, **given)
            trace.forward = len(trace.numbers)
            output.backward(torch.empty_like(output))
    return trace


def _drop_gradient(parameter: Tensor) -> None:
    # Gradients are held for the whole step, and counted with the weights.
    parameter.grad = None


@dataclass(frozen=True)
class Memory:
    """Bytes that a device holds in a step."""

    weights: float
    gradients: float
    moments: float
    averages: float
    gathered: float  # of fsdp: layers made whole, and their gradients
    activations: float  # what the passes hold at their peak

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.averages + self.gathered + self.activations


@dataclass(frozen=True)
class Estimate:
    """A step on a number of devices."""

    devices: int
    images: int  # that a device computes at a time
    memory: Memory
    passes: float  # seconds forward and backward
    update: float  # seconds
    volume: float  # bytes that a device sends
    exposed: float  # seconds of communication that no computing hides

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.passes + self.update + self.exposed


def estimate(workload: Workload, settings: Mapping[str, Any], device: Device, devices: int) -> Estimate:
    """The formulas at the top of this module; ``devices`` times the accumulation divides the batch."""
    options, costs = settings["train"], workload.costs
    accumulation = options["accumulation"]
    images = options["batch_size"] // (devices * accumulation)
    is_sharded = _is_sharded(settings, devices)
    shards = devices if is_sharded else 1
    # The headers of older files do not have the fields.
    averages = costs.average_bytes * (
        1 + sum(len(settings["ema"].get(name, ())) for name in ("further_decays", "widths"))
    )
    memory = Memory(
        weights=costs.weight_bytes / shards,
        gradients=costs.gradient_bytes / (shards if accumulation == 1 else 1),
        moments=costs.moment_bytes / shards,
        averages=averages / shards,
        gathered=3 * workload.largest_unit if is_sharded else 0,
        activations=workload.held_bytes(images),
    )
    forward, backward = workload.seconds(images, device)
    passes = accumulation * (forward + backward + memory.activations / device.fresh)
    # Sums of gradients, clipping, AdamW and averages, each reading and writing what it is of.
    traffic = (3 * (accumulation - 1) + 3 + 7) * costs.gradient_bytes + 3 * averages
    others = (devices - 1) / devices
    if is_sharded:
        volume = others * (2 * costs.weight_bytes * accumulation + costs.gradient_bytes)
        hidden, last = passes, others * workload.largest_unit
    else:
        volume = 2 * others * costs.gradient_bytes
        hidden, last = backward, 2 * others * min(costs.gradient_bytes, _BUCKET)
    to_next = device.within if devices <= device.devices_a_node else device.between
    return Estimate(
        devices=devices,
        images=images,
        memory=memory,
        passes=passes,
        update=traffic / shards / (device.shares["memory"] * device.bandwidth),
        volume=volume,
        exposed=max(volume / to_next - hidden, last / to_next),
    )


def _is_sharded(settings: Mapping[str, Any], devices: int) -> bool:
    return devices > 1 and settings["train"]["parallel"] == "fsdp"


def check_devices(settings: Mapping[str, Any], devices: int) -> None:
    """Raise ConfigError for a number of devices that the config's step cannot be shared among."""
    options = settings["train"]
    batch_size, accumulation = options["batch_size"], options["accumulation"]
    if devices < 1:
        raise ConfigError(f"--devices={devices}: must be at least 1")
    if batch_size % (devices * accumulation):
        raise ConfigError(
            f"--devices={devices}: devices x train.accumulation = {devices} x {accumulation} must divide "
            f"train.batch_size = {batch_size}"
        )
    if devices == 1 and options["parallel"] == "fsdp":
        raise ConfigError("--devices=1: train.parallel = 'fsdp' shards the weights among at least 2")


class Plan:
    """What a config takes on a number of devices of a kind."""

    def __init__(self, settings: Mapping[str, Any], data_shape: tuple[int, ...], device: Device, devices: int):
        """Trace the config's network and estimate its step.

        Args:
            settings: a resolved config, as a dict.
            data_shape: shape of one example.
            device: their kind.
            devices: how many there are.

        Raises:
            ConfigError: for a number of devices that the step cannot be shared among.
        """
        check_devices(settings, devices)
        self.settings, self.data_shape, self.device = settings, data_shape, device
        self.workload = _workload(settings, data_shape)
        options = settings["train"]
        parts = options["batch_size"] // options["accumulation"]
        fewer = [count for count in (2**power for power in range(devices.bit_length())) if count < devices]
        self.scaling = [
            estimate(self.workload, settings, device, count) for count in [*fewer, devices] if parts % count == 0
        ]
        self.estimate = self.scaling[-1]

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return self.estimate.memory.total <= self.device.memory

    def efficiency(self, one: Estimate) -> float:
        """How much of its devices' time a step uses as well as one device alone would."""
        return self.scaling[0].step / (one.devices * one.step)

    def hours(self, one: Estimate) -> float:
        """To the end of the recipe."""
        return self.settings["train"]["steps"] * one.step / 3600

    def remedies(self) -> Iterator[tuple[str, float]]:
        """Changes of the config that lower the memory of a device, and the bytes that it then takes."""
        options, devices = self.settings["train"], self.estimate.devices
        parts = options["batch_size"] // devices
        for accumulation in (part for part in range(options["accumulation"] + 1, parts + 1) if parts % part == 0):
            memory = estimate(
                self.workload, _changed(self.settings, "train", accumulation=accumulation), self.device, devices
            )
            if memory.memory.total <= self.device.memory or accumulation == parts:
                yield f"train.accumulation = {accumulation}", memory.memory.total
                break
        changes: list[tuple[str, str, Any]] = []
        if self.settings["network"].get("checkpointing") is False:
            changes.append(("network", "checkpointing", True))
        if devices > 1 and options["parallel"] != "fsdp":
            changes.append(("train", "parallel", "fsdp"))
        if options["precision"] == "float32":
            changes += [("train", "precision", half) for half in ("bfloat16", "float16") if half in self.device.peak][
                :1
            ]
        for section, name, value in changes:
            settings = _changed(self.settings, section, **{name: value})
            workload = self.workload if name == "parallel" else _workload(settings, self.data_shape)
            size = estimate(workload, settings, self.device, devices).memory.total
            yield f"{section}.{name} = {value!r}", size

    def text(self) -> str:
        """All of it, to read."""
        return "\n".join([*self._network(), *self._memory(), *self._step(), "", *self._scaling(), "", *_NOTES])

    def _network(self) -> Iterator[str]:
        costs, options = self.workload.costs, self.settings["train"]
        both = costs.forward_flops + costs.backward_flops
        parallel = ", by " + ("fsdp" if _is_sharded(self.settings, 2) else "ddp") if self.estimate.devices > 1 else ""
        yield (
            f"{self.settings['network']['name']}, data of shape {self.data_shape}, in {options['precision']}, "
            f"on {self.estimate.devices} x {self.device.name}{parallel}"
        )
        yield f"{costs.parameters:,} parameters"
        forward = quantity(costs.forward_flops, "FLOP")
        yield f"an image: {forward} forward, {quantity(both, 'FLOP')} with the backward pass"

    def _memory(self) -> Iterator[str]:
        one, kept = self.estimate, self.workload.costs.kept_bytes_of(self.estimate.images)
        images = "1 image" if one.images == 1 else f"{one.images} images"
        yield f"memory of a device, which has {quantity(self.device.memory, 'B')}"
        rows = {
            "weights": one.memory.weights,
            "gradients": one.memory.gradients,
            "AdamW's two moments": one.memory.moments,
            "averages": one.memory.averages,
            "layers made whole": one.memory.gathered,
            f"passes of {images}": one.memory.activations,
            "together": one.memory.total,
        }
        for name, size in rows.items():
            if size:
                note = (
                    f", of which {quantity(kept, 'B')} are kept for the backward pass"
                    if name.startswith("pass")
                    else ""
                )
                yield f"  {name:<22}{quantity(size, 'B'):>10}{note}"
        if not self.fits:
            yield "  IT DOES NOT FIT. A device would hold, each of these alone changed:"
            for change, size in self.remedies():
                fits = "which fits" if size <= self.device.memory else "still too much"
                yield f"    {change:<32}{quantity(size, 'B'):>10}, {fits}"
            yield "    or lower train.batch_size, or take more devices or larger ones"

    def _step(self) -> Iterator[str]:
        one, steps, price = self.estimate, self.settings["train"]["steps"], self.device.price
        total = one.devices * self.hours(one)
        yield f"a step: {1e3 * one.step:.4g} ms"
        yield f"  forward and backward  {1e3 * one.passes:>10.4g} ms"
        yield f"  update                {1e3 * one.update:>10.4g} ms"
        if one.devices > 1:
            sent = quantity(one.volume, "B")
            yield f"  communication         {1e3 * one.exposed:>10.4g} ms not hidden; a device sends {sent}"
        yield (
            f"{steps:,} steps: {self.hours(one):.4g} hours, {total:.4g} device-hours, "
            f"${total * price:,.2f} at ${price:g} each"
        )

    def _scaling(self) -> Iterator[str]:
        names = ("devices", "images of each", "GB of each", "ms a step", "images/s", "hours", "device-hours", "cost")
        yield "  ".join(f"{name:>8}" for name in (*names, "efficiency"))
        for one in self.scaling:
            hours = self.hours(one)
            cells = (
                f"{one.devices}",
                f"{one.images}",
                f"{one.memory.total / 1e9:.3g}",
                f"{1e3 * one.step:.4g}",
                f"{self.settings['train']['batch_size'] / one.step:.4g}",
                f"{hours:.4g}",
                f"{one.devices * hours:.4g}",
                f"${one.devices * hours * self.device.price:,.0f}",
                f"{self.efficiency(one):.0%}",
            )
            widths = [max(8, len(name)) for name in (*names, "efficiency")]
            yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


_NOTES = (
    "Data: peaks, memory and bandwidths, from vendors' data sheets. Assumptions: the shares of them that are",
    "attained, the time of a launch, the price (--price) and all of cpu. See docs/planning.md.",
)


def _workload(settings: Mapping[str, Any], data_shape: tuple[int, ...]) -> Workload:
    return Workload(empty_network(settings, data_shape), data_shape, autocast_dtype(settings["train"]["precision"]))


def _changed(settings: Mapping[str, Any], section: str, **fields: Any) -> dict[str, Any]:
    """The same settings, but for some fields of a section."""
    changed = copy.deepcopy(dict(settings))
    changed[section].update(fields)
    return changed
