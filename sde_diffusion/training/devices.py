"""What devices can do: one table of them, and the measurement of the one that is here.

In the table are data of the vendors, named with each device: peaks of dense arithmetic (half of what a data sheet
gives for sparse), memory, and bandwidths in one direction (half of what it gives for both). Assumptions are

    shares     of the peaks that convolutions, matrix products, attention and memory traffic attain
    launch     seconds that no kernel falls below, as Python has to ask for each
    fresh      bytes/s at which a CPU's system hands out memory
    price      dollars an hour of a device: orders of magnitude of what clouds ask, to be replaced by the true one
    cpu        all of it: a core of a server with AVX-512, two units of 16 lanes at 2.5 GHz, that shares 8 channels
               of memory and a network of 25 Gbit/s with 31 others

and, where a device can be put into various machines, those machines. The shares of convolutions are round numbers
near what two published runs attained, EDM on CIFAR-10 in float32 on 8 V100 and ADM on ImageNet-64 in float16 on 32
A100 (README of the code of Karras et al. 2022); `python benchmarks/plan.py --published` prints their times. All else
is fitted to nothing.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.training.config import ConfigError, choose_device

# Of accelerators. In float32, without TensorFloat-32, libraries convolve by Winograd's algorithm, with 2.25 times fewer
# multiplications than are counted (Lavin & Gray 2016).
SHARES = {"convolution": 0.2, "winograd": 0.6 * 2.25, "product": 0.6, "attention": 0.4, "memory": 0.8}


@dataclass(frozen=True)
class Device:
    """A kind of device, and what it is connected by.

    Attributes:
        name: what it is.
        peak: FLOP/s by the dtype of the operands; "tf32" is that of float32 convolutions, where there is such.
        memory: bytes.
        bandwidth: bytes/s from and to its memory.
        within: bytes/s that it sends to others of its node.
        between: bytes/s that it sends to other nodes, while all others of its node do the same.
        devices_a_node: how many there are in a node.
        price: dollars an hour; an assumption.
        shares: of the peaks that are attained, by the kind of kernel, and of the bandwidth; an assumption.
        launch: seconds that each kernel takes at least; an assumption.
        fresh: bytes/s at which the system hands out memory, page by page, that a pass asks for anew in every step, as
            on a CPU; what accelerators have used once is kept for them.
    """

    name: str
    peak: Mapping[str, float]
    memory: float
    bandwidth: float
    within: float
    between: float
    devices_a_node: int
    price: float
    shares: Mapping[str, float]
    launch: float = 1e-5
    fresh: float = math.inf

    def rate(self, kind: str, dtype: torch.dtype) -> float:
        """FLOP/s that a kind of kernel attains: "convolution", "product" or "attention"."""
        name = str(dtype).removeprefix("torch.")
        if kind == "convolution" and name == "float32":
            if "tf32" in self.peak:
                name = "tf32"
            elif "winograd" in self.shares:
                kind = "winograd"
        # What is not listed is computed as float32 is.
        return self.shares[kind] * self.peak.get(name, self.peak["float32"])


_HOPPER = {"float32": 67e12, "tf32": 494.5e12, "bfloat16": 989.5e12, "float16": 989.5e12}
_AMPERE = {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12, "float16": 312e12}

DEVICES: dict[str, Device] = {
    # NVIDIA H100 Tensor Core GPU data sheet (SXM); DGX H100 data sheet: 8 GPUs, 8 ConnectX-7 of 400 Gbit/s.
    "h100": Device("H100 SXM 80 GB", _HOPPER, 80e9, 3.35e12, 450e9, 50e9, 8, 3.0, SHARES),
    # NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet.
    "h200": Device("H200 SXM 141 GB", _HOPPER, 141e9, 4.8e12, 450e9, 50e9, 8, 4.0, SHARES),
    # NVIDIA A100 Tensor Core GPU data sheet (SXM); DGX A100 data sheet: 8 GPUs, 8 ConnectX-6 of 200 Gbit/s.
    "a100": Device("A100 SXM 80 GB", _AMPERE, 80e9, 2.039e12, 300e9, 25e9, 8, 1.8, SHARES),
    "a100-40gb": Device("A100 SXM 40 GB", _AMPERE, 40e9, 1.555e12, 300e9, 25e9, 8, 1.3, SHARES),
    # NVIDIA V100 Tensor Core GPU data sheet (SXM2, 32 GB); DGX-1 data sheet: 8 GPUs, 4 ports of 100 Gbit/s.
    "v100": Device(
        "V100 SXM2 32 GB", {"float32": 15.7e12, "float16": 125e12}, 32e9, 900e9, 150e9, 6.25e9, 8, 0.8, SHARES
    ),
    # NVIDIA L4 Tensor Core GPU data sheet: PCIe 4 x16. Assumed: 8 in a machine with 100 Gbit/s.
    "l4": Device(
        "L4 24 GB",
        {"float32": 30.3e12, "tf32": 60e12, "bfloat16": 121e12, "float16": 121e12},
        *(24e9, 300e9, 32e9, 1.56e9, 8, 0.6, SHARES),
    ),
    # NVIDIA T4 70W low profile PCIe GPU accelerator data sheet: PCIe 3 x16. Assumed: 4 in a machine with 50 Gbit/s.
    "t4": Device("T4 16 GB", {"float32": 8.1e12, "float16": 65e12}, 16e9, 320e9, 16e9, 1.56e9, 4, 0.3, SHARES),
    # NVIDIA Ada GPU architecture white paper (float32 sums): PCIe 4 x16. Assumed: 4 in a machine with 10 Gbit/s.
    "rtx4090": Device(
        "GeForce RTX 4090 24 GB",
        {"float32": 82.6e12, "tf32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12},
        *(24e9, 1.008e12, 32e9, 0.31e9, 4, 0.4, SHARES),
    ),
    "cpu": Device(
        "core of a CPU",
        {"float32": 160e9, "bfloat16": 320e9},
        *(4e9, 10e9, 2e9, 0.1e9, 32, 0.04),
        shares={"convolution": 0.8, "product": 0.6, "attention": 0.4, "memory": 1.0},
        fresh=4e9,
    ),
}


def choose_device_type(name: str, precision: str) -> Device:
    """The device of the table by its name, or "here": the one that torch has here, measured in some seconds.

    Raises:
        ConfigError: for an unknown name, or a precision that the device does not compute in.
    """
    if name == "here":
        return measure(precision)
    if name not in DEVICES:
        raise ConfigError(f"--device-type={name}: must be here or one of {', '.join(DEVICES)}")
    device = DEVICES[name]
    if precision not in device.peak:
        others = ", ".join(dtype for dtype in device.peak if dtype != "tf32")
        raise ConfigError(f"train.precision = {precision!r}: {name} computes in {others}")
    return device


def measure(precision: str = "float32") -> Device:
    """The accelerator that is here, or the CPU with all of torch's threads, by a few kernels forward and backward.

    A convolution, a product and attention of usual sizes give the rates; a chain of normalisations, activations and
    sums the bandwidth; sums of a few numbers the time of a launch; on a CPU, a large new tensor the rate at which
    memory is handed out. What connects several of them cannot be measured with one: that is the table's cpu.
    """
    place = choose_device("auto")
    # Half precision leaves some kernels in float32.
    peaks, shares = {}, {"memory": 1.0}
    for name in dict.fromkeys(("float32", precision)):
        rates = _rates(place, getattr(torch, name))
        peaks[name] = max(rates.values())
        # The last is the one asked for, in which nearly all kernels are.
        shares |= {kind: rate / peaks[name] for kind, rate in rates.items()}
    if place.type == "cpu":
        count, memory = os.cpu_count() or 1, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        fresh = _fresh()
    else:
        fresh = math.inf
        count, memory = torch.accelerator.device_count(), float(torch.get_device_module(place).mem_get_info(place)[1])
    return replace(
        DEVICES["cpu"],
        name=f"{place.type} here",
        peak=peaks,
        shares=shares,
        memory=memory,
        bandwidth=_bandwidth(place, getattr(torch, precision)),
        launch=_launch(place),
        fresh=fresh,
        devices_a_node=count,
    )


def _rates(place: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of each kind of kernel, forward and backward."""

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, device=place, dtype=dtype)

    batch, channels, side = 32, 64, 16
    image = tensor(batch, channels, side, side).to(memory_format=torch.channels_last)
    kernel = tensor(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    rows, width = 4096, 256
    heads, tokens, head = 32, 256, 64
    works: dict[str, tuple[Callable[..., Tensor], list[Tensor], int]] = {
        "convolution": (
            lambda x, w: F.conv2d(x, w, padding=1),
            [image, kernel],
            6 * 9 * batch * (channels * side) ** 2,
        ),
        "product": (F.linear, [tensor(rows, width), tensor(width, width)], 6 * rows * width**2),
        "attention": (
            F.scaled_dot_product_attention,
            [tensor(1, heads, tokens, head) for _ in range(3)],
            14 * heads * tokens**2 * head,
        ),
    }
    return {kind: flops / _seconds(place, run, inputs) for kind, (run, inputs, flops) in works.items()}


def _bandwidth(place: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s read and written by normalisations, activations and sums, forward and backward.

    They follow one another, so that a pass asks for ever more memory and gives it back at its end, as a network's does.
    """
    x = torch.randn(16, 64, 32, 32, device=place, dtype=dtype).to(memory_format=torch.channels_last)
    # Groups of 4 channels, as the networks have them by default, but of 16 in half precision: a CPU takes many times as
    # long there for narrower ones, and configs avoid them.
    depth, groups = 12, 16 if dtype == torch.float32 else 4

    def run(x: Tensor) -> Tensor:
        for _ in range(depth):
            x = x + F.silu(F.group_norm(x, groups))
        return x

    # Tensors read and written by each kernel, forward and then backward.
    norm, activation, total = 2 + 3, 2 + 3, 3 + 3
    return depth * (norm + activation + total) * x.numel() * x.element_size() / _seconds(place, run, [x])


def _launch(place: torch.device) -> float:
    """Seconds of a kernel that has next to nothing to do, forward or backward."""
    count = 200

    def run(x: Tensor) -> Tensor:
        for _ in range(count):
            x = x + 1.0
        return x

    return _seconds(place, run, [torch.zeros(8, device=place)]) / (2 * count)


def _fresh() -> float:
    """Bytes/s at which memory is first written to, of a block so large that C libraries never keep it."""
    seconds, count = [], 2**24
    for _ in range(3):
        start = time.perf_counter()
        block = torch.ones(count)
        seconds.append(time.perf_counter() - start)
        # Given back at once, so that the next one is new.
        del block
    return 4 * count / min(seconds)


def _seconds(place: torch.device, run: Callable[..., Tensor], inputs: list[Tensor], repeats: int = 5) -> float:
    """Median seconds of run(*inputs) and its backward pass."""
    inputs = [x.requires_grad_() for x in inputs]
    gradient = torch.ones_like(run(*inputs))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.autograd.grad(run(*inputs), inputs, gradient)
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        seconds.append(time.perf_counter() - start)
    # The first ones compile and allocate.
    return statistics.median(seconds[2:])
