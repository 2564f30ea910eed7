"""Log-likelihoods of test images by the exact trace: python benchmarks/likelihood_reference.py.

What the other benchmarks compare with: the first images of Fashion-MNIST's test set, dequantised, under the shipped
model, by 784 products at each of 48 nodes an image on a path of 16 steps. Written image by image; a run that was
stopped goes on.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.data import load_dataset
from sde_diffusion.samplers.noise import Streams

FILE = Path("outputs/likelihood_reference.safetensors")


def test_images(count: int) -> tuple[sd.DiffusionModel, Tensor]:
    """The shipped model, and the first test images, dequantised."""
    model = sd.load(sd.pretrained("fashion_mnist"))
    dataset = load_dataset(name="fashion_mnist", split="test")
    items: list[Any] = [dataset[i] for i in range(count)]
    codes = torch.stack([item if isinstance(item, Tensor) else item[0] for item in items])
    return model, model.data.dequantize(codes, Streams(0, range(count)).uniform(model.data_shape))


def reference(count: int = 16, threads: int | None = None) -> tuple[sd.DiffusionModel, Tensor, Tensor, Tensor]:
    """The model, the dequantised images, their log densities (nats), and estimates of the solver's error in these."""
    if threads:
        torch.set_num_threads(threads)
    model, x = test_images(count)
    done = load_file(FILE) if FILE.exists() else {"log_prob": torch.empty(0), "solver_error": torch.empty(0)}
    FILE.parent.mkdir(exist_ok=True)
    for i in range(len(done["log_prob"]), count):
        result = sd.log_likelihood(model, x[i : i + 1], trace="exact", steps=16, nodes=3)
        done = {name: torch.cat([done[name], getattr(result, name)]) for name in done}
        save_file(done, FILE)
        print(
            f"image {i}: {float(result.log_prob):.3f} nats, {int(result.derivative_evaluations)} products, "
            f"{result.seconds:.0f} seconds",
            flush=True,
        )
    return model, x, done["log_prob"][:count], done["solver_error"][:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    *_, log_prob, solver_error = reference(arguments.count, arguments.threads)
    print(f"mean {float(log_prob.mean()):.3f} nats; estimate of the solver's error {float(solver_error.mean()):.4f}")
