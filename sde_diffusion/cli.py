"""Commands: train a config, sample from a run, evaluate likelihood or bound, count a network's cost, plan a run.

    python -m sde_diffusion train --config=configs/demo.py --workdir=runs/demo --config.optim.lr=1e-3
    python -m sde_diffusion sample --workdir=runs/demo --solver=ode
    python -m sde_diffusion likelihood --workdir=runs/demo --count=64
    python -m sde_diffusion bound --workdir=runs/demo --count=64 --steps=1000 --terms=64
    python -m sde_diffusion info --config=configs/cifar10_ddpm.py --shape=3,32,32
    python -m sde_diffusion plan --config=configs/cifar10_ddpm.py --shape=3,32,32 --devices=8 --device-type=a100

All but train use the model that ships with the package when no --workdir is given. likelihood and bound evaluate the
whole split without --count, and go on where they were interrupted. Under torchrun all ranks train one network, and
share the samples or examples of the other commands:

    torchrun --nproc-per-node=8 -m sde_diffusion train --config=configs/demo.py --workdir=runs/demo
    torchrun --nproc-per-node=8 -m sde_diffusion likelihood --workdir=runs/demo --split=test
"""

from __future__ import annotations

import ast
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from absl import flags
from ml_collections import ConfigDict, config_flags

from sde_diffusion import __version__
from sde_diffusion.bound import CODES
from sde_diffusion.data import DATASETS, load_dataset
from sde_diffusion.data.datasets import SPLITS
from sde_diffusion.data.pictures import save_picture
from sde_diffusion.evaluation import DatasetResult, Measure, bound_measure, evaluate_dataset, likelihood_measure
from sde_diffusion.likelihood import METHODS, PROBES, TRACES
from sde_diffusion.model import DiffusionModel
from sde_diffusion.networks.account import account, quantity
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers import sample, solvers
from sde_diffusion.samplers.grids import GRIDS
from sde_diffusion.storage import checksum, files_of, flatten
from sde_diffusion.training import ConfigError, Interrupted, TrainingError, load, train
from sde_diffusion.training.checkpoint import model_file, pretrained, read_description
from sde_diffusion.training.config import (
    NAMED,
    autocast_dtype,
    choose,
    choose_device,
    load_config_file,
    resolve_config,
)
from sde_diffusion.training.devices import DEVICES, choose_device_type
from sde_diffusion.training.distributed import Ranks, launched, place_of_launcher
from sde_diffusion.training.plan import Plan, check_devices, empty_network

Define = Callable[[flags.FlagValues], None]
Run = Callable[[flags.FlagValues, ConfigDict | None], None]


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code: 0, 2 after one line on what was wrong, 128 + signal of a run it ended."""
    names = " | ".join(_COMMANDS)
    if not arguments or arguments[0] in ("-h", "--help", "--helpfull", "help"):
        print(f"usage: python -m sde_diffusion {names} [--flag=value ...]\n\n{__doc__}")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in _COMMANDS:
        return _fail(f"{command!r} is no command; there are {names}")
    define, run = _COMMANDS[command]
    try:
        values, config = _parse(command, rest, define)
        if values.help:
            print(f"usage: python -m sde_diffusion {command} [--flag=value ...]\n{_help(values)}")
            return 0
        run(values, config)
    except (flags.Error, ValueError, SolverError, TrainingError, OSError) as error:
        return _fail(str(error))
    except Interrupted as error:
        _fail(f"{error}; the same command goes on from there")
        return error.code
    except KeyboardInterrupt:
        goes_on = f"; the same command goes on {_GOES_ON[command]}" if command in _GOES_ON else ""
        return _fail(f"interrupted{goes_on}")
    return 0


def _fail(message: str) -> int:
    print(f"sde_diffusion: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parse(command: str, arguments: Sequence[str], define: Define) -> tuple[flags.FlagValues, ConfigDict | None]:
    """Flags, and the config with its --config.field=value overrides; on a FlagValues of our own, not absl's."""
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this page", short_name="h", flag_values=values)
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    define(values)
    paths = [a.split("=", 1) for a in _joined(arguments, "--config") if a.split("=", 1)[0] == "--config"]
    rest = [a for a in _joined(arguments, "--config") if a.split("=", 1)[0] != "--config"]
    config = None
    if paths:
        config = load_config_file(paths[-1][1] if len(paths[-1]) > 1 else "")
        rest = _apply(config, rest)
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[command, *rest])
    elif any(a.startswith("--config.") for a in rest):
        raise ConfigError("--config.field=value changes a config: give --config=FILE too")
    positional = values([command, *rest])[1:]
    if positional:
        raise ConfigError(f"{positional[0]!r} is not a flag; flags are --name=value")
    return values, None if config is None else holder.value


