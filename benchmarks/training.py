"""What the training loop adds to a step, and what its models are worth: python benchmarks/training.py --only=NAME.

    overhead  share of a step of configs/fashion_mnist.py that is neither forward, backward, optimizer (with the
              clipping of the gradient) nor average: from drawing a batch and its noise to logs and checkpoints.
    rate      images a second of configs/demo.py, from the call of ``train`` until its return and of its steps alone,
              as shares of what the bare network reaches.
    peer      as much CPU time for configs/fashion_mnist.py as for the trainer of denoising-diffusion-pytorch, and the
              models of both measured by the same code.

The first two compare with bare steps: a copy of the network, its loss, optimizer and average, on batches drawn before.
They take turns with the loop after every line of metrics, so that whatever else the machine does meets both, and a
stretch of the loop is compared with the bare steps before and after it. Where other processes want the same cores,
--clock=cpu still tells them apart, but sees no waiting for the disk. In "overhead" every step writes a line, a hundred
times as often as by the config; checkpoints are written within the step, which is the most that they can cost, and are
counted as often as the config has them.

For "peer", --stage=train leaves models in --output, which --stage=evaluate measures; one that is there is not trained
again. The peer imports torchvision, which takes a torch that it was built for; both sides run in its environment:

    python -m venv FOLDER && FOLDER/bin/pip install torch==2.14.1 torchvision==0.29.1
    FOLDER/bin/pip install denoising-diffusion-pytorch==2.3.4 --editable .

Its Trainer and GaussianDiffusion are as they come: 1000 timesteps, sigmoid schedule, prediction of v, Adam, average of
decay 0.995 every 10 steps; batches of 32 and mixed precision, as in its README, with the bfloat16 that ours has too, in
which it is 1.6 times as fast. What differs from the README is in its favour: every batch is a step, where it adds up
two; no images are mirrored, as those that it is measured by are not; it stops for no samples; and the CPU time of the
processes that read its images is not counted. The width of its U-Net is that of the nearest number of parameters,
1.76 M where ours has 1.69 M. --rates are its learning rates, each a run of its own; 8e-5 is the README's. Ours has the
config's settings but the number of steps, which a short measurement sets, within the time, so that the learning rate
reaches 0 near its end. With --together=2 ours and the first of the peer's train side by side, each on a core of its
own: what they take from one another's caches and memory they take alike.

Both models are sampled by the same solver from the same starts down to their least noise, and end with x̂₀: the peer's
is a DiffusionModel of its discrete chain, state i of T at t = i/T, down to state 1, as it has seen no less noise.
The largest deviation of 50 steps of its own DDIM sampler from ours is printed. The codes of both are what features and
likelihoods see; the peer's points −1 + 2k/255 are the centres of its bins. Bits/dim are of the ODE, down to each
model's own least noise, and to the peer's for both.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sde_diffusion as sd
from sde_diffusion.data import DataInfo, fashion_mnist, load_dataset
from sde_diffusion.evaluation import Moments, extract_features, frechet_distance, load_features
from sde_diffusion.losses import SPREADS, TIMES, WEIGHTINGS, denoising_loss
from sde_diffusion.training import TrainResult, resolve_config, train
from sde_diffusion.training.checkpoint import save_model

CONFIGS = Path(__file__).parents[1] / "configs"
# What a time is read from, in seconds.
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
TIMESTEPS = 1000
# Of denoising-diffusion-pytorch's sampler, and of its comparison with ours.
DDIM_STEPS = 50


class BareSteps:
    """Forward, backward, optimizer and average of a copy of a run's network, on a few batches drawn before."""

    def __init__(self, config: ConfigDict, model: sd.DiffusionModel, clock: Clock):
        """Copy the network, draw the batches, and warm up."""
        self.model, self.config, self.clock = copy.deepcopy(model), config, clock
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optim.lr, fused=True)
        weighting = dict(config.loss.weighting)
        self.weighting = WEIGHTINGS[weighting.pop("name")](**weighting)
        self.batches = cycle(self._draw(8))
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Seconds a step."""
        started = self.clock()
        for x0, t, time_weight, noise in (next(self.batches) for _ in range(steps)):
            is_half = self.config.train.precision == "bfloat16"
            with torch.autocast("cpu", torch.bfloat16) if is_half else nullcontext():
                losses = denoising_loss(self.model, x0, t, noise, self.weighting)
            self.optimizer.zero_grad(set_to_none=True)
            (time_weight * losses).mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
            self.optimizer.step()
            weights = [parameter.detach() for parameter in self.model.parameters()]
            torch._foreach_lerp_(self.average, weights, 1 - self.config.ema.decay)
        return (self.clock() - started) / steps

    def _draw(self, count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        dataset: Any = load_dataset(split="train", **self.config.data)
        options, size = dict(self.config.loss.time), self.config.train.batch_size
        times = TIMES[options.pop("name")](self.model.sde, **options)
        batches = []
        for indices in torch.arange(count * size).remainder(len(dataset)).split(size):
            codes = dataset.values[indices]
            x0 = dataset.data.dequantize(codes, torch.rand(codes.shape))
            t, time_weight = times.draw(SPREADS[self.config.loss.spread](torch.rand(size)))
            batches.append((x0, t, time_weight, torch.randn_like(x0)))
        return batches


@dataclass
class Turns:
    """What a run took that bare steps took turns with; seconds.

    Attributes:
        loop: a step of the run, in each stretch between two lines of metrics.
        bare: a bare step, before each stretch and after the last.
        steps: of the run, at the end of each stretch.
        total: from the call of ``train`` until its return, without the bare steps.
    """

    loop: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    total: float = 0.0

    def around(self) -> list[float]:
        """Seconds of a bare step around each stretch."""
        return [(before + after) / 2 for before, after in pairwise(self.bare)]


def take_turns(config: ConfigDict, bare_steps: int, clock: Clock) -> Turns:
    """Train, with bare steps after every line of metrics; the first stretch, with the start, is left out."""
    turns, paused = Turns(), 0.0
    bare: BareSteps | None = None
    last, left = 0, clock()

    def callback(result: TrainResult) -> None:
        nonlocal bare, last, left, paused
        entered = clock()
        if bare is None:
            bare = BareSteps(config, result.raw_model, clock)
        else:
            turns.loop.append((entered - left) / (result.step - last))
            turns.steps.append(result.step)
        turns.bare.append(bare.seconds(bare_steps))
        last, left = result.step, clock()
        paused += left - entered

    started = clock()
    with tempfile.TemporaryDirectory() as workdir:
        config.workdir = workdir
        train(config, callbacks=[callback])
        turns.total = clock() - started - paused
    return turns


def overhead(steps: int, clock: Clock) -> None:
    """Print the table of ``configs/fashion_mnist.py``."""
    config = resolve_config(CONFIGS / "fashion_mnist.py")
    checkpoint_every, short = config.train.checkpoint_every, 4
    config.train.log_every, config.train.steps, config.train.sample_every = 1, steps, 0
    config.train.checkpoint_every, config.train.async_checkpoints = short, False
    turns = take_turns(config, 1, clock)
    has_checkpoint = [step % short == 0 or step == steps for step in turns.steps]
    extra = [loop - bare for loop, bare in zip(turns.loop, turns.around(), strict=True)]
    plain, saved = (
        statistics.median(seconds for seconds, is_saved in zip(extra, has_checkpoint, strict=True) if is_saved == kind)
        for kind in (False, True)
    )
    bare, checkpoint = statistics.median(turns.bare), saved - plain
    whole = bare + plain + checkpoint / checkpoint_every
    print("| of a step | ms | share |\n|---|---|---|")
    for name, seconds in (
        ("forward, backward, optimizer, average", bare),
        ("the rest, without checkpoints", plain),
        (f"a checkpoint of {1e3 * checkpoint:.0f} ms every {checkpoint_every} steps", checkpoint / checkpoint_every),
        ("all but forward, backward, optimizer, average", whole - bare),
    ):
        print(f"| {name} | {1e3 * seconds:.1f} | {100 * seconds / whole:.2f} % |")
    print("\n| share that the loop tells | % |\n|---|---|")
    for name, share in told_shares(config).items():
        print(f"| {name} | {100 * share:.2f} |")


def told_shares(config: ConfigDict) -> dict[str, float]:
    """Medians of the shares in the lines of metrics, of a run by itself: its times count what is done at a line."""
    lines: list[dict[str, float]] = []
    config.train.steps = 20
    with tempfile.TemporaryDirectory() as workdir:
        config.workdir = workdir
        train(config, callbacks=[lambda result: lines.append(dict(result.metrics))])
    names = [name for name in lines[-1] if name.startswith("share_")]
    return {name: statistics.median(line[name] for line in lines[1:]) for name in names}


def rate(steps: int | None, clock: Clock) -> None:
    """Print the table of ``configs/demo.py``."""
    config = resolve_config(CONFIGS / "demo.py")
    config.train.steps = steps or config.train.steps
    if config.train.steps < 2 * config.train.log_every:
        raise ValueError(f"steps = {steps}: must be at least {2 * config.train.log_every}")
    turns = take_turns(config, 10, clock)
    bare = statistics.median(turns.bare)
    print("| images a second | | share of the bare rate |\n|---|---|---|")
    for name, seconds in (
        ("bare steps", bare),
        ("the loop's steps", statistics.median(turns.loop)),
        (f"from call to return, {config.train.steps} steps", turns.total / config.train.steps),
    ):
        print(f"| {name} | {config.train.batch_size / seconds:.1f} | {bare / seconds:.3f} |")


@dataclass(frozen=True)
class Comparison:
    """What "peer" was asked for.

    Attributes:
        data: folder of the data set; None is that of the environment or the slice in the package.
        output: where models are kept.
        minutes: CPU time of a training.
        seed: of the trainings.
        rates: learning rates of the peer.
        samples: how many are drawn of each model.
        images: test images whose likelihood is measured.
        nfe: evaluations of the solver.
    """

    data: Path | None
    output: Path
    minutes: float
    seed: int
    rates: Sequence[float]
    samples: int
    images: int
    nfe: int

    def file(self, rate: float | None) -> Path:
        """Of the model of ours, or of the peer's of a learning rate."""
        return self.output / ("ours.safetensors" if rate is None else f"peer-{rate:g}.safetensors")


