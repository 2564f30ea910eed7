"""What a training run can be told, with its defaults, and the check that nothing else was said."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ml_collections import ConfigDict

from sde_diffusion.data import DATASETS
from sde_diffusion.losses import SPREADS, TIMES, WEIGHTINGS
from sde_diffusion.model import PREDICTIONS
from sde_diffusion.networks import NETWORKS
from sde_diffusion.sde import SDES
from sde_diffusion.storage import flatten
from sde_diffusion.training.ema import NARROWEST, WIDEST
from sde_diffusion.training.schedules import SCHEDULES


class ConfigError(ValueError):
    """A field that does not exist, or holds what it cannot."""


class Sections(ConfigDict):
    """A ConfigDict in which a name can stand for a section: ``config.sde = "ve"`` is ``named("ve")``.

    A section that names a class or function gets all its options, so that each of them can be set afterwards.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a field; a section by its name too. Sections within are of this class."""
        if isinstance(value, str) and isinstance(self.get(key), ConfigDict):
            value = named(value)
        if key in _NAMED_FIELDS and isinstance(value, dict | ConfigDict):
            # What is wrong with it is said when the config is resolved, with all else.
            with contextlib.suppress(ConfigError):
                value = _section(_NAMED_FIELDS[key], dict(value))
        super().__setitem__(key, Sections(value) if isinstance(value, dict | ConfigDict) else value)


def default_config() -> ConfigDict:
    """Every field of a run, locked against misspelling; a file in configs/ changes some of them.

    ``sde``, ``network``, ``data``, ``loss.weighting``, ``loss.time`` and ``optim.schedule`` name a class or function of
    the library; their other fields are its keyword arguments. Another is chosen with
    ``config.network = named("mlp", width=128)``, or with its defaults by its name alone, ``config.network = "mlp"``.
    """
    return Sections(
        {
            "seed": 0,
            "data": _section("data", {"name": "fashion_mnist"}),
            "flip": False,  # mirror half of the images, left to right
            "sde": _section("sde", {"name": "vp"}),
            "network": _section(
                "network",
                {
                    "name": "unet",
                    "base_channels": 64,
                    "channel_multipliers": (1, 2, 2),
                    "attention_resolutions": (),
                },
            ),
            "model": {
                "prediction": "edm",
                "sigma_data": 0.5,  # standard deviation of the data, for the prediction "edm"
                "mean_step": 1e-3,  # how much earlier the state is that the prediction "mean" is of
                "learned_variance": False,  # that of a reverse step; with the weighting "hybrid"
            },
            "loss": {
                "weighting": _section("loss.weighting", {"name": "edm"}),
                "time": _section("loss.time", {"name": "log_normal"}),
                "spread": "independent",  # or "stratified", "antithetic": the times within a batch
            },
            "optim": {
                "lr": 2e-4,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "warmup": 1000,  # steps of linear rise
                "schedule": _section("optim.schedule", {"name": "cosine"}),  # after the rise
                "grad_clip": 1.0,  # largest norm of the gradient; 0 does not clip
            },
            "ema": {
                "decay": 0.9999,
                "further_decays": (),  # of averages kept beside the main one
                "widths": (),  # of power-function averages, as a share of the run, to choose another from afterwards
                "snapshot_every": 1000,  # steps between the snapshots that are kept of those
            },
            "train": {
                "steps": 100_000,
                "batch_size": 128,  # of a step, on all ranks together
                "accumulation": 1,  # parts that a rank's share of the batch is computed in, one after another
                "parallel": "auto",  # of several ranks: "ddp", which is auto's, or "fsdp", which shards the weights
                "device": "auto",  # the accelerator if there is one; or a torch device
                "precision": "float32",  # or autocast of the network to "bfloat16", or "float16" with a scaled loss
                "workers": 0,  # processes that load data, on each rank
                "prefetch": 2,  # batches that each of them loads ahead
                "label_dropout": 0.1,  # share of labels hidden, so that the model can be asked without one
                "log_every": 100,  # steps between lines of metrics
                "checkpoint_every": 2000,
                "keep_checkpoints": 2,
                "keep_every": 0,  # steps between checkpoints that stay for good; 0: none does
                "async_checkpoints": True,  # write them while training goes on
                "sample_every": 10_000,  # steps between pictures, of images or points in the plane; 0: none
                "sample_count": 64,
            },
            "evaluation": {
                "every": 0,  # steps between evaluations of the averaged model; 0: none
                "loss_count": 1024,  # held-out examples whose loss is measured; 0: none
                "levels": 10,  # noise levels at which it is measured besides
                "likelihood_count": 0,  # held-out examples whose likelihood is measured
                "frechet_count": 0,  # samples whose Fréchet distance to the training data is measured
                "features": "",  # the feature network of that distance; by default the one for the data
                "batch_size": 64,  # on each rank
                "patience": 0,  # evaluations without a smaller held-out loss after which the run ends; 0: it never does
            },
            "workdir": "",  # nothing is written without one
        }
    ).lock()


def named(name: str, **options: Any) -> ConfigDict:
    """A section that names a class or function of the library and sets some of its arguments."""
    return ConfigDict({"name": name, **options})


# Fields that may differ when a run is taken up again: they change neither the data nor a step, but that another kind
# of device draws other random numbers.
RESUMABLE = frozenset(
    {
        "workdir",
        "data.path",
        "data.cache",
        "train.device",
        # Of the same batch, but for rounding and the draws of dropout.
        "train.accumulation",
        "train.parallel",
        "train.workers",
        "train.prefetch",
        "ema.snapshot_every",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.async_checkpoints",
        "train.sample_every",
        "train.sample_count",
        "evaluation.every",
        "evaluation.loss_count",
        "evaluation.levels",
        "evaluation.likelihood_count",
        "evaluation.frechet_count",
        "evaluation.features",
        "evaluation.batch_size",
        # When a run ends is no part of a step.
        "evaluation.patience",
    }
)

_CHOICES = {
    "train.precision": ("float32", "bfloat16", "float16"),
    "train.parallel": ("auto", "ddp", "fsdp"),
    "model.prediction": tuple(PREDICTIONS),
    "loss.spread": tuple(SPREADS),
}
_POSITIVE = (
    "optim.lr",
    "optim.eps",
    "model.sigma_data",
    "model.mean_step",
    "ema.snapshot_every",
    "train.batch_size",
    "train.accumulation",
    "train.prefetch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_count",
    "evaluation.batch_size",
)
_NOT_NEGATIVE = (
    "seed",
    "optim.weight_decay",
    "optim.warmup",
    "optim.grad_clip",
    "train.steps",
    "train.workers",
    "train.keep_every",
    "train.sample_every",
    "evaluation.every",
    "evaluation.loss_count",
    "evaluation.levels",
    "evaluation.likelihood_count",
    "evaluation.frechet_count",
    "evaluation.patience",
)
_FRACTIONS = ("optim.beta1", "optim.beta2", "ema.decay", "train.label_dropout")
# Sections whose fields are the keyword arguments of a named class; the second entry counts the arguments the
# library itself supplies, which a config may not.
NAMED: dict[str, tuple[Mapping[str, Callable[..., Any]], tuple[str, ...]]] = {
    "data": (DATASETS, ("split",)),
    "sde": (SDES, ()),
    "network": (NETWORKS, ("data_shape", "out_channels")),
    "loss.weighting": (WEIGHTINGS, ()),
    "loss.time": (TIMES, ("sde",)),
    "optim.schedule": (SCHEDULES, ()),
}
_NAMED_FIELDS = {field.rpartition(".")[2]: field for field in NAMED}


def resolve_config(config: Mapping[str, Any] | ConfigDict | str | os.PathLike[str]) -> ConfigDict:
    """A complete, checked copy of a config.

    Args:
        config: a ConfigDict or mapping with some or all of ``default_config``'s fields, or the path of a Python file
            with ``get_config()``.

    Raises:
        ConfigError: naming the field that is unknown or wrong, its value and what is allowed.
    """
    if isinstance(config, str | os.PathLike):
        config = load_config_file(config)
    given = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    values = default_config().to_dict()
    _merge(values, given, "")
    _check(values)
    return Sections(values).lock()


def load_config_file(path: str | os.PathLike[str]) -> ConfigDict:
    """Run ``get_config()`` of a Python file.

    Raises:
        ConfigError: if there is no such file or function, or it sets a field that does not exist.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"config = {os.fspath(path)!r}: no such file")
    spec = importlib.util.spec_from_file_location("sde_diffusion_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config = {os.fspath(path)!r}: must be a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever the user's file does wrong
        raise ConfigError(f"config = {os.fspath(path)!r}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config = {os.fspath(path)!r}: get_config() must return a ConfigDict; got {config!r}")
    return config


def choose(config: ConfigDict, field: str, name: str, **options: Any) -> None:
    """Set a named section to another class or function of the library, with its defaults but for these options.

    Raises:
        ConfigError: as for the config.
    """
    section, _, last = field.rpartition(".")
    parent = config[section] if section else config
    if parent[last].name == name:
        return
    with config.unlocked():
        parent[last] = ConfigDict(_section(field, {"name": name, **options}))


def choose_device(name: str, argument: str = "device") -> torch.device:
    """The device of a name, or for "auto" the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: for a device that torch does not have here.
    """
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            # Times are computed in float64, which not every accelerator has.
            with contextlib.suppress(TypeError, RuntimeError):
                return torch.empty((), device=accelerator, dtype=torch.float64).device
    try:
        return torch.empty((), device=name).device
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"{argument} = {name!r}: must be 'auto' or a device that torch has here") from error


