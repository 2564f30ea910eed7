"""A run's directory is its own, and says what the run was begun with."""

import json
import os
import platform
import re
import signal
import warnings
from datetime import datetime

import pytest
import torch
from torch.utils.data import Dataset

import sde_diffusion
from sde_diffusion import train
from sde_diffusion.data import ArrayDataset, DataInfo, as_dataset
from sde_diffusion.training import CheckpointError, ConfigError, resolve_config
from sde_diffusion.training.run_directory import check_data, data_fingerprint, locked, write_manifest


@pytest.fixture
def manifest(tiny, tmp_path):
    """manifest(change): the manifest of a finished run, with what a function changes in it written back."""
    path = tmp_path / "manifest.json"
    train(tiny(workdir=str(tmp_path)))

    def read(change=None):
        values = json.loads(path.read_text())
        if change is not None:
            change(values)
            path.write_text(json.dumps(values))
        return values

    return read


# The manifest


def test_a_manifest_says_what_a_run_was_begun_with(tiny, manifest, tmp_path):
    values = manifest()
    assert values["versions"] == {
        "sde_diffusion": sde_diffusion.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    assert values["seed"] == 0
    assert values["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", values["commit"])
    age = datetime.now().astimezone() - datetime.fromisoformat(values["started"])
    assert -1 <= age.total_seconds() < 600
    expected = json.loads(resolve_config(tiny()).to_json())
    del expected["workdir"]
    assert values["config"] == expected == json.loads((tmp_path / "config.json").read_text())
    data = values["data"]
    assert (data["examples"], data["shape"], data["classes"]) == (50, [2], 0)
    assert data["range"]["bits"] is None
    assert re.fullmatch("[0-9a-f]{64}", data["sha256"])


def test_a_manifest_stays_that_of_the_beginning(tiny, manifest, tmp_path):
    before = manifest(lambda values: values.update(started="2020-01-01T00:00:00+00:00"))
    train(tiny(workdir=str(tmp_path), train={"log_every": 2}))
    assert manifest() == before


def test_a_folder_without_a_commit_has_none(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    config = {**tiny(), "seed": 3}
    write_manifest(tmp_path, config, as_dataset(torch.zeros(3, 2)))
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert (values["commit"], values["seed"]) == (None, 3)


@pytest.mark.parametrize(("version", "is_refused"), [("1.0.0", True), ("0.9.7", False), ("10.1", True)])
def test_a_run_of_another_major_version_is_refused(tiny, manifest, tmp_path, monkeypatch, version, is_refused):
    monkeypatch.setattr(sde_diffusion, "__version__", "0.1.0")
    manifest(lambda values: values["versions"].update(sde_diffusion=version))
    if not is_refused:
        train(tiny(workdir=str(tmp_path)))
        return
    with pytest.raises(CheckpointError, match=rf"begun with sde_diffusion {version}, and this is 0\.1\.0: install"):
        train(tiny(workdir=str(tmp_path)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": {}, "data": {}}', '{"versions": {"sde_diffusion": 1}}'])
def test_a_damaged_manifest_is_named(tiny, manifest, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: (cannot be read|must hold the versions and the data)"):
        train(tiny(workdir=str(tmp_path)))


# The data


class Random(Dataset):
    """Examples that are others each time, as with augmentation."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.rand(2) + index


def values(change=None):
    tensor = torch.arange(400, dtype=torch.float32).reshape(200, 2) / 400
    if change is not None:
        tensor[change] += 0.5
    return tensor


LABELS = torch.arange(200) % 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (as_dataset(values()[:-1]), "199 examples: the run in .* was trained on 200"),
        (as_dataset(values().reshape(200, 1, 2)), r"examples of shape \[1, 2\]: .* trained on \[2\]"),
        (ArrayDataset(values(), data=DataInfo(low=0.0, bits=None)), r"the range {'low': 0\.0, .*: .* {'low': -1\.0"),
        (ArrayDataset(values(), LABELS), "3 classes: .* trained on 0"),
        (
            as_dataset(values(change=0)),
            r"other examples \(SHA-256 of some: \w{64}\): .* on \w{64}; give",
        ),
        (as_dataset(values(change=199)), "other examples"),
        (as_dataset(values().double()), "other examples"),
    ],
    ids=["number", "shape", "range", "classes", "first", "last", "dtype"],
)
def test_data_that_have_changed_are_named(tiny, tmp_path, given, message):
    begun = as_dataset(values())
    write_manifest(tmp_path, {"seed": 0}, begun)
    check_data(tmp_path, as_dataset(values()))
    with pytest.raises(ConfigError, match=f"dataset has {message}"):
        check_data(tmp_path, given)


def test_labels_are_part_of_the_data():
    one, other = (data_fingerprint(ArrayDataset(values(), labels)) for labels in (LABELS, LABELS.flip(0)))
    assert one["sha256"] != other["sha256"]
    assert {**one, "sha256": ""} == {**other, "sha256": ""}


def test_a_run_does_not_go_on_with_other_data(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path))
    train(config, dataset=values())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="dataset has other examples"):
        train(config, dataset=values().flip(0))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train(config, dataset=values())


def test_examples_drawn_anew_each_time_are_no_other_data(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path))
    train(config, dataset=Random())
    assert json.loads((tmp_path / "manifest.json").read_text())["data"]["sha256"] is None
    train(config, dataset=Random())


def test_a_big_data_set_is_not_read_through():
    class Big(Dataset):
        data_shape, data, classes, seen = (2,), DataInfo(bits=None), 0, 0

        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            self.seen += 1
            return torch.full((2,), float(index), dtype=torch.float64)

    dataset = Big()
    assert data_fingerprint(dataset)["examples"] == 10**12
    assert dataset.seen == 128


# The lock


def test_a_directory_has_one_run_at_a_time(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path), train={"log_every": 2})

    def begin_again(result):
        with pytest.raises(ConfigError, match=rf"workdir = '{tmp_path}': process {os.getpid()} trains there"):
            train(config)

    assert train(config, callbacks=[begin_again]).step == 8
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    train(config)


def test_a_run_that_fails_frees_its_directory(tiny, tmp_path):
    def fail(result):
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train(tiny(workdir=str(tmp_path)), callbacks=[fail])


def forked(run):
    """The id of a process that calls a function and then waits to be killed."""
    process = os.fork()
    if process == 0:
        try:
            run()
            signal.pause()
        finally:
            os._exit(1)
    return process


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.mark.parametrize("has_worker", [False, True])
def test_the_lock_keeps_other_processes_off_and_ends_with_its_own(tmp_path, has_worker):
    """Also with that of a process whose workers, which load data, outlive it."""
    read, write = os.pipe()

    def hold():
        with locked(tmp_path):
            worker = forked(lambda: None) if has_worker else 0
            os.write(write, f"{worker}\n".encode())
            signal.pause()

    holder = forked(hold)
    try:
        with os.fdopen(read) as pipe:
            worker = int(pipe.readline())
        with pytest.raises(ConfigError, match=f"process {holder} trains there"), locked(tmp_path):
            pass
    finally:
        kill(holder)
    try:
        with locked(tmp_path):
            pass
        if has_worker:
            os.kill(worker, 0)
    finally:
        os.close(write)
        if has_worker:
            os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_of(tiny, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="its file system has no locks"):
        assert train(tiny(workdir=str(tmp_path))).step == 8


def test_nothing_is_warned_of_otherwise(tiny, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tiny(workdir=str(tmp_path)))
    assert not list(tmp_path.rglob("*partial*"))
