"""A folder of image files as a data set: resized and cropped to one size, with its subfolders as classes if asked.

They are decoded each time they are asked for, or once for all epochs, workers, ranks and runs, into one file:

    cache/NAME-SPLIT-HASH.npy      (N, C, H, W) uint8, mapped into memory; see memory_map.py

The hash is of all that the values depend on, so that a folder that was changed gets another file.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from sde_diffusion.data.datasets import SPLITS, Sample, check_split
from sde_diffusion.data.info import DataInfo
from sde_diffusion.data.memory_map import MemoryMapped, write_once
from sde_diffusion.data.pictures import IMAGE_MODES

_ONE_IN_TEST = 10
# Counts the ways of making values from a file: another one is another cache.
_DECODING = 1
# Files that are decoded in parallel, and held until they are written.
_AT_ONCE = 64


class ImageFolder(Dataset[Sample]):
    """All images below a folder, as uint8 tensors (channels, H, W), in the order of their relative names.

    If the folder has subfolders train and test they are the splits. Else one file in ten is a test image,
    chosen by a hash of its relative name: adding files moves no other to the other side.

    Photographs are turned upright as their EXIF orientation says. Transparent pixels are laid over white,
    unless channels=4 keeps them.

    Attributes:
        files: The paths, sorted; none in a copy that was pickled with a cache, which needs none.
        data_shape: (channels, H, W).
        data: 8 bits in [-1, 1].
        labels: (N,) int64, or None.
        classes: The number of classes; 0 without labels.
        class_names: The subfolders that are the classes, in their order.
        cached: The decoded images, or None without a cache.
        name: The folder's name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        size: int | tuple[int, int] | None = None,
        channels: int = 3,
        labels: bool = False,
        cache: str | os.PathLike[str] = "",
    ) -> None:
        """List the files; none is decoded yet, but with a cache that does not have them: then all are.

        Args:
            path: The folder, searched recursively for the formats that Pillow opens.
            split: "train" or "test".
            size: (H, W), or one number for both: the largest centred part of that aspect ratio is scaled to
                it (bicubic, antialiased). None if all files have one size already.
            channels: 1 (grey), 3 (RGB) or 4 (RGBA).
            labels: Whether items are pairs (image, label): the label counts the first-level subfolders, sorted by name;
                of both splits together, so that a class has one number.
            cache: A directory in which the decoded images are kept; "" decodes them anew each time. Of several
                processes one decodes, and the others wait for it. Another size, another version of Pillow, or files
                with another name, size or time of change make another array; those before stay until they are deleted.

        Raises:
            FileNotFoundError: if there is no such folder, or no image for the split in it.
            ValueError: for an invalid argument, with size=None for the first file of another size, with labels for a
                file in no subfolder, and with a cache for a file that cannot be decoded.
            OSError: if the cache cannot be written, or its disk has less room than it takes.
        """
        check_split(split)
        if channels not in IMAGE_MODES:
            raise ValueError(f"channels must be one of {', '.join(map(str, IMAGE_MODES))}; got {channels!r}")
        self.path = Path(path)
        self.files = _split_files(self.path, split)
        self.mode = IMAGE_MODES[channels]
        height, width = _common_size(self.files) if size is None else _as_pair(size)
        self.data_shape: tuple[int, ...] = (channels, height, width)
        self.data = DataInfo(bits=8)
        self.name = self.path.name
        self.class_names: tuple[str, ...] = ()
        self.labels: torch.Tensor | None = None
        if labels:
            self.class_names, self.labels = _classes(self.path, split, self.files)
        self.classes = len(self.class_names)
        self.cached = None if cache == "" else self._cached(Path(cache), split)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files) if self.cached is None else len(self.cached)

    def __getitem__(self, index: int) -> Sample:
        """Image index, with labels as a pair (image, label).

        Raises:
            ValueError: naming the file, if it cannot be decoded or has more than 8 bits a channel.
        """
        if self.cached is not None:
            return self.cached[index]
        image = torch.from_numpy(self._decode(self.files[index]))
        return image if self.labels is None else (image, self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The images at several indices, from a cache at once."""
        if self.cached is not None:
            return self.cached.__getitems__(indices)
        return [self[index] for index in indices]

    def __getstate__(self) -> dict[str, Any]:
        """Without the paths if there is a cache: millions of them would be sent to each worker."""
        return self.__dict__ if self.cached is None else {**self.__dict__, "files": []}

    def _decode(self, file: Path) -> np.ndarray:
        """The image in a file, (C, H, W) uint8."""
        _, height, width = self.data_shape
        try:
            with Image.open(file) as opened:
                upright = _with_mode(ImageOps.exif_transpose(opened), self.mode)
            fitted = ImageOps.fit(upright, (width, height), method=Image.Resampling.BICUBIC)
        except Exception as error:  # decoders raise anything from OSError to SyntaxError
            raise ValueError(f"cannot read image {file}: {error}") from error
        return np.ascontiguousarray(np.array(fitted).reshape(height, width, -1).transpose(2, 0, 1))

    def _cached(self, folder: Path, split: str) -> MemoryMapped:
        digest = hashlib.sha256(repr((_DECODING, PIL.__version__, self.data_shape)).encode())
        for file in self.files:
            status = file.stat()
            name = file.relative_to(self.path).as_posix()
            digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        array = folder / f"{self.name}-{split}-{digest.hexdigest()[:16]}.npy"
        write_once(array, (len(self.files), *self.data_shape), self._decode_all)
        return MemoryMapped(array, self.labels, self.data)

    def _decode_all(self) -> Iterator[np.ndarray]:
        """The images in their order. Pillow lets go of the interpreter while it decodes: threads share the work."""
        bar = tqdm(total=len(self.files), desc=f"decode {self.name}", unit="image", disable=None)
        with ThreadPoolExecutor() as threads, bar:
            for first in range(0, len(self.files), _AT_ONCE):
                for image in threads.map(self._decode, self.files[first : first + _AT_ONCE]):
                    yield image
                    bar.update()


def _split_files(root: Path, split: str) -> list[Path]:
    """The sorted image files of a split.

    Raises:
        FileNotFoundError: if there are none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"path must be a folder of images, but {root} is not a folder")
    files = _image_files(_split_root(root, split))
    if not _has_split_folders(root):
        files = [file for file in files if _hashed_split(file.relative_to(root)) == split]
    if not files:
        raise FileNotFoundError(f"no image for the {split} split in {root}")
    return files


