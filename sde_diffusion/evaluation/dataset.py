r"""Likelihoods and bounds of a whole data set, example by example, that go on where they were interrupted.

    directory/
      settings.json          what the numbers depend on: model, data, options, seed
      examples-0-….jsonl     a line an example; each start of each rank, here 0, writes a file of its own
      result.json            once every example is there: the mean, its errors, and what it cost
      histogram.png          the examples' values

Of n examples with values v, and estimates' standard errors s and solver's errors e, all a dimension:

    mean              v̄ = Σ v/n
    std_error         √(Σ s²)/n                     how far a repeat with another seed would be
    solver_error      Σ |e|/n                       how far an exact solver would be; the errors may have one sign
    sampling_error    √(Σ (v − v̄)²/(n − 1))/√n      how far other examples would be

Example i draws from stream i of the seed, so that batches, ranks and interruptions change its numbers only where
rounding has an adaptive solver take other steps, which is within their errors. Ranks share nothing but the directory:
rank r of R takes the examples r, r + R, r + 2R, … that no file holds yet, none waits for another, and whichever sees
all examples on the disk writes the result. A file is only ever appended to by the process that made it; a line without
its end is what a killed one left, and is not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from sde_diffusion.bound import variational_bound
from sde_diffusion.data.datasets import DataSource, as_dataset, hash_of_examples
from sde_diffusion.evaluation.metrics import Moments
from sde_diffusion.likelihood import bits_per_dim, log_likelihood
from sde_diffusion.model import Model
from sde_diffusion.storage import flatten, read_json, write_json

# Examples (B, *data_shape) and their indices in the data set to columns (B,) by name, the value that matters first.
Measure: TypeAlias = Callable[[Tensor, list[int]], Mapping[str, Tensor]]
Row: TypeAlias = dict[str, Any]

_SETTINGS, _RESULT, _HISTOGRAM = "settings.json", "result.json", "histogram.png"
_LINES = "examples-*.jsonl"


@dataclass(frozen=True)
class DatasetResult:
    """What ``evaluate_dataset`` returns: a table of the examples, and what follows from it.

    Attributes:
        quantity: the name of the column of values, "bits_per_dim" or "nats_per_dim".
        columns: (n,) each, by name, in the order of the data set; int64 what was counted, else float64. An error that
            could not be estimated is NaN. "seconds" are an example's share of its batch's.
        settings: what the numbers depend on.
        ranks: how many processes shared the examples, in the end.
        directory: where the files are.
    """

    quantity: str
    columns: dict[str, Tensor]
    settings: dict[str, Any]
    ranks: int
    directory: Path

    @property
    def count(self) -> int:
        """n, the number of examples."""
        return len(self.values)

    @property
    def values(self) -> Tensor:
        """(n,) the column of values."""
        return self.columns[self.quantity]

    @property
    def unit(self) -> str:
        """Of the values: "bits/dim" or "nats/dim"."""
        return self.quantity.replace("_per_", "/")

    @property
    def mean(self) -> float:
        """Over the examples."""
        return float(self.values.mean())

    @property
    def std_error(self) -> float:
        """Of the mean, from the estimator alone; NaN if it was not estimated."""
        return float(self._column("std_error").square().sum().sqrt()) / self.count

    @property
    def solver_error(self) -> float:
        """Of the mean, from the solver, an estimate; NaN if there is none."""
        return float(self._column("solver_error").abs().mean())

    @property
    def sampling_error(self) -> float:
        """Of the mean, from one example to another; NaN for one."""
        return float(self.values.std() / math.sqrt(self.count)) if self.count > 1 else math.nan

    @property
    def seconds(self) -> float:
        """Of computing, added up over ranks."""
        return float(self.columns["seconds"].sum())

    @property
    def totals(self) -> dict[str, int]:
        """What was counted, added up: evaluations of the network, and products with its derivative."""
        return {name: int(column.sum()) for name, column in self.columns.items() if not column.is_floating_point()}

    @property
    def parts(self) -> dict[str, float]:
        """Means of the other columns, such as the terms of a bound."""
        known = {self.quantity, "std_error", "solver_error", "seconds", *self.totals}
        return {name: float(column.mean()) for name, column in self.columns.items() if name not in known}

    @property
    def histogram(self) -> Path:
        """The picture."""
        return self.directory / _HISTOGRAM

    def summary(self) -> dict[str, Any]:
        """What result.json holds."""
        numbers = {"mean": self.mean, "std_error": self.std_error, "solver_error": self.solver_error}
        return {
            "quantity": self.quantity,
            "count": self.count,
            **_finite_or_none(numbers | {"sampling_error": self.sampling_error}),
            "parts": _finite_or_none(self.parts),
            "totals": self.totals,
            "seconds": self.seconds,
            "ranks": self.ranks,
            "settings": self.settings,
        }

    def _column(self, name: str) -> Tensor:
        return self.columns.get(name, torch.full_like(self.values, math.nan))


def likelihood_measure(model: Model, **options: Any) -> Measure:
    """A measure for ``evaluate_dataset``: −log p a dimension under the probability-flow ODE.

    Bits a dimension of codes, uniformly dequantised, by ``bits_per_dim``; nats of continuous data by
    ``log_likelihood``.

    Args:
        model: a trained or exact model.
        **options: those of the function.
    """

    def of_codes(examples: Tensor, indices: list[int]) -> Mapping[str, Tensor]:
        bits = bits_per_dim(model, examples, indices=indices, **options)
        return {
            "bits_per_dim": bits.per_example,
            "std_error": bits.per_example_std_error,
            "solver_error": bits.per_example_solver_error,
            "nfe": bits.nfe,
            "derivative_evaluations": bits.derivative_evaluations,
        }

    def of_continuous(examples: Tensor, indices: list[int]) -> Mapping[str, Tensor]:
        likelihood = log_likelihood(model, examples.to(model.dtype), indices=indices, **options)
        dimension = math.prod(model.data_shape)
        return {
            "nats_per_dim": -likelihood.log_prob / dimension,
            "std_error": likelihood.std_error / dimension,
            "solver_error": likelihood.solver_error / dimension,
            "nfe": likelihood.nfe,
            "derivative_evaluations": likelihood.derivative_evaluations,
        }

    return of_continuous if model.data.bits is None else of_codes


def bound_measure(model: Model, **options: Any) -> Measure:
    """A measure for ``evaluate_dataset``: the variational bound and its three parts, a dimension.

    Args:
        model: a trained or exact model.
        **options: those of ``variational_bound``.
    """

    def measure(examples: Tensor, indices: list[int]) -> Mapping[str, Tensor]:
        images = examples.to(model.dtype) if model.data.bits is None else examples
        bound = variational_bound(model, images, indices=indices, **options)
        return {
            bound.unit.replace("/", "_per_"): bound.per_example,
            "std_error": bound.per_example_std_error,
            "prior": bound.per_dimension(bound.prior),
            "transitions": bound.per_dimension(bound.transitions.sum(1)),
            "decoder": bound.per_dimension(bound.decoder),
            "nfe": torch.full((len(images),), bound.nfe),
        }

    return measure


def evaluate_dataset(
    measure: Measure,
    dataset: Any,
    directory: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    count: int | None = None,
    batch_size: int = 64,
    rank: int = 0,
    ranks: int = 1,
    progress: bool | None = None,
) -> DatasetResult | None:
    """Measure every example of a data set exactly once, on any number of ranks and after any interruption.

    Called again with the same directory it goes on with the examples that are left, also with another ``count``,
    ``batch_size`` or number of ranks.

    Args:
        measure: maps examples (B, *data_shape) and their B indices to columns (B,), the value that matters first and
            "std_error" and "solver_error" by these names, if it has them; as ``likelihood_measure`` makes one.
        dataset: whatever ``as_dataset`` takes; examples are fetched batch by batch, without their labels.
        directory: where the files are, made with the first batch.
        settings: JSON values that the numbers depend on; a fingerprint of the data is added.
        count: only the first so many examples; all by default.
        batch_size: examples measured together.
        rank: which of the processes this is, from 0.
        ranks: how many processes share the examples.
        progress: whether rank 0 shows a bar of its share, with the mean so far ± its standard error over examples; by
            default on a terminal.

    Returns:
        The result, which result.json and histogram.png hold too; None as long as other ranks are not done.

    Raises:
        ValueError: for an argument that is wrong; for a directory of other settings, naming the first that differs;
            for a damaged line, naming file and line; for a value that is not finite, naming the example. What is on
            the disk stays there.
    """
    for name, number in (("count", count), ("batch_size", batch_size), ("ranks", ranks)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank = {rank}: must be in [0, {ranks}), the ranks there are")
    dataset, directory = as_dataset(dataset), Path(directory)
    count = len(dataset) if count is None else min(count, len(dataset))
    # As they will be read back.
    known = json.loads(json.dumps({**settings, "fingerprint": fingerprint(dataset)}))
    _check_settings(directory, known)
    rows = _read(directory, len(dataset))
    share = range(rank, count, ranks)
    left = [index for index in share if index not in rows]
    moments = _Running([row for index, row in rows.items() if index < count])
    is_hidden = rank > 0 or (None if progress is None else not progress)
    bar = tqdm(total=len(share), initial=len(share) - len(left), unit="example", disable=is_hidden)
    bar.set_postfix_str(str(moments))
    with bar, _Lines(directory, known, rank) as lines:
        for first in range(0, len(left), batch_size):
            batch = _measure(measure, dataset, left[first : first + batch_size])
            lines.append(batch)
            moments.add(batch)
            bar.set_postfix_str(str(moments), refresh=False)
            bar.update(len(batch))
    # Again, for what the other ranks have written since.
    rows = _read(directory, len(dataset))
    if any(index not in rows for index in range(count)):
        return None
    result = _tabulate([rows[index] for index in range(count)], known, ranks, directory)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        _save_histogram(result, Path(folder) / _HISTOGRAM)
        write_json(Path(folder) / _RESULT, result.summary())
        for name in (_HISTOGRAM, _RESULT):
            (Path(folder) / name).replace(directory / name)
    return result


def fingerprint(dataset: DataSource) -> str:
    """A hash of the number of examples, their shape and range, and of what ``hash_of_examples`` looks at."""
    described = (len(dataset), tuple(dataset.data_shape), dataset.data, hash_of_examples(dataset))
    return hashlib.sha256(repr(described).encode()).hexdigest()


def _examples(dataset: DataSource, indices: Sequence[int]) -> Tensor:
    """(B, *data_shape), without labels."""
    items = [dataset[index] for index in indices]
    return torch.stack([item if isinstance(item, Tensor) else item[0] for item in items])


def _measure(measure: Measure, dataset: DataSource, indices: list[int]) -> list[Row]:
    """The lines of some examples: the index, the columns, and an equal share of the time."""
    started = time.perf_counter()
    measured = measure(_examples(dataset, indices), indices)
    columns = {name: column.tolist() for name, column in measured.items()}
    seconds = (time.perf_counter() - started) / len(indices)
    quantity = next(iter(columns))
    rows = []
    for place, index in enumerate(indices):
        row = {name: column[place] for name, column in columns.items()}
        if not math.isfinite(row[quantity]):
            raise ValueError(f"example {index}: {quantity} = {row[quantity]}: must be finite")
        rows.append({"index": index, **_finite_or_none(row), "seconds": seconds})
    return rows


class _Running:
    """The mean of the values so far ± its standard error over examples."""

    def __init__(self, rows: Sequence[Row]):
        self._moments = Moments(1)
        self.add(rows)

    def add(self, rows: Sequence[Row]) -> None:
        if rows:
            self._moments.update(torch.tensor([[row[_quantity(row)]] for row in rows], dtype=torch.float64))

    def __str__(self) -> str:
        if self._moments.count == 0:
            return ""
        error = math.sqrt(self._moments.covariance / self._moments.count) if self._moments.count > 1 else math.nan
        return f"{float(self._moments.mean):.4f} ± {error:.4f}"


class _Lines:
    """A new file of lines in a directory; neither is there before the first line."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], rank: int):
        self._directory, self._settings, self._rank = directory, settings, rank
        self._file: BinaryIO | None = None

    def append(self, rows: Sequence[Row]) -> None:
        """Add lines and have them written to the disk now."""
        if self._file is None:
            self._file = self._open()
        self._file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _open(self) -> BinaryIO:
        self._directory.mkdir(parents=True, exist_ok=True)
        if not (self._directory / _SETTINGS).exists():
            with tempfile.TemporaryDirectory(dir=self._directory) as folder:
                write_json(Path(folder) / _SETTINGS, self._settings)
                (Path(folder) / _SETTINGS).replace(self._directory / _SETTINGS)
        return (self._directory / _LINES.replace("*", f"{self._rank}-{time.time_ns()}")).open("xb")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _check_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a directory whose numbers are of something else."""
    path = directory / _SETTINGS
    if not path.exists():
        if list(directory.glob(_LINES)):
            raise ValueError(f"{directory}: holds examples, but no {_SETTINGS} says of what; give another directory")
        return
    stored, given = flatten(read_json(path)), flatten(settings)
    for name in [*given, *stored]:
        if stored.get(name) != given.get(name):
            raise ValueError(
                f"{name} = {given.get(name)!r}: the examples in {directory} were evaluated with {stored.get(name)!r}; "
                "go on with that, or give another directory"
            )


def _read(directory: Path, size: int) -> dict[int, Row]:
    """The lines of all files by index, without the index; of an example that two ranks measured, the first."""
    rows: dict[int, Row] = {}
    for path in sorted(directory.glob(_LINES)):
        # What follows the last end of a line is nothing, or torn.
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                index = row.pop("index")
                if not (isinstance(index, int) and 0 <= index < size and math.isfinite(row[_quantity(row)])):
                    raise ValueError(f"index {index}")
                if rows and row.keys() != next(iter(rows.values())).keys():
                    raise ValueError(f"columns {', '.join(row)}")
            except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
                raise ValueError(
                    f"{path}, line {number}: not the line of an example ({error}); without the line it is measured anew"
                ) from error
            rows.setdefault(index, row)
    return rows


def _quantity(row: Row) -> str:
    """The first column but the index."""
    return next(name for name in row if name != "index")


def _tabulate(rows: Sequence[Row], settings: dict[str, Any], ranks: int, directory: Path) -> DatasetResult:
    columns = {}
    for name in rows[0]:
        column = [math.nan if row[name] is None else row[name] for row in rows]
        columns[name] = torch.tensor(column, dtype=torch.int64 if isinstance(column[0], int) else torch.float64)
    return DatasetResult(_quantity(rows[0]), columns, settings, ranks, directory)


def _finite_or_none(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _save_histogram(result: DatasetResult, path: Path) -> None:
    # Imported here because it takes longer than the rest of the package, which needs no plots.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(result.values.numpy(), bins=max(10, min(100, math.isqrt(result.count))))
    axes.axvline(result.mean, color="black", linewidth=1)
    axes.set(
        title=f"{result.mean:.4f} ± {result.sampling_error:.4f} over {result.count} examples",
        xlabel=f"{result.unit} of an example",
        ylabel="examples",
    )
    figure.savefig(path, dpi=100)
