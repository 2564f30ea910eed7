"""Few evaluations on real images: SDE_DIFFUSION_DATA=FOLDER python benchmarks/image_solvers.py.

The model that ships with the package, from the same 2,000 starts by each solver at 5, 10 and 20 evaluations:

* distance: root mean square over pixels and the first 256 images to the end of the same probability-flow ODE, solved at
  1e-5; and the median over images of their own;
* Fréchet distance to the training images in the package's feature space, with a bootstrap interval.

ddim, dpmpp_2m and unipc are each given the grid of the smallest distance over the first 64 starts. FOLDER holds the
whole data set; without it the reference is the slice in the package, and the Fréchet distances are others. Solved
images are kept in --cache, so that a run that was stopped goes on. The picture shows eight images by each solver at 5.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import matplotlib
from safetensors.torch import load_file, save_file
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.evaluation import Moments, extract_features, frechet_distance, load_features
from sde_diffusion.samplers.grids import GRIDS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HAND_MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "unipc, order 2": ("unipc", {"order": 2}),
    "unipc, order 3": ("unipc", {"order": 3}),
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {"auto": ("auto", {}), "calibrated": ("calibrated", {})}
COUNTS = (5, 10, 20)
# Not the one whose starts a solver is calibrated on.
SEED = 0
FEW = 64
EXACT = 256


class Solved:
    """Images of the shipped model, each set solved once."""

    def __init__(self, cache: Path):
        """Keep them in a folder."""
        self.model, self.cache = sd.load(sd.pretrained("fashion_mnist")), cache
        cache.mkdir(parents=True, exist_ok=True)

    def images(self, count: int, **options: Any) -> Tensor:
        """``sample(model, count, **options)`` from the starts of ``SEED``, (count, 1, 28, 28)."""
        key = hashlib.sha256(repr((count, sorted(options.items()))).encode()).hexdigest()[:16]
        path = self.cache / f"{key}.safetensors"
        if not path.exists():
            out = sd.sample(self.model, count, seed=SEED, batch_size=100, **options)
            save_file({"samples": out.samples}, path)
        return load_file(path)["samples"]


def distances(images: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square over pixels and those of the images that are known exactly; and the median of their own."""
    own = (images[: len(exact)] - exact[: len(images)]).flatten(1).square().mean(1)
    return float(own.mean().sqrt()), float(own.sqrt().median())


def distance(images: Tensor, exact: Tensor) -> float:
    """The first of these."""
    return distances(images, exact)[0]


def best_grid(solved: Solved, solver: str, options: dict[str, Any], nfe: int, exact: Tensor) -> str:
    """That of the smallest distance over the first starts."""
    found = {grid: distance(solved.images(FEW, solver=solver, nfe=nfe, grid=grid, **options), exact) for grid in GRIDS}
    return min(found, key=lambda grid: found[grid])


def picture(rows: dict[str, Tensor], output: Path) -> None:
    """Eight images a row."""
    figure, axes = plt.subplots(len(rows), 8, figsize=(8, 0.95 * len(rows)), squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for image, axis in zip(images, line, strict=False):
            axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    figure.tight_layout(pad=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, bbox_inches="tight")
    plt.close(figure)


def run(
    count: int = 2000, cache: str = "outputs/image_solvers", output: str = "docs/images/solvers_images.png"
) -> None:
    """Print the table and draw the picture."""
    solved, features = Solved(Path(cache)), load_features("fashion_mnist")
    train = fashion_mnist("train")
    reference = Moments.of(extract_features(train.data.points(train.values), features))
    exact = solved.images(min(count, EXACT), solver="ode", rtol=1e-5, atol=1e-5)
    print(f"{count} images; Fréchet distance to {len(train)} training images, 95 % interval of it without its bias.\n")
    print("| evaluations | solver | grid | distance | of the best hand-made | median | Fréchet distance | interval |")
    print("|---|---|---|---|---|---|---|---|")

    def row(nfe: int, name: str, grid: str, images: Tensor, best: float) -> None:
        frechet = frechet_distance(extract_features(images, features), reference)
        error, median = distances(images, exact)
        lower, upper = frechet.interval
        cells = [nfe, name, grid, f"{error:.4f}", f"{error / best:.2f}", f"{median:.4f}", f"{frechet.distance:.3f}"]
        print(f"| {' | '.join(map(str, cells))} | {lower:.3f} to {upper:.3f} |", flush=True)

    shown = {"ode, 1e-5": exact}
    for nfe in COUNTS:
        sets = {}
        for name, (solver, options) in HAND_MADE.items():
            grid = best_grid(solved, solver, options, nfe, exact)
            sets[name, grid] = solved.images(count, solver=solver, nfe=nfe, grid=grid, **options)
        best = min(distance(images, exact) for images in sets.values())
        for name, (solver, options) in OURS.items():
            sets[name, "its own"] = solved.images(count, solver=solver, nfe=nfe, **options)
        for (name, grid), images in sets.items():
            row(nfe, name, grid, images, best)
            if nfe == COUNTS[0]:
                shown[f"{name}, {nfe}"] = images
    picture({name: images[:8] for name, images in shown.items()}, Path(output))
    print(f"\nwrote {output}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--cache", default="outputs/image_solvers")
    parser.add_argument("--output", default="docs/images/solvers_images.png")
    arguments = parser.parse_args()
    run(arguments.count, arguments.cache, arguments.output)


if __name__ == "__main__":
    main()
