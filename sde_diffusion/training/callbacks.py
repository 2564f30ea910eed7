"""What a user's own code is told of a run, and when: logging elsewhere, measurements of one's own, an early end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from sde_diffusion.training.loop import TrainResult


class Callback:
    """Called on the occasions of a run; a subclass defines those it is for.

    Every rank calls every method: what is to happen once, such as writing a file, is for ``run.rank == 0``, and should
    be short, as the others wait. No method may change the weights. Where they are sharded, the models can be called
    only by all ranks together.

    Setting ``run.stop = True``, on any rank, ends the run after this step, with a checkpoint. It is looked at after a
    line of metrics and after an evaluation.
    """

    def begin(self, run: TrainResult) -> None:
        """Before the first step that is taken now, also of a run that goes on: ``run.step`` steps are done."""

    def metrics(self, run: TrainResult) -> None:
        """After every line of metrics, which is ``run.metrics``."""

    def evaluation(self, run: TrainResult) -> None:
        """After every evaluation, whose numbers are ``run.evaluation``."""

    def checkpoint(self, run: TrainResult, path: Path) -> None:
        """After a checkpoint is whole on the disk, in the folder ``path``."""

    def end(self, run: TrainResult, error: BaseException | None) -> None:
        """After the last step; or after the error, or the signal, that ended the run."""


CallbackLike: TypeAlias = Callback | Callable[["TrainResult"], None]


class _Metrics(Callback):
    """A function called after every line of metrics."""

    def __init__(self, function: Callable[[TrainResult], None]):
        self.function = function

    def metrics(self, run: TrainResult) -> None:
        self.function(run)


def as_callback(callback: CallbackLike) -> Callback:
    """A callback as it is, and a function of a TrainResult as one whose ``metrics`` it is.

    Raises:
        TypeError: for anything else, such as a class in place of its instance.
    """
    if isinstance(callback, Callback):
        return callback
    if isinstance(callback, type) or not callable(callback):
        raise TypeError(f"callbacks: {callback!r} must be a Callback, or a function of a TrainResult")
    return _Metrics(callback)
