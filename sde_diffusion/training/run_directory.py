"""What surrounds a run's steps: a directory of its own, a record of what it was begun with, and a clean end.

    workdir/
      lock                              held by the process that trains; the system frees it when that process ends
      config.json                       the resolved config
      manifest.json                     that config, when the run was begun, with which versions and which data
      metrics.jsonl, tensorboard/       a line every log_every steps
      evaluations.jsonl                 a line for each evaluation
      samples/                          sample pictures
      averages/                         snapshots of power-function averages
      checkpoints/                      see checkpoint.py

A run goes on only with the config and the data it was begun with, and with the same major version of the library.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

import sde_diffusion
from sde_diffusion.data.datasets import DataSource, hash_of_examples
from sde_diffusion.storage import CheckpointError, read_json, write_json
from sde_diffusion.training.config import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 1.0

# What an error says of each part of a fingerprint.
_PHRASES = {
    "examples": "{} examples",
    "shape": "examples of shape {}",
    "range": "the range {}",
    "classes": "{} classes",
    "sha256": "other examples (SHA-256 of some: {})",
}


class Interrupted(SystemExit):
    """A run has stopped at SIGTERM or SIGINT, after a checkpoint: uncaught, the process exits with 128 + the signal."""

    code: int

    def __init__(self, received: signal.Signals, step: int, workdir: Path):
        """Of the signal, the step that was finished and the run's directory."""
        super().__init__(128 + received)
        self.received, self.step, self.workdir = received, step, workdir

    def __str__(self) -> str:
        """One line for the user."""
        return f"{self.received.name} after step {self.step}: its checkpoint is in {self.workdir}"


class Signals:
    """Within a with statement, the first SIGTERM or SIGINT is noted; a second one has its usual effect.

    The same signal soon after counts as the first: a scheduler sends it to all processes of a job, and the launcher
    among them sends it on.

    Attributes:
        received: the signal, or None as long as there was none.
    """

    def __init__(self, are_noted: bool = True):
        """Leave the signals alone if they are not to be noted, or outside of the main thread, which alone can."""
        self.received: signal.Signals | None = None
        self._are_noted = are_noted and threading.current_thread() is threading.main_thread()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        """Set the handlers, but not of a signal that is ignored, as SIGINT is in a shell's background jobs."""
        for number in _SIGNALS if self._are_noted else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._echo = signal.Signals(number), _Echo(number)
        elif not self._echo.is_of(number):
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *exception: object) -> None:
        """Set the handlers that were there before."""
        while self._previous:
            signal.signal(*self._previous.popitem())


def outlast_a_signal(worker: int) -> None:
    """In a process that loads data for a run: let the first SIGTERM and SIGINT pass, and the next end it.

    A terminal or a scheduler sends them to every process of a run, which needs its workers to finish the step.
    """
    echoes: dict[int, _Echo] = {}

    def pass_by(number: int, frame: FrameType | None) -> None:
        if not echoes.setdefault(number, _Echo(number)).is_of(number):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for each in _SIGNALS:
        signal.signal(each, pass_by)


class _Echo:
    """Whether a signal is the same one, told again by another process."""

    def __init__(self, number: int):
        self._number, self._heard = number, time.monotonic()

    def is_of(self, number: int) -> bool:
        return number == self._number and time.monotonic() - self._heard < _ECHO_SECONDS


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Have a run directory, made if it is not there, to this process alone.

    Raises:
        ConfigError: if another process has it, with that process's id.
    """
    import fcntl  # which Windows does not have, and nothing but training needs

    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"workdir = {str(workdir)!r}: process {file.read().strip()} trains there; wait for its end, "
                "or choose another directory"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{workdir}: its file system has no locks ({error}): let no other process train there", stacklevel=2
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


_held: set[TextIO] = set()


def _close_locks() -> None:
    """Let a forked process, such as one that loads data, not keep the lock of a run that is killed before it."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def write_manifest(workdir: Path, config: Mapping[str, Any], dataset: DataSource) -> None:
    """Write config.json and manifest.json of a run that begins."""
    write_json(workdir / "config.json", config)
    manifest = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "sde_diffusion": sde_diffusion.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "seed": config["seed"],
        "data": data_fingerprint(dataset),
        "config": config,
    }
    write_json(workdir / "manifest.json", manifest)


def check_version(workdir: Path) -> None:
    """Refuse to go on with a run of another major version of the library.

    Raises:
        CheckpointError: naming both versions; also for a manifest that is damaged.
    """
    manifest = _read_manifest(workdir)
    if manifest is None:
        return
    begun, present = manifest["versions"]["sde_diffusion"], sde_diffusion.__version__
    if begun.partition(".")[0] != present.partition(".")[0]:
        raise CheckpointError(
            f"{workdir}: the run was begun with sde_diffusion {begun}, and this is {present}: install {begun} to go on "
            "with it, or begin anew in another directory"
        )


def check_data(workdir: Path, dataset: DataSource) -> None:
    """Refuse to go on with a run under data that are not those it was begun with.

    Raises:
        ConfigError: naming what differs.
    """
    manifest = _read_manifest(workdir)
    if manifest is None:
        return
    stored, given = manifest["data"], data_fingerprint(dataset)
    for name, phrase in _PHRASES.items():
        is_fixed = name != "sha256" or None not in (stored.get(name), given[name])
        if is_fixed and stored.get(name) != given[name]:
            raise ConfigError(
                f"dataset has {phrase.format(given[name])}: the run in {workdir} was trained on {stored.get(name)}; "
                "give it the same data to go on, or another directory to begin anew"
            )


def data_fingerprint(dataset: DataSource) -> dict[str, Any]:
    """What tells a data set from another, whatever its size: two looks at up to 64 examples at even distances.

    Returns:
        JSON values: the number of examples, their shape, range and classes, and the SHA-256 of those looked at; None
        for examples that are others at the second look, as randomly augmented ones are.
    """
    first, second = hash_of_examples(dataset), hash_of_examples(dataset)
    return {
        "examples": len(dataset),
        "shape": list(dataset.data_shape),
        "range": asdict(dataset.data),
        "classes": dataset.classes,
        "sha256": first if first == second else None,
    }


def _read_manifest(workdir: Path) -> Any:
    """The manifest, or None for a run that was begun before there were any."""
    path = workdir / "manifest.json"
    if not path.exists():
        return None
    manifest = read_json(path)
    try:
        manifest["versions"]["sde_diffusion"].partition("."), manifest["data"].get("examples")
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: must hold the versions and the data that the run was begun with") from error
    return manifest


def _commit() -> str | None:
    """The commit that the library's folder is at, with "-dirty" if it was changed since; None if there is none."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