def train_ours(asked: Comparison) -> None:
    """Train for the CPU time from now on, and keep the averaged model."""
    limit = time.process_time() + 60 * asked.minutes
    config = resolve_config(CONFIGS / "fashion_mnist.py")
    config.seed, config.data.path, config.train.device = asked.seed, str(asked.data or ""), "cpu"
    config.train.sample_every = 0
    config.train.log_every, config.train.steps = 4, 12
    lines: list[tuple[float, TrainResult]] = []

    def note(result: TrainResult) -> None:
        lines.append((time.process_time(), result))
        result.stop = lines[-1][0] > limit

    with tempfile.TemporaryDirectory() as folder:
        config.workdir = f"{folder}/short"
        train(config, callbacks=[note])
        (early, _), *_, (late, _) = lines
        config.train.steps = max(1, int(0.96 * (limit - time.process_time()) / ((late - early) / 8)))
        config.train.log_every, config.workdir = 20, f"{folder}/run"
        train(config, callbacks=[note])
    used, result = lines[-1]
    about = json.loads(config.to_json())
    del about["workdir"]
    save_model(result.model, asked.file(None), about)
    _note_cost(asked.file(None), result.step, config.train.batch_size, used - limit + 60 * asked.minutes)
    if result.step < config.train.steps:
        print(f"ours: the time was up at step {result.step} of {config.train.steps}", flush=True)


