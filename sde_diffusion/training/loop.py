"""The training loop: config in, checkpoints out, resumable after any of them.

    x₀ = dequantised data,  t from the config's distribution p,  ε ~ N(0, I)
    step AdamW on  mean over the batch of  w(t) ‖target − prediction(α x₀ + σ ε, t)‖² · uniform density/p(t)
    averages of the weights move after every step; training/ema.py has their formulas

Every random number of a step is a function of the seed, the step and the example's place in the global batch alone
(dropout: of the seed, the step, the rank and the part of its share), so a resumed run takes exactly the steps that an
uninterrupted one would, and one on more ranks the same but for rounding; training/distributed.py has how they share.
"""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from sde_diffusion.data import as_dataset, load_dataset
from sde_diffusion.data.datasets import DataSource
from sde_diffusion.data.pictures import has_picture, save_picture
from sde_diffusion.losses import (
    SPREADS,
    TIMES,
    WEIGHTINGS,
    Hybrid,
    TimeSampler,
    Weighting,
    denoising_loss,
    independent,
)
from sde_diffusion.model import DiffusionModel
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers.noise import Streams, unmixed_random_numbers
from sde_diffusion.samplers.sample import sample
from sde_diffusion.storage import flatten, read_json
from sde_diffusion.training.batches import batches
from sde_diffusion.training.callbacks import Callback, as_callback
from sde_diffusion.training.checkpoint import (
    Checkpoints,
    build_model,
    contents_of,
    load_checkpoint,
    newest_whole,
    set_aside_after,
)
from sde_diffusion.training.config import (
    RESUMABLE,
    ConfigError,
    autocast_dtype,
    choose_device,
    resolve_config,
)
from sde_diffusion.training.distributed import Gathered, Ranks, exchanging, launched, replicate, shard, whole
from sde_diffusion.training.ema import Averages, drop_snapshots
from sde_diffusion.training.held_out import Evaluation
from sde_diffusion.training.log import Log, Stopwatch
from sde_diffusion.training.run_directory import (
    Interrupted,
    Signals,
    check_data,
    check_version,
    locked,
    write_manifest,
)
from sde_diffusion.training.schedules import SCHEDULES, Schedule

