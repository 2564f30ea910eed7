"""Several ranks train the network that one would: gloo on the CPU, with processes forked for each case.

This file is also what runs in those processes, under the name "rank": see the end.
"""

import errno
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sde_diffusion import load, post_hoc_average, train
from sde_diffusion.data import ArrayDataset
from sde_diffusion.storage import Contents, StoredTensors, own_rows, part_of
from sde_diffusion.training import Callback, CheckpointError, loop
from sde_diffusion.training.checkpoint import Checkpoints, newest_checkpoint
from sde_diffusion.training.distributed import launched

# Imports once what takes seconds to import.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "sde_diffusion", "pytest", "PIL.Image"]
)
TIMEOUT = 120.0  # seconds, after which processes that wait for one another are ended
UNET = {
    "name": "unet",
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "classes": 3,
}
DIT = {"name": "dit", "patch": 4, "width": 16, "depth": 2, "heads": 2, "classes": 3}


def on_ranks(ranks, work, **options):
    """What a function of this file returns on each of some ranks: (value, None) or (None, error as a string)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORK.Pipe(duplex=False) for _ in range(ranks)]
    processes = []
    for rank, (_, answers) in enumerate(pipes):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        task = {"work": work.__name__, "options": options, "environment": environment, "answers": answers}
        processes.append(FORK.Process(target=runpy.run_path, args=(__file__, {"TASK": task}, "rank")))
    deadline = time.monotonic() + TIMEOUT
    try:
        for process, (_, answers) in zip(processes, pipes, strict=True):
            process.start()
            answers.close()
        for rank, (pipe, _) in enumerate(pipes):
            assert pipe.poll(max(0, deadline - time.monotonic())), f"rank {rank} has not answered in {TIMEOUT} s"
        answers = [pipe.recv() for pipe, _ in pipes]
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * ranks
        return answers
    finally:
        for process in processes:
            process.kill()


def values_of(answers):
    """The values, where no rank has failed."""
    for rank, (_, error) in enumerate(answers):
        assert error is None, f"rank {rank}: {error}"
    return [value for value, _ in answers]


def examples():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (60, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ArrayDataset(values, torch.arange(60) % 3)


def config_of(workdir, dropout=0.0, network=None, **options):
    """Everything at once: labels, a sampler of times that learns, several averages."""
    return {
        "network": network or {**UNET, "dropout": dropout},
        "optim": {"lr": 1e-3, "warmup": 5},
        "ema": {"decay": 0.9, "further_decays": (0.5,), "widths": (0.1,), "snapshot_every": 4},
        "loss": {"spread": "stratified", "time": {"name": "loss_second_moment", "bins": 3, "history": 2}},
        "train": {
            "device": "cpu",
            "steps": 8,
            "batch_size": 8,
            "log_every": 1,
            "checkpoint_every": 4,
            "sample_every": 0,
            **options,
        },
        "workdir": str(workdir),
    }


def lines(workdir):
    """Every line of metrics, without the times it took."""
    found = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    is_time = ("share_", "images_per_second")
    return [{name: value for name, value in line.items() if not name.startswith(is_time)} for line in found]


def files(workdir):
    return {path.name: path.read_bytes() for path in newest_checkpoint(Path(workdir)).iterdir()}


def assert_same_run(one, other):
    """The same last checkpoint, with every file of it, and the same lines of metrics, bit for bit."""
    assert files(one).keys() == files(other).keys()
    assert [name for name, content in files(one).items() if content != files(other)[name]] == []
    assert lines(one) == lines(other)


def assert_close(one, other):
    """The same lines of metrics, but for rounding."""
    assert [line["step"] for line in lines(one)] == [line["step"] for line in lines(other)]
    for found, expected in zip(lines(one), lines(other), strict=True):
        # Sums in another order: 3e-7 or so in these runs.
        assert found["loss"] == pytest.approx(expected["loss"], rel=0, abs=1e-5), found["step"]
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), found["step"]


def cut(workdir, copy):
    """A copy of a run of which the last checkpoint is lost."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(newest_checkpoint(copy))
    return copy


