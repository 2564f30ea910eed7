"""Fashion-MNIST: 28 x 28 grey images of ten kinds of clothing.

A slice of it, the first 10,000 training and the first 2,000 test images, comes with the package, so that
every example runs without a download; a folder with the original files gives all 60,000 and 10,000.

Source: Xiao, Rasul & Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms" (2017), arXiv:1708.07747; MIT licence, beside the files.
"""

import os
from importlib import resources

from sde_diffusion.data.datasets import ArrayDataset
from sde_diffusion.data.idx import idx_images

DATA_VARIABLE = "SDE_DIFFUSION_DATA"
SLICE_FOLDER = "fashion_mnist_slice"


def fashion_mnist(split: str = "train", path: str | os.PathLike[str] | None = None) -> ArrayDataset:
    """Fashion-MNIST with its labels, whole or the slice in the package.

    Args:
        split: "train" or "test".
        path: A folder with the four original files (train-images-idx3-ubyte[.gz],
            t10k-labels-idx1-ubyte[.gz], ...); by default the one that the environment variable
            SDE_DIFFUSION_DATA names; without either, the slice.

    Returns:
        Values (N, 1, 28, 28) uint8, labels (N,) from 0 to 9.

    Raises:
        FileNotFoundError: if the folder lacks a file, listing the names looked for.
        ValueError: for an unknown split, or a damaged file.
    """
    folder = path or os.environ.get(DATA_VARIABLE) or resources.files(__package__) / SLICE_FOLDER
    dataset = idx_images(folder, split)
    dataset.name = "fashion_mnist"
    return dataset