def _has_split_folders(root: Path) -> bool:
    return any((root / name).is_dir() for name in SPLITS)


def _split_root(root: Path, split: str) -> Path:
    """The folder below which the files of a split are."""
    return root / split if _has_split_folders(root) else root


def _classes(root: Path, split: str, files: Sequence[Path]) -> tuple[tuple[str, ...], torch.Tensor]:
    """The first-level subfolders of both splits, sorted, and which of them each file is in: (N,) int64.

    Raises:
        ValueError: for a file that is in none.
    """
    roots = {_split_root(root, name) for name in SPLITS}
    names = tuple(sorted({_class_name(file, folder) for folder in roots for file in _image_files(folder)}))
    numbers = {name: number for number, name in enumerate(names)}
    own = _split_root(root, split)
    return names, torch.tensor([numbers[_class_name(file, own)] for file in files])


def _class_name(file: Path, root: Path) -> str:
    first, *rest = file.relative_to(root).parts
    if not rest:
        raise ValueError(f"labels=True takes the subfolders of {root} for classes, but {file.name} is in none of them")
    return first


def _image_files(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _hashed_split(name: Path) -> str:
    digest = hashlib.sha256(name.as_posix().encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _ONE_IN_TEST == 0 else "train"


def _as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"size must be a positive integer, a pair (H, W) of them, or None; got {size!r}")
    return pair


def _common_size(files: Sequence[Path]) -> tuple[int, int]:
    """The one size (H, W) of all files, from their headers."""
    first = _upright_size(files[0])
    for file in files[1:]:
        if (other := _upright_size(file)) != first:
            raise ValueError(
                f"size=None needs images of one size, but {files[0]} has (H, W) = {first} and "
                f"{file} has {other}: pass size=..."
            )
    return first


def _upright_size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            width, height = image.size
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise ValueError(f"cannot read image {file}: {error}") from error
    return (width, height) if on_its_side else (height, width)


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to L, RGB or RGBA; where RGBA would become either of the others, over a white background."""
    if image.mode.startswith(("I", "F")):
        # Pillow would clip these to 255, not scale them.
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it to 8 bits first")
    if mode != "RGBA" and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