def digest(model):
    tensors = model.state_dict().values()
    assert not any(isinstance(tensor, DTensor) for tensor in tensors)
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


# What ranks do


class Look(Callback):
    """What this rank has of each tensor, after the last step."""

    def __init__(self):
        self.optimizer, self.seen = None, {}

    def metrics(self, run):
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        moments += [state["exp_avg_sq"] for state in self.optimizer.state.values()]
        parameters = list(run.raw_model.parameters())
        kinds = {
            "weights": parameters,
            "gradients": [parameter.grad for parameter in parameters],
            "averages": list(run.model.parameters()),
            "moments": moments,
        }
        self.seen = {
            kind: [
                (tuple(tensor.shape), tensor.to_local().numel() if isinstance(tensor, DTensor) else None)
                for tensor in tensors
            ]
            for kind, tensors in kinds.items()
        }
        network = run.raw_model.network
        self.seen["units"] = [isinstance(unit, FSDPModule) for unit in network.units() if list(unit.parameters())]


def trained(config):
    """The weights that a run returns, what is held of them, and how often ranks spoke of which."""
    look = Look()
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: setattr(look, "optimizer", optimizer))
    result = train(config, dataset=examples(), callbacks=[look])
    hook.remove()
    assert (result.rank, result.ranks) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return {"model": digest(result.model), "raw": digest(result.raw_model), **look.seen}


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._opname] = self.calls.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def exchanges(config):
    """How often each of the collectives was called in a run."""
    with Collectives() as collectives:
        train(config, dataset=examples())
    return collectives.calls


def refused_by_the_disk(config, rank, place):
    """A run of which one rank finds the disk full in the second checkpoint."""
    owner, name = {"write": (Contents, "write"), "complete": (Checkpoints, "_complete")}[place]
    real = getattr(owner, name)

    def full(self, path, *more):
        if int(os.environ["RANK"]) == rank and "00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, *more)

    setattr(owner, name, full)
    train(config, dataset=examples())


ODD = {"matrix": (5, 2), "row": (1, 3), "three": (3,), "many": (13, 2, 1), "empty": (0, 3), "narrow": (4, 0)}


def odd_tensors(folder):
    """Tensors that ranks do not divide, written as a checkpoint's are, and what is to be read."""
    with launched() as ranks:
        mesh = init_device_mesh("cpu", (ranks.size,))
        tensors = {name: torch.arange(math.prod(shape)).reshape(shape) for name, shape in ODD.items()}
        sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
        contents = {**sharded, "step": torch.tensor(7.0)}
        path = part_of(Path(folder) / "odd.safetensors", ranks.rank, ranks.size)
        Contents(contents, {"key": "value"}, ranks.is_first).write(path)
        dist.barrier()
        stored = StoredTensors(Path(folder) / "odd.safetensors")
        is_own = all(torch.equal(stored.read(name, own_rows(own)), own.to_local()) for name, own in sharded.items())
        is_whole = all(torch.equal(stored.read(name), tensor) for name, tensor in tensors.items())
        return is_own, is_whole, stored.header, float(stored.read("step"))


def left_of_replicas(config, step):
    """Whether anything of what replicates is left when a run has ended, or has been ended by an error."""
    replicas = []

    def replicate(objective):
        replica = DistributedDataParallel(objective)
        replicas.append(weakref.ref(replica))
        return replica

    def fail(run):
        if run.step == step:
            raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "replicate", replicate)
        try:
            train(config, dataset=examples(), callbacks=[fail])
        except ZeroDivisionError:
            return [replica() is None for replica in replicas], "failed"
    return [replica() is None for replica in replicas], "done"