def _check_fields(names: Sequence[str], config: ConfigDict) -> None:
    known = list(flatten(config.to_dict()))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ConfigError(f"--config.{name}: no such field; did you mean {', '.join(close)}?")


def _apply(config: ConfigDict, arguments: Sequence[str]) -> list[str]:
    """Carry out the overrides that config_flags does not: of a section by its name, and of fields that hold None.

    Returns:
        The arguments that remain.
    """
    pairs = [(a, *a.removeprefix("--config.").partition("=")[::2]) for a in arguments if a.startswith("--config.")]
    paths = {field: value for _, field, value in pairs if field.endswith(".path")}
    done = set()
    for argument, field, value in pairs:
        section = field.removesuffix(".name")
        if section in NAMED:
            # The one option without a default: there is no section without it.
            path = paths.get(f"{section}.path")
            choose(config, section, value, **({} if path is None else {"path": path}))
            done.add(argument)
    _check_fields([field for argument, field, _ in pairs if argument not in done], config)
    for argument, field, value in pairs:
        section, _, last = field.rpartition(".")
        parent = config[section] if section else config
        if parent[last] is None:
            parent[last] = _value(value)
            done.add(argument)
    return [a for a in arguments if a not in done]


def _joined(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments with "--name", "value" joined to "--name=value"."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == name:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _help(values: flags.FlagValues) -> str:
    lines = []
    for name in sorted(set(values)):
        flag = values[name]
        if flag.short_name != name:
            default = "" if flag.default in (None, False, []) else f" (default: {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(
        [
            "",
            *lines,
            "",
            "  --config=FILE: a file of configs/",
            "  --config.field=value: changes a field of it",
        ]
    )


def _define_train(values: flags.FlagValues) -> None:
    """Training is told everything by its config."""


def _train(values: flags.FlagValues, config: ConfigDict | None) -> None:
    if config is None:
        raise ConfigError("--config is missing: give one of the files in configs/, as in --config=configs/demo.py")
    with config.unlocked():
        config.workdir = values.workdir or config.workdir
    if not config.workdir:
        raise ConfigError("--workdir is missing: the directory to write the run to")
    result = train(config)
    if result.rank:
        return
    loss = f", loss {result.metrics['loss']:.4f}" if result.metrics else ""
    parameters = sum(parameter.numel() for parameter in result.model.parameters())
    print(f"{result.step} steps done{loss}, {parameters:,} parameters; the run is in {result.workdir}")


def _define_pretrained(values: flags.FlagValues) -> None:
    flags.DEFINE_string("pretrained", "fashion_mnist", "without --workdir, a model that ships", flag_values=values)


def _define_sample(values: flags.FlagValues) -> None:
    _define_pretrained(values)
    flags.DEFINE_enum("solver", "auto", list(solvers()), "how to solve", flag_values=values)
    flags.DEFINE_integer("count", 16, "number of samples", flag_values=values)
    flags.DEFINE_string("device", "auto", "where to compute", flag_values=values)
    flags.DEFINE_integer("steps", None, "steps of the solver", flag_values=values)
    flags.DEFINE_integer("nfe", None, "evaluations of the network allowed", flag_values=values)
    flags.DEFINE_enum("grid", None, list(GRIDS), "times of the steps; by default the solver's", flag_values=values)
    flags.DEFINE_enum("threshold", None, ["static", "dynamic"], "keep the data in their range", flag_values=values)
    flags.DEFINE_bool("denoise", False, "end at the estimate of the data, without the last noise", flag_values=values)
    flags.DEFINE_bool("compile", False, "make one graph of a step", flag_values=values)
    flags.DEFINE_bool("progress", False, "show a bar", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "samples solved together", flag_values=values)
    flags.DEFINE_integer("label", None, "class to draw, of a model with classes", flag_values=values)
    flags.DEFINE_integer("seed", 0, "seed", flag_values=values)
    flags.DEFINE_multi_string("option", [], "NAME=VALUE of the solver, such as eta=0.5", flag_values=values)
    flags.DEFINE_string("output", "outputs/samples.png", "picture to write", flag_values=values)