def train_peer(asked: Comparison, rate: float) -> None:
    """Train the peer's for the CPU time from now on, and keep the averaged network."""
    from denoising_diffusion_pytorch import Trainer

    started = time.process_time()
    torch.manual_seed(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            peer_diffusion(),
            str(_image_folder(asked)),
            train_batch_size=32,
            train_lr=rate,
            # More than there is time for.
            train_num_steps=10**9,
            save_and_sample_every=10**9,
            augment_horizontal_flip=False,
            amp=True,
            mixed_precision_type="bf16",
            calculate_fid=False,
            results_folder=folder,
        )
        trainer.dl = _until(started + 60 * asked.minutes, trainer.dl)
        # Its loop ends with its batches.
        with suppress(StopIteration):
            trainer.train()
    used = time.process_time() - started
    save_file(trainer.ema.ema_model.model.state_dict(), asked.file(rate))
    _note_cost(asked.file(rate), trainer.step, trainer.batch_size, used)


def peer_diffusion(**options: Any) -> Any:
    """The peer's network and chain."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(dim=26, dim_mults=(1, 2, 4), channels=1)
    return GaussianDiffusion(network, image_size=28, timesteps=TIMESTEPS, **options)


class PeerNetwork(nn.Module):
    """The peer's U-Net as a function of the chain's time: its timesteps count states 1…T from 0."""

    def __init__(self, unet: nn.Module):
        """Wrap it."""
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """F (B, C, H, W) at times t (B,)."""
        return self.unet(x, TIMESTEPS * t - 1)


def peer_model(diffusion: Any, data: DataInfo) -> sd.DiffusionModel:
    """The peer's model as one of ours."""
    sde = sd.GaussianChain.ddpm(diffusion.betas).to_sde()
    shape = (diffusion.channels, *diffusion.image_size)
    model = sd.DiffusionModel(PeerNetwork(diffusion.model), sde, "v", data_shape=shape, data=data)
    return model.eval().requires_grad_(False)


