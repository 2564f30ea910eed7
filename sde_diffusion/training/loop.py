"""The training loop: config in, checkpoints out, resumable after any of them.

    x₀ = dequantised data,  t from the config's distribution p,  ε ~ N(0, I)
    step AdamW on  mean over the batch of  w(t) ‖target − prediction(α x₀ + σ ε, t)‖² · uniform density/p(t)
    averages of the weights move after every step; training/ema.py has their formulas

Every random number of a step is a function of the seed, the step and the example's place in the global batch alone
(dropout: of the seed and the step), so a resumed run takes exactly the steps that an uninterrupted one would.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate
from tqdm import tqdm

from sde_diffusion.data import as_dataset, load_dataset
from sde_diffusion.data.pictures import has_picture, save_picture
from sde_diffusion.losses import SPREADS, TIMES, WEIGHTINGS, Hybrid, TimeSampler, Weighting, denoising_loss
from sde_diffusion.model import DiffusionModel
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.samplers.sample import sample
from sde_diffusion.training.checkpoint import (
    build_model,
    load_checkpoint,
    newest_whole,
    read_json,
    save_checkpoint,
    set_aside_after,
    write_text,
)
from sde_diffusion.training.config import RESUMABLE, ConfigError, choose_device, flatten, resolve_config
from sde_diffusion.training.ema import Averages, drop_snapshots
from sde_diffusion.training.run_directory import (
    Interrupted,
    Signals,
    check_data,
    check_version,
    locked,
    outlast_a_signal,
    write_manifest,
)


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or its gradient is no longer finite."""


@dataclass
class TrainResult:
    """Where a run stands; what ``train`` returns and its callbacks are given."""

    model: DiffusionModel  # with averaged weights: for sampling and evaluation
    raw_model: DiffusionModel  # with the weights being trained
    step: int
    workdir: Path | None
    metrics: dict[str, float] = field(default_factory=dict)  # the last line logged


def train(
    config: ConfigDict | Mapping[str, Any] | str | Path,
    network: nn.Module | None = None,
    dataset: Any = None,
    callbacks: Sequence[Callable[[TrainResult], None]] = (),
) -> TrainResult:
    """Train a score network, or go on with the run that is in ``config.workdir``.

    Args:
        config: some or all fields of ``default_config``, or the path of a file in configs/.
        network: a module called as network(x, t), in place of the config's.
        dataset: an array (N, ...), a tensor or a torch Dataset, in place of the config's.
        callbacks: each called with a TrainResult after every line of metrics.

    Returns:
        The averaged and the raw model, the step reached, the last metrics and the run's directory.

    Raises:
        ConfigError: for a field that is unknown or wrong, or differs from that of the run to go on with.
        ValueError: if network, data set and config do not fit together, or the data hold NaN; naming which.
            Also for data that are not those of the run to go on with, and a directory that another process trains in.
        CheckpointError: if all checkpoints of the run to go on with are damaged, or the newest is of another model, or
            the run of another version of the library; or if a checkpoint cannot be written: those before it stand.
        TrainingError: if the loss or its gradient is no longer finite; the last checkpoint stands.
        Interrupted: at SIGTERM or SIGINT in a run with a directory, after the step and its checkpoint: a SystemExit
            with the code 128 + signal. A second signal has its usual effect at once.
    """
    config = resolve_config(config)
    description = _description(config, network is not None, dataset is not None)
    dataset = load_dataset(split="train", **config.data) if dataset is None else as_dataset(dataset)
    device = choose_device(config.train.device, "train.device")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            raw = build_model(description, dataset.data_shape, dataset.data, network).to(device)
            weighting = _build(WEIGHTINGS, config.loss.weighting)
            times = _build(TIMES, config.loss.time, raw.sde)
        except TypeError as error:
            raise ConfigError(f"network, sde, model or loss: an option is of the wrong type: {error}") from error
        _check_fit(config, raw, weighting, dataset)
        with locked(Path(config.workdir)) if config.workdir else nullcontext():
            run = _Run(config, description, dataset, raw, weighting, times, device)
            return run.finish(callbacks)