# Of a step, whose shares of the time each line of metrics tells.
_PARTS = ("data", "network", "optimizer", "average", "logging")


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or its gradient is no longer finite, or the memory is too small."""


@dataclass
class TrainResult:
    """Where a run stands; what ``train`` returns and its callbacks are given.

    During a run whose weights are sharded, those of both models are DTensors; afterwards they are whole, on the CPU.
    """

    model: DiffusionModel  # with averaged weights: for sampling and evaluation
    raw_model: DiffusionModel  # with the weights being trained
    step: int
    workdir: Path | None
    metrics: dict[str, float] = field(default_factory=dict)  # the last line logged
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one
    rank: int = 0
    ranks: int = 1
    stop: bool = False  # set by a callback, on any rank: ends the run after the next line of metrics or evaluation


def train(
    config: ConfigDict | Mapping[str, Any] | str | Path,
    network: nn.Module | None = None,
    dataset: Any = None,
    callbacks: Sequence[Callback | Callable[[TrainResult], None]] = (),
    held_out: Any = None,
) -> TrainResult:
    """Train a score network, or go on with the run that is in ``config.workdir``.

    In each of the processes that torchrun started, it trains one network with all of them.

    Args:
        config: some or all fields of ``default_config``, or the path of a file in configs/.
        network: a module called as network(x, t), in place of the config's. It is trained as it is, and cannot be used
            any more where its weights were sharded.
        dataset: an array (N, ...), a tensor or a torch Dataset, in place of the config's.
        callbacks: each a ``Callback``, or a function that is called with a TrainResult after every line of metrics.
        held_out: beside a data set of one's own, data to evaluate on; of the config's it is the test split.

    Returns:
        The averaged and the raw model, the step reached, the last metrics and the run's directory.

    Raises:
        ConfigError: for a field that is unknown or wrong, or differs from that of the run to go on with; for ranks that
            do not divide the batch.
        ValueError: if network, data set and config do not fit together, or the data hold NaN; naming which.
            Also for data that are not those of the run to go on with, and a directory that another process trains in.
        CheckpointError: if all checkpoints of the run to go on with are damaged, or the newest is of another model, or
            the run of another version of the library; or if a checkpoint cannot be written: those before it stand.
        TrainingError: if the loss or its gradient is no longer finite, or memory does not suffice; the last checkpoint
            stands.
        Interrupted: at SIGTERM or SIGINT in a run with a directory, after the step and its checkpoint: a SystemExit
            with the code 128 + signal. A second signal has its usual effect at once.
        TypeError: for a callback that is none.
        RuntimeError: on the other ranks, where the first has failed.
    """
    config = resolve_config(config)
    description = _description(config, network is not None, dataset is not None)
    told = [as_callback(callback) for callback in callbacks]
    # Before the ranks meet: the first to decode a folder of images may take long, and the others need not wait in vain.
    dataset, held_out = _data(config, dataset, held_out)
    with launched(config.train.parallel == "fsdp") as ranks:
        _check_ranks(config, ranks, has_picture(dataset.data_shape))
        device = choose_device(config.train.device, "train.device")
        with unmixed_random_numbers(device):
            torch.manual_seed(config.seed)
            try:
                raw = build_model(description, dataset.data_shape, dataset.data, network)
                weighting = _build(WEIGHTINGS, config.loss.weighting)
                times = _build(TIMES, config.loss.time, raw.sde)
                schedule = _build(SCHEDULES, config.optim.schedule)
            except TypeError as error:
                raise ConfigError(
                    f"network, sde, model, loss or optim: an option is of the wrong type: {error}"
                ) from error
            _check_fit(config, raw, weighting, dataset)
            evaluation = None
            if config.evaluation.every:
                evaluation = Evaluation(config, weighting, times, dataset, held_out, ranks)
                evaluation.check(raw)
            with ExitStack() as held:
                if config.workdir:
                    ranks.first(partial(held.enter_context, locked(Path(config.workdir))))
                run = _Run(config, description, dataset, raw, weighting, times, schedule, evaluation, device, ranks)
                return run.finish(told)


class _Objective(nn.Module):
    """The loss as a module, which is what ranks average the gradients of."""

    def __init__(self, model: DiffusionModel, weighting: Weighting):
        super().__init__()
        self.model, self.weighting = model, weighting

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return denoising_loss(self.model, x0, t, noise, self.weighting, **cond)


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
        schedule: Schedule,
        evaluation: Evaluation | None,
        device: torch.device,
        ranks: Ranks,
    ):
        self.config, self.description, self.dataset = config, description, dataset
        self.raw, self.times, self.schedule, self.device, self.ranks = raw, times, schedule, device, ranks
        self.evaluation, self.workdir = evaluation, Path(config.workdir) if config.workdir else None
        self.share = ranks.share(config.train.batch_size)
        ranks.begin_alike(raw)
        self.gathered = Gathered(raw) if ranks.sharded else None
        mesh = init_device_mesh(device.type, (ranks.size,)) if ranks.sharded else None

        def place(model: DiffusionModel) -> None:
            if mesh is not None:
                shard(model.network, mesh)
            model.to(device)

        ema = config.ema
        self.averages = Averages(raw, ema.decay, ema.further_decays, ema.widths, place)
        self.averaged = self.averages.models["model"]
        place(raw)
        self.objective: nn.Module = _Objective(raw, weighting)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            raw.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.autocast = autocast_dtype(config.train.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast is torch.float16)
        self.step = 0
        # This rank's, since the last line of metrics, which may be further back than the checkpoint taken up.
        self.logged_step, self.unlogged_loss = 0, torch.zeros((), device=device)
        self.checkpoints = None
        if self.workdir:
            self._take_up(self.workdir)
            options = config.train
            self.checkpoints = Checkpoints(
                self.workdir, ranks, options.keep_checkpoints, options.keep_every, options.async_checkpoints
            )
        # Of those that this process takes.
        self.first_step = self.step
        if ranks.size > 1 and not ranks.sharded:
            self._go_through()
            self._check_all_used()
            self.objective = replicate(self.objective)
            # It changes the order in which ranks add gradients after the first backward pass, and the order of a sum is
            # in its last bits: a run that is taken up would differ from one that was not interrupted.
            self._go_through()
            self.optimizer.zero_grad(set_to_none=True)

    def finish(self, callbacks: Sequence[Callback]) -> TrainResult:
        """Take all the steps that remain."""
        where = self.workdir if self.ranks.is_first else None
        ranks, error = self.ranks, None
        result = TrainResult(self.averaged, self.raw, self.step, self.workdir, rank=ranks.rank, ranks=ranks.size)
        try:
            evaluated = where if self.evaluation else None
            with Log(where, "metrics", self.step) as log, Log(evaluated, "evaluations", self.step) as evaluations:
                result.metrics, result.evaluation = log.last, evaluations.last
                self._tell(callbacks, "begin", result)
                if not self._has_converged(evaluations):
                    self._go(log, evaluations, result, callbacks)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if self.checkpoints:
                self.checkpoints.close()
            # DistributedDataParallel keeps the group of ranks, whose end, if it comes with that, may wait for ever.
            del self.objective
            self._tell(callbacks, "end", result, error)
        self.raw.eval()
        if self.gathered:
            result.model, result.raw_model = (self.gathered.of(each, "cpu") for each in (self.averaged, self.raw))
        return result

    def _go(self, log: Log, evaluations: Log, result: TrainResult, callbacks: Sequence[Callback]) -> None:
        """Take steps, and after each do what is due."""
        options, ranks = self.config.train, self.ranks
        has_label = bool(getattr(self.raw.network, "classes", 0))
        self.raw.train()
        watch = Stopwatch(self.device, _PARTS)
        is_hidden = None if ranks.is_first else True
        bar = tqdm(total=options.steps, initial=self.step, desc="train", unit="step", disable=is_hidden)
        with bar, Signals(are_noted=self.workdir is not None) as signals:
            for values, label in batches(self.dataset, self.config, self.step, ranks, self.device, has_label):
                with _advice_on_memory(self.config):
                    loss, grad_norm = self._take_step(values, label, watch)
                self.unlogged_loss += loss
                result.step, is_last, news = self.step, self.step == options.steps, []
                bar.update()
                if self.step % options.log_every == 0 or is_last:
                    result.metrics = self._measure(grad_norm, watch)
                    log.write(result.metrics)
                    bar.set_postfix_str("loss {loss:.4f}, {images_per_second:.0f} images/s".format(**result.metrics))
                    news.append("metrics")
                self._keep_and_show(is_last, loss, grad_norm)
                watch.lap("logging")
                if self.evaluation and (self.step % self.config.evaluation.every == 0 or is_last):
                    result.evaluation = {"step": self.step, **self.evaluation.run(self._whole(self.averaged))}
                    evaluations.write(result.evaluation)
                    result.stop |= self._has_converged(evaluations)
                    news.append("evaluation")
                    watch.lap("evaluation")
                request = ranks.largest(int(signals.received or 0))
                is_saved = self.step % options.checkpoint_every == 0 or is_last or request > 0
                if self.workdir and is_saved:
                    self._save([log, evaluations], result, callbacks, loss, grad_norm)
                for event in news:
                    self._tell(callbacks, event, result)
                # Nothing else asks for an end; ranks need not agree on it after every step.
                is_ended = bool(news) and bool(ranks.largest(int(result.stop)))
                if self.workdir and is_ended and not is_last:
                    self._keep_averages(loss, grad_norm)
                    if not is_saved:
                        self._save([log, evaluations], result, callbacks, loss, grad_norm)
                watch.lap("logging")
                if self.workdir and request:
                    self._complete(result, callbacks)
                    raise Interrupted(signal.Signals(request), self.step, self.workdir)
                if is_ended:
                    break
            self._complete(result, callbacks)

    def _has_converged(self, evaluations: Log) -> bool:
        """Whether the held-out loss has not become smaller for long enough; the first rank knows all evaluations."""
        evaluation = self.evaluation
        return evaluation is not None and bool(self.ranks.first(lambda: int(evaluation.stops(evaluations.lines))))

    def _take_step(self, values: Tensor, label: Tensor | None, watch: Stopwatch) -> tuple[Tensor, Tensor]:
        """Take a step on this rank's share of a batch; its loss, and the norm of the gradient of the whole batch."""
        streams, x0, u, noise = self._draw(values)
        t, time_weight = self.times.draw(u)
        cond = {} if label is None else {"label": self._hide(label, streams)}
        watch.lap("data")
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._differentiate(x0, t, noise, time_weight, cond)
        if self.times.state_dict():
            total = self.config.train.batch_size
            self.times.update(*(self.ranks.collect(each, self.share, total) for each in (t, losses)))
        watch.lap("network")
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.optim.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        watch.lap("optimizer")
        self.averages.update(self.raw, self.step)
        watch.lap("average")
        return (time_weight * losses).mean(), grad_norm

    def _differentiate(
        self, x0: Tensor, t: Tensor, noise: Tensor, time_weight: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        """Add up the gradient of the mean loss, part by part, and exchange it with the last; losses (B,)."""
        parts = self.config.train.accumulation
        size = len(x0) // parts
        losses = []
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            # Dropout reads torch's global generator: seeded here, it too depends on the seed and the step alone.
            words = (self.config.seed, self.step, self.ranks.rank, part)
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
            with exchanging(self.objective, self.raw.network, part == parts - 1):
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    of_part = {name: values[rows] for name, values in cond.items()}
                    loss = self.objective(x0[rows], t[rows], noise[rows], of_part)
                self.scaler.scale((time_weight[rows] * loss).mean() / parts).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _hide(self, label: Tensor, streams: Streams) -> Tensor:
        """Replace some labels by the one past the last class, which stands for none."""
        is_hidden = streams.uniform(()) < self.config.train.label_dropout
        return torch.where(is_hidden, getattr(self.raw.network, "classes", 0), label)

    def _draw(self, values: Tensor) -> tuple[Streams, Tensor, Tensor, Tensor]:
        """Dequantise and flip a batch, and draw its noise and what its times are made of: one stream an example."""
        first, total = self.step * self.config.train.batch_size, self.config.train.batch_size
        streams = Streams(self.config.seed, range(first + self.share.start, first + self.share.stop), self.device)
        shape = values.shape[1:]
        uniform = streams.uniform((2 + (shape.numel() if self.dataset.data.bits else 0),))
        x0 = values.float()
        if self.dataset.data.bits:
            x0 = self.dataset.data.dequantize(values, uniform[:, 2:].reshape(values.shape))
        if self.config.flip:
            x0 = torch.where((uniform[:, 1] < 0.5).reshape(-1, *[1] * len(shape)), x0.flip(-1), x0)
        u, spread = uniform[:, 0], SPREADS[self.config.loss.spread]
        if spread is not independent:
            u = spread(self.ranks.collect(u, self.share, total))[self.share.start : self.share.stop]
        return streams, x0, u, streams.normal(shape)

    def _check_all_used(self) -> None:
        """Refuse weights that a pass leaves without a gradient, for which DistributedDataParallel waits for ever."""
        unused = [name for name, p in self.raw.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise ConfigError(
                f"network: {', '.join(unused)}: no part in training, which all weights must have on several ranks: "
                "freeze them with requires_grad_(False), or configure the network without"
            )

    def _go_through(self) -> None:
        """Go through the network and back, without a step."""
        model = self.raw
        x0 = torch.zeros(1, *model.data_shape, device=self.device)
        cond = (
            {"label": torch.zeros(1, dtype=torch.int64, device=self.device)}
            if getattr(model.network, "classes", 0)
            else {}
        )
        self.raw.train()
        self.objective(x0, x0.new_full((1,), model.sde.t_max), x0, cond).sum().backward()

    def _learning_rate(self, step: int) -> float:
        optim = self.config.optim
        rise = min(1.0, (step + 1) / max(1, optim.warmup))
        return optim.lr * rise * self.schedule(step, self.config.train.steps)

    def _measure(self, grad_norm: Tensor, watch: Stopwatch) -> dict[str, float]:
        """The next line of metrics, alike on all ranks but for their times."""
        loss, steps = self._losses_of_ranks().mean(), self.step - self.logged_step
        seconds, shares = watch.read()
        line = {
            "step": self.step,
            "loss": self._finite("loss", loss) / steps,
            "grad_norm": self._finite_gradient(grad_norm),
            "lr": self._learning_rate(self.step - 1),
            "images_per_second": (self.step - max(self.logged_step, self.first_step))
            * self.config.train.batch_size
            / seconds,
            **{f"share_{part}": share for part, share in shares.items()},
        }
        if self.scaler.is_enabled():
            line["loss_scale"] = self.scaler.get_scale()
            if not math.isfinite(line["grad_norm"]):
                # The step was left out; JSON has no infinity.
                del line["grad_norm"]
        self.logged_step, self.unlogged_loss = self.step, torch.zeros_like(self.unlogged_loss)
        return line

    def _losses_of_ranks(self) -> Tensor:
        """(ranks,), since the last line of metrics."""
        rank, ranks = self.ranks.rank, self.ranks.size
        return self.ranks.collect(self.unlogged_loss.reshape(1), range(rank, rank + 1), ranks)

    def _take_up(self, workdir: Path) -> None:
        """Begin a run's directory, or go on from its newest whole checkpoint."""

        def find() -> int:
            checkpoint = newest_whole(workdir)
            if checkpoint is None:
                write_manifest(workdir, self.description, self.dataset)
                drop_snapshots(workdir, 0)
                return 0
            check_version(workdir)
            stored = _completed(read_json(workdir / "config.json"))
            _check_same(flatten(stored), flatten(self.description), workdir)
            return int(checkpoint.name)

        def clear() -> None:
            check_data(workdir, self.dataset)
            set_aside_after(workdir, self.step)
            drop_snapshots(workdir, self.step)

        self.step = self.ranks.first(find)
        if self.step == 0:
            return
        path = workdir / "checkpoints" / f"{self.step:08d}"
        state = load_checkpoint(path, self.raw, self.averages.models, self.optimizer, self.times)
        self.ranks.first(clear)
        # A checkpoint of before they were stored began a new mean; one of a single rank had a number.
        self.logged_step = state.get("logged_step", self.step)
        losses = np.atleast_1d(state.get("unlogged_loss", 0.0))
        is_own = len(losses) == self.ranks.size
        self.unlogged_loss.fill_(float(losses[self.ranks.rank] if is_own else losses.mean()))
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _save(
        self, logs: Sequence[Log], result: TrainResult, callbacks: Sequence[Callback], loss: Tensor, grad_norm: Tensor
    ) -> None:
        """Begin to write a checkpoint; the one before it is then whole."""
        assert self.checkpoints is not None
        self._check_finite(loss, grad_norm)
        for log in logs:
            log.sync()
        self._complete(result, callbacks)
        losses = self._losses_of_ranks().tolist()
        state: dict[str, Any] = {"step": self.step, "logged_step": self.logged_step, "unlogged_loss": losses}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        contents = contents_of(self.description, self.raw, self.averages.models, self.optimizer, self.times)
        self.checkpoints.write(state, contents)
        if not self.config.train.async_checkpoints:
            self._complete(result, callbacks)

    def _complete(self, result: TrainResult, callbacks: Sequence[Callback]) -> None:
        """Wait for the checkpoint that is being written, and tell of it."""
        if self.checkpoints and (path := self.checkpoints.finish()):
            self._tell(callbacks, "checkpoint", result, path)

    def _keep_and_show(self, is_last: bool, loss: Tensor, grad_norm: Tensor) -> None:
        """Draw samples and keep averages where that is due.

        Before the checkpoint: a run that is taken up there does not come by here again.
        """
        options = self.config.train
        if self.workdir is None:
            return
        if options.sample_every and self.step % options.sample_every == 0 and has_picture(self.dataset.data_shape):
            self._draw_samples(self.workdir / "samples" / f"{self.step:08d}.png")
        if self.step % self.config.ema.snapshot_every == 0 or is_last:
            self._keep_averages(loss, grad_norm)

    def _keep_averages(self, loss: Tensor, grad_norm: Tensor) -> None:
        if self.workdir and self.averages.widths:
            self._check_finite(loss, grad_norm)
            self.averages.save_snapshots(self.workdir, self.step, self.description, self._whole_on_cpu, self.ranks)

    def _whole(self, model: DiffusionModel) -> DiffusionModel:
        """A model to be called on this rank alone; all ranks must ask for it."""
        return self.gathered.of(model, self.device) if self.gathered else model

    def _whole_on_cpu(self, model: DiffusionModel) -> DiffusionModel:
        """A model to be written by this rank alone; all ranks must ask for it."""
        return self.gathered.of(model, "cpu") if self.gathered else model

    def _draw_samples(self, path: Path) -> None:
        """Each rank draws its share, and the first makes a picture of them."""
        count, classes = self.config.train.sample_count, getattr(self.raw.network, "classes", 0)
        cond = {"label": torch.arange(count, device=self.device) % classes} if classes else None
        model, shard = self._whole(self.averaged), (self.ranks.rank, self.ranks.size)
        try:
            own = sample(model, count, solver="heun", steps=20, cond=cond, seed=self.config.seed, shard=shard).samples
        except SolverError as error:
            # No reason to end the run, and the other ranks are not to wait.
            warnings.warn(f"samples of step {self.step}: {error}", stacklevel=2)
            own = torch.full((len(self.ranks.share(count)), *model.data_shape), math.nan, device=self.device)
        samples = self.ranks.collect(own, self.ranks.share(count), count)
        if bool(samples.isfinite().all()):
            self.ranks.first(partial(save_picture, samples, self.dataset.data, path))

    def _tell(self, callbacks: Sequence[Callback], event: str, result: TrainResult, *more: Any) -> None:
        for callback in callbacks:
            getattr(callback, event)(result, *more)

    def _check_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Before weights are kept: a finite loss can have a gradient that is not, and a step with it spoils them."""
        self._finite("loss", self.ranks.total(loss))
        self._finite_gradient(grad_norm)

    def _finite_gradient(self, norm: Tensor) -> float:
        """The norm; with a scaled loss it may overflow, and the step is then not taken."""
        norm = whole(norm)
        return float(norm) if self.scaler.is_enabled() else self._finite("grad_norm", norm)

    def _finite(self, name: str, value: Tensor) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise TrainingError(
                f"{name} is {number} at step {self.step}: lower optim.lr, or look for outliers in the data"
            )
        return number


@contextmanager
def _advice_on_memory(config: ConfigDict) -> Iterator[None]:
    """Say what to lower where memory does not suffice for a step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        options = config.train
        raise TrainingError(
            f"out of memory in a step: raise train.accumulation = {options.accumulation}, which divides the batch of "
            f"{options.batch_size} into parts, set network.checkpointing or train.precision = 'bfloat16', lower "
            f"train.batch_size, or on several devices set train.parallel = 'fsdp' ({error})"
        ) from error


def _data(config: ConfigDict, dataset: Any, held_out: Any) -> tuple[DataSource, DataSource | None]:
    """What to train on and, if the run is to be evaluated, what to evaluate on."""
    if dataset is not None:
        return as_dataset(dataset), None if held_out is None else as_dataset(held_out)
    if held_out is not None:
        raise ConfigError("held_out: is for a data set of one's own; of the config's data it is the test split")
    needs_held_out = config.evaluation.every and (config.evaluation.loss_count or config.evaluation.likelihood_count)
    test = load_dataset(split="test", **config.data) if needs_held_out else None
    return load_dataset(split="train", **config.data), test


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


def _build(registry: Mapping[str, Callable[..., Any]], section: ConfigDict, *arguments: Any) -> Any:
    """What a named section describes."""
    options = dict(section)
    return registry[options.pop("name")](*arguments, **options)


def _check_ranks(config: ConfigDict, ranks: Ranks, has_picture: bool) -> None:
    """Refuse a batch that is not divided by ranks and parts, and to shard among one."""
    options = config.train
    if ranks.sharded and ranks.size == 1:
        raise ConfigError(
            "train.parallel = 'fsdp': there is one rank, and nothing to shard: start several by torchrun, or set 'auto'"
        )
    if options.batch_size % (ranks.size * options.accumulation):
        raise ConfigError(
            f"train.batch_size = {options.batch_size}: must be a multiple of the {ranks.size} ranks x "
            f"train.accumulation = {options.accumulation}"
        )
    if ":" in options.device and ranks.size > 1:
        raise ConfigError(f"train.device = {options.device!r}: of several ranks each takes its own; name none of them")
    if config.workdir and options.sample_every and has_picture and options.sample_count < ranks.size:
        raise ConfigError(f"train.sample_count = {options.sample_count}: must be at least the {ranks.size} ranks")


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