def deviation(diffusion: Any, count: int = 4) -> float:
    """The largest difference of an image (count, ...) by the peer's DDIM sampler from ours of the same start."""
    shape = (count, diffusion.channels, *diffusion.image_size)
    torch.manual_seed(0)
    start = torch.randn(shape)
    torch.manual_seed(0)
    theirs = 2 * diffusion.ddim_sample(shape) - 1
    states = torch.linspace(-1, TIMESTEPS - 1, DDIM_STEPS + 1).int().flip(0) + 1
    times = [state / TIMESTEPS for state in states[:-1].tolist()]
    # Its x̂₀ is kept within [−1, 1].
    model = peer_model(diffusion, DataInfo(low=-1, high=1))
    ours = sd.sample(model, count, solver="ddim", grid=times, x_start=start, denoise=True, threshold="static")
    return float((ours.samples - theirs).abs().max())


@dataclass(frozen=True)
class Candidate:
    """A trained model.

    Attributes:
        name: in the table.
        model: of averaged weights.
        t_end: time of its least noise.
        cost: steps, images and CPU seconds of its training.
        diffusion: the peer's own, if it is the peer's.
    """

    name: str
    model: sd.DiffusionModel
    t_end: float
    cost: dict[str, float]
    diffusion: Any = None


def candidates(asked: Comparison) -> list[Candidate]:
    """The models in ``output``."""
    model = sd.load(asked.file(None))
    found = [Candidate("ours", model, model.sde.t_min, _cost(asked.file(None)))]
    for rate in asked.rates:
        diffusion = peer_diffusion(sampling_timesteps=DDIM_STEPS).eval()
        diffusion.model.load_state_dict(load_file(asked.file(rate)))
        half = 1 / 255
        theirs = peer_model(diffusion, DataInfo(low=-1 - half, high=1 + half))
        found.append(Candidate(f"peer, rate {rate:g}", theirs, 1 / TIMESTEPS, _cost(asked.file(rate)), diffusion))
    return found