def autocast_dtype(precision: str) -> torch.dtype | None:
    """That of a config's ``train.precision``; None for float32, which is no autocast."""
    return None if precision == "float32" else getattr(torch, precision)


def _merge(values: dict[str, Any], given: Mapping[str, Any], prefix: str) -> None:
    for name, value in given.items():
        field = prefix + name
        if field in NAMED:
            if isinstance(value, str):
                value = {"name": value}
            if isinstance(value, Mapping) and value.get("name", values[name]["name"]) == values[name]["name"]:
                value = {**values[name], **value}
            values[name] = _section(field, value)
        elif name not in values:
            raise ConfigError(f"{field}: no such field; there are {', '.join(prefix + known for known in values)}")
        elif isinstance(values[name], dict):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{field} = {value!r}: must be a section with {', '.join(values[name])}")
            _merge(values[name], value, field + ".")
        else:
            values[name] = _cast(field, value, type(values[name]))


def _section(field: str, section: Any) -> dict[str, Any]:
    """A named section, checked and with the defaults of the class or function that it names."""
    registry, supplied = NAMED[field]
    if not isinstance(section, Mapping) or section.get("name") not in registry:
        name = section.get("name") if isinstance(section, Mapping) else section
        raise ConfigError(f"{field}.name = {name!r}: must be one of {', '.join(registry)}")
    parameters = inspect.signature(registry[section["name"]]).parameters
    options = {name: parameter.default for name, parameter in parameters.items() if name not in supplied}
    for option in section:
        if option != "name" and option not in options:
            raise ConfigError(f"{field}.{option}: {section['name']} takes {', '.join(options) or 'no options'}")
    options.update({name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in section.items()})
    for option, value in options.items():
        if value is inspect.Parameter.empty:
            raise ConfigError(f"{field}.{option}: {section['name']} needs a value for it")
    return options


