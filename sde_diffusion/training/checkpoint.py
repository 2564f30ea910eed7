"""Checkpoints: safetensors and JSON only, each whole or absent, and none read that is not as it was written.

    workdir/checkpoints/00001000/       after 1000 steps
      model.safetensors                 averaged (EMA) weights, the ones to use
      model-0.999.safetensors           a further average, by its decay, if asked for
      power-0.05.safetensors            a power-function average, by its relative width, if asked for
      raw.safetensors                   the weights being trained
      optimizer.safetensors             AdamW's moments
      times.safetensors                 what the sampler of times has learnt, if it is one that learns
      state.json                        the step, and the losses since the last line of metrics
      checksums.json                    the SHA-256 of each of these files

Of a run whose weights are sharded, each rank writes its part of every .safetensors file: see storage.py.

A checkpoint is written file by file to a folder of another name, each file forced to the disk, and then renamed: a
process can be killed at any instant, or find the disk full, and leaves the checkpoints before as they were. What
happens to a file later is noticed by its checksum, and the checkpoint before is taken.

The header of every model file holds what is needed to rebuild the model, so that one file is enough to share.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.data.info import DataInfo
from sde_diffusion.losses import TimeSampler
from sde_diffusion.model import DiffusionModel
from sde_diffusion.networks import build_network
from sde_diffusion.sde import SDES
from sde_diffusion.storage import (
    CheckpointError,
    Contents,
    StoredTensors,
    checksum,
    fill,
    own,
    own_rows,
    part_of,
    read_json,
    sync,
    write_json,
)
from sde_diffusion.training.distributed import Ranks

_HEADER = "sde_diffusion"
_CHECKSUMS = "checksums.json"


def build_model(config: Mapping[str, Any], data_shape: tuple[int, ...], data: DataInfo, network: Any) -> DiffusionModel:
    """The model that a resolved config describes, for data of this shape; a given network stands in for its own."""
    if network is None:
        # The headers of older files do not have the field.
        channels = 2 * data_shape[0] if config["model"].get("learned_variance") else None
        network = build_network(**config["network"], data_shape=data_shape, out_channels=channels)
    sde_options = dict(config["sde"])
    sde = SDES[sde_options.pop("name")](**sde_options)
    return DiffusionModel(network, sde, data_shape=data_shape, data=data, **config["model"])


def load(
    path: str | os.PathLike[str],
    *,
    network: Callable[..., Tensor] | None = None,
    raw: bool = False,
    average: float | None = None,
    device: torch.device | str | None = None,
) -> DiffusionModel:
    """Rebuild a trained model, in evaluation mode.

    Args:
        path: a run directory, of which the newest checkpoint is read that is not damaged, or one .safetensors.
        network: the network to fill, for a run that was given one of the user's own.
        raw: of a run directory, the weights as trained in place of their average.
        average: of a run directory, the average of this decay, one of ``ema.further_decays``, in place of the main one.
        device: where to put it.

    Raises:
        CheckpointError: if nothing is there, or it is damaged, or its tensors do not fit the network.
    """
    given, path = Path(path), model_file(Path(path), raw, average)
    stored = StoredTensors(path)
    description = _description(stored)
    config = description["config"]
    if network is None and config["network"]["name"] == "custom":
        raise CheckpointError(f"{path}: was trained with a network of the user's own; pass it as network=")
    try:
        # Its first weights are overwritten, so that drawing them is no reason to disturb the user's random numbers.
        with torch.random.fork_rng([]):
            model = build_model(config, tuple(description["data_shape"]), DataInfo(**description["data"]), network)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no model of this library: {error}") from error
    fill(model, stored)
    # What is made for this model alone, such as a calibrated solver, is kept beside it.
    model.directory = given if given.is_dir() else given.with_suffix("")
    return model.to(device).eval().requires_grad_(False)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Config, data shape and data range of the model in a run directory or .safetensors; errors as for ``load``."""
    return _description(StoredTensors(model_file(Path(path))))


def pretrained(name: str) -> Path:
    """Path of a model that ships with the package, to be given to ``load``.

    Raises:
        ValueError: for an unknown name; docs/results.md describes the models.
    """
    folder = Path(str(resources.files("sde_diffusion") / "pretrained"))
    names = sorted(file.stem for file in folder.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"name = {name!r}: must be one of {', '.join(names)}")
    return folder / f"{name}.safetensors"


