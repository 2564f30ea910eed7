"""What a run tells of itself: lines of numbers, in files and to TensorBoard, and where its time went."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sde_diffusion.storage import write_text


class Log:
    """A file of JSON lines and TensorBoard, each without the lines that a resumed run will write again.

    Attributes:
        lines: those so far, in order.
    """

    def __init__(self, workdir: Path | None, name: str, step: int):
        """Go on after ``step`` with the file of this name in a run's directory; without one nothing is written."""
        self._file: Any = None
        self.lines: list[dict[str, float]] = []
        if workdir is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        path = workdir / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # A run that was killed may have left half a line, which has no end.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        self.lines = [json.loads(line) for line in kept]
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard" / name), purge_step=step + 1)

    @property
    def last(self) -> dict[str, float]:
        """The last line; empty without any."""
        return self.lines[-1] if self.lines else {}

    def write(self, numbers: Mapping[str, float]) -> None:
        """Add a line, with its "step"."""
        self.lines.append(dict(numbers))
        if self._file is None:
            return
        self._file.write(json.dumps(numbers) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            if name != "step":
                self._board.add_scalar(name, value, int(numbers["step"]))

    def sync(self) -> None:
        """Have the lines written to the disk now: no checkpoint is to outlive the lines before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        """The log itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


class Stopwatch:
    """How long each part of the work takes, on the device that does it, without waiting for it but when it is read."""

    def __init__(self, device: torch.device, parts: Sequence[str] = ()):
        """Start; ``parts`` are told of in every reading, others where there was something of them."""
        self._parts, self._device = parts, None if device.type == "cpu" else device
        self._started, self._marks = time.perf_counter(), [("", self._now())]

    def lap(self, part: str) -> None:
        """Count what was done since the last call for ``part``."""
        self._marks.append((part, self._now()))

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and the share of each part."""
        if self._device:
            torch.accelerator.synchronize(self._device)
        elapsed = time.perf_counter() - self._started
        seconds = dict.fromkeys([*self._parts, *(part for part, _ in self._marks[1:])], 0.0)
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += begin.elapsed_time(end) / 1000 if self._device else end - begin
        self._started, self._marks = time.perf_counter(), [("", self._now())]
        return elapsed, {part: spent / elapsed for part, spent in seconds.items()}

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event
