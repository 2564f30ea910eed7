"""Data: sets of images and points, their range and bit depth, and pictures of samples.

A new data set is a function (split, **options) -> data set, and one line in DATASETS.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from sde_diffusion.data.datasets import ArrayDataset, DataSource, WrappedDataset, as_dataset
from sde_diffusion.data.fashion_mnist import fashion_mnist
from sde_diffusion.data.idx import idx_images, read_idx, write_idx
from sde_diffusion.data.image_folder import ImageFolder
from sde_diffusion.data.info import DataInfo
from sde_diffusion.data.memory_map import MemoryMapped, array_file
from sde_diffusion.data.pictures import image_grid, save_picture
from sde_diffusion.data.toys import TOYS, checkerboard, eight_gaussians, moons, spiral, toy

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "DataInfo",
    "DataSource",
    "ImageFolder",
    "MemoryMapped",
    "WrappedDataset",
    "array_file",
    "as_dataset",
    "checkerboard",
    "eight_gaussians",
    "fashion_mnist",
    "idx_images",
    "image_grid",
    "load_dataset",
    "moons",
    "read_idx",
    "save_picture",
    "spiral",
    "toy",
    "write_idx",
]

DATASETS: dict[str, Callable[..., DataSource]] = {
    "fashion_mnist": fashion_mnist,
    "idx": idx_images,
    "image_folder": ImageFolder,
    "array_file": array_file,
    **{name: partial(toy, name) for name in TOYS},
}


def load_dataset(name: str, split: str = "train", **options: Any) -> DataSource:
    """A data set by its name in DATASETS.

    Args:
        name: A key of DATASETS.
        split: "train" or "test".
        **options: The other parameters of that entry, such as path, or size.

    Raises:
        ValueError: for an unknown name, split or option, or a missing option, listing what is allowed.
        FileNotFoundError: if files are missing.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}; got {name!r}")
    parameters = inspect.signature(DATASETS[name]).parameters
    allowed = [parameter for parameter in parameters if parameter != "split"]
    if unknown := sorted(options.keys() - set(allowed)):
        raise ValueError(f"data set {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed)}")
    required = [key for key in allowed if parameters[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in options]:
        raise ValueError(f"data set {name!r} needs the option {', '.join(missing)}")
    return DATASETS[name](split=split, **options)
