"""The idx format of the MNIST family: a header of type and shape, then the array in big-endian order.

    bytes 0-1  zero        byte 2  type code        byte 3  number of dimensions d
    then d sizes, each a big-endian uint32, then the values, last index fastest

Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits", section "File formats".
"""

import gzip
import math
import os
import struct
import zlib
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import torch

from sde_diffusion.data.datasets import ArrayDataset, check_split

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_GZIP_MAGIC = b"\x1f\x8b"
_IMAGE_STEMS = {
    "train": ("train-images-idx3-ubyte",),
    "test": ("t10k-images-idx3-ubyte", "test-images-idx3-ubyte"),
}


def read_idx(path: str | os.PathLike[str] | Traversable) -> np.ndarray:
    """Read an idx file, plain or gzip-compressed (told apart by content), as an array in native byte order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not idx, is damaged, or is not as long as its header says.
    """
    source = Path(path) if isinstance(path, str | os.PathLike) else path
    content = source.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{source}: damaged gzip file ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        types = ", ".join(f"{code:02x}" for code in _DTYPES)
        raise ValueError(
            f"{source}: not an idx file, its magic number is {content[:4].hex(' ') or 'missing'} instead of "
            f"00 00, a type among {types}, and the number of dimensions"
        )
    dtype, dimensions = np.dtype(_DTYPES[content[2]]), content[3]
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(f"{source}: truncated in the header, {len(content)} bytes of {header_size}")
    shape = struct.unpack(f">{dimensions}I", content[4:header_size])
    expected = header_size + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "over-long"
        raise ValueError(f"{source}: {fault}, {len(content)} bytes; shape {shape} of {dtype} needs {expected}")
    return np.frombuffer(content, dtype, offset=header_size).reshape(shape).astype(dtype.newbyteorder("="))


def write_idx(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write an array as an idx file, gzip-compressed at level 9 if the name ends in .gz.

    Equal arrays make equal files: the compressed header has no time in it.

    Raises:
        ValueError: if idx has no code for the array's dtype, or the array has no dimension.
    """
    code = _CODES.get(array.dtype.newbyteorder(">"))
    if code is None:
        allowed = ", ".join(dtype.newbyteorder("=").name for dtype in _CODES)
        raise ValueError(f"array has dtype {array.dtype}, but idx files hold {allowed}")
    if array.ndim == 0:
        raise ValueError("array must have at least one dimension, got a scalar")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    content = header + array.astype(_DTYPES[code]).tobytes()
    if str(path).endswith(".gz"):
        content = gzip.compress(content, compresslevel=9, mtime=0)
    Path(path).write_bytes(content)


def idx_images(path: str | os.PathLike[str] | Traversable, split: str = "train") -> ArrayDataset:
    """Labelled grey images from a folder of idx files: MNIST, Fashion-MNIST, KMNIST, EMNIST.

    The images are the one file whose name ends in train-images-idx3-ubyte, for the test split
    t10k-images-idx3-ubyte or test-images-idx3-ubyte, plain or with .gz; the labels' name has labels-idx1 for
    images-idx3. EMNIST comes as several such sets (emnist-balanced-train-images-idx3-ubyte.gz, ...), to be
    kept in a folder each; its images are stored transposed, and are left so.

    Args:
        path: The folder.
        split: "train" or "test".

    Returns:
        Values (N, 1, H, W) uint8, labels (N,) int64, under the folder's name.

    Raises:
        FileNotFoundError: if the folder lacks a file, listing the names looked for.
        ValueError: for an unknown split, several sets in one folder, or files that do not fit one another.
    """
    check_split(split)
    folder = Path(path) if isinstance(path, str | os.PathLike) else path
    image_stem = _find_image_stem(folder, split)
    image_file = _plain_or_compressed(folder, image_stem)
    label_file = _plain_or_compressed(folder, image_stem.replace("images-idx3", "labels-idx1"))
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.dtype != np.uint8 or images.ndim != 3:
        raise ValueError(f"{image_file}: images must be uint8 (N, H, W), got {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{label_file}: shape {labels.shape}, but {image_file} has {len(images)} images")
    return ArrayDataset(torch.from_numpy(images)[:, None], torch.from_numpy(labels), name=folder.name)


def _find_image_stem(folder: Path | Traversable, split: str) -> str:
    """The one file name, without .gz, that ends like a file of the split's images."""
    endings = _IMAGE_STEMS[split]
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    stems = sorted({name.removesuffix(".gz") for name in names if name.removesuffix(".gz").endswith(endings)})
    if not stems:
        looked_for = " or ".join(f"*{ending}[.gz]" for ending in endings)
        raise FileNotFoundError(f"no {split} images in {folder}: looked for {looked_for}")
    if len(stems) > 1:
        raise ValueError(f"{folder} must hold one set of {split} images, but has {', '.join(stems)}")
    return stems[0]


def _plain_or_compressed(folder: Path | Traversable, stem: str) -> Path | Traversable:
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {stem} or {stem}.gz in {folder}")