def model_file(path: Path, raw: bool = False, average: float | None = None) -> Path:
    """The file that ``load`` reads for these arguments, which may be there in parts; errors as there."""
    if not path.is_dir():
        return path
    name = "raw.safetensors" if raw else "model.safetensors"
    checkpoint = newest_whole(path, name if average is None else f"model-{float(average)}.safetensors")
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint in this directory")
    if average is None:
        return checkpoint / name
    stems = {
        file.name.removesuffix(".safetensors").split(".rank-")[0] for file in checkpoint.glob("model-*.safetensors")
    }
    kept = {float(stem.partition("-")[2]): checkpoint / f"{stem}.safetensors" for stem in stems}
    if raw or average not in kept:
        raise CheckpointError(
            f"average = {average}, raw = {raw}: {checkpoint} has raw weights, the main average, and beside it those of "
            f"the decays {sorted(kept)}"
        )
    return kept[average]


def newest_checkpoint(workdir: Path) -> Path | None:
    """The checkpoint of the most steps, or None."""
    found = _checkpoints(workdir)
    return found[-1] if found else None


def newest_whole(workdir: Path, name: str | None = None) -> Path | None:
    """The newest checkpoint of which the file of this name, or every file, is as it was written; None without any.

    Warns of each newer one, naming the damaged file.

    Raises:
        CheckpointError: if all are damaged, naming a damaged file of the newest.
    """
    damage: list[CheckpointError] = []
    for checkpoint in reversed(_checkpoints(workdir)):
        try:
            _verify(checkpoint, name)
        except CheckpointError as error:
            damage.append(error)
            continue
        for each in damage:
            warnings.warn(f"{each}; checkpoint {checkpoint.name} is taken instead", stacklevel=2)
        return checkpoint
    if damage:
        raise CheckpointError(f"{damage[0]}; no checkpoint before it is whole") from damage[0]
    return None


def set_aside_after(workdir: Path, step: int) -> None:
    """Rename the checkpoints of more steps, which are damaged, so that they do not count as checkpoints any more."""
    for checkpoint in _checkpoints(workdir):
        if int(checkpoint.name) > step:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


