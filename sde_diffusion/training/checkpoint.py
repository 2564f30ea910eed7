"""Runs on disk: safetensors and JSON only, each checkpoint whole or absent.

    workdir/
      config.json                       the resolved config
      metrics.jsonl, tensorboard/       a line every log_every steps
      samples/                          sample pictures
      checkpoints/00001000/             after 1000 steps
        model.safetensors               averaged (EMA) weights, the ones to use
        raw.safetensors                 the weights being trained
        optimizer.safetensors           AdamW's moments
        times.safetensors               what the sampler of times has learnt, if it is one that learns
        state.json                      the step, and the number of examples in the data set

The header of every model file holds what is needed to rebuild the model, so that one file is enough to share.
"""

from __future__ import annotations

import json
import os
import shutil
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


class CheckpointError(ValueError):
    """A file that is missing, damaged, or of another model."""


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
    device: torch.device | str | None = None,
) -> DiffusionModel:
    """Rebuild a trained model, in evaluation mode.

    Args:
        path: a run directory, of which the newest checkpoint is read, or one .safetensors.
        network: the network to fill, for a run that was given one of the user's own.
        raw: of a run directory, the weights as trained in place of their average.
        device: where to put it.

    Raises:
        CheckpointError: if nothing is there, or it is damaged, or its tensors do not fit the network.
    """
    given, path = Path(path), _model_file(Path(path), raw)
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
    path = _model_file(Path(path), raw=False)
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


def newest_checkpoint(workdir: Path) -> Path | None:
    """The checkpoint of the most steps, or None."""
    found = _checkpoints(workdir)
    return found[-1] if found else None


def save_checkpoint(
    workdir: Path,
    state: Mapping[str, int],
    config: Mapping[str, Any],
    raw: DiffusionModel,
    average: DiffusionModel,
    optimizer: torch.optim.Optimizer,
    times: TimeSampler,
    keep: int,
) -> Path:
    """Write everything needed to go on from state["step"], then delete all but the ``keep`` newest."""
    final = workdir / "checkpoints" / f"{state['step']:08d}"
    partial = final.with_name(f"partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_model(raw, partial / "raw.safetensors", config)
    _save_model(average, partial / "model.safetensors", config)
    save_tensors(dict(_optimizer_tensors(optimizer)), partial / "optimizer.safetensors", {})
    if learnt := times.state_dict():
        save_tensors(learnt, partial / "times.safetensors", {})
    write_json(partial / "state.json", state)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)
    for old in _checkpoints(workdir)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    path: Path,
    raw: DiffusionModel,
    average: DiffusionModel,
    optimizer: torch.optim.Optimizer,
    times: TimeSampler,
) -> dict[str, int]:
    """Restore what ``save_checkpoint`` wrote; returns its state.

    Raises:
        CheckpointError: naming the damaged file or the tensor that does not fit.
    """
    for model, name in ((raw, "raw.safetensors"), (average, "model.safetensors")):
        fill(model, load_tensors(path / name)[0], path / name)
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
    if not isinstance(state, dict) or not all(isinstance(state.get(name), int) for name in ("step", "examples")):
        raise CheckpointError(f"{path / 'state.json'}: must hold the numbers step and examples")
    return state


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _model_file(path: Path, raw: bool) -> Path:
    if not path.is_dir():
        return path
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint in this directory")
    return checkpoint / ("raw.safetensors" if raw else "model.safetensors")


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


def _save_model(model: DiffusionModel, path: Path, config: Mapping[str, Any]) -> None:
    description = {"config": config, "data_shape": model.data_shape, "data": asdict(model.data)}
    save_tensors(model.state_dict(), path, {_HEADER: json.dumps(description)})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a .safetensors file with a header of strings, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    # Copied: safetensors refuses tensors that share memory, such as tied weights.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, partial, metadata=header)
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
