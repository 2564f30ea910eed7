import itertools
import json
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sde_diffusion import train
from sde_diffusion.training.log import Log, Stopwatch


def line(step):
    return {"step": step, "loss": 1 / step}


def test_lines_are_kept_in_a_file_and_on_the_board(tmp_path):
    with Log(tmp_path, "metrics", 0) as log:
        assert log.last == {}
        for step in (3, 6):
            log.write(line(step))
        # Each is there as soon as it is written.
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 0.3333333333333333}\n' + (
            '{"step": 6, "loss": 0.16666666666666666}\n'
        )
        log.sync()
        assert log.lines == [line(3), line(6)]
        assert log.last == line(6)
    board = EventAccumulator(str(tmp_path / "tensorboard" / "metrics")).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (3, 6)
    ]


def test_a_line_is_kept_as_it_was_when_it_was_written():
    log, numbers = Log(None, "metrics", 0), line(3)
    log.write(numbers)
    numbers["loss"] = 7.0
    assert log.last == line(3)


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Log(None, "metrics", 0) as log:
        log.write(line(1))
        log.sync()
    assert log.lines == [line(1)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", ["", '{"step": 4', '{"step": 4, "loss": 0.25}', '{"step": 1', "{"])
@pytest.mark.parametrize("step", [0, 2, 3, 9])
def test_lines_that_a_run_will_write_again_are_dropped(tmp_path, half, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(number)) + "\n" for number in (1, 2, 3)) + half)
    with Log(tmp_path, "metrics", step) as log:
        assert log.lines == [line(number) for number in (1, 2, 3) if number <= step]
        log.write(line(step + 1))
    assert [json.loads(text) for text in path.read_text().splitlines()] == log.lines
    assert path.read_text().endswith("\n")
    assert {found.name for found in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_two_logs_of_a_run_do_not_touch_each_other(tmp_path):
    with Log(tmp_path, "metrics", 0) as one, Log(tmp_path, "evaluations", 0) as other:
        one.write(line(5))
        other.write({"step": 5, "held_out_loss": 2.0})
    with Log(tmp_path, "metrics", 4) as one, Log(tmp_path, "evaluations", 9) as other:
        assert (one.last, other.last) == ({}, {"step": 5, "held_out_loss": 2.0})


class Clock:
    """Seconds that pass as told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_each_part_has_its_share_of_the_time(clock):
    watch = Stopwatch(torch.device("cpu"), ("data", "network", "average"))
    for _ in range(2):
        clock.passes(1)
        watch.lap("data")
        clock.passes(2)
        watch.lap("network")
        clock.passes(0.5)
        watch.lap("logging")
    clock.passes(1)
    # What no part had is in none of the shares.
    expected = {"data": 2 / 8, "network": 4 / 8, "average": 0.0, "logging": 1 / 8}
    assert watch.read() == (8.0, expected)
    assert list(expected) == ["data", "network", "average", "logging"]


def test_a_reading_begins_anew(clock):
    watch = Stopwatch(torch.device("cpu"), ("data",))
    clock.passes(3)
    watch.lap("data")
    watch.read()
    clock.passes(1)
    watch.lap("logging")
    clock.passes(3)
    watch.lap("data")
    assert watch.read() == (4.0, {"data": 0.75, "logging": 0.25})
    clock.passes(2)
    assert watch.read() == (2.0, {"data": 0.0})


def test_the_shares_of_a_run_are_of_its_time(tiny):
    lines = []
    train(tiny(train={"log_every": 2}), callbacks=[lambda run: lines.append(dict(run.metrics))])
    assert len(lines) == 4
    for numbers in lines:
        shares = {name: share for name, share in numbers.items() if name.startswith("share_")}
        assert {"share_data", "share_network", "share_optimizer", "share_average"} <= shares.keys()
        assert all(share >= 0 for share in shares.values())
        # Shares of one time: but for the rounding of a sum they cannot exceed it.
        assert 0 < sum(shares.values()) <= 1 + 1e-12
    for one, other in itertools.pairwise(lines):
        assert one.keys() == other.keys()