class Checkpoints:
    """What writes the checkpoints of a run, one at a time: while the run goes on, if that is asked for.

    The first rank writes all of it, or of a sharded run each rank its part.
    """

    def __init__(self, workdir: Path, ranks: Ranks, keep: int, keep_every: int = 0, in_background: bool = False):
        """Write nothing yet.

        Args:
            workdir: the directory of the run.
            ranks: who writes.
            keep: how many of the newest checkpoints stay.
            keep_every: those whose step is a multiple of it stay too; 0 for none.
            in_background: whether ``write`` returns as soon as everything is copied to the CPU's memory.
        """
        self._folder, self._ranks, self._keep, self._keep_every = workdir / "checkpoints", ranks, keep, keep_every
        self._writer = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._group = ranks.further_group() if ranks.sharded else None
        self._begun: Path | None = None
        self._written: Future[None] = Future()

    def write(self, state: Mapping[str, Any], files: Mapping[str, tuple[Mapping[str, Tensor], dict[str, str]]]) -> None:
        """Begin to write what is needed to go on from state["step"]; the newest checkpoints but ``keep`` are deleted.

        Args:
            state: JSON values, the step among them.
            files: tensors and a header by the name of their file.
        """
        assert self._begun is None
        self._begun, self._written = self._folder / f"{state['step']:08d}", Future()
        if not (self._ranks.is_first or self._ranks.sharded):
            self._written.set_result(None)
            return
        copied = {name: Contents(*content, self._ranks.is_first) for name, content in files.items()}
        arguments = self._begun, dict(state), {name: content for name, content in copied.items() if content.nbytes}
        if self._writer:
            self._written = self._writer.submit(self._write, *arguments)
        else:
            self._written = _done(self._write, *arguments)

    def finish(self) -> Path | None:
        """Wait for the checkpoint that is being written: its folder, on all ranks; None if there is none.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk; nothing of it is left, and the others stay.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        error = self._written.exception()
        failed = self._ranks.largest(int(error is not None))
        if error:
            raise error
        if failed:
            raise CheckpointError(f"{begun} cannot be written by another rank; the checkpoints before it are whole")
        return begun

    def close(self) -> None:
        """End the thread that writes, after what it has begun."""
        if self._writer:
            self._writer.shutdown()

    def _write(self, final: Path, state: dict[str, Any], contents: dict[str, Contents]) -> None:
        """Write a checkpoint, stage by stage; each rank that writes goes on when all are well."""
        partial = final.with_name(f"partial-{final.name}")
        for stage in (self._begin, self._write_own, self._complete):
            error: Exception | None = None
            try:
                stage(partial, state, contents)
            except Exception as failure:
                error = failure
            if not self._all_well(error is None):
                shutil.rmtree(partial, ignore_errors=True)
                needed = sum(content.nbytes for content in contents.values())
                raise _explained(error, final, needed) from error
        if self._ranks.is_first:
            self._delete_old()

    def _begin(self, partial: Path, state: dict[str, Any], contents: dict[str, Contents]) -> None:
        """Make a folder of another name, with the state."""
        if self._ranks.is_first:
            _remove_partial(self._folder)
            partial.mkdir(parents=True)
            write_json(partial / "state.json", state)

    def _write_own(self, partial: Path, state: dict[str, Any], contents: dict[str, Contents]) -> None:
        """Write this rank's files and their checksums."""
        checksums = {}
        for name, content in contents.items():
            path = self._part(partial / name, self._ranks.rank)
            content.write(path)
            checksums[path.name] = checksum(path)
        write_json(part_of(partial / _CHECKSUMS, self._ranks.rank, self._ranks.size), checksums)

    def _complete(self, partial: Path, state: dict[str, Any], contents: dict[str, Contents]) -> None:
        """Join the ranks' checksums, and give the checkpoint its name."""
        if not self._ranks.is_first:
            return
        checksums = {"state.json": checksum(partial / "state.json")}
        for rank in range(self._ranks.size if self._ranks.sharded else 1):
            # By name: a network's file system may not list at once what another machine has written.
            path = part_of(partial / _CHECKSUMS, rank, self._ranks.size)
            checksums |= read_json(path)
            path.unlink()
        write_json(partial / _CHECKSUMS, checksums)
        sync(partial)
        partial.rename(partial.with_name(partial.name.removeprefix("partial-")))
        sync(self._folder)

    def _delete_old(self) -> None:
        """Delete all but the newest checkpoints; what cannot be deleted stays, and is reported."""
        try:
            for old in _checkpoints(self._folder.parent)[: -self._keep]:
                if self._keep_every == 0 or int(old.name) % self._keep_every:
                    # Renamed first: a checkpoint is never there in part.
                    old.rename(old.with_name(f"partial-{old.name}"))
        except OSError as error:
            warnings.warn(f"an old checkpoint cannot be deleted: {error}", stacklevel=2)
        _remove_partial(self._folder)

    def _part(self, path: Path, rank: int) -> Path:
        return part_of(path, rank, self._ranks.size) if self._ranks.sharded else path

    def _all_well(self, is_well: bool) -> bool:
        """Whether all ranks that write are well; the slowest is waited for."""
        return is_well if self._group is None else not self._ranks.largest(int(not is_well), self._group)


def _done(function: Callable[..., None], *arguments: Any) -> Future[None]:
    """A call that is over, with its error if it had one."""
    future: Future[None] = Future()
    try:
        function(*arguments)
        future.set_result(None)
    except Exception as error:
        future.set_exception(error)
    return future


def _explained(error: Exception | None, final: Path, needed: int) -> Exception:
    """What to tell the user of a checkpoint that could not be written."""
    if error is None:
        return CheckpointError(f"{final} cannot be written by another rank; the checkpoints before it are whole")
    if not isinstance(error, OSError):
        return error
    free = ""
    with contextlib.suppress(OSError):
        free = f", and {shutil.disk_usage(final.parents[1]).free / 1e6:.3g} MB are free"
    return CheckpointError(
        f"{final} cannot be written: {error}; it takes {needed / 1e6:.3g} MB{free}; the checkpoints before it are whole"
    )


