"""Log a run to Weights & Biases: python examples/wandb_callback.py --config=configs/spiral.py --workdir=runs/spiral.

Needs ``pip install wandb``. With --offline nothing leaves the machine: ``wandb sync`` uploads it later. A run that is
interrupted goes on, here and there, with the same command: its id is kept in the run's directory.
"""

from __future__ import annotations

import argparse
import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import sde_diffusion as sd
from sde_diffusion.training import resolve_config
from sde_diffusion.training.callbacks import Callback


class WeightsAndBiases(Callback):
    """Metrics, evaluations and the pictures of samples that a run draws, logged by its first rank.

    What a run repeats, from its last checkpoint on, is logged already; Weights & Biases leaves it out with a warning.
    """

    def __init__(
        self, config: Mapping[str, Any], project: str = "sde_diffusion", name: str | None = None, offline: bool = False
    ):
        """Find wandb; nothing is logged yet.

        Args:
            config: the run's, to be shown beside it.
            project: where the run is listed.
            name: of the run; by default Weights & Biases makes one up.
            offline: write to the run's directory alone.

        Raises:
            ModuleNotFoundError: without wandb.
        """
        self.wandb = _import_wandb()
        self.config, self.project, self.name, self.offline = config, project, name, offline
        self.log: Any = None
        self.pictured = 0

    def begin(self, run: sd.TrainResult) -> None:
        """Open the run there, or go on with it."""
        if run.rank:
            return
        self.pictured = run.step
        self.log = self.wandb.init(
            project=self.project,
            name=self.name,
            id=_stored_id(run.workdir) if run.workdir else None,
            resume="allow",
            dir=str(run.workdir) if run.workdir else None,
            config=dict(self.config),
            # Of a run that goes on, other fields than those of its steps may have changed.
            allow_val_change=True,
            mode="offline" if self.offline else None,
        )

    def metrics(self, run: sd.TrainResult) -> None:
        """Log a line of metrics, and pictures that are new."""
        if self.log:
            self.log.log(_without_step(run.metrics), step=run.step)
            self._log_pictures(run)

    def evaluation(self, run: sd.TrainResult) -> None:
        """Log an evaluation."""
        if self.log:
            self.log.log(_without_step(run.evaluation), step=run.step)

    def end(self, run: sd.TrainResult, error: BaseException | None) -> None:
        """Close the run there, as failed if it ended by an error or a signal."""
        if self.log:
            self._log_pictures(run)
            self.log.finish(exit_code=0 if error is None else 1)
            self.log = None

    def _log_pictures(self, run: sd.TrainResult) -> None:
        if run.workdir is None:
            return
        for picture in sorted((run.workdir / "samples").glob("*.png")):
            step = int(picture.stem)
            if step > self.pictured:
                self.log.log({"samples": self.wandb.Image(str(picture), caption=f"step {step}")}, step=run.step)
                self.pictured = step


def _import_wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("no module named wandb: install it with `pip install wandb`") from error


def _stored_id(workdir: Path) -> str:
    """What Weights & Biases knows the run in this directory by."""
    path = workdir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _without_step(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if name != "step"}


def main() -> None:
    """Train, or go on with the run in the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file in configs/")
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--project", default="sde_diffusion", help="where it is listed (default: %(default)s)")
    parser.add_argument("--name", help="of the run there")
    parser.add_argument("--offline", action="store_true", help="write to the directory alone")
    arguments = parser.parse_args()

    config = resolve_config(arguments.config)
    config.workdir = arguments.workdir
    logger = WeightsAndBiases(config.to_dict(), arguments.project, arguments.name, arguments.offline)
    result = sd.train(config, callbacks=[logger])
    print(f"{result.step} steps done; the run is in {result.workdir}")


if __name__ == "__main__":
    main()