def _sample(values: flags.FlagValues, config: ConfigDict | None) -> None:
    with launched() as ranks:
        _draw(values, config, ranks)


def _draw(values: flags.FlagValues, config: ConfigDict | None, ranks: Ranks) -> None:
    """Draw this rank's share of the samples; the first rank makes a picture of all."""
    model, _, _ = _model(values, config)
    classes = getattr(model.network, "classes", 0)
    if values.label is not None and not 0 <= values.label < classes:
        raise ConfigError(f"--label={values.label}: the model has {classes} classes, from 0")
    options = dict(_option(text) for text in values.option)
    allowed = solvers()[values.solver].options
    for option in options:
        if option not in allowed:
            raise ConfigError(f"--option={option}: solver {values.solver!r} takes {', '.join(allowed) or 'no options'}")
    cond = None if values.label is None else {"label": torch.full((values.count,), values.label)}
    result = sample(
        model,
        values.count,
        solver=values.solver,
        steps=values.steps,
        nfe=values.nfe,
        grid=values.grid,
        threshold=values.threshold,
        denoise=values.denoise,
        compile=values.compile,
        progress=values.progress and ranks.is_first,
        cond=cond,
        batch_size=values.batch_size,
        shard=(ranks.rank, ranks.size),
        seed=values.seed,
        **options,
    )
    samples = ranks.collect(result.samples, ranks.share(values.count), values.count)
    if ranks.is_first:
        save_picture(samples, model.data, values.output)
        print(f"solver {values.solver}, nfe {result.nfe}, {result.seconds:.1f} seconds, {values.count} samples")
        print(f"wrote {values.output}")


def _define_evaluation(values: flags.FlagValues) -> None:
    _define_pretrained(values)
    flags.DEFINE_string("dataset", None, f"{', '.join(DATASETS)}; by default that of the run", flag_values=values)
    flags.DEFINE_multi_string("option", [], "NAME=VALUE of the data set, such as path=FOLDER", flag_values=values)
    flags.DEFINE_enum("split", "test", list(SPLITS), "examples to evaluate", flag_values=values)
    flags.DEFINE_integer("count", None, "only the first so many; by default the whole split", flag_values=values)
    flags.DEFINE_string(
        "output",
        None,
        "directory of the results, in which an interrupted evaluation goes on; by default COMMAND_SPLIT in the run's, "
        "or in outputs/ without one",
        flag_values=values,
    )
    flags.DEFINE_string("device", "auto", "where to compute", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "examples evaluated together", flag_values=values)
    flags.DEFINE_integer("seed", 0, "seed", flag_values=values)