def evaluate(asked: Comparison) -> None:
    """Print the tables of Fréchet distances and of bits/dim, each if it was asked for."""
    found = candidates(asked)
    if asked.samples:
        print_distances(found, asked)
    if asked.images:
        print_bits(found, fashion_mnist("test", asked.data).values[: asked.images])


def print_distances(found: Sequence[Candidate], asked: Comparison) -> None:
    """Print Fréchet distances, and how near the samples are to the solution of their ODE."""
    training = fashion_mnist("train", asked.data)
    features, points = load_features("fashion_mnist"), training.data.points
    reference = Moments.of(extract_features(points(training.values), features))
    print(f"Fréchet distance to {reference.count} training images, 95 % intervals; unipc, {asked.nfe} evaluations.\n")
    columns = "model | parameters | steps | images | CPU s | sampler | samples | distance | without its bias | interval"
    print(f"| {columns} |")
    print("|---" * 10 + "|")
    for one in found:
        size = sum(parameter.numel() for parameter in one.model.parameters())
        about = f"{one.name} | {size} | " + " | ".join(
            f"{one.cost[name]:.0f}" for name in ("steps", "images", "seconds")
        )
        drawn = {"ours": one.model.data.quantize(_draw(one, asked.samples, asked.nfe))}
        if one.diffusion is not None:
            few = max(asked.samples // 5, reference.mean.numel() + 1)
            drawn[f"its own, DDIM {DDIM_STEPS}"] = _draw_by_own(one.diffusion, few)
        for sampler, codes in drawn.items():
            result = frechet_distance(extract_features(points(codes), features), reference)
            lower, upper = result.interval
            print(
                f"| {about} | {sampler} | {len(codes)} | {result.distance:.3f} | {result.corrected:.3f} "
                f"| {lower:.3f} to {upper:.3f} |",
                flush=True,
            )
    for one in found:
        twice = (_draw(one, 16, nfe) for nfe in (asked.nfe, 2 * asked.nfe))
        error = (next(twice) - next(twice)).square().mean().sqrt()
        by_own = f"; of its own sampler from ours at most {deviation(one.diffusion):.1e}" if one.diffusion else ""
        print(
            f"\n{one.name}: difference at {2 * asked.nfe} evaluations {error:.1e}, root mean square{by_own}", flush=True
        )


def print_bits(found: Sequence[Candidate], codes: Tensor) -> None:
    """Print bits/dim (first ours), and the differences of the others from it, example by example."""
    noise = max(one.model.sde.log_noise(one.t_end) for one in found)
    print(f"\nBits/dim of {len(codes)} test images by the ODE; standard errors of the examples, and of the estimate.\n")
    levels = f"least noise, σ/α | bits/dim | more than ours | down to σ/α = {math.exp(noise):.4f} | more than ours"
    print(f"| model | {levels} |")
    print("|---|---|---|---|---|---|")
    first: list[Tensor] = []
    for one in found:
        sde = one.model.sde
        common = float(sde.t_from_log_snr(torch.tensor(-2 * noise, dtype=torch.float64)))
        times = (one.t_end, one.t_end if sde.log_noise(one.t_end) == noise else common)
        measured = {t: sd.bits_per_dim(one.model, codes, t_min=t, probes=2, batch_size=32) for t in set(times)}
        cells = [f"{one.name} | {math.exp(sde.log_noise(one.t_end)):.4f}"]
        for column, bits in enumerate(measured[t] for t in times):
            if one is found[0]:
                first.append(bits.per_example)
            more = (bits.per_example - first[column]).double()
            error = float(more.std()) / math.sqrt(len(more))
            cells.append(
                f"{bits.mean:.3f} ± {bits.sampling_error:.3f}, {bits.std_error:.4f} | {more.mean():.3f} ± {error:.3f}"
            )
        print(f"| {' | '.join(cells)} |", flush=True)


def _draw(one: Candidate, count: int, nfe: int) -> Tensor:
    """x̂₀ at the least noise (count, 1, 28, 28)."""
    options: dict[str, Any] = {"solver": "unipc", "order": 3, "denoise": True, "t_end": one.t_end}
    return sd.sample(one.model, count, nfe=nfe, batch_size=100, **options).samples


def _draw_by_own(diffusion: Any, count: int) -> Tensor:
    """Codes (count, 1, 28, 28) of samples by the peer's sampler."""
    torch.manual_seed(0)
    images = [diffusion.sample(batch_size=min(100, count - first)) for first in range(0, count, 100)]
    return (255 * torch.cat(images)).round().to(torch.uint8)


def _until(limit: float, batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The batches until the CPU time has been used."""
    for batch in batches:
        if time.process_time() > limit:
            return
        yield batch


def _image_folder(asked: Comparison) -> Path:
    """The training images as files, which is how the peer wants them."""
    values = fashion_mnist("train", asked.data).values
    folder = asked.output / f"images-{len(values)}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        for index, image in enumerate(values[:, 0].numpy()):
            Image.fromarray(image).save(partial / f"{index:05d}.png")
        partial.rename(folder)
    return folder


def _note_cost(file: Path, steps: int, batch_size: int, seconds: float) -> None:
    costs = {"steps": steps, "images": steps * batch_size, "seconds": seconds}
    file.with_suffix(".json").write_text(json.dumps(costs))
    print(f"{file.stem}: {steps} steps of {batch_size} images in {seconds:.0f} s of CPU time", flush=True)


def _cost(file: Path) -> dict[str, float]:
    costs: dict[str, float] = json.loads(file.with_suffix(".json").read_text())
    return costs


def _on_one_thread(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def compare(asked: Comparison, stage: str, together: int) -> None:
    """Train each in a process of its own, so many at a time, and evaluate."""
    asked.output.mkdir(parents=True, exist_ok=True)
    if "train" in stage:
        _image_folder(asked)
        print(f"{asked.minutes:g} minutes of CPU time each, seed {asked.seed}", flush=True)
        jobs: list[tuple[Any, ...]] = [] if asked.file(None).exists() else [(train_ours, asked)]
        jobs += [(train_peer, asked, rate) for rate in asked.rates if not asked.file(rate).exists()]
        for first in range(0, len(jobs), together):
            started = [
                multiprocessing.get_context("spawn").Process(target=_on_one_thread, args=job)
                for job in jobs[first : first + together]
            ]
            for process in started:
                process.start()
            for process in started:
                process.join()
            if any(process.exitcode for process in started):
                raise RuntimeError(f"exit codes {[process.exitcode for process in started]}: a training has failed")
    if "evaluate" in stage:
        evaluate(asked)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("overhead", "rate", "peer"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="of overhead and rate")
    parser.add_argument("--steps", type=int, help="of overhead, 60 by default, and rate, the config's by default")
    parser.add_argument("--stage", choices=("train", "evaluate", "train,evaluate"), default="train,evaluate")
    parser.add_argument("--data", type=Path, help="folder of the whole data set")
    parser.add_argument("--output", type=Path, default=Path("outputs/training"), help="for the models of peer")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--together", type=int, default=1, help="trainings of peer at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[8e-5, 1e-3])
    parser.add_argument("--samples", type=int, default=5000, help="0: no distances")
    parser.add_argument("--images", type=int, default=256, help="0: no bits/dim")
    parser.add_argument("--nfe", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.minutes < 0.2:
        parser.error(
            f"--minutes={arguments.minutes}: must be at least 0.2, of which the short measurement takes a part"
        )
    torch.set_num_threads(arguments.threads)
    if arguments.only == "overhead":
        overhead(arguments.steps or 60, CLOCKS[arguments.clock])
    elif arguments.only == "rate":
        rate(arguments.steps, CLOCKS[arguments.clock])
    else:
        of_comparison = {name: getattr(arguments, name) for name in Comparison.__dataclass_fields__}
        compare(Comparison(**of_comparison), arguments.stage, arguments.together)


if __name__ == "__main__":
    main()