def told_of_checkpoints(config):
    """Whether each checkpoint was there when this rank was told of it."""

    class Told(Callback):
        seen: list[tuple[str, bool]] = []  # noqa: RUF012 (one instance)

        def checkpoint(self, run, path):
            self.seen.append((path.name, (path / "checksums.json").exists()))

    complete = Checkpoints._complete

    def slowly(self, *arguments):
        time.sleep(0.2)
        complete(self, *arguments)

    Checkpoints._complete = slowly
    told = Told()
    train(config, dataset=examples(), callbacks=[told])
    return told.seen


class Overflowing(nn.Module):
    """A network whose gradient is infinite on the last rank in the third step."""

    def __init__(self):
        super().__init__()
        self.layer, self.overflows = nn.Linear(2, 2), False

    def forward(self, x, t):
        # A loss of 2^16 times its size does not overflow by itself.
        output = 1e-3 * self.layer(x).float()
        if self.overflows:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output


class Overflow(Callback):
    """Sets off the third step's, and keeps the weights after each."""

    def __init__(self, network):
        self.network, self.weights = network, []

    def metrics(self, run):
        self.network.overflows = run.step == 2 and run.rank == run.ranks - 1
        weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in run.raw_model.parameters()]
        self.weights.append(torch.cat([weight.detach().flatten() for weight in weights]).tolist())


def overflown(config):
    torch.manual_seed(0)
    callback = Overflow(Overflowing())
    train(config, callback.network, torch.randn(20, 2), callbacks=[callback])
    return callback.weights


def failing_first():
    """What ranks say when the first has failed, and when it has not."""

    def fail():
        raise ZeroDivisionError("of the first")

    with launched() as ranks:
        assert ranks.first(lambda: 7 + ranks.rank) == 7
        try:
            ranks.first(fail)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def spoken():
    """Each collective's answer on this rank."""
    with launched() as ranks:
        values = torch.tensor([1.0, 2.0]) * (ranks.rank + 1)
        network = nn.BatchNorm1d(1)
        nn.init.constant_(network.weight, ranks.rank + 5)
        network.running_mean.fill_(ranks.rank + 6)
        ranks.begin_alike(network)
        places = ranks.share(5)
        return {
            "ranks": (ranks.rank, ranks.size),
            "total": ranks.total(values).tolist(),
            "kept": values.tolist(),
            "collected": ranks.collect(torch.tensor(places) ** 2, places, 5).tolist(),
            "largest": ranks.largest(10 + ranks.rank),
            "group": ranks.largest(20 + ranks.rank, ranks.further_group()),
            "network": [float(network.weight), float(network.running_mean)],
        }


# The same run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(ranks, parallel, ...): the directory of a run that is not to be changed, and what its ranks returned."""
    known = {}

    def run(ranks, parallel="auto", dropout=0.0, **options):
        key = (ranks, parallel, dropout, *options.items())
        if key not in known:
            workdir = tmp_path_factory.mktemp("run")
            config = config_of(workdir, dropout, parallel=parallel, **options)
            known[key] = workdir, values_of(on_ranks(ranks, trained, config=config))
        return known[key]

    return run


@pytest.mark.parametrize(
    ("ranks", "parallel", "accumulation", "steps"),
    [
        (1, "auto", 2, 8),
        (2, "ddp", 2, 8),
        (2, "fsdp", 1, 8),
        pytest.param(1, "auto", 4, 50, marks=pytest.mark.slow),
        *(
            pytest.param(ranks, parallel, accumulation, 50, marks=pytest.mark.slow)
            for parallel, ranks, accumulation in itertools.product(["ddp", "fsdp"], [2, 4], [1, 2])
        ),
    ],
)
def test_the_losses_are_those_of_one_process(finished, ranks, parallel, accumulation, steps):
    expected, _ = finished(1, steps=steps)
    found, _ = finished(ranks, parallel, steps=steps, accumulation=accumulation)
    assert [line["step"] for line in lines(found)] == list(range(1, steps + 1))
    assert_close(found, expected)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_pictures_are_those_of_one_process(finished, parallel):
    options = {"steps": 2, "sample_every": 2, "sample_count": 5}
    one, several = (
        np.asarray(Image.open(finished(*ranks, **options)[0] / "samples/00000002.png")).astype(int)
        for ranks in ((1,), (2, parallel))
    )
    # The weights differ by rounding, so that few levels can, each by one.
    assert np.abs(one - several).max() <= 1
    assert (one != several).mean() < 0.01
    assert one.std() > 10