def _cast(field: str, value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_cast(f"{field}[{index}]", item, float) for index, item in enumerate(value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == int(value):
        return int(value)
    if kind in (int, float) or not isinstance(value, kind):
        finite = "finite and " if kind is float else ""
        raise ConfigError(f"{field} = {value!r}: must be {finite}of type {kind.__name__}")
    return value


def _check(values: dict[str, Any]) -> None:
    flat = flatten(values)
    for field, choices in _CHOICES.items():
        if flat[field] not in choices:
            raise ConfigError(f"{field} = {flat[field]!r}: must be one of {', '.join(choices)}")
    for field in _POSITIVE:
        if not 0 < flat[field] < math.inf:
            raise ConfigError(f"{field} = {flat[field]}: must be positive")
    for field in _NOT_NEGATIVE:
        if not 0 <= flat[field] < math.inf:
            raise ConfigError(f"{field} = {flat[field]}: must be at least 0")
    for field in _FRACTIONS:
        if not 0 <= flat[field] < 1:
            raise ConfigError(f"{field} = {flat[field]}: must be in [0, 1)")
    if flat["train.keep_every"] % flat["train.checkpoint_every"]:
        raise ConfigError(
            f"train.keep_every = {flat['train.keep_every']}: must be a multiple of train.checkpoint_every = "
            f"{flat['train.checkpoint_every']}, as only checkpoints can be kept"
        )
    if flat["evaluation.patience"] and not (flat["evaluation.every"] and flat["evaluation.loss_count"]):
        raise ConfigError(
            f"evaluation.patience = {flat['evaluation.patience']}: needs held-out losses to wait for; "
            f"evaluation.every = {flat['evaluation.every']}, evaluation.loss_count = {flat['evaluation.loss_count']}: "
            "must be positive too"
        )
    _check_averages(flat["ema.decay"], flat["ema.further_decays"], flat["ema.widths"])


def _check_averages(decay: float, further: tuple[float, ...], widths: tuple[float, ...]) -> None:
    if not all(0 <= other < 1 for other in further) or len({decay, *further}) < 1 + len(further):
        raise ConfigError(f"ema.further_decays = {further}: must be in [0, 1), none twice or that of ema.decay")
    if not all(NARROWEST <= width <= WIDEST for width in widths) or len(set(widths)) < len(widths):
        raise ConfigError(f"ema.widths = {widths}: must be in [{NARROWEST}, {WIDEST}], none twice")
