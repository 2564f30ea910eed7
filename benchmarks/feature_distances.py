"""How far known faults are in the feature space: SDE_DIFFUSION_DATA=FOLDER python benchmarks/feature_distances.py.

Distances of Fashion-MNIST's test images, as they are and spoilt in known ways, to its training images, in the feature
space of `load_features("fashion_mnist")`: a scale to read a model's distance on. FOLDER holds the four idx files of the
whole data set; without it, the slice in the package is used, and the numbers are others.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.data import fashion_mnist
from sde_diffusion.evaluation import Moments, extract_features, frechet_distance, kernel_distance, load_features

# 5 x 5 binomial weights, of standard deviation 1 pixel along each axis.
BLUR = torch.outer(torch.tensor([1.0, 4, 6, 4, 1]), torch.tensor([1.0, 4, 6, 4, 1])) / 256


def gaussian_like(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw (count, ...) from the Gaussian of the images' mean and covariance, pixel by pixel."""
    moments = Moments.of(images.flatten(1))
    values, vectors = torch.linalg.eigh(moments.covariance)
    noise = torch.randn(count, len(values), generator=generator, dtype=torch.float64)
    drawn = moments.mean + (noise * values.clamp(min=0).sqrt()) @ vectors.mT
    return drawn.clamp(-1, 1).float().reshape(count, *images.shape[1:])


def spoilt(test: Tensor, labels: Tensor, train: Tensor) -> dict[str, Tensor]:
    """The sets of images (N, 1, 28, 28) to measure, by name."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(test.shape, generator=generator)
    return {
        "test images": test,
        "test images, a fifth of them": test[: len(test) // 5],
        "class 0 missing": test[labels != 0],
        "noise of standard deviation 0.05": (test + 0.05 * noise).clamp(-1, 1),
        "noise of standard deviation 0.2": (test + 0.2 * noise).clamp(-1, 1),
        "blur of 1 pixel": F.conv2d(F.pad(test, (2, 2, 2, 2), value=-1.0), BLUR[None, None]),
        "mirrored left to right": test.flip(3),
        "Gaussian of the training images": gaussian_like(train, len(test), generator),
    }


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    features = load_features("fashion_mnist")
    train, test = fashion_mnist("train"), fashion_mnist("test")
    if test.labels is None:
        raise ValueError("the test images have no labels")
    images = train.data.points(train.values)
    reference = extract_features(images, features)
    moments = Moments.of(reference)
    print(f"Reference: {len(reference)} training images.\n")
    print("| images | number | Fréchet distance | without its bias | 95 % interval | kernel distance |")
    print("|---|---|---|---|---|---|")
    for name, samples in spoilt(test.data.points(test.values), test.labels, images).items():
        vectors = extract_features(samples, features)
        frechet, kernel = frechet_distance(vectors, moments), kernel_distance(vectors, reference)
        lower, upper = frechet.interval
        print(
            f"| {name} | {len(vectors)} | {frechet.distance:.3f} | {frechet.corrected:.3f} "
            f"| {lower:.3f} to {upper:.3f} | {kernel.distance:.4f} ± {kernel.std_error:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