class _Evaluation:
    """A model, a data set and a directory as the flags have them, for one of torchrun's ranks or the only one."""

    def __init__(self, command: str, values: flags.FlagValues, config: ConfigDict | None):
        self.values = values
        # Ranks meet in files alone: one that is slower, or killed and restarted, holds up no other.
        self.rank, self.ranks = place_of_launcher()
        self.model, section, path = _model(values, config)
        self.dataset, data = self._load(section)
        self.settings = {
            "version": __version__,
            "model": checksum(*files_of(model_file(path))),
            "data": data,
            "split": values.split,
            # Another kind of device draws other random numbers.
            "device": self.model.device.type,
        }
        parent = path if path.is_dir() else Path("outputs")
        self.directory = Path(values.output or parent / f"{command}_{values.split}")

    def _load(self, section: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The data set asked for, and its name and options but where it is: the same data elsewhere are the same."""
        name = self.values.dataset or section["name"]
        if name == "custom":
            raise ConfigError("the run was trained on a data set of the user's own: give --dataset, or use Python")
        if name not in DATASETS:
            raise ConfigError(f"--dataset={name}: must be one of {', '.join(DATASETS)}")
        options = dict(section, name=name) if name == section["name"] else {"name": name}
        options |= dict(_option(text) for text in self.values.option)
        dataset, model = load_dataset(split=self.values.split, **options), self.model
        if (tuple(dataset.data_shape), dataset.data) != (tuple(model.data_shape), model.data):
            raise ConfigError(
                f"--dataset={name}: its examples have shape {tuple(dataset.data_shape)} and {dataset.data}; "
                f"the model's {tuple(model.data_shape)} and {model.data}"
            )
        return dataset, {key: value for key, value in options.items() if key not in ("path", "cache")}

    def run(self, measure: Callable[..., Measure], options: dict[str, Any], folder: str = "") -> DatasetResult | None:
        """The result of this measure with these options, in a folder of the directory; None if other ranks go on."""
        settings = {name: "inf" if value == math.inf else value for name, value in options.items()}
        result = evaluate_dataset(
            measure(self.model, **options),
            self.dataset,
            self.directory / folder,
            settings={**self.settings, "measure": measure.__name__, "options": settings},
            count=self.values.count,
            batch_size=self.values.batch_size,
            rank=self.rank,
            ranks=self.ranks,
        )
        if result is None:
            share = range(len(self.dataset))[: self.values.count][self.rank :: self.ranks]
            print(f"rank {self.rank} of {self.ranks}: its {len(share)} examples are done; the last rank has the result")
        return result


def _define_likelihood(values: flags.FlagValues) -> None:
    _define_evaluation(values)
    flags.DEFINE_enum("method", "decoupled", list(METHODS), "how to solve", flag_values=values)
    flags.DEFINE_enum("trace", "hutchinson", list(TRACES), "how to compute the divergence", flag_values=values)
    flags.DEFINE_integer("probes", 8, "probes of Hutchinson's estimate", flag_values=values)
    flags.DEFINE_enum("probe", "orthogonal", list(PROBES), "their distribution", flag_values=values)
    flags.DEFINE_integer("steps", None, "of the path; by default one for each unit of log(σ/α)", flag_values=values)
    flags.DEFINE_integer("nodes", None, "of the quadrature in each step; by default 4", flag_values=values)
    flags.DEFINE_float("rtol", None, "relative tolerance of the solver; by default the method's", flag_values=values)
    flags.DEFINE_float("atol", None, "absolute tolerance of the solver; by default the method's", flag_values=values)
    flags.DEFINE_float("t_min", None, "time whose density is evaluated", flag_values=values)
    flags.DEFINE_float(
        "target_std_error",
        None,
        "take probes until an example's error is so small, in bits/dim (continuous data: nats)",
        flag_values=values,
    )
    flags.DEFINE_integer("draws", 1, "of dequantisation, for codes", flag_values=values)
    flags.DEFINE_bool("bounds", False, "the variational bound too, of a chain and of its limit", flag_values=values)
    flags.DEFINE_float("chain_steps", 1000, "of --bounds: steps of the chain", flag_values=values)
    flags.DEFINE_integer("terms", 16, "of --bounds: terms to evaluate, sampled by strata", flag_values=values)
    flags.DEFINE_integer("repeats", 2, "of --bounds: independent estimates to average", flag_values=values)


def _likelihood(values: flags.FlagValues, config: ConfigDict | None) -> None:
    evaluation = _Evaluation("likelihood", values, config)
    model = evaluation.model
    is_continuous = model.data.bits is None
    names = ("method", "trace", "probes", "probe", "steps", "nodes", "rtol", "atol")
    options = {name: values[name].value for name in names}
    options |= {
        "t_min": model.sde.t_min if values.t_min is None else values.t_min,
        "target_std_error": values.target_std_error,
        "seed": values.seed,
    }
    if not is_continuous:
        options["draws"] = values.draws
    elif values.draws != 1:
        raise ConfigError(f"--draws={values.draws}: the data are continuous, and not dequantised")
    result = evaluation.run(likelihood_measure, options)
    if result is not None:
        print(f"{result.unit} of {result.count} {values.split} examples: {result.mean:.4f}")
        print("  -log density of the probability-flow ODE" + ", codes uniformly dequantised" * (not is_continuous))
        print(f"  standard error of the estimator (probes): {_error(result.std_error)}")
        print(f"  error of the solver (its estimate):       {_error(result.solver_error)}")
        print(f"  standard error over examples (sampling):  {_error(result.sampling_error)}")
        print(f"  density at t_min = {options['t_min']:.3g}; {_costs(result)}")
    if values.bounds:
        shared = {"terms": values.terms, "repeats": values.repeats, "seed": values.seed}
        for folder, steps in (("bound_discrete", values.chain_steps), ("bound_continuous", math.inf)):
            _evaluate_bound(evaluation, {"steps": steps, **shared}, folder)


def _define_bound(values: flags.FlagValues) -> None:
    _define_evaluation(values)
    flags.DEFINE_float("steps", 1000, "steps of the chain; inf for the limit of continuous time", flag_values=values)
    flags.DEFINE_enum("grid", "log_snr", list(GRIDS), "in what the steps are equal", flag_values=values)
    flags.DEFINE_integer("terms", None, "terms to evaluate, sampled by strata; all by default", flag_values=values)
    flags.DEFINE_integer("repeats", 2, "independent estimates to average", flag_values=values)
    flags.DEFINE_string("variance", "posterior", "of a step: posterior, noising, learned or 0 to 1", flag_values=values)
    flags.DEFINE_enum("codes", "centres", list(CODES), "the point that stands for a code", flag_values=values)
    flags.DEFINE_float("t_min", None, "time of the chain's first state", flag_values=values)


def _bound(values: flags.FlagValues, config: ConfigDict | None) -> None:
    names = ("steps", "grid", "terms", "repeats", "codes", "t_min", "seed")
    options = {name: values[name].value for name in names} | {"variance": _value(values.variance)}
    _evaluate_bound(_Evaluation("bound", values, config), options)


def _evaluate_bound(evaluation: _Evaluation, options: dict[str, Any], folder: str = "") -> None:
    """Evaluate the bound with these options, and print it."""
    result = evaluation.run(bound_measure, options, folder)
    if result is None:
        return
    chain = "limit of continuous time" if options["steps"] == math.inf else f"chain of {options['steps']:g} steps"
    parts = zip(("L_T", "sum of L_t", "L_0"), result.parts.values(), strict=True)
    print(f"bound on the {result.unit} of {result.count} {evaluation.values.split} examples: {result.mean:.4f}")
    print(f"  variational, of the {chain}")
    print(f"  standard error of the estimator (repeats): {_error(result.std_error)}")
    print(f"  standard error over examples (sampling):   {_error(result.sampling_error)}")
    print(f"  {', '.join(f'{name} {part:.3g}' for name, part in parts)}; {_costs(result)}")


def _define_info(values: flags.FlagValues) -> None:
    flags.DEFINE_string("shape", None, "of the data, as 3,32,32; by default the data set's", flag_values=values)
    flags.DEFINE_string("device", "auto", "whose kernels to count; nothing is computed there", flag_values=values)


def _info(values: flags.FlagValues, config: ConfigDict | None) -> None:
    settings, shape = _settings_and_shape(values, config)
    options = dict(settings["network"])
    name, precision, batch_size = options.pop("name"), settings["train"]["precision"], settings["train"]["batch_size"]
    network, autocast = empty_network(settings, shape), autocast_dtype(precision)
    costs = account(network, shape, autocast=autocast, device=choose_device(values.device))
    forward, both = costs.forward_flops, costs.forward_flops + costs.backward_flops
    print(f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())}), data of shape {shape}\n")
    print(f"{costs.table()}\n")
    print(f"{costs.parameters:,} parameters, {quantity(costs.weight_bytes, 'B')} of weights")
    # The headers of older files do not have the fields.
    further = sum(len(settings["ema"].get(field, ())) for field in ("further_decays", "widths"))
    held, averages = costs.training_bytes + further * costs.average_bytes, "averages" if further else "average"
    print(f"  training holds {quantity(held, 'B')}: weights, gradients, AdamW's two moments, {averages}")
    print(f"an example: {quantity(forward, 'FLOP')} forward, {quantity(both, 'FLOP')} with the backward pass")
    print(f"  {quantity(costs.kept_bytes, 'B')} kept for the backward pass, in {precision}")
    print(f"a batch of {batch_size}: {quantity(batch_size * both, 'FLOP')} with the backward pass")
    print(f"  {quantity(costs.kept_bytes_of(batch_size), 'B')} kept for the backward pass")
    print("A multiply-add counts as two FLOPs. A step's peak of memory is higher than what it holds and keeps.")


def _define_plan(values: flags.FlagValues) -> None:
    flags.DEFINE_string("shape", None, "of the data, as 3,32,32; by default the data set's", flag_values=values)
    flags.DEFINE_integer("devices", 1, "how many there are", flag_values=values)
    flags.DEFINE_string(
        "device-type", "here", f"here, which is measured, or one of {', '.join(DEVICES)}", flag_values=values
    )
    flags.DEFINE_float("price", None, "dollars an hour of a device; by default a guess", flag_values=values)


def _plan(values: flags.FlagValues, config: ConfigDict | None) -> None:
    settings, shape = _settings_and_shape(values, config)
    # Older runs lack fields, and a data set of the user's own is no section of a config.
    settings = resolve_config({name: section for name, section in settings.items() if name != "data"}).to_dict()
    check_devices(settings, values.devices)
    device = choose_device_type(str(values["device-type"].value), settings["train"]["precision"])
    if values.price is not None:
        if not 0 <= values.price < math.inf:
            raise ConfigError(f"--price={values.price}: must be at least 0")
        device = replace(device, price=values.price)
    print(Plan(settings, shape, device, values.devices).text())


def _settings_and_shape(values: flags.FlagValues, config: ConfigDict | None) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The config given, or that of the run or of the model that ships, and the shape of the data."""
    shape = None if values.shape is None else _shape(values.shape)
    if config is None:
        description = read_description(Path(values.workdir or pretrained("fashion_mnist")))
        if description["config"]["network"]["name"] == "custom":
            raise ConfigError("the run's network is of the user's own: count it in Python, by account(network)")
        return description["config"], shape or tuple(description["data_shape"])
    if values.workdir:
        raise ConfigError(f"--workdir={values.workdir} and --config: give one of them")
    settings = resolve_config(config).to_dict()
    if shape is None:
        try:
            shape = tuple(load_dataset(split="train", **settings["data"]).data_shape)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{error}; without the data, give their shape, as in --shape=3,32,32") from error
    return settings, shape


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"--shape={text}: must be positive whole numbers, as in --shape=3,32,32")
    return tuple(map(int, sizes))