class _Run:
    """The state of a run and the steps it takes."""

    def __init__(
        self,
        config: ConfigDict,
        description: dict[str, Any],
        dataset: Any,
        raw: DiffusionModel,
        weighting: Weighting,
        times: TimeSampler,
        device: torch.device,
    ):
        self.config, self.description, self.dataset = config, description, dataset
        self.raw, self.weighting, self.times, self.device = raw, weighting, times, device
        self.workdir = Path(config.workdir) if config.workdir else None
        self.step = 0
        # Since the last line of metrics: it may be further back than the checkpoint that a run is taken up from.
        self.logged_step, self.unlogged_loss = 0, torch.zeros((), device=device)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            raw.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.averages = Averages(raw, config.ema.decay, config.ema.further_decays, config.ema.widths)
        self.averaged = self.averages.models["model"]
        if self.workdir:
            self._take_up()
            drop_snapshots(self.workdir, self.step)

    def finish(self, callbacks: Sequence[Callable[[TrainResult], None]]) -> TrainResult:
        """Take all the steps that remain."""
        options = self.config.train
        log = _Log(self.workdir, self.step)
        result = TrainResult(self.averaged, self.raw, self.step, self.workdir, log.last)
        timed_from, started = self.step, time.perf_counter()
        self.raw.train()
        is_drawn = options.sample_every and has_picture(self.dataset.data_shape)
        bar = tqdm(total=options.steps, initial=self.step, desc="train", unit="step", disable=None)
        with log, bar, Signals(are_noted=self.workdir is not None) as signals:
            for values, label in self._batches():
                loss, grad_norm = self._take_step(values, label)
                self.unlogged_loss += loss
                bar.update()
                is_last, interruption = self.step == options.steps, signals.received
                if self.step % options.log_every == 0 or is_last:
                    elapsed = time.perf_counter() - started
                    result.step = self.step
                    result.metrics = {
                        "step": self.step,
                        "loss": self._finite("loss", self.unlogged_loss) / (self.step - self.logged_step),
                        "grad_norm": self._finite("grad_norm", grad_norm),
                        "lr": self._learning_rate(self.step - 1),
                        "images_per_second": (self.step - timed_from) * options.batch_size / elapsed,
                    }
                    log.write(result.metrics)
                    bar.set_postfix_str("loss {loss:.4f}, {images_per_second:.0f} images/s".format(**result.metrics))
                    self.logged_step, self.unlogged_loss = self.step, torch.zeros_like(self.unlogged_loss)
                    timed_from, started = self.step, time.perf_counter()
                # Before the checkpoint: a run that is taken up there does not come by here again.
                if self.workdir and is_drawn and self.step % options.sample_every == 0:
                    self._draw_samples(self.workdir / "samples" / f"{self.step:08d}.png")
                every = self.config.ema.snapshot_every
                if self.workdir and self.averages.widths and (self.step % every == 0 or is_last):
                    self._finite("loss", loss)
                    self._finite("grad_norm", grad_norm)
                    self.averages.save_snapshots(self.workdir, self.step, self.description)
                if self.workdir and (self.step % options.checkpoint_every == 0 or is_last or interruption):
                    # A finite loss can have a gradient that is not, and one step with it spoils the weights.
                    self._finite("loss", loss)
                    self._finite("grad_norm", grad_norm)
                    log.sync()
                    self._save()
                    timed_from, started = self.step, time.perf_counter()
                if result.step == self.step:
                    for callback in callbacks:
                        callback(result)
                if self.workdir and interruption:
                    raise Interrupted(interruption, self.step, self.workdir)
        self.raw.eval()
        return result

    def _take_step(self, values: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        streams, x0, u, noise = self._draw(values.to(self.device, non_blocking=True))
        t, time_weight = self.times.draw(SPREADS[config.loss.spread](u))
        cond = {} if label is None else {"label": self._hide(label.to(self.device, non_blocking=True), streams)}
        # Dropout reads torch's global generator: seeded here, it too depends on the seed and the step alone.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, self.step)).generate_state(1)[0]))
        is_half = config.train.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if is_half else nullcontext():
            losses = denoising_loss(self.raw, x0, t, noise, self.weighting, **cond)
        self.times.update(t, losses.detach())
        loss = (time_weight * losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = config.optim.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.raw.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.optimizer.step()
        self.step += 1
        self.averages.update(self.raw, self.step)
        return loss.detach(), grad_norm

    def _hide(self, label: Tensor, streams: Streams) -> Tensor:
        """Replace some labels by the one past the last class, which stands for none."""
        is_hidden = streams.uniform(()) < self.config.train.label_dropout
        return torch.where(is_hidden, getattr(self.raw.network, "classes", 0), label)

    def _draw(self, values: Tensor) -> tuple[Streams, Tensor, Tensor, Tensor]:
        """Dequantise and flip a batch, and draw its noise and what its times are made of: one stream an example."""
        first = self.step * len(values)
        streams = Streams(self.config.seed, range(first, first + len(values)), self.device)
        shape = values.shape[1:]
        uniform = streams.uniform((2 + (shape.numel() if self.dataset.data.bits else 0),))
        x0 = values.float()
        if self.dataset.data.bits:
            x0 = self.dataset.data.dequantize(values, uniform[:, 2:].reshape(values.shape))
        if self.config.flip:
            x0 = torch.where((uniform[:, 1] < 0.5).reshape(-1, *[1] * len(shape)), x0.flip(-1), x0)
        return streams, x0, uniform[:, 0], streams.normal(shape)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches of the remaining steps, (values, labels or None)."""
        options = self.config.train
        order = _Order(len(self.dataset), self.config.seed, self.step, options.steps, options.batch_size)
        has_label = bool(getattr(self.raw.network, "classes", 0))
        loader = DataLoader(
            self.dataset,
            batch_sampler=order,
            num_workers=options.workers,
            pin_memory=self.device.type != "cpu",
            collate_fn=_collate,
            worker_init_fn=outlast_a_signal,
        )
        for values, label in loader:
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ValueError(f"dataset: a value in the batch of step {self.step} is NaN or infinite")
            if has_label and label is None:
                raise ConfigError("network.classes is set, but the data set has no labels")
            yield values, label if has_label else None

    def _learning_rate(self, step: int) -> float:
        optim = self.config.optim
        rate = optim.lr * min(1.0, (step + 1) / max(1, optim.warmup))
        if optim.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.config.train.steps))
        return rate

    def _take_up(self) -> None:
        assert self.workdir is not None
        checkpoint = newest_whole(self.workdir)
        if checkpoint is None:
            write_manifest(self.workdir, self.description, self.dataset)
            return
        check_version(self.workdir)
        stored = _completed(read_json(self.workdir / "config.json"))
        _check_same(flatten(stored), flatten(self.description), self.workdir)
        state = load_checkpoint(checkpoint, self.raw, self.averages.models, self.optimizer, self.times)
        check_data(self.workdir, self.dataset)
        self.step = state["step"]
        # A checkpoint of before they were stored began a new mean.
        self.logged_step = state.get("logged_step", self.step)
        self.unlogged_loss.fill_(state.get("unlogged_loss", 0.0))
        set_aside_after(self.workdir, self.step)

    def _save(self) -> None:
        assert self.workdir is not None
        state = {"step": self.step, "logged_step": self.logged_step, "unlogged_loss": float(self.unlogged_loss)}
        save_checkpoint(
            self.workdir,
            state,
            self.description,
            self.raw,
            self.averages.models,
            self.optimizer,
            self.times,
            self.config.train.keep_checkpoints,
            self.config.train.keep_every,
        )

    def _draw_samples(self, path: Path) -> None:
        count, classes = self.config.train.sample_count, getattr(self.raw.network, "classes", 0)
        cond = {"label": torch.arange(count, device=self.device) % classes} if classes else None
        drawn = sample(self.averaged, count, solver="heun", steps=20, cond=cond, seed=self.config.seed)
        save_picture(drawn.samples, self.dataset.data, path)

    def _finite(self, name: str, value: Tensor) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise TrainingError(
                f"{name} is {number} at step {self.step}: lower optim.lr, or look for outliers in the data"
            )
        return number


class _Order(Sampler[list[int]]):
    """Indices of each batch: one permutation an epoch, of (seed, epoch) alone; batches run across epochs."""

    def __init__(self, size: int, seed: int, first_step: int, steps: int, batch_size: int):
        self.size, self.seed, self.steps, self.batch_size = size, seed, range(first_step, steps), batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    permutation = np.random.default_rng((self.seed, epoch)).permutation(self.size)
                batch.append(int(permutation[position % self.size]))
            yield batch

    def __len__(self) -> int:
        return len(self.steps)


class _Log:
    """metrics.jsonl and TensorBoard, each without the lines that a resumed run will write again."""

    def __init__(self, workdir: Path | None, step: int):
        self._file = self._board = None
        self.last: dict[str, float] = {}
        if workdir is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        path = workdir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # A run that was killed may have left half a line, which has no end.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        self.last = json.loads(kept[-1]) if kept else {}
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))

    def sync(self) -> None:
        """Have the lines written to the disk now: no checkpoint is to outlive the lines before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _description(config: ConfigDict, has_network: bool, has_dataset: bool) -> dict[str, Any]:
    """The config as it is stored: without its place, and with the user's own network and data named so."""
    values = json.loads(config.to_json())
    del values["workdir"]
    if has_network:
        values["network"] = {"name": "custom"}
    if has_dataset:
        values["data"] = {"name": "custom"}
    return values


def _completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was stored, with the defaults of fields that did not exist then."""
    custom = {name for name, section in stored.items() if section == {"name": "custom"}}
    known = resolve_config({name: section for name, section in stored.items() if name not in custom})
    return _description(known, "network" in custom, "data" in custom)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor | None]:
    batch = default_collate(items)
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])


def _build(registry: Mapping[str, Callable[..., Any]], section: ConfigDict, *arguments: Any) -> Any:
    """What a named section describes."""
    options = dict(section)
    return registry[options.pop("name")](*arguments, **options)


def _check_fit(config: ConfigDict, model: DiffusionModel, weighting: Weighting, dataset: Any) -> None:
    """Refuse what config, network and data set do not agree on."""
    if next(model.parameters(), None) is None:
        raise ValueError("network has no parameters to train: it must be a torch module with some")
    classes = getattr(model.network, "classes", 0)
    if classes and classes < dataset.classes:
        raise ConfigError(f"network.classes = {classes}: the data set has {dataset.classes} classes")
    if model.learned_variance != isinstance(weighting, Hybrid):
        raise ConfigError(
            f"loss.weighting.name = {config.loss.weighting.name!r}, "
            f"model.learned_variance = {model.learned_variance}: 'hybrid' is what learns variances, and nothing else"
        )
    if config.flip and len(dataset.data_shape) != 3:
        raise ConfigError(f"flip = True: the data have shape {dataset.data_shape}, and only images are mirrored")


def _check_same(stored: dict[str, Any], given: dict[str, Any], workdir: Path) -> None:
    """Refuse to go on with a run under another config, where that would change its steps."""
    for name in sorted(stored.keys() | given.keys()):
        if name not in RESUMABLE and stored.get(name) != given.get(name):
            raise ConfigError(
                f"{name} = {given.get(name)!r}: the run in {workdir} has {stored.get(name)!r}; "
                "use its config to go on, or another workdir to begin anew"
            )
