"""Data sets as training sees them: codes or real vectors of one shape, with or without class labels.

Codes are served as integers: dequantisation noise is drawn by whoever trains or evaluates, from its own seed,
so that it is fresh at every visit and repeatable all the same (see `DataInfo`).
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset

from sde_diffusion.data.info import DataInfo

Sample: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

SPLITS = ("train", "test")
_UNSIGNED_WITHOUT_REDUCTIONS = (torch.uint16, torch.uint32, torch.uint64)


@runtime_checkable
class DataSource(Protocol):
    """What training asks of a data set: a map-style `torch.utils.data.Dataset` with three attributes more.

    Item i is a value of shape data_shape, or a pair (value, label) when classes > 0.
    """

    data_shape: tuple[int, ...]
    data: DataInfo
    classes: int

    def __len__(self) -> int:
        """The number of items."""

    def __getitem__(self, index: int) -> Sample:
        """The value, or (value, label), at an index."""


# How many examples stand for a data set: enough to notice another one, few enough to read at once.
_LOOKS = 64


def hash_of_examples(dataset: DataSource) -> str:
    """The SHA-256 of up to 64 examples at even distances, with their labels: whatever its size."""
    digest = hashlib.sha256()
    for index in torch.linspace(0, len(dataset) - 1, min(_LOOKS, len(dataset)), dtype=torch.float64).long().tolist():
        item = dataset[index]
        value, label = (item, None) if isinstance(item, torch.Tensor) else (item[0], int(item[1]))
        digest.update(repr((value.dtype, label)).encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ArrayDataset(Dataset[Sample]):
    """A data set held in memory as one tensor.

    Attributes:
        values: (N, *data_shape), codes of dtype `data.code_dtype`, or floats as they were given.
        labels: (N,) int64, or None.
        data: The range and bit depth.
        name: What reports call it.
        data_shape: The shape of one value.
        classes: The largest label plus one; 0 without labels.
    """

    def __init__(
        self,
        values: torch.Tensor,
        labels: torch.Tensor | None = None,
        data: DataInfo | None = None,
        name: str = "array",
    ) -> None:
        """Check and hold the data.

        Args:
            values: (N, *data_shape) integer codes in [0, 2**data.bits), or finite floats.
            labels: (N,) integers from 0, or None.
            data: By default DataInfo(bits=8) for uint8 and DataInfo(bits=None) for floats.
            name: What reports call it.

        Raises:
            ValueError: for empty data, values that are not finite or not codes (naming the first), a bit
                depth that does not fit their dtype, or labels that do not fit the values.
        """
        if values.ndim < 2 or values.numel() == 0:
            raise ValueError(f"values must have shape (N, *data_shape), none of them 0; got {tuple(values.shape)}")
        self.data = _default_info(values.dtype) if data is None else data
        self.values = _checked_values(values, self.data)
        self.labels = None if labels is None else _checked_labels(labels, len(values))
        self.name = name
        self.data_shape = tuple(values.shape[1:])
        self.classes = 0 if self.labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        """The number of items N."""
        return len(self.values)

    def __getitem__(self, index: int) -> Sample:
        """Item index: (value, label), or the value alone in a data set without labels."""
        if self.labels is None:
            return self.values[index]
        return self.values[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The items at several indices, gathered at once: the call of a DataLoader that batches."""
        chosen = torch.as_tensor(indices)
        values = self.values[chosen].unbind()
        if self.labels is None:
            return list(values)
        return list(zip(values, self.labels[chosen].unbind(), strict=True))


class WrappedDataset(Dataset[Sample]):
    """A user's map-style data set, with the attributes that training asks for.

    Items are tensors or pairs (tensor, label); data_shape and dtype are item 0's, and every item is held to
    them when it is fetched. Labels are served where the source says how many classes it has, in an attribute
    `classes`: a number, or a list of names as in torchvision.
    """

    def __init__(self, source: Any, data: DataInfo | None = None) -> None:
        """Wrap source, any object with __len__ and __getitem__.

        Raises:
            ValueError: if the source is empty or its first item is not of the kinds above.
        """
        if len(source) == 0:
            raise ValueError(f"source must not be empty: {type(source).__name__} has length 0")
        classes = getattr(source, "classes", 0)
        self.source = source
        self.name = type(source).__name__
        self.classes = classes if isinstance(classes, int) else len(classes)
        value, _ = self._fetch(0)
        self.data_shape = tuple(value.shape)
        self.data = _default_info(value.dtype) if data is None else data
        # Fetched as training will, so that a source of the wrong kind is refused here.
        self.__getitem__(0)

    def __len__(self) -> int:
        """The number of items of the source."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Item index, checked.

        Raises:
            ValueError: naming the index, if the item is of another shape than item 0, is not finite, is out
                of the codes' range, or has no valid label.
        """
        value, label = self._fetch(index)
        if tuple(value.shape) != self.data_shape:
            raise ValueError(f"item {index} has shape {tuple(value.shape)}, item 0 {self.data_shape}")
        value = _checked_values(value[None], self.data, first_index=index)[0]
        if self.classes == 0:
            return value
        if label is None or not 0 <= int(label) < self.classes:
            raise ValueError(f"item {index} has label {label}, but labels must be in [0, {self.classes})")
        return value, torch.as_tensor(int(label))

    def _fetch(self, index: int) -> tuple[torch.Tensor, Any]:
        item = self.source[index]
        value, label = (*item, None)[:2] if isinstance(item, tuple | list) else (item, None)
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            raise ValueError(
                f"item {index} of {type(self.source).__name__} must be a tensor of at least one dimension, "
                f"or a pair (tensor, label); got {type(value).__name__}"
            )
        return value, label


