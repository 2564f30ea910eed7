import errno
import json
import os
import pickle
import re
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sde_diffusion.cli import main
from sde_diffusion.data import DATASETS, ArrayDataset, DataInfo, DataSource, MemoryMapped, array_file
from sde_diffusion.data.datasets import hash_of_examples
from sde_diffusion.data.memory_map import write_once

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def images(count=7, shape=(3, 4, 5)):
    return np.random.default_rng(0).integers(256, size=(count, *shape), dtype=np.uint8)


def test_items_are_those_of_the_array(tmp_path):
    values, labels = images(), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    mapped = MemoryMapped(save(tmp_path / "a.npy", values), labels)
    held = ArrayDataset(torch.from_numpy(values), labels)
    assert isinstance(mapped, DataSource)
    assert (mapped.data_shape, mapped.data, mapped.classes) == ((3, 4, 5), DataInfo(), 3)
    assert (len(mapped), hash_of_examples(mapped)) == (7, hash_of_examples(held))
    # Neither sorted nor without repetition, and counted from the end.
    for (image, label), index in zip(mapped.__getitems__([5, 0, 5, -1]), [5, 0, 5, 6], strict=True):
        assert torch.equal(image, held[index][0])
        assert label == labels[index]
    with pytest.raises(IndexError):
        mapped[7]


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_floats_are_continuous_whatever_their_byte_order(tmp_path, dtype):
    values = np.linspace(-1, 1, 12).reshape(4, 3).astype(dtype)
    mapped = MemoryMapped(save(tmp_path / "a.npy", values))
    assert (mapped.data.bits, mapped.data_shape) == (None, (3,))
    assert mapped[2].dtype == torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).dtype
    assert mapped[2].tolist() == values[2].tolist()


def test_codes_of_another_depth(tmp_path):
    mapped = MemoryMapped(save(tmp_path / "a.npy", np.full((2, 3), 4000, np.uint16)), data=DataInfo(bits=12))
    assert (mapped[0].dtype, mapped[1].tolist()) == (torch.int32, [4000] * 3)


@pytest.mark.filterwarnings("error")
def test_items_are_copies_that_can_be_written_to(tmp_path):
    mapped = MemoryMapped(save(tmp_path / "a.npy", images()))
    image = mapped[0]
    image += 1
    assert torch.equal(image - 1, mapped[0])


def test_workers_map_the_file_themselves(tmp_path):
    values = images(200, (3, 32, 32))
    mapped = MemoryMapped(save(tmp_path / "a.npy", values), torch.arange(200))
    assert mapped[0][1] == 0
    # What a worker is sent where processes are not forked: 1600 bytes of labels, and little else.
    content = pickle.dumps(mapped)
    assert len(content) < 5_000
    batches = list(DataLoader(pickle.loads(content), batch_size=150, num_workers=1))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.from_numpy(values))
    assert torch.equal(torch.cat([label for _, label in batches]), torch.arange(200))


def test_a_folder_of_arrays(tmp_path):
    save(tmp_path / "train.npy", images(5, (4, 6)))
    save(tmp_path / "train_labels.npy", np.array([0, 3, 1, 1, 0], np.int16))
    save(tmp_path / "test.npy", images(2, (4, 6)))
    train, test = DATASETS["array_file"](path=tmp_path), array_file(tmp_path, "test")
    assert (len(train), train.classes, train.data_shape, train.name) == (5, 4, (1, 4, 6), tmp_path.name)
    assert train[1][1].dtype == torch.int64
    assert (len(test), test.classes, test[0].shape) == (2, 0, (1, 4, 6))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"test": images()}, FileNotFoundError, r"no .*train\.npy"),
        ({"train": images(shape=(8, 8, 3))}, ValueError, r"train\.npy: .*channels last"),
        ({"train": images(0)}, ValueError, r"train\.npy: values must have shape \(N, \*data_shape\)"),
        ({"train": np.zeros(5, np.uint8)}, ValueError, r"train\.npy: values must have shape"),
        ({"train": np.zeros((5, 2), np.int32)}, ValueError, r"train\.npy: .*bit depth"),
        ({"train": np.full((5, 2), np.nan)}, ValueError, r"train\.npy: values must be finite"),
        ({"train": np.zeros((5, 2), np.longdouble)}, ValueError, r"train\.npy: .*(float128|longdouble|dtype)"),
        ({"train": np.zeros((5, 2), "U3")}, ValueError, r"train\.npy: .*type"),
        ({"train": np.array([["a", 1]] * 5, object)}, ValueError, r"train\.npy: is not a whole \.npy file"),
        ({"train": np.asfortranarray(images())}, ValueError, r"train\.npy: is in Fortran order"),
        ({"train": images(), "train_labels": np.zeros(6, int)}, ValueError, r"\(7,\) integers .*train\.npy; .*\(6,\)"),
        ({"train": images(), "train_labels": np.arange(7) - 1}, ValueError, r"from 0.*got -1"),
        ({"train": images(), "train_labels": np.zeros(7)}, ValueError, r"train_labels\.npy: .*float64"),
    ],
)
def test_bad_arrays_are_named(tmp_path, files, error, message):
    for name, array in files.items():
        save(tmp_path / f"{name}.npy", array)
    with pytest.raises(error, match=message):
        array_file(tmp_path)


