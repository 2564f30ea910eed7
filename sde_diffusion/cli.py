"""Commands: train a config, sample from a run, evaluate its likelihood or the bound on it.

    python -m sde_diffusion train --config=configs/demo.py --workdir=runs/demo --config.optim.lr=1e-3
    python -m sde_diffusion sample --workdir=runs/demo --solver=ode
    python -m sde_diffusion likelihood --workdir=runs/demo --count=64
    python -m sde_diffusion bound --workdir=runs/demo --count=64 --steps=1000 --terms=64

All but train use the model that ships with the package when no --workdir is given.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from absl import flags
from ml_collections import ConfigDict, config_flags

from sde_diffusion.bound import CODES, variational_bound
from sde_diffusion.data import load_dataset
from sde_diffusion.data.pictures import save_picture
from sde_diffusion.likelihood import PROBES, TRACES, bits_per_dim, log_likelihood
from sde_diffusion.model import DiffusionModel
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers import sample, solvers
from sde_diffusion.samplers.grids import GRIDS
from sde_diffusion.training import ConfigError, TrainingError, load, train
from sde_diffusion.training.checkpoint import pretrained, read_description
from sde_diffusion.training.config import NAMED, choose, choose_device, flatten, load_config_file, resolve_config

Define = Callable[[flags.FlagValues], None]
Run = Callable[[flags.FlagValues, ConfigDict | None], None]


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code: 0, or 2 after one line on what was wrong."""
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
    except KeyboardInterrupt:
        is_training = command == "train"
        return _fail("interrupted" + "; the same command goes on from the last checkpoint" * is_training)
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
    done = set()
    for argument, field, value in pairs:
        section = field.removesuffix(".name")
        if section in NAMED:
            choose(config, section, value)
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
    loss = f", loss {result.metrics['loss']:.4f}" if result.metrics else ""
    parameters = sum(parameter.numel() for parameter in result.model.parameters())
    print(f"{result.step} steps done{loss}, {parameters:,} parameters; the run is in {result.workdir}")


def _define_sample(values: flags.FlagValues) -> None:
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
    model, _ = _model(values, config)
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
        progress=values.progress,
        cond=cond,
        batch_size=values.batch_size,
        seed=values.seed,
        **options,
    )
    save_picture(result.samples, model.data, values.output)
    print(f"solver {values.solver}, nfe {result.nfe}, {result.seconds:.1f} seconds, {values.count} samples")
    print(f"wrote {values.output}")


def _define_evaluation(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("split", "test", ["train", "test"], "examples to evaluate", flag_values=values)
    flags.DEFINE_integer("count", 64, "number of examples, the first of the split", flag_values=values)
    flags.DEFINE_string("device", "auto", "where to compute", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "examples evaluated together", flag_values=values)
    flags.DEFINE_integer("seed", 0, "seed", flag_values=values)


def _examples(values: flags.FlagValues, section: dict[str, Any]) -> torch.Tensor:
    """The examples asked for, as the data set holds them."""
    if section["name"] == "custom":
        raise ConfigError("the run was trained on a data set of the user's own; evaluate it from Python")
    if values.count < 1:
        raise ConfigError(f"--count={values.count}: must be at least 1")
    dataset: Any = load_dataset(split=values.split, **section)
    items = [dataset[i] for i in range(min(values.count, len(dataset)))]
    return torch.stack([item if isinstance(item, torch.Tensor) else item[0] for item in items])


def _define_likelihood(values: flags.FlagValues) -> None:
    _define_evaluation(values)
    flags.DEFINE_enum("trace", "hutchinson", list(TRACES), "how to compute the divergence", flag_values=values)
    flags.DEFINE_integer("probes", 2, "probes of Hutchinson's estimate", flag_values=values)
    flags.DEFINE_enum("probe", "rademacher", list(PROBES), "their distribution", flag_values=values)
    flags.DEFINE_float("tolerance", 1e-4, "relative and absolute tolerance of the solver", flag_values=values)
    flags.DEFINE_float("t_min", None, "time whose density is evaluated", flag_values=values)


def _likelihood(values: flags.FlagValues, config: ConfigDict | None) -> None:
    model, section = _model(values, config)
    examples = _examples(values, section)
    options = {
        "trace": values.trace,
        "probes": values.probes,
        "probe": values.probe,
        "rtol": values.tolerance,
        "atol": values.tolerance,
        "t_min": values.t_min,
        "batch_size": values.batch_size,
        "seed": values.seed,
    }
    if model.data.bits is None:
        likelihood = log_likelihood(model, examples.float(), **options)
        print(
            f"log-likelihood of {len(examples)} {values.split} examples: {float(likelihood.log_prob.mean()):.4f} nats"
        )
        print(f"  standard error of an example's, over probes: {float(likelihood.std_error.mean()):.4f}")
        print(f"  density at t_min = {likelihood.t_min:.3g}; nfe {likelihood.nfe}, {likelihood.seconds:.1f} seconds")
        return
    bits = bits_per_dim(model, examples, **options)
    print(f"bits/dim of {len(examples)} {values.split} examples: {bits.mean:.4f}")
    print(f"  standard error of the estimator (probes): {bits.std_error:.4f}")
    print(f"  standard error over examples (sampling):  {bits.sampling_error:.4f}")
    print(f"  density at t_min = {bits.t_min:.3g}; nfe {bits.nfe}, {bits.seconds:.1f} seconds")


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
    model, section = _model(values, config)
    examples = _examples(values, section)
    bound = variational_bound(
        model,
        examples.float() if model.data.bits is None else examples,
        steps=values.steps,
        grid=values.grid,
        t_min=values.t_min,
        variance=_value(values.variance),
        codes=values.codes,
        terms=values.terms,
        repeats=values.repeats,
        batch_size=values.batch_size,
        seed=values.seed,
    )
    parts = {"L_T": bound.prior, "sum of L_t": bound.transitions.sum(1), "L_0": bound.decoder}
    split = ", ".join(f"{name} {float(bound.per_dimension(nats).mean()):.3g}" for name, nats in parts.items())
    print(f"bound on the {bound.unit} of {len(examples)} {values.split} examples: {bound.mean:.4f}")
    print(f"  standard error of the estimator (repeats): {bound.std_error:.4f}")
    print(f"  standard error over examples (sampling):   {bound.sampling_error:.4f}")
    print(f"  {split}; nfe {bound.nfe}, {bound.seconds:.1f} seconds")


def _model(values: flags.FlagValues, config: ConfigDict | None) -> tuple[DiffusionModel, dict[str, Any]]:
    """The model asked for, or the one that ships, and the data section that it goes with."""
    workdir = values.workdir or (config.workdir if config is not None else "")
    path = Path(workdir) if workdir else pretrained("fashion_mnist")
    data = read_description(path)["config"]["data"] if config is None else resolve_config(config).data.to_dict()
    return load(path, device=choose_device(values.device)), data


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
}
