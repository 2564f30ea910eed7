"""How good the models that ship are: SDE_DIFFUSION_DATA=FOLDER python benchmarks/pretrained.py.

For each model: bits/dim of test images by the probability-flow ODE, with the standard errors over probes and over
images, of a model with classes also given each image's class; and the Fréchet distance of samples to the 60,000
training images in the feature space of `load_features("fashion_mnist")`, samples of a model with classes being of all
alike. The images, codes, probes and starts are the same for all. With --workdir=RUN, what that run took comes last.
--picture=docs/images/classes.png draws samples of each class instead.

FOLDER holds the four idx files of the whole data set; without it, the slice in the package is the reference, and the
distances are others.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.data.pictures import save_picture
from sde_diffusion.evaluation import Moments, extract_features, frechet_distance, load_features
from sde_diffusion.model import DiffusionModel

MODELS = ("fashion_mnist", "fashion_mnist_class")


def bits(model: DiffusionModel, count: int, has_label: bool) -> str:
    """A row's bits/dim of the first test images, given their classes or not."""
    images, labels = zip(*(fashion_mnist("test")[index] for index in range(count)), strict=True)
    cond = {"label": torch.stack(labels)} if has_label else None
    result = sd.bits_per_dim(model, torch.stack(images), cond=cond, batch_size=32)
    return f"{result.mean:.4f} ± {result.std_error:.4f} (probes) ± {result.sampling_error:.3f} (images)"


def distance(model: DiffusionModel, count: int, nfe: int, reference: Moments) -> str:
    """A row's Fréchet distance of samples."""
    classes = getattr(model.network, "classes", 0)
    cond = {"label": torch.arange(count) % classes} if classes else None
    samples = sd.sample(model, count, nfe=nfe, cond=cond, batch_size=100).samples.clamp(-1, 1)
    found = frechet_distance(extract_features(samples, load_features("fashion_mnist")), reference)
    lower, upper = found.interval
    return f"{found.distance:.3f} | {found.corrected:.3f} | {lower:.3f} to {upper:.3f}"


def draw(model: DiffusionModel, path: Path) -> None:
    """Write a picture of eight samples of each class."""
    classes = getattr(model.network, "classes", 0)
    labels = torch.arange(classes).repeat(8)
    samples = sd.sample(model, len(labels), nfe=15, cond={"label": labels}).samples
    save_picture(samples, model.data, path, columns=classes)


def took(workdir: Path, steps: int | None) -> str:
    """Steps, images seen and hours of a run, from its lines of metrics up to so many steps."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if steps is None or line["step"] <= steps]
    batch_size = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["train"]["batch_size"]
    images = [batch_size * (line["step"] - before["step"]) for before, line in pairwise([{"step": 0}, *lines])]
    hours = sum(n / line["images_per_second"] for n, line in zip(images, lines, strict=True)) / 3600
    return f"{lines[-1]['step']} steps, {sum(images):,} images, {hours:.2f} hours, loss {lines[-1]['loss']:.4f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names, run directories or files")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--nfe", type=int, default=30)
    parser.add_argument(
        "--picture", type=Path, help="to write, of samples of each class of the last model, and no more"
    )
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--steps", type=int, help="of --workdir, only the first so many")
    arguments = parser.parse_args()
    if arguments.picture:
        draw(sd.load(sd.pretrained(arguments.models[-1])), arguments.picture)
        return
    train = fashion_mnist("train")
    reference = Moments.of(extract_features(train.data.points(train.values), load_features("fashion_mnist")))
    print(f"{arguments.images} test images, {arguments.samples} samples, {len(train)} training images.\n")
    print("| model | bits/dim | Fréchet distance | without its bias | 95 % interval |\n|---|---|---|---|---|")
    for name in arguments.models:
        model = sd.load(sd.pretrained(name) if name in MODELS else name)
        found = distance(model, arguments.samples, arguments.nfe, reference)
        print(f"| {name} | {bits(model, arguments.images, has_label=False)} | {found} |", flush=True)
        if getattr(model.network, "classes", 0):
            print(f"| {name}, given the class | {bits(model, arguments.images, has_label=True)} | | | |", flush=True)
    if arguments.workdir:
        print(f"\n{arguments.workdir.name}: {took(arguments.workdir, arguments.steps)}")


if __name__ == "__main__":
    main()