def contents_of(
    config: Mapping[str, Any],
    raw: DiffusionModel,
    averages: Mapping[str, DiffusionModel],
    optimizer: torch.optim.Optimizer,
    times: TimeSampler,
) -> dict[str, tuple[Mapping[str, Tensor], dict[str, str]]]:
    """The tensors of a checkpoint and their headers, by their files' names.

    Args:
        config: what the headers of the models say of them.
        raw: the model being trained.
        averages: models by the names of their files, the main one "model".
        optimizer: its moments are stored.
        times: what it has learnt is stored.
    """
    files: dict[str, tuple[Mapping[str, Tensor], dict[str, str]]] = {
        f"{name}.safetensors": (model.state_dict(), _header(model, config))
        for name, model in {"raw": raw, **averages}.items()
    }
    files["optimizer.safetensors"] = (dict(_optimizer_tensors(optimizer)), {})
    if learnt := times.state_dict():
        files["times.safetensors"] = (learnt, {})
    return files


def load_checkpoint(
    path: Path,
    raw: DiffusionModel,
    averages: Mapping[str, DiffusionModel],
    optimizer: torch.optim.Optimizer,
    times: TimeSampler,
) -> dict[str, Any]:
    """Restore what was stored by any number of ranks; returns its state.

    Raises:
        CheckpointError: naming the damaged file or the tensor that does not fit.
    """
    for name, model in {"raw": raw, **averages}.items():
        fill(model, StoredTensors(path / f"{name}.safetensors"))
    _load_moments(optimizer, StoredTensors(path / "optimizer.safetensors"))
    if times.state_dict():
        stored = StoredTensors(path / "times.safetensors")
        try:
            times.load_state_dict({name: stored.read(name) for name in stored.shapes})
        except ValueError as error:
            raise CheckpointError(f"{stored.path}: {error}") from error
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path / 'state.json'}: must hold the step, a whole number")
    return state


def _load_moments(optimizer: torch.optim.Optimizer, stored: StoredTensors) -> None:
    """Give an optimizer its moments, each with the rows that this rank has of the parameter."""
    moments: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, shape in stored.shapes.items():
        index, _, kind = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise CheckpointError(f"{stored.path}: tensor {name} belongs to no parameter")
        parameter = parameters[int(index)]
        if kind == "step":
            moment = stored.read(name)
        elif shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored.path}: tensor {name}: the file has {shape}, the network {tuple(parameter.shape)}"
            )
        else:
            # In the parameter's own memory format: a fused step walks both in storage order.
            moment = torch.empty_like(parameter)
            own(moment).copy_(stored.read(name, own_rows(parameter)))
        moments.setdefault(int(index), {})[kind] = moment
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _verify(checkpoint: Path, name: str | None) -> None:
    """Hold one file of a checkpoint, or all, against their checksums; CheckpointError naming the first damaged."""
    if not (checkpoint / _CHECKSUMS).exists() and (checkpoint / "state.json").exists():
        return  # of a run before there were checksums
    expected = read_json(checkpoint / _CHECKSUMS)
    if not isinstance(expected, dict):
        raise CheckpointError(f"{checkpoint / _CHECKSUMS}: must hold the checksum of each file")
    for path in [checkpoint / known for known in expected if name is None or _is_of(known, name)]:
        try:
            is_whole = checksum(path) == expected[path.name]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not is_whole:
            raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in {_CHECKSUMS}")


def _is_of(known: str, name: str) -> bool:
    """Whether a file is the one of this name, or a part of it."""
    return known == name or known.startswith(f"{name.removesuffix('.safetensors')}.rank-")


def _remove_partial(checkpoints: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for partial in checkpoints.glob("partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _description(stored: StoredTensors) -> dict[str, Any]:
    try:
        description = json.loads(stored.header[_HEADER])
        DataInfo(**description["data"])
        tuple(description["data_shape"]), description["config"]["network"]["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{stored.path}: its header does not describe a model of this library") from error
    return description


def _checkpoints(workdir: Path) -> list[Path]:
    found = (path for path in (workdir / "checkpoints").glob("[0-9]*") if path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, moments in optimizer.state_dict()["state"].items():
        for kind, tensor in moments.items():
            yield f"{index}.{kind}", tensor


def _header(model: DiffusionModel, config: Mapping[str, Any]) -> dict[str, str]:
    """What is needed to rebuild a model, for its file's header."""
    return {_HEADER: json.dumps({"config": config, "data_shape": model.data_shape, "data": asdict(model.data)})}


def save_model(model: DiffusionModel, path: Path, config: Mapping[str, Any]) -> None:
    """Write a model with a header that rebuilds it, whole or not at all; OSError if it cannot be written."""
    Contents(model.state_dict(), _header(model, config)).write(path)
