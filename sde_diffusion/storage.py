"""Files of a run: safetensors and JSON, each whole or absent, and tensors that several ranks wrote a part of each.

    model.safetensors                   all tensors of one process
    model.rank-3-of-8.safetensors       rows of each tensor, those of rank 3 of 8; "part" in its header is JSON, the
                                        header of the whole and {tensor: [first row, shape of the whole tensor]}

Both are asked for by the first name. Whoever reads takes the rows it needs from whatever files have them, so what N
ranks wrote is read by any other number. The safetensors storage of torch.distributed.checkpoint is much the same, but
has no header for what rebuilds a model, and takes a tensor's shape from the parts that are there: it misses none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

_PART = "part"


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another model, or cannot be written."""


class Rows(NamedTuple):
    """Which rows of a tensor are at hand: ``size`` from ``first`` on, of a whole of ``shape``; a number has one."""

    first: int
    size: int
    shape: tuple[int, ...]


def own_rows(tensor: Tensor) -> Rows:
    """The rows of a tensor that this rank holds: all, unless it is sharded by ``fully_shard``."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Rows(0, shape[0] if shape else 1, shape)
    (placement,), mesh = tensor.placements, tensor.device_mesh
    assert isinstance(placement, Shard)
    assert placement.dim == 0
    # As torch.chunk divides: parts of one size, the last ones smaller or empty.
    size = -(-shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * size, shape[0])
    return Rows(first, len(tensor.to_local()), shape)


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StoredTensors:
    """The tensors of a file, or of the parts of it that several ranks wrote.

    Attributes:
        path: its name, whether there are parts or not.
        header: strings that were stored with the tensors.
        shapes: of the whole tensors, by their names, in alphabetical order.
    """

    def __init__(self, path: Path):
        """Read headers only.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        self.path, self.header = path, dict[str, str]()
        self._parts: dict[str, list[tuple[Path, Rows]]] = {}
        for file in files_of(path):
            with _opened(file) as stored:
                header = stored.metadata() or {}
                part = json.loads(header.get(_PART, "{}"))
                self.header |= part.get("header", header)
                index = part.get("rows", {})
                for name in stored.keys():  # noqa: SIM118 (no mapping)
                    shape = tuple(stored.get_slice(name).get_shape())
                    first, whole = index.get(name, (0, shape))
                    rows = Rows(first, shape[0] if shape else 1, tuple(whole))
                    self._parts.setdefault(name, []).append((file, rows))
        self.shapes = {name: parts[0][1].shape for name, parts in sorted(self._parts.items())}

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A tensor, or some rows of it; CheckpointError if a part of it is missing or damaged."""
        parts = self._parts[name]
        if not self.shapes[name] or (rows is None and parts[0][1].size == self.shapes[name][0]):
            with _opened(parts[0][0]) as stored:
                return stored.get_tensor(name)
        first, size, shape = rows or Rows(0, self.shapes[name][0], self.shapes[name])
        pieces = []
        for file, part in sorted(parts, key=lambda part: part[1].first):
            begin, end = max(first, part.first), min(first + size, part.first + part.size)
            with _opened(file) as stored:
                pieces.append(stored.get_slice(name)[max(0, begin - part.first) : max(0, end - part.first)])
        read = torch.cat(pieces)
        if len(read) != size:
            raise CheckpointError(f"{self.path}: tensor {name}: {len(read)} of the rows are there, of shape {shape}")
        return read


def files_of(path: Path) -> list[Path]:
    """The file of this name, or the parts of it that ranks wrote, in the order of their ranks."""
    parts = {
        int(part.name.split(".rank-")[1].split("-")[0]): part for part in path.parent.glob(_part_name(path, "*-of-*"))
    }
    return [parts[rank] for rank in sorted(parts)] if parts and not path.exists() else [path]


def part_of(path: Path, rank: int, ranks: int) -> Path:
    """The name of a rank's part of a file."""
    return path.with_name(_part_name(path, f"{rank}-of-{ranks}"))


def _part_name(path: Path, which: str) -> str:
    return f"{path.stem}.rank-{which}{path.suffix}"


def fill(module: nn.Module, stored: StoredTensors) -> None:
    """Copy tensors into a module, keeping its memory format; into a sharded one the rows of this rank.

    Raises:
        CheckpointError: naming the first tensor that is missing, left over, or of another shape.
    """
    tensors = module.state_dict()
    for name in [*tensors, *stored.shapes]:
        if name not in stored.shapes or name not in tensors or tuple(tensors[name].shape) != stored.shapes[name]:
            found = stored.shapes.get(name, "nothing")
            needed = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(f"{stored.path}: tensor {name}: the file has {found}, the network {needed}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own(tensor).copy_(stored.read(name, own_rows(tensor) if isinstance(tensor, DTensor) else None))


class Contents:
    """Tensors as they are now, on their way to a file: copies on the CPU of what this rank has of each."""

    def __init__(self, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None, is_first: bool = True):
        """Copy them, also those that share memory, which safetensors refuses; what is not sharded only on one rank."""
        tensors = {name: tensor for name, tensor in tensors.items() if is_first or isinstance(tensor, DTensor)}
        index = {name: own_rows(tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        self._header = {**(header or {})}
        if index:
            rows_of = {name: (rows.first, rows.shape) for name, rows in index.items()}
            # One entry: safetensors writes several in an order that differs from one time to the next.
            self._header = {_PART: json.dumps({"header": self._header, "rows": rows_of}, sort_keys=True)}
        self._copies = {
            name: own(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self.nbytes = sum(copy.nbytes for copy in self._copies.values())

    def write(self, path: Path) -> None:
        """Write a .safetensors file, whole or not at all.

        Raises:
            OSError: if it cannot be written, as on a full disk.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(self._copies, partial, metadata=self._header)
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from error
        sync(partial)
        partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def checksum(*files: Path) -> str:
    """The SHA-256 of files one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file or directory to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
