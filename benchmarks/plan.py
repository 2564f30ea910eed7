"""What `plan` predicts of training on this CPU, beside what it takes: python benchmarks/plan.py [--only=dit,...].

With --published it prints instead what it predicts of two published runs, of which the shares of convolutions in
the table of devices are (times: README of the code of Karras et al. 2022).

    fashion_mnist   configs/fashion_mnist.py, in bfloat16
    dit             the same data and a transformer of 4 M parameters, in float32
    cifar10_ddpm    configs/cifar10_ddpm.py at a quarter of its width and an eighth of its batch, on random images

The step is the median of those of `train`, on one thread; the memory is by how much the process's peak exceeds what it
held before the network was made, the data loaded and the libraries in use. The prediction is that of
``--device-type=here``: the rates of three kernels, the bandwidth and the time of a launch, measured before and after in
processes of their own, of which the mean is taken. Nothing else may run beside it.

The C library keeps some of the memory that is given back to it, in pieces that do not fit what is asked for next: that
is no tensor, and not predicted. The last two columns are of a second run, in which it keeps none of 64 KiB or more.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from sde_diffusion.data import load_dataset
from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import load_config_file, named, resolve_config, train
from sde_diffusion.training.devices import DEVICES, measure
from sde_diffusion.training.plan import Plan

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = ("fashion_mnist", "dit", "cifar10_ddpm")
STEPS = 12


def case(name: str) -> tuple[ConfigDict, Any]:
    """A config and its data set, None for that of the config."""
    dataset = None
    if name == "cifar10_ddpm":
        config = load_config_file(CONFIGS / "cifar10_ddpm.py")
        config.network.base_channels //= 4
        config.train.batch_size //= 8
        dataset = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    else:
        config = load_config_file(CONFIGS / "fashion_mnist.py")
        if name == "dit":
            config.network = named("dit", width=192, depth=6, heads=3)
            config.train.batch_size = 32
            config.train.precision = "float32"
    config.train.steps, config.train.log_every, config.train.sample_every = STEPS, 1, 0
    config.train.device = "cpu"
    return resolve_config(config), dataset


def predict(name: str) -> dict[str, float]:
    """Seconds and bytes of a step."""
    config, dataset = case(name)
    shape = (1, 28, 28) if dataset is None else tuple(dataset.shape[1:])
    estimate = Plan(config.to_dict(), shape, measure(config.train.precision), 1).estimate
    return {"seconds": estimate.step, "bytes": estimate.memory.total}


def run(name: str) -> dict[str, float]:
    """Seconds and bytes of a step of training."""
    config, dataset = case(name)
    dataset = load_dataset(split="train", **config.data) if dataset is None else dataset
    # What training itself loads is not the network's.
    tiny = {"steps": 2, "batch_size": 2, "precision": config.train.precision, "device": "cpu"}
    train({"data": "spiral", "network": "mlp", "train": tiny})
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    train(config, dataset=dataset, callbacks=[lambda _: times.append(time.perf_counter())])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The first steps load and compile.
    seconds = statistics.median(after - before for before, after in pairwise(times[2:]))
    return {"seconds": seconds, "bytes": 1024.0 * (peak - held)}


def child(what: str, name: str, **environment: str) -> dict[str, float]:
    """The result of ``predict`` or ``run`` in a process of its own."""
    command = [sys.executable, __file__, f"--{what}={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def published() -> None:
    """Print the table of published runs."""
    adm = {name: value for name, value in PUBLISHED["adm_imagenet64"].options.items() if name != "out_channels"}
    # 2500 M images; in parts, of which its README says that they save memory, and which cost little.
    large = {"steps": 2_500_000_000 // 4096, "batch_size": 4096, "accumulation": 4, "precision": "float16"}
    runs: list[tuple[str, Any, tuple[int, ...], str, int, float]] = [
        ("EDM, CIFAR-10", CONFIGS / "cifar10_edm.py", (3, 32, 32), "v100", 8, 2),
        ("ADM, ImageNet-64", {"network": {"name": "unet", **adm}, "train": large}, (3, 64, 64), "a100", 32, 13),
    ]
    print("| run | devices | days: predicted | published | ratio |")
    print("|---|---|---|---|---|")
    for name, config, shape, device, devices, days in runs:
        plan = Plan(resolve_config(config).to_dict(), shape, DEVICES[device], devices)
        predicted = plan.hours(plan.estimate) / 24
        print(f"| {name} | {devices} {device} | {predicted:.1f} | about {days:g} | {predicted / days:.2f} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--predict", choices=CASES, help="of a process of its own")
    parser.add_argument("--run", choices=CASES, help="of a process of its own")
    parser.add_argument("--published", action="store_true")
    arguments = parser.parse_args()
    if arguments.published:
        published()
        return
    torch.set_num_threads(1)
    if arguments.predict or arguments.run:
        print(json.dumps(predict(arguments.predict) if arguments.predict else run(arguments.run)))
        return
    print(
        "| config | step, ms: predicted | measured | ratio | memory, MB: predicted | measured | ratio "
        "| kept none | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.only.split(","):
        first, measured, last = child("predict", name), child("run", name), child("predict", name)
        predicted = {key: (first[key] + last[key]) / 2 for key in first}
        # glibc's mallopt(3).
        exact = child("run", name, MALLOC_MMAP_THRESHOLD_=str(2**16))["bytes"]
        cells = [
            f"{scale * predicted[key]:.0f} | {scale * measured[key]:.0f} | {predicted[key] / measured[key]:.2f}"
            for key, scale in (("seconds", 1e3), ("bytes", 1e-6))
        ]
        cells.append(f"{1e-6 * exact:.0f} | {predicted['bytes'] / exact:.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