def _error(value: float) -> str:
    return "not estimated" if math.isnan(value) else f"{value:.4f}"


def _costs(result: DatasetResult) -> str:
    """Evaluations an example, and time; where the histogram is."""
    names = {"nfe": "nfe", "derivative_evaluations": "products with the derivative"}
    counts = (f"{names[name]} {total / result.count:.4g}" for name, total in result.totals.items())
    return f"{', '.join(counts)}, {result.seconds:.1f} seconds; see {result.histogram}"


def _model(values: flags.FlagValues, config: ConfigDict | None) -> tuple[DiffusionModel, dict[str, Any], Path]:
    """The model asked for, or the one that ships, the data section that it goes with, and where it is."""
    workdir = values.workdir or (config.workdir if config is not None else "")
    path = Path(workdir) if workdir else pretrained(values.pretrained)
    data = read_description(path)["config"]["data"] if config is None else resolve_config(config).data.to_dict()
    return load(path, device=choose_device(values.device)), data, path


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--option={text}: must be NAME=VALUE")
    return name, _value(value)


def _value(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


_COMMANDS: dict[str, tuple[Define, Run]] = {
    "train": (_define_train, _train),
    "sample": (_define_sample, _sample),
    "likelihood": (_define_likelihood, _likelihood),
    "bound": (_define_bound, _bound),
    "info": (_define_info, _info),
    "plan": (_define_plan, _plan),
}

# How each command that can be interrupted goes on.
_GOES_ON = {
    "train": "from the last checkpoint",
    "likelihood": "with the examples that are left",
    "bound": "with the examples that are left",
}