def as_dataset(source: Any, data: DataInfo | None = None) -> DataSource:
    """Make a data set of whatever holds data.

    Args:
        source: One of
            * a data set that has data_shape, data and classes already: returned as it is;
            * a numpy array or tensor (N, *data_shape): floats are continuous, uint8 are 8-bit codes, and grey
              images (N, H, W) of uint8 become (N, 1, H, W);
            * any map-style data set of tensors or (tensor, label) pairs: wrapped (see `WrappedDataset`).
        data: The range and bit depth, instead of those defaults.

    Raises:
        ValueError: as the two classes do; for images with their channels last, because a wrong guess would
            train on stripes without a word; for a data argument that contradicts the data set's own.
        TypeError: for a source of any other kind.
    """
    if isinstance(source, np.ndarray):
        # A copy in native byte order: torch shares memory with neither foreign-endian nor read-only arrays.
        source = torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("=")))
    if isinstance(source, torch.Tensor):
        return ArrayDataset(_channels_first(source), data=data)
    if isinstance(source, DataSource):
        if data is not None and data != source.data:
            raise ValueError(f"data={data} contradicts the data set's own {source.data}")
        return source
    is_map = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    # A tuple (values, labels) would pass for a data set of two items.
    if is_map and not isinstance(source, tuple | list | dict | str | bytes):
        declared = getattr(source, "data", None)
        return WrappedDataset(source, declared if data is None and isinstance(declared, DataInfo) else data)
    raise TypeError(
        "source must be a data set, a numpy array or tensor (N, *data_shape), or a map-style Dataset with "
        f"__len__ and __getitem__; got {type(source).__name__}"
    )


def check_split(split: str) -> None:
    """Raise a ValueError unless split is "train" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")


def _channels_first(values: torch.Tensor) -> torch.Tensor:
    """Give uint8 images (N, H, W) a channel axis; leave other values, but refuse channels that look last."""
    if values.dtype != torch.uint8:
        return values
    if values.ndim == 3:
        return values[:, None]
    if values.ndim == 4 and values.shape[3] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"source has shape {tuple(values.shape)}, like images (N, H, W, C) with channels last; "
            "expected (N, C, H, W), permute with array.transpose(0, 3, 1, 2) or tensor.permute(0, 3, 1, 2); "
            "if the shape is meant, build an ArrayDataset"
        )
    return values


def _default_info(dtype: torch.dtype) -> DataInfo:
    if dtype.is_floating_point:
        return DataInfo(bits=None)
    if dtype == torch.uint8:
        return DataInfo(bits=8)
    raise ValueError(f"values have dtype {dtype}: say their bit depth with data=DataInfo(bits=...), or pass floats")


def _checked_values(values: torch.Tensor, data: DataInfo, first_index: int = 0) -> torch.Tensor:
    """values (N, *data_shape) in the dtype they are served in; errors count rows from first_index."""
    if values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"values must be integer codes or real floats, got dtype {values.dtype}")
    if values.is_floating_point():
        if data.bits is not None:
            raise ValueError(
                f"values have dtype {values.dtype} but data.bits={data.bits}: pass data=DataInfo(bits=None) "
                "for continuous data, or integer codes"
            )
        bad, allowed = ~values.isfinite().flatten(1).all(1), "finite"
    else:
        if data.bits is None:
            raise ValueError(f"values have dtype {values.dtype} but data.bits=None: pass DataInfo(bits=...), or floats")
        if values.dtype in _UNSIGNED_WITHOUT_REDUCTIONS:
            values = values.to(torch.int64)
        smallest, largest = values.flatten(1).aminmax(dim=1)
        # In int64, because 2**bits need not be representable in the codes' own dtype.
        bad = (smallest.to(torch.int64) < 0) | (largest.to(torch.int64) >= 2**data.bits)
        allowed = f"in [0, {2**data.bits}) for data.bits={data.bits}"
    if bad.any():
        index = first_index + int(bad.int().argmax())
        raise ValueError(f"values must be {allowed}; the first that is not is at index {index}")
    return values if data.bits is None else values.to(data.code_dtype)


def _checked_labels(labels: torch.Tensor, count: int) -> torch.Tensor:
    if labels.shape != (count,):
        raise ValueError(f"labels must have shape ({count},) like the values, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got dtype {labels.dtype}")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    return labels