@pytest.mark.parametrize(
    "labels", [torch.zeros(7), torch.zeros(7, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)]
)
def test_labels_of_the_wrong_kind(tmp_path, labels):
    with pytest.raises(ValueError, match=r"labels must be \(7,\) integers"):
        MemoryMapped(save(tmp_path / "a.npy", images()), labels)


@pytest.mark.parametrize("kept", [0, 20, 200])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kept):
    path = save(tmp_path / "a.npy", images())
    os.truncate(path, kept)
    with pytest.raises(ValueError, match=r"a\.npy: is not a whole \.npy file"):
        MemoryMapped(path)


def test_a_file_is_written_once(tmp_path, monkeypatch):
    path, values = tmp_path / "new" / "a.npy", images()
    write_once(path, values.shape, lambda: values)
    # One that is there needs no lock: its folder may be one that others only read.
    monkeypatch.setattr("fcntl.flock", lambda *_: pytest.fail("locked"))
    write_once(path, values.shape, lambda: pytest.fail("written again"))
    assert np.array_equal(np.load(path), values)


def test_what_a_killed_process_left_is_not_taken(tmp_path):
    path, values = tmp_path / "a.npy", images()

    def die_in_the_midst():
        yield values[0]
        os._exit(9)

    child = os.fork()
    if child == 0:
        write_once(path, values.shape, die_in_the_midst)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [file.name for file in tmp_path.glob("*.npy*") if file.suffix != ".lock"] == ["a.npy.part"]
    write_once(path, values.shape, lambda: values)
    assert np.array_equal(np.load(path), values)
    assert not list(tmp_path.glob("*.part"))


def test_an_error_in_the_midst_leaves_nothing(tmp_path):
    def rows():
        yield images()[0]
        raise RuntimeError("no second row")

    with pytest.raises(RuntimeError, match="no second row"):
        write_once(tmp_path / "a.npy", images().shape, rows)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy.lock"]


def test_of_several_at_once_one_writes(tmp_path):
    path, values, calls = tmp_path / "a.npy", images(), []
    has_begun, may_end = threading.Event(), threading.Event()

    def rows():
        calls.append(1)
        has_begun.set()
        assert may_end.wait(10)
        return values

    # Each opens the lock's file anew, so that threads exclude one another as processes do.
    threads = [threading.Thread(target=write_once, args=(path, values.shape, rows)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert has_begun.wait(10)
    threads[0].join(0.1)
    assert (path.exists(), sum(thread.is_alive() for thread in threads)) == (False, 3)
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert (len(calls), np.array_equal(np.load(path), values)) == (1, True)


def test_a_full_disk_is_told_of_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1_000_000))
    with pytest.raises(OSError, match=r"a\.npy: the array takes 3\.07 GB, but 0\.001 GB are free"):
        write_once(tmp_path / "a.npy", (1_000_000, 3, 32, 32), lambda: pytest.fail("begun"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy.lock"]


def test_a_disk_that_fills_up_in_the_midst(tmp_path):
    def rows():
        yield images()[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"a\.npy: the array takes .* GB, but No space left"):
        write_once(tmp_path / "a.npy", images().shape, rows)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy.lock"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match="its file system has no locks"):
        write_once(tmp_path / "a.npy", images().shape, images)


@pytest.mark.parametrize("field", ["data", "data.name"])
def test_a_run_is_told_of_it_by_its_flags(tmp_path, field, capsys):
    save(tmp_path / "arrays" / "train.npy", np.linspace(-1, 1, 24, dtype=np.float32).reshape(12, 2))
    command = ["train", f"--config={ROOT / 'configs' / 'spiral.py'}", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.{field}=array_file", "--config.train.steps=1", "--config.train.sample_every=0"]
    assert main(command) == 2
    assert "data.path: array_file needs a value" in capsys.readouterr().err
    assert main([*command, f"--config.data.path={tmp_path / 'arrays'}"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == {"name": "array_file", "path": str(tmp_path / "arrays")}


def test_the_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    assert (len(names["dataset"]), names["dataset"].classes) == (1000, 10)
