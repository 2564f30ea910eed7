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

A checkpoint is written file by file to a folder of another name, each file forced to the disk, and then renamed: a
process can be killed at any instant, or find the disk full, and leaves the checkpoints before as they were. What
happens to a file later is noticed by its checksum, and the checkpoint before is taken.

The header of every model file holds what is needed to rebuild the model, so that one file is enough to share.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sde_diffusion.data.info import DataInfo
from sde_diffusion.losses import TimeSampler
from sde_diffusion.model import DiffusionModel
from sde_diffusion.networks import build_network
from sde_diffusion.sde import SDES

_HEADER = "sde_diffusion"
_CHECKSUMS = "checksums.json"


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another model, or cannot be written."""


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
    tensors, header = load_tensors(path)
    description = _description(path, header)
    config = description["config"]
    if network is None and config["network"]["name"] == "custom":
        raise CheckpointError(f"{path}: was trained with a network of the user's own; pass it as network=")
    try:
        # Its first weights are overwritten, so that drawing them is no reason to disturb the user's random numbers.
        with torch.random.fork_rng():
            model = build_model(config, tuple(description["data_shape"]), DataInfo(**description["data"]), network)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no model of this library: {error}") from error
    fill(model, tensors, path)
    # What is made for this model alone, such as a calibrated solver, is kept beside it.
    model.directory = given if given.is_dir() else given.with_suffix("")
    return model.to(device).eval().requires_grad_(False)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Config, data shape and data range of the model in a run directory or .safetensors; errors as for ``load``."""
    path = model_file(Path(path))
    return _description(path, load_tensors(path)[1])


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


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a module, keeping its memory format.

    Raises:
        CheckpointError: naming the first tensor that is missing, left over, or of another shape.
    """
    own = module.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            needed = tuple(own[name].shape) if name in own else "nothing"
            raise CheckpointError(f"{path}: tensor {name}: the file has {found}, the network {needed}")
    module.load_state_dict(dict(tensors))


def model_file(path: Path, raw: bool = False, average: float | None = None) -> Path:
    """The file that ``load`` reads for these arguments; errors as there."""
    if not path.is_dir():
        return path
    name = "raw.safetensors" if raw else "model.safetensors"
    checkpoint = newest_whole(path, name if average is None else f"model-{float(average)}.safetensors")
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint in this directory")
    if average is None:
        return checkpoint / name
    kept = {float(file.stem.partition("-")[2]): file for file in checkpoint.glob("model-*.safetensors")}
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


def save_checkpoint(
    workdir: Path,
    state: Mapping[str, float],
    config: Mapping[str, Any],
    raw: DiffusionModel,
    averages: Mapping[str, DiffusionModel],
    optimizer: torch.optim.Optimizer,
    times: TimeSampler,
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write everything needed to go on from state["step"], then delete all but the newest checkpoints.

    Args:
        workdir: the directory of the run.
        state: numbers, the step among them.
        config: what the headers of the models say of them.
        raw: the model being trained.
        averages: models by the names of their files, the main one "model".
        optimizer: its moments are stored.
        times: what it has learnt is stored.
        keep: how many of the newest checkpoints stay.
        keep_every: those whose step is a multiple of it stay too; 0 for none.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk; nothing of it is left, and the others stay.
    """
    files: dict[str, tuple[Mapping[str, Tensor], dict[str, str]]] = {
        f"{name}.safetensors": (model.state_dict(), _header(model, config))
        for name, model in {"raw": raw, **averages}.items()
    }
    files["optimizer.safetensors"] = (dict(_optimizer_tensors(optimizer)), {})
    if learnt := times.state_dict():
        files["times.safetensors"] = (learnt, {})
    final = workdir / "checkpoints" / f"{state['step']:08d}"
    partial = final.with_name(f"partial-{final.name}")
    _remove_partial(final.parent)
    try:
        partial.mkdir(parents=True)
        for name, (tensors, header) in files.items():
            save_tensors(tensors, partial / name, header)
        write_json(partial / "state.json", state)
        write_json(partial / _CHECKSUMS, {name: checksum(partial / name) for name in [*files, "state.json"]})
        _sync(partial)
        partial.rename(final)
        _sync(final.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(tensor.nbytes for tensors, _ in files.values() for tensor in tensors.values())
        raise CheckpointError(
            f"{final} cannot be written: {error}; it takes {needed / 1e6:.3g} MB, and "
            f"{shutil.disk_usage(workdir).free / 1e6:.3g} MB are free; the checkpoints before it are whole"
        ) from error
    for old in _checkpoints(workdir)[:-keep]:
        if keep_every == 0 or int(old.name) % keep_every:
            # Renamed first: a checkpoint is never there in part.
            old.rename(old.with_name(f"partial-{old.name}"))
    _remove_partial(final.parent)
    return final


def load_checkpoint(
    path: Path,
    raw: DiffusionModel,
    averages: Mapping[str, DiffusionModel],
    optimizer: torch.optim.Optimizer,
    times: TimeSampler,
) -> dict[str, Any]:
    """Restore what ``save_checkpoint`` wrote; returns its state.

    Raises:
        CheckpointError: naming the damaged file or the tensor that does not fit.
    """
    for name, model in {"raw": raw, **averages}.items():
        file = path / f"{name}.safetensors"
        fill(model, load_tensors(file)[0], file)
    moments: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in load_tensors(path / "optimizer.safetensors")[0].items():
        index, _, kind = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise CheckpointError(f"{path / 'optimizer.safetensors'}: tensor {name} belongs to no parameter")
        parameter = parameters[int(index)]
        if tensor.shape != parameter.shape and kind != "step":
            raise CheckpointError(
                f"{path / 'optimizer.safetensors'}: tensor {name}: the file has {tuple(tensor.shape)}, "
                f"the network {tuple(parameter.shape)}"
            )
        if tensor.ndim:
            # In the parameter's own memory format: a fused step walks both in storage order.
            tensor = torch.empty_like(parameter).copy_(tensor)
        moments.setdefault(int(index), {})[kind] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if times.state_dict():
        learnt = load_tensors(path / "times.safetensors")[0]
        try:
            times.load_state_dict(learnt)
        except ValueError as error:
            raise CheckpointError(f"{path / 'times.safetensors'}: {error}") from error
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path / 'state.json'}: must hold the step, a whole number")
    return state


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _verify(checkpoint: Path, name: str | None) -> None:
    """Hold one file of a checkpoint, or all, against their checksums; CheckpointError naming the first damaged."""
    if not (checkpoint / _CHECKSUMS).exists() and (checkpoint / "state.json").exists():
        return  # of a run before there were checksums
    expected = read_json(checkpoint / _CHECKSUMS)
    if not isinstance(expected, dict):
        raise CheckpointError(f"{checkpoint / _CHECKSUMS}: must hold the checksum of each file")
    for path in [checkpoint / known for known in expected if name in (None, known)]:
        try:
            is_whole = checksum(path) == expected[path.name]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not is_whole:
            raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in {_CHECKSUMS}")


def _remove_partial(checkpoints: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for partial in checkpoints.glob("partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _description(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        description = json.loads(header[_HEADER])
        DataInfo(**description["data"])
        tuple(description["data_shape"]), description["config"]["network"]["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header does not describe a model of this library") from error
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
    """Write a model with a header that rebuilds it, whole or not at all; errors as for ``save_tensors``."""
    save_tensors(model.state_dict(), path, _header(model, config))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a .safetensors file with a header of strings, whole or not at all.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    partial = path.with_name(path.name + ".partial")
    # Copied: safetensors refuses tensors that share memory, such as tied weights.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(copies, partial, metadata=header)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from error
    _sync(partial)
    partial.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file and its header; CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _sync(path: Path) -> None:
    """Have the system write a file or directory to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
