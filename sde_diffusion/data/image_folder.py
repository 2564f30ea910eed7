"""A folder of image files as a data set: decoded when they are asked for, resized and cropped to one size."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

from sde_diffusion.data.datasets import SPLITS, check_split
from sde_diffusion.data.info import DataInfo
from sde_diffusion.data.pictures import IMAGE_MODES

_ONE_IN_TEST = 10


class ImageFolder(Dataset[torch.Tensor]):
    """All images below a folder, as uint8 tensors (channels, H, W), in the order of their relative names.

    If the folder has subfolders train and test they are the splits. Else one file in ten is a test image,
    chosen by a hash of its relative name: adding files moves no other to the other side.

    Photographs are turned upright as their EXIF orientation says. Transparent pixels are laid over white,
    unless channels=4 keeps them.

    Attributes:
        files: The paths, sorted.
        data_shape: (channels, H, W).
        data: 8 bits in [-1, 1].
        classes: 0, it has no labels.
        name: The folder's name.
    """

    classes = 0

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        size: int | tuple[int, int] | None = None,
        channels: int = 3,
    ) -> None:
        """List the files; none is decoded yet.

        Args:
            path: The folder, searched recursively for the formats that Pillow opens.
            split: "train" or "test".
            size: (H, W), or one number for both: the largest centred part of that aspect ratio is scaled to
                it (bicubic, antialiased). None if all files have one size already.
            channels: 1 (grey), 3 (RGB) or 4 (RGBA).

        Raises:
            FileNotFoundError: if there is no such folder, or no image for the split in it.
            ValueError: for an invalid argument, and with size=None for the first file of another size.
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

    def __len__(self) -> int:
        """The number of files."""
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Decode file index.

        Raises:
            ValueError: naming the file, if it cannot be decoded or has more than 8 bits a channel.
        """
        _, height, width = self.data_shape
        file = self.files[index]
        try:
            with Image.open(file) as opened:
                upright = _with_mode(ImageOps.exif_transpose(opened), self.mode)
            fitted = ImageOps.fit(upright, (width, height), method=Image.Resampling.BICUBIC)
        except Exception as error:  # decoders raise anything from OSError to SyntaxError
            raise ValueError(f"cannot read image {file}: {error}") from error
        pixels = torch.from_numpy(np.array(fitted)).reshape(height, width, -1)
        return pixels.permute(2, 0, 1).contiguous()

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Decode the files at several indices."""
        return [self[index] for index in indices]


def _split_files(root: Path, split: str) -> list[Path]:
    """The sorted image files of a split.

    Raises:
        FileNotFoundError: if there are none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"path must be a folder of images, but {root} is not a folder")
    if any((root / name).is_dir() for name in SPLITS):
        files = _image_files(root / split)
    else:
        files = [file for file in _image_files(root) if _hashed_split(file.relative_to(root)) == split]
    if not files:
        raise FileNotFoundError(f"no image for the {split} split in {root}")
    return files


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