@pytest.mark.parametrize(
    ("ranks", "parallel", "dropout"),
    [
        (2, "ddp", 0.2),
        (2, "fsdp", 0.0),
        pytest.param(4, "ddp", 0.2, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", 0.2, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_taken_up_is_the_run_that_was_not(finished, tmp_path, ranks, parallel, dropout):
    whole, _ = finished(ranks, parallel, dropout)
    parts = cut(whole, tmp_path / "parts")
    values_of(on_ranks(ranks, trained, config=config_of(parts, dropout, parallel=parallel)))
    assert_same_run(parts, whole)
    kept = sorted(path.name for path in (parts / "averages").iterdir())
    assert kept == ["00000004-0.1.safetensors", "00000008-0.1.safetensors"]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow), pytest.param(4, "fsdp", marks=pytest.mark.slow)],
)
def test_two_runs_are_the_same(finished, tmp_path, ranks, parallel):
    one, _ = finished(ranks, parallel, 0.2)
    values_of(on_ranks(ranks, trained, config=config_of(tmp_path, 0.2, parallel=parallel)))
    assert_same_run(tmp_path, one)
    # Each rank, and each part, drops others.
    other, _ = finished(1, dropout=0.2)
    assert lines(one)[-1]["loss"] != pytest.approx(lines(other)[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("begun", "ended"),
    [
        ((2, "fsdp"), (1, "auto")),
        ((1, "auto"), (2, "ddp")),
        *(
            pytest.param(begun, ended, marks=pytest.mark.slow)
            for begun, ended in [
                ((2, "ddp"), (2, "fsdp")),
                ((1, "auto"), (4, "fsdp")),
                ((4, "fsdp"), (2, "fsdp")),
                ((2, "fsdp"), (4, "fsdp")),
                ((4, "fsdp"), (2, "ddp")),
            ]
        ),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_ranks(finished, tmp_path, begun, ended):
    whole, _ = finished(*begun)
    parts = cut(whole, tmp_path / "parts")
    ranks, parallel = ended
    values_of(on_ranks(ranks, trained, config=config_of(parts, parallel=parallel)))
    assert_close(parts, whole)
    assert newest_checkpoint(parts).name == "00000008"


# What a rank holds


def rows_of(shape, rank, ranks):
    """Entries of a tensor that are a rank's, as torch.chunk divides its rows."""
    chunks = torch.empty(shape).chunk(ranks)
    return chunks[rank].numel() if rank < len(chunks) else 0


def test_each_rank_holds_its_share_of_everything(finished):
    _, answers = finished(2, "fsdp")
    for rank, answer in enumerate(answers):
        for kind in ("weights", "gradients", "averages", "moments"):
            assert [held for _, held in answer[kind]] == [rows_of(shape, rank, 2) for shape, _ in answer[kind]], kind
        total = sum(math.prod(shape) for shape, _ in answer["weights"])
        # A tensor of few rows is not halved, such as the last convolution's, of one.
        assert sum(held for _, held in answer["weights"]) == pytest.approx(total / 2, rel=0.05)
        assert len(answer["moments"]) == 2 * len(answer["weights"])
        assert len(answer["units"]) > 5
        assert all(answer["units"])


def test_each_rank_holds_everything_where_gradients_alone_are_exchanged(finished):
    _, answers = finished(2, "ddp")
    for answer in answers:
        assert {held for kind in ("weights", "gradients", "averages", "moments") for _, held in answer[kind]} == {None}
        assert not any(answer["units"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_return_the_whole_models_that_are_stored(finished, parallel):
    workdir, answers = finished(2, parallel)
    for answer in answers:
        assert (answer["model"], answer["raw"]) == (digest(load(workdir)), digest(load(workdir, raw=True)))


def test_a_transformer_is_sharded_by_its_blocks(tmp_path):
    options = {"network": DIT, "steps": 3}
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    answers = values_of(on_ranks(2, trained, config=config_of(sharded, parallel="fsdp", **options)))
    for answer in answers:
        assert answer["units"] == [True, True]
        assert sum(held for _, held in answer["weights"]) < 0.55 * sum(
            math.prod(shape) for shape, _ in answer["weights"]
        )
    train(config_of(single, **options), dataset=examples())
    assert_close(sharded, single)


# What ranks write


def test_each_rank_writes_its_part(finished):
    workdir, _ = finished(2, "fsdp")
    models = ["model", "model-0.5", "power-0.1", "raw", "optimizer"]
    parts = [f"{name}.rank-{rank}-of-2.safetensors" for name in models for rank in range(2)]
    # What is not sharded is the first rank's.
    expected = {*parts, "times.rank-0-of-2.safetensors", "state.json"}
    found = newest_checkpoint(workdir)
    assert {path.name for path in found.iterdir()} == {*expected, "checksums.json"}
    assert json.loads((found / "checksums.json").read_text()).keys() == expected
    sizes = [sum(path.stat().st_size for path in found.glob(f"*.rank-{rank}-of-2.safetensors")) for rank in range(2)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


def test_a_sharded_run_is_loaded_as_any_other(finished):
    (sharded, _), (single, _) = finished(2, "fsdp"), finished(2, "ddp")
    for options in ({}, {"raw": True}, {"average": 0.5}):
        expected, found = (load(workdir, **options).state_dict() for workdir in (single, sharded))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            # AdamW divides by the root of a moment: where a gradient is nearly 0, its rounding moves a weight by up to
            # the learning rate a step; elsewhere by little.
            assert (tensor - found[name]).abs().max() <= 8 * 2 * 1e-3, name
            assert (tensor - found[name]).abs().mean() < 1e-5, name
    expected, found = (post_hoc_average(workdir, 0.15) for workdir in (single, sharded))
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert (one - other).abs().mean() < 1e-5


@pytest.mark.parametrize("damage", ["missing", "flipped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_taken(finished, tmp_path, damage, rank):
    workdir = shutil.copytree(finished(2, "fsdp")[0], tmp_path / "run")
    before = cut(workdir, tmp_path / "before")

    def spoil(checkpoint):
        path = checkpoint / f"model.rank-{rank}-of-2.safetensors"
        if damage == "missing":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    spoil(newest_checkpoint(workdir))
    name = rf"model\.rank-{rank}-of-2\.safetensors"
    with pytest.warns(UserWarning, match=rf"00000008/{name}.*checkpoint 00000004 is taken"):
        found = load(workdir)
    assert digest(found) == digest(load(before))
    spoil(newest_checkpoint(before))
    with pytest.raises(CheckpointError, match=rf"00000004/{name}.*no checkpoint before"):
        load(before)
    if damage == "missing":
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* of the rows are there"):
            load(newest_checkpoint(workdir) / "model.safetensors")


@pytest.mark.parametrize(
    ("parallel", "rank", "place", "background"),
    [
        ("fsdp", 1, "write", True),
        ("fsdp", 0, "complete", True),
        ("ddp", 0, "write", True),
        ("fsdp", 1, "write", False),
        pytest.param("fsdp", 0, "write", True, marks=pytest.mark.slow),
        pytest.param("ddp", 0, "write", False, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_on_one_rank_ends_all_and_leaves_the_checkpoint_before(tmp_path, parallel, rank, place, background):
    options = {"checkpoint_every": 2, "parallel": parallel, "async_checkpoints": background}
    config = config_of(tmp_path, network=DIT, **options)
    config["ema"] = {"decay": 0.9}
    answers = on_ranks(2, refused_by_the_disk, config=config, rank=rank, place=place)
    reasons = ["cannot be written by another rank", "cannot be written by another rank"]
    reasons[rank] = "No space left on device"
    for (_, error), reason in zip(answers, reasons, strict=True):
        assert error.startswith("CheckpointError: ")
        assert reason in error
        assert "the checkpoints before it are whole" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
    load(tmp_path)


@pytest.mark.parametrize(("parallel", "background"), [("ddp", True), ("fsdp", True), ("fsdp", False)])
def test_a_checkpoint_is_there_when_ranks_are_told_of_it(tmp_path, parallel, background):
    options = {"steps": 4, "checkpoint_every": 2, "parallel": parallel, "async_checkpoints": background}
    config = config_of(tmp_path, network=DIT, **options)
    answers = values_of(on_ranks(2, told_of_checkpoints, config=config))
    assert answers == [[("00000002", True), ("00000004", True)]] * 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensors_that_ranks_do_not_divide_are_stored(tmp_path, ranks):
    answers = values_of(on_ranks(ranks, odd_tensors, folder=str(tmp_path)))
    assert answers == [(True, True, {"key": "value"}, 7.0)] * ranks
    # By one process too, and as the same tensors.
    stored = StoredTensors(tmp_path / "odd.safetensors")
    assert stored.shapes == {**ODD, "step": ()}
    for name, shape in ODD.items():
        assert torch.equal(stored.read(name), torch.arange(math.prod(shape)).reshape(shape))


# What ranks say to one another


def test_gradients_are_exchanged_once_a_step(tmp_path):
    found = {}
    for parallel, accumulation in itertools.product(["ddp", "fsdp"], [1, 2]):
        options = {"network": DIT, "steps": 3}
        config = config_of("", parallel=parallel, accumulation=accumulation, **options)
        found[parallel, accumulation], other = values_of(on_ranks(2, exchanges, config=config))
        assert found[parallel, accumulation] == other
    assert found["ddp", 1] == found["ddp", 2]
    assert found["ddp", 1]["allreduce_"] > 3
    one, two = found["fsdp", 1], found["fsdp", 2]
    assert one["_reduce_scatter_base_"] == two["_reduce_scatter_base_"] == 3 * 3
    # Weights are gathered for each part.
    assert one["_allgather_base_"] < two["_allgather_base_"] <= 2 * one["_allgather_base_"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_collect_what_each_has(ranks):
    for rank, answer in enumerate(values_of(on_ranks(ranks, spoken))):
        count = ranks * (ranks + 1) // 2
        assert answer == {
            "ranks": (rank, ranks),
            "total": [1.0 * count, 2.0 * count],
            "kept": [1.0 * (rank + 1), 2.0 * (rank + 1)],
            "collected": [0, 1, 4, 9, 16],
            "largest": 10 + ranks - 1,
            "group": 20 + ranks - 1,
            "network": [5.0, 6.0],
        }


@pytest.mark.parametrize(("step", "end"), [(0, "done"), (2, "failed")])
def test_the_end_of_a_run_is_not_left_to_that_of_the_process(step, end):
    """A process group that ends with the last object that keeps it waits for its threads, and they for Python."""
    config = config_of("", network=DIT, steps=3)
    assert values_of(on_ranks(2, left_of_replicas, config=config, step=step)) == [([True], end)] * 2


def test_all_ranks_fail_if_the_first_does():
    answers = values_of(on_ranks(2, failing_first))
    assert answers == ["ZeroDivisionError: of the first", "RuntimeError: rank 1: rank 0 has failed, and says why"]


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (2, {"batch_size": 7}, r"train.batch_size = 7: must be a multiple of the 2 ranks x train.accumulation = 1"),
        (2, {"accumulation": 3}, r"train.batch_size = 8: must be a multiple of the 2 ranks x train.accumulation = 3"),
        (2, {"sample_every": 1, "sample_count": 1}, r"train.sample_count = 1: must be at least the 2 ranks"),
        (1, {"accumulation": 3}, r"train.batch_size = 8: must be a multiple of the 1 ranks x train.accumulation = 3"),
        (1, {"parallel": "fsdp"}, r"train.parallel = 'fsdp': there is one rank"),
    ],
)
def test_what_ranks_cannot_share_is_named(tmp_path, ranks, options, message):
    for _, error in on_ranks(ranks, trained, config=config_of(tmp_path, **options)):
        assert error.startswith(f"ConfigError: {message}")
    assert list(tmp_path.iterdir()) == []


# Half precision


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(tmp_path, parallel):
    config = config_of(tmp_path, parallel=parallel, precision="float16", steps=5)
    del config["network"]
    one, other = values_of(on_ranks(2, overflown, config=config))
    assert one == other
    assert [before == after for before, after in itertools.pairwise(one)] == [False, True, False, False]
    assert [line["loss_scale"] for line in lines(tmp_path)] == [2.0**16] * 2 + [2.0**15] * 3


# torchrun

WORKER = f"""
import json, os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import runpy, torch
torch.set_num_threads(1)
own = runpy.run_path({__file__!r})
from sde_diffusion import train
config, slowly, killed = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

class Act(own["Callback"]):
    def metrics(self, run):
        own["time"].sleep(slowly)
    def checkpoint(self, run, path):
        if killed and not os.path.exists(killed):
            open(killed, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

train(config, dataset=own["examples"](), callbacks=[Act()])
"""


def torchrun(tmp_path, config, slowly=0.0, killed="", restarts=0):
    """A launcher of two ranks."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(worker), json.dumps(config), str(slowly), killed]
    # Ranks that are started again are else told the addresses of those that failed (pytorch/pytorch#135712).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_that_is_asked_to_end_goes_on_at_its_next_start(finished, tmp_path, parallel):
    whole, _ = finished(2, parallel, 0.2)
    parts = tmp_path / "parts"
    config = config_of(parts, 0.2, parallel=parallel)
    launcher = torchrun(tmp_path, config, slowly=0.5)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (parts / "metrics.jsonl").exists() or len(lines(parts)) < 2:
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        _, messages = launcher.communicate(timeout=TIMEOUT)
    finally:
        launcher.kill()
    assert launcher.returncode == 1, messages
    step = int(newest_checkpoint(parts).name)
    assert 2 <= step < 8
    assert [line["step"] for line in lines(parts)] == list(range(1, step + 1))
    launcher = torchrun(tmp_path, config)
    _, messages = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 0, messages
    assert_same_run(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_starts_ranks_again_when_one_is_killed(finished, tmp_path, parallel):
    whole, _ = finished(2, parallel, 0.2)
    parts, killed = tmp_path / "parts", tmp_path / "killed"
    config = config_of(parts, 0.2, parallel=parallel)
    launcher = torchrun(tmp_path, config, killed=str(killed), restarts=1)
    _, messages = launcher.communicate(timeout=2 * TIMEOUT)
    assert launcher.returncode == 0, messages
    assert killed.exists()
    assert_same_run(parts, whole)


def take_part(work, options, environment, answers):
    """Be a rank."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in environment.items()}})
    torch.set_num_threads(1)
    try:
        answer = globals()[work](**options), None
    except BaseException as error:
        traceback.print_exc()
        answer = None, f"{type(error).__name__}: {error}"
    answers.send(answer)


if __name__ == "rank":
    take_part(**globals()["TASK"])
