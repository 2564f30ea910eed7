"""Data sets that stay on the disk: a .npy file mapped into memory.

    file.npy       magic number, version, a header with dtype and shape (N, ...), then the values, last index fastest

The system reads a page of the file when a value on it is first asked for, and keeps it while nothing else needs the
memory. So a set of any size is open at once, and all workers, ranks and runs on a machine share one copy of it.

Source: NumPy Enhancement Proposal 1, "A simple file format for NumPy arrays".
"""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sde_diffusion.data.datasets import ArrayDataset, Sample, as_dataset, check_split
from sde_diffusion.data.info import DataInfo


class MemoryMapped(Dataset[Sample]):
    """The items of a .npy file (N, ...), each read when it is asked for.

    Only the first item is looked at beforehand: that all codes are in range, and all floats finite, is not checked.
    It pickles as its path and labels, and each process maps the file itself.

    Attributes:
        path: The file.
        labels: (N,) int64, or None.
        data: The range and bit depth.
        name: What reports call it.
        data_shape: The shape of one value.
        classes: The largest label plus one; 0 without labels.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        labels: torch.Tensor | None = None,
        data: DataInfo | None = None,
        name: str = "memory_mapped",
    ) -> None:
        """Read the file's header and its first item.

        Args:
            path: A .npy file of codes or real floats, (N, ...), or (N, H, W) for grey images of uint8.
            labels: (N,) integers from 0, or None.
            data: By default DataInfo(bits=8) for uint8 and DataInfo(bits=None) for floats.
            name: What reports call it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is not a whole .npy file, is in Fortran order, or its first item is none
                that `as_dataset` takes; and for labels that do not fit it.
        """
        self.path = Path(path)
        self._array: np.ndarray | None = None
        array = _mapped(self.path)
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{path}: is in Fortran order, where each item is strewn over the whole file; "
                "save np.ascontiguousarray(array)"
            )
        try:
            # Values of one item stand for the kind of all.
            first = as_dataset(array[:1], data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        assert isinstance(first, ArrayDataset)
        self.data, self.data_shape, self._dtype = first.data, first.data_shape, first.values.dtype
        self._length = len(array)
        self.labels = None if labels is None else _checked_labels(labels, len(array), self.path)
        self.classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.name = name

    def __len__(self) -> int:
        """The number of items N."""
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Item index, copied: (value, label), or the value alone in a data set without labels."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The items at several indices, copied at once: the call of a DataLoader that batches."""
        if self._array is None:
            self._array = _mapped(self.path)
        chosen = np.asarray(indices)
        # In the file's order, which a disk reads faster.
        order = chosen.argsort()
        rows = np.empty((len(chosen), *self._array.shape[1:]), self._array.dtype.newbyteorder("="))
        rows[order] = self._array[chosen[order]]
        values = torch.from_numpy(rows).to(self._dtype).reshape(-1, *self.data_shape).unbind()
        if self.labels is None:
            return list(values)
        return list(zip(values, self.labels[torch.from_numpy(chosen)].unbind(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """All but the map, which would be pickled with its values."""
        return {**self.__dict__, "_array": None}


def array_file(path: str | os.PathLike[str], split: str = "train") -> MemoryMapped:
    """A user's own arrays, in a folder of .npy files that are mapped into memory.

        folder/
          train.npy, test.npy                    (N, C, H, W) uint8, grey (N, H, W), or floats (N, ...)
          train_labels.npy, test_labels.npy      (N,) integers from 0, if there are labels

    Args:
        path: The folder.
        split: "train" or "test".

    Raises:
        FileNotFoundError: if the folder has no array for the split.
        ValueError: for an unknown split, and as `MemoryMapped`, naming the file.
    """
    check_split(split)
    folder = Path(path)
    values, labels = folder / f"{split}.npy", folder / f"{split}_labels.npy"
    if not values.is_file():
        raise FileNotFoundError(f"path must be a folder with {split}.npy in it, but there is no {values}")
    given = None
    if labels.is_file():
        array = _mapped(labels)
        if array.dtype.kind not in "iu":
            raise ValueError(f"{labels}: labels must be integers, got dtype {array.dtype}")
        given = torch.from_numpy(array.astype(np.int64))
    return MemoryMapped(values, given, name=folder.name)


def write_once(path: Path, shape: tuple[int, ...], rows: Callable[[], Iterable[np.ndarray]]) -> None:
    """Write a uint8 .npy file unless it is there: whole or not at all, by one process while the others wait.

    A process that is killed leaves the file under another name, path + ".part", which the next one begins anew; the
    system frees its lock.

    Args:
        path: The file. Folders are made if they are not there.
        shape: (N, ...).
        rows: Makes the N rows in their order; only the process that writes calls it.

    Raises:
        OSError: if the disk has less room than the array takes, saying both; if the file system has no locks, or the
            folder cannot be written to.
    """
    if path.exists():
        return
    import fcntl  # which Windows does not have, and nothing else here needs

    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(f"{path.parent}: its file system has no locks ({error}); choose another") from error
        if not path.exists():
            _write_whole(path, shape, rows)


def _write_whole(path: Path, shape: tuple[int, ...], rows: Callable[[], Iterable[np.ndarray]]) -> None:
    part, size = Path(f"{path}.part"), math.prod(shape)
    try:
        with part.open("wb") as file:
            if (free := shutil.disk_usage(path.parent).free) < size:
                raise OSError(errno.ENOSPC, f"{free / 1e9:.3g} GB are free")
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for row in rows():
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{path}: the array takes {size / 1e9:.3g} GB, but {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except ValueError as error:
        raise ValueError(f"{path}: is not a whole .npy file ({error})") from error


def _checked_labels(labels: torch.Tensor, count: int, path: Path) -> torch.Tensor:
    required = f"labels must be ({count},) integers from 0, one for each item of {path}"
    is_whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (count,) or not is_whole:
        raise ValueError(f"{required}; got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"{required}; got {int(labels.min())}")
    return labels
