"""A run that is ended from outside, at whatever instant, and taken up again is the run that was not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sde_diffusion import Interrupted, train
from sde_diffusion.cli import main
from sde_diffusion.data import ArrayDataset
from sde_diffusion.training.checkpoint import newest_checkpoint

SIGNALS = [signal.SIGTERM, signal.SIGINT]

# Imports once, and begins and kills one process after another: a fork takes milliseconds.
KILLED_RUNS = """
import json, os, random, signal, sys, time
import torch._dynamo  # which the first step of a process imports
from torch.utils.tensorboard import SummaryWriter
from sde_diffusion import train

config, workdir, seed, count = json.loads(sys.argv[1]), *sys.argv[2:]

def begin(name):
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train({**config, "workdir": f"{workdir}/{name}"})
            code = 0
        finally:
            os._exit(code)
    return process

def finish(name):
    assert os.waitpid(begin(name), 0)[1] == 0

def wait_for_lines(name, count):
    path = f"{workdir}/{name}/metrics.jsonl"
    while not os.path.exists(path) or open(path).read().count(chr(10)) < count:
        time.sleep(0.001)

finish("whole")
instants = random.Random(int(seed))
for name in range(int(count)):
    process = begin(name)
    # From line to line takes about as long.
    wait_for_lines(name, instants.randrange(7))
    time.sleep(instants.uniform(0, 0.05))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    finish(name)
"""

# A run with a worker, until it is ended.
ENDLESS_RUN = """
import json, signal, sys
from sde_diffusion import train

signal.signal(signal.SIGINT, signal.default_int_handler)
train(json.loads(sys.argv[1]))
"""


def lines(workdir):
    """Every line of metrics, without the time it took."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = ("images_per_second", "share_")
    return [{name: value for name, value in line.items() if not name.startswith(times)} for line in found]


def assert_same_run(one, other):
    """The same last checkpoint, with every file of it, and the same lines of metrics, bit for bit."""
    found, expected = (
        {path.name: path.read_bytes() for path in newest_checkpoint(run).iterdir()} for run in (one, other)
    )
    assert found == expected
    assert lines(one) == lines(other)


class Sends(ArrayDataset):
    """Points that send signals to the process when the examples of a step are fetched."""

    def __init__(self, step, *numbers):
        super().__init__(torch.arange(100, dtype=torch.float32).reshape(50, 2) / 100)
        self.step, self.numbers, self.fetched = step, numbers, 0

    def __getitems__(self, indices):
        self.fetched += 1
        if self.fetched == self.step:
            for number in self.numbers:
                signal.raise_signal(number)
        return super().__getitems__(indices)


@pytest.fixture
def noticed():
    """The signals that reach the handlers which a run finds, in place of those that would end the tests."""
    received = []

    def note(number, frame):
        received.append(number)
        raise ZeroDivisionError

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    yield received
    assert all(signal.getsignal(number) is note for number in SIGNALS)
    for number, handler in previous.items():
        signal.signal(number, handler)


# Asked to end


@pytest.mark.parametrize("step", [1, 4, 5, 7])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(tiny, tmp_path, noticed, number, step):
    options = {"log_every": 3, "checkpoint_every": 4}
    whole, parts = (tiny(workdir=str(tmp_path / name), train=options) for name in ("whole", "parts"))
    train(whole, dataset=Sends(0))
    with pytest.raises(Interrupted) as interrupted:
        train(parts, dataset=Sends(step, number))
    assert interrupted.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert (interrupted.value.received, interrupted.value.step) == (number, step)
    assert str(interrupted.value) == f"{number.name} after step {step}: its checkpoint is in {tmp_path / 'parts'}"
    assert newest_checkpoint(tmp_path / "parts").name == f"{step:08d}"
    train(parts, dataset=Sends(0))
    # Also the line of metrics whose steps were interrupted.
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert noticed == []


