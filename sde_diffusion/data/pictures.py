"""Samples as pictures: a grid of images, a scatter plot of points in the plane, or the ways that points took there."""

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


def save_picture(x: torch.Tensor, data: DataInfo, path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Write model-space samples as a picture file, making its folder if need be.

    Args:
        x: (N, C, H, W) with C = 1, 3 or 4: a grid, at 8 bits a channel whatever data.bits, three times
            enlarged if no side is above 64 pixels. (N, 2): a scatter plot.
        data: The range of x; data.low is black and data.high is white.
        path: Where to, with the ending of a picture format, such as .png.
        columns: Images a row, as in ``image_grid``; of no meaning for points.

    Raises:
        ValueError: for any other shape, or columns below 1.
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
    image_grid(dataclasses.replace(data, bits=8).quantize(x), columns, zoom).save(path)


def _save_scatter_plot(points: torch.Tensor, path: Path) -> None:
    # Imported here because it takes longer than the rest of the package, which needs no plots.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    horizontal, vertical = points.detach().cpu().unbind(dim=1)
    axes.scatter(horizontal, vertical, s=4, linewidths=0, alpha=0.6)
    figure.savefig(path, dpi=120)


def save_trajectories(
    trajectories: Sequence[torch.Tensor],
    points: Sequence[torch.Tensor],
    titles: Sequence[str],
    path: str | os.PathLike[str],
    curve: torch.Tensor | None = None,
) -> None:
    """Write panels side by side: the ways that points take in the plane, from light to dark, to black dots.

    Args:
        trajectories: (K, n, 2) a panel, K >= 2 states of n points, from the first to the last.
        points: (m, 2) a panel, the dots, whose surroundings are what is shown.
        titles: One a panel.
        path: Where to, with the ending of a picture format, such as .png; its folder is made if need be.
        curve: (l, 2), a grey line through all panels.

    Raises:
        ValueError: for other shapes, no panel, or unequal numbers of panels.
    """
    if not len(trajectories) == len(points) == len(titles) > 0:
        raise ValueError(
            f"trajectories, points and titles must be as many, and not none; "
            f"got {len(trajectories)}, {len(points)} and {len(titles)}"
        )
    for way, dots in zip(trajectories, points, strict=True):
        if way.ndim != 3 or way.shape[2] != 2 or len(way) < 2 or dots.ndim != 2 or dots.shape[1] != 2 or not len(dots):
            raise ValueError(
                f"trajectories must be (K, n, 2) with K >= 2, and points (m, 2); "
                f"got {tuple(way.shape)} and {tuple(dots.shape)}"
            )
    # Imported here for the same reason as below.
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(titles), 4.3), layout="constrained")
    for axes, way, dots, title in zip(
        figure.subplots(1, len(titles), squeeze=False)[0], trajectories, points, titles, strict=True
    ):
        way, dots = way.detach().cpu(), dots.detach().cpu()
        # (K - 1) n segments (2, 2), those of a step together and later steps above earlier ones.
        segments = torch.stack([way[:-1], way[1:]], dim=2).flatten(0, 1)
        step = torch.arange(len(way) - 1).repeat_interleave(way.shape[1])
        lines = LineCollection(list(segments.numpy()), cmap="YlGnBu", linewidths=0.7, alpha=0.7)
        lines.set_array(step.numpy())
        # The lightest fifth of the colours is hardly seen on white.
        lines.set_clim(-len(way) / 4, len(way))
        axes.add_collection(lines)
        if curve is not None:
            axes.plot(*curve.detach().cpu().unbind(dim=1), color="silver", linewidth=3, zorder=0)
        axes.scatter(*dots.unbind(dim=1), s=14, color="black", zorder=3)
        centre = dots.mean(dim=0)
        reach = 1.3 * float((dots - centre).abs().max())
        axes.set(
            title=title,
            aspect="equal",
            xlim=(float(centre[0]) - reach, float(centre[0]) + reach),
            ylim=(float(centre[1]) - reach, float(centre[1]) + reach),
            xticks=[],
            yticks=[],
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
