"""Our U-Net beside the one of diffusers, of the same weights: python benchmarks/networks.py [--only=speed,memory,...].

    speed     forward pass and training step (forward, backward, AdamW, average of the weights), batch 8, on one thread
              and on all: rounds in which ours, the peer's and a convolution of the same data take turns. Given are the
              fastest of each, their ratio, the median of the rounds' ratios, and the share of the fastest convolution's
              rate, in the operations of the published architecture.
    memory    the most bytes of tensors at any time of a training step: of all, and without the weights, AdamW's moments
              and the average; ours with activation checkpointing too.
    outputs   the largest difference of their outputs.
    compile   graphs and graph breaks of torch.compile over 100 training steps and a sampling run.

Nothing else may run beside it: two busy processes slow each other many times over.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers_weights import unet_from_diffusers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sde_diffusion as sd
from sde_diffusion.losses import denoising_loss
from sde_diffusion.networks import UNet
from sde_diffusion.networks.account import FLOPS

BATCH = 8
MEGABYTE = 2**20


def peer(size: str) -> UNet2DModel:
    """diffusers' network: DDPM's for CIFAR-10 ("large"), or one of 1.6 M parameters for images of one channel."""
    widths: tuple[int, ...]
    attends: tuple[bool, ...]
    if size == "large":
        widths, attends, channels, groups = (128, 256, 256, 256), (False, True, False, False), 3, 32
    else:
        # At least 4 channels a group, as DDPM's successors have it.
        widths, attends, channels, groups = (32, 64, 64), (False, True, False), 1, 8
    return UNet2DModel(
        sample_size=32,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=None,
        norm_num_groups=groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def networks(size: str) -> dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]]:
    """Ours and the peer's, of equal weights, each with its call on (x, t)."""
    torch.manual_seed(0)
    theirs: Any = peer(size)
    ours = unet_from_diffusers(theirs)
    return {"ours": (ours, ours), "diffusers": (theirs, lambda x, t: theirs(x, t).sample)}


def data(size: str, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Images and times."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3 if size == "large" else 1, 32, 32, generator=generator)
    return x, 999 * torch.rand(batch, generator=generator)


def training_step(network: nn.Module, call: Callable[[Tensor, Tensor], Tensor], size: str) -> Callable[[], None]:
    """A function that takes a step."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    x, t = data(size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(call(x, t), x).backward()
        optimizer.step()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in network.parameters()], 1e-4)

    return step


def convolution() -> tuple[Callable[[], object], float]:
    """The fastest kind of convolution there is in such a network, and its operations."""
    batch, channels, size = 32, 256, 16
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad():
            return F.conv2d(x, weight, padding=1)

    return run, 2 * 9 * batch * channels**2 * size**2


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def speed(rounds: int) -> None:
    """Print the tables of the forward pass and of the training step."""
    all_threads = torch.get_num_threads()
    print("| size | threads | of | ours, ms | diffusers, ms | ratio | median ratio | ours, share | diffusers, share |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in ("large", "small"):
        both, (x, t) = networks(size), data(size)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, torch.no_grad():
            both["diffusers"][1](x, t)
        convolve, convolution_flops = convolution()
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            for what in ("forward", "training step"):
                flops = counter.get_total_flops() * (1 if what == "forward" else 3)
                runs: dict[str, Callable[[], object]] = {"convolution": convolve}
                for name, (network, call) in both.items():
                    if what == "forward":
                        runs[name] = torch.no_grad()(partial(call, x, t))
                    else:
                        runs[name] = training_step(network, call, size)
                seconds = take_turns(runs, rounds * (1 if size == "large" else 5))
                best = {name: min(values) for name, values in seconds.items()}
                peak = convolution_flops / best["convolution"]
                ratios = [a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True)]
                print(
                    f"| {size} | {threads} | {what} | {1e3 * best['ours']:.1f} | {1e3 * best['diffusers']:.1f} "
                    f"| {best['ours'] / best['diffusers']:.2f} | {statistics.median(ratios):.2f} "
                    f"| {flops / best['ours'] / peak:.2f} | {flops / best['diffusers'] / peak:.2f} |",
                    flush=True,
                )
        torch.set_num_threads(all_threads)
        print(
            f"\n{size}: {counter.get_total_flops() / 1e9:.1f} GFLOP a forward pass of {BATCH} images, "
            f"the convolution {peak / 1e9:.0f} GFLOP/s on {all_threads} threads\n"
        )


def peak_of_step(network: nn.Module, call: Callable[[Tensor, Tensor], Tensor], size: str) -> float:
    """Most bytes of tensors that a training step adds to the weights, the moments and the average."""
    step = training_step(network, call, size)
    step()
    for parameter in network.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"
    ]
    return max(accumulate(changes))


def memory() -> None:
    """Print the table of peak memory."""
    print("| size | network | all tensors, MB | of the step, MB | ratio of all | ratio of the step |")
    print("|---|---|---|---|---|---|")
    for size in ("large", "small"):
        rows: dict[str, tuple[float, float]] = {}
        for name in ("diffusers", "ours", "ours, checkpointing"):
            network, call = networks(size)["diffusers" if name == "diffusers" else "ours"]
            if isinstance(network, UNet):
                network.checkpointing = name == "ours, checkpointing"
            state = 4 * sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
            of_step = peak_of_step(network.train(), call, size)
            rows[name] = total, above = (state + of_step) / MEGABYTE, of_step / MEGABYTE
            whole, part = rows["diffusers"]
            print(
                f"| {size} | {name} | {total:.0f} | {above:.0f} | {total / whole:.2f} | {above / part:.2f} |",
                flush=True,
            )


def outputs() -> None:
    """Print the largest difference of the outputs."""
    for size in ("large", "small"):
        x, t = data(size, 2)
        with torch.no_grad():
            ours, theirs = (call(x, t) for _, call in networks(size).values())
        print(f"{size}: largest difference {(ours - theirs).abs().max():.1e}, largest output {theirs.abs().max():.2f}")


def compile_counts() -> None:
    """Print how many graphs torch.compile made, and how many breaks there were."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    network = UNet((1, 32, 32), base_channels=32, channel_multipliers=(1, 2, 2))
    model = sd.DiffusionModel(network, sd.VPSDE(), "eps", data_shape=(1, 32, 32))
    compiled: Any = torch.compile(network, backend="eager")
    model.network = compiled
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    weighting = sd.losses.WEIGHTINGS["simple"]()
    for _ in range(100):
        x0, t = torch.randn(4, 1, 32, 32), torch.rand(4).clamp(min=1e-3)
        optimizer.zero_grad(set_to_none=True)
        denoising_loss(model, x0, t, torch.randn_like(x0), weighting).mean().backward()
        optimizer.step()
    made = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(f"100 training steps: {made[0]} graph, {made[1]} graph breaks")
    torch._dynamo.reset()
    counters.clear()
    sd.sample(model, 4, solver="ddim", steps=20)
    made = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(f"a sampling run of 20 steps: {made[0]} graph, {made[1]} graph breaks")


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="outputs,compile,memory,speed")
    parser.add_argument(
        "--rounds", type=int, default=8, help="rounds of the large network; the small one has five times"
    )
    arguments = parser.parse_args()
    sections: dict[str, Callable[[], None]] = {
        "outputs": outputs,
        "compile": compile_counts,
        "memory": memory,
        "speed": lambda: speed(arguments.rounds),
    }
    for name in arguments.only.split(","):
        print(f"\n## {name}\n", flush=True)
        sections[name]()


if __name__ == "__main__":
    main()