def test_a_signal_in_the_last_step_ends_a_run_that_is_whole(tiny, tmp_path, noticed):
    config = tiny(workdir=str(tmp_path))
    with pytest.raises(Interrupted, match="SIGTERM after step 8"):
        train(config, dataset=Sends(8, signal.SIGTERM))
    assert train(config, dataset=Sends(1, signal.SIGTERM)).step == 8


def test_a_second_signal_ends_a_run_at_once(tiny, tmp_path, noticed):
    with pytest.raises(ZeroDivisionError):
        train(tiny(workdir=str(tmp_path)), dataset=Sends(5, signal.SIGTERM, signal.SIGINT))
    assert noticed == [signal.SIGINT]
    assert newest_checkpoint(tmp_path).name == "00000003"


def test_callbacks_of_the_last_step_are_called(tiny, tmp_path, noticed):
    seen = []
    with pytest.raises(Interrupted):
        train(tiny(workdir=str(tmp_path)), dataset=Sends(5, signal.SIGTERM), callbacks=[lambda r: seen.append(r.step)])
    assert seen == [1, 2, 3, 4, 5]


def test_a_run_without_a_directory_leaves_signals_alone(tiny, noticed):
    with pytest.raises(ZeroDivisionError):
        train(tiny(), dataset=Sends(5, signal.SIGTERM))
    assert noticed == [signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_so(tiny, tmp_path):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(tiny(workdir=str(tmp_path)), dataset=Sends(5, signal.SIGINT)).step == 8
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_run_in_a_thread_leaves_signals_alone(tiny, tmp_path, noticed):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(workdir=str(tmp_path)), dataset=Sends(0))))
    thread.start()
    thread.join()
    assert results[0].step == 8


def test_the_command_says_how_to_go_on_and_exits_with_the_signal(tmp_path, monkeypatch, capsys, noticed):
    monkeypatch.setattr("sde_diffusion.training.loop.load_dataset", lambda **section: Sends(3, signal.SIGTERM))
    config = Path(__file__).parents[2] / "configs" / "spiral.py"
    assert main(["train", f"--config={config}", f"--workdir={tmp_path}", "--config.network.width=8"]) == 143
    expected = f"SIGTERM after step 3: its checkpoint is in {tmp_path}; the same command goes on from there\n"
    assert capsys.readouterr().err.endswith(f"sde_diffusion: error: {expected}")


def wait_for_lines(workdir, process):
    """Until a run has taken steps."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.02)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_a_run_and_its_workers_ends_the_process_cleanly(tiny, tmp_path, number):
    """As a terminal and a scheduler send it: to the whole group of processes."""
    options = {"steps": 10**6, "log_every": 2, "checkpoint_every": 10**6, "workers": 1}
    config = tiny(workdir=str(tmp_path), train=options)
    command = [sys.executable, "-c", ENDLESS_RUN, json.dumps(config)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_lines(tmp_path, process)
        os.killpg(process.pid, number)
        _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, "Traceback" in messages) == (128 + number, False), messages
    step = int(newest_checkpoint(tmp_path).name)
    assert [line["step"] for line in lines(tmp_path)] == list(range(2, step + 1, 2))


# Killed


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_instant_ends_as_if_it_had_not_been(tiny, tmp_path, count):
    options = {
        "steps": 20,
        "log_every": 3,
        "checkpoint_every": 4,
        "keep_checkpoints": 2,
        "keep_every": 8,
        "device": "cpu",
    }
    config = tiny(train=options)
    command = [sys.executable, "-c", KILLED_RUNS, json.dumps(config), str(tmp_path), "0", str(count)]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = tmp_path / "whole"
    assert [line["step"] for line in lines(whole)] == [*range(3, 20, 3), 20]
    for name in range(count):
        run = tmp_path / str(name)
        assert_same_run(run, whole)
        assert {"00000008", "00000016", "00000020"} <= {path.name for path in (run / "checkpoints").iterdir()}
