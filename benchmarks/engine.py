"""Many images: latency of the first batch and the rate after it: python benchmarks/engine.py.

The model that ships with the package, by a solver of fixed steps, run as it is and through torch.compile, whose first
batch waits for the graph. A profile of the steps says how often one waits for the device: as often as the host reads a
number of it.
"""

import argparse
import time
from itertools import pairwise

import torch

import sde_diffusion as sd

# Where the host reads a number of the device.
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")


def batch_seconds(model: sd.Model, backend: bool | str, solver: str, nfe: int, size: int, batches: int) -> list[float]:
    """Seconds that each batch took."""
    ends = [time.perf_counter()]

    def note(i: int, t: float, x: torch.Tensor) -> None:
        if i == nfe:
            ends.append(time.perf_counter())

    sd.sample(model, size * batches, solver=solver, nfe=nfe, batch_size=size, compile=backend, callback=note)
    return [after - before for before, after in pairwise(ends)]


def waits_per_step(model: sd.Model, solver: str) -> float:
    """How often a step waits for the device: what 40 steps wait more often than 20, by a profile on the CPU."""
    counts = []
    sd.sample(model, 2, solver=solver, nfe=20)
    for nfe in (20, 40):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            sd.sample(model, 2, solver=solver, nfe=nfe)
        counts.append(sum(event.count for event in profile.key_averages() if event.key in WAITS))
    return (counts[1] - counts[0]) / 20


def run(
    backends: tuple[str, ...] = ("aot_eager",),
    solver: str = "dpmpp_2m",
    nfe: int = 10,
    size: int = 64,
    batches: int = 4,
) -> None:
    """Print a row for the steps as they are and one for each backend."""
    model = sd.load(sd.pretrained("fashion_mnist"))
    waits = waits_per_step(model, solver)
    print(f"{solver}, {nfe} evaluations, {batches} batches of {size} images; waits a step: {waits:g}\n")
    print("| compile | first batch, s | steady rate, images/s |\n|---|---|---|")
    every: tuple[bool | str, ...] = (False, *backends)
    for backend in every:
        first, *others = batch_seconds(model, backend, solver, nfe, size, batches)
        print(f"| {backend or 'no'} | {first:.2f} | {size * len(others) / sum(others):.1f} |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="*", default=["aot_eager"], help="of torch.compile, such as inductor")
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    run(tuple(arguments.backends), batches=arguments.batches)


if __name__ == "__main__":
    main()
