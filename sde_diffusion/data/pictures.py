"""Samples as pictures: a grid of images, or a scatter plot of points in the plane."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sde_diffusion.data.info import DataInfo

# Pillow's name of a picture's pixels, by their number of channels.
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_GAP = 2
_SMALL_IMAGE = 64


def image_grid(images: torch.Tensor, columns: int | None = None, zoom: int = 1) -> Image.Image:
    """Images side by side on white, row by row, 2 pixels apart.

    Args:
        images: (N, C, H, W) uint8, C = 1, 3 or 4.
        columns: Images a row, by default the smallest number that makes no fewer columns than rows.
        zoom: Each pixel becomes zoom x zoom pixels.

    Raises:
        ValueError: for images of another shape or dtype, or numbers below 1.
    """
    is_image_batch = images.ndim == 4 and images.shape[1] in IMAGE_MODES and images.numel() > 0
    if images.dtype != torch.uint8 or not is_image_batch:
        raise ValueError(
            f"images must be uint8 (N, C, H, W) with C one of {', '.join(map(str, IMAGE_MODES))}, not empty; "
            f"got {images.dtype}, shape {tuple(images.shape)}"
        )
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1 or zoom < 1:
        raise ValueError(f"columns and zoom must be at least 1, got columns={columns}, zoom={zoom}")
    cell_height, cell_width = zoom * height + _GAP, zoom * width + _GAP
    size = (columns * cell_width + _GAP, math.ceil(count / columns) * cell_height + _GAP)
    mode = IMAGE_MODES[channels]
    grid = Image.new(mode, size, "white")
    pixels = images.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        tile = Image.frombytes(mode, (width, height), picture.tobytes())
        tile = tile.resize((zoom * width, zoom * height), Image.Resampling.NEAREST)
        grid.paste(tile, (_GAP + column * cell_width, _GAP + row * cell_height))
    return grid


def has_picture(data_shape: Sequence[int]) -> bool:
    """Whether ``save_picture`` can draw data of this shape: images (C, H, W), or points in the plane (2,)."""
    return tuple(data_shape) == (2,) or (len(data_shape) == 3 and data_shape[0] in IMAGE_MODES)


def save_picture(x: torch.Tensor, data: DataInfo, path: str | os.PathLike[str]) -> None:
    """Write model-space samples as a picture file, making its folder if need be.

    Args:
        x: (N, C, H, W) with C = 1, 3 or 4: a grid, at 8 bits a channel whatever data.bits, three times
            enlarged if no side is above 64 pixels. (N, 2): a scatter plot.
        data: The range of x; data.low is black and data.high is white.
        path: Where to, with the ending of a picture format, such as .png.

    Raises:
        ValueError: for any other shape.
    """
    if not has_picture(x.shape[1:]) or x.numel() == 0:
        raise ValueError(
            f"x must be images (N, C, H, W) with C one of {', '.join(map(str, IMAGE_MODES))}, "
            f"or points (N, 2), not empty; got shape {tuple(x.shape)}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if x.ndim == 2:
        _save_scatter_plot(x, path)
        return
    zoom = 3 if max(x.shape[2:]) <= _SMALL_IMAGE else 1
    image_grid(dataclasses.replace(data, bits=8).quantize(x), zoom=zoom).save(path)


def _save_scatter_plot(points: torch.Tensor, path: Path) -> None:
    # Imported here because it takes longer than the rest of the package, which needs no plots.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    horizontal, vertical = points.detach().cpu().unbind(dim=1)
    axes.scatter(horizontal, vertical, s=4, linewidths=0, alpha=0.6)
    figure.savefig(path, dpi=120)
