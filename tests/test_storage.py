"""What any number of ranks have written is read by any other number, and nothing that is missing goes unnoticed."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from sde_diffusion import storage
from sde_diffusion.storage import (
    CheckpointError,
    Contents,
    Rows,
    StoredTensors,
    checksum,
    files_of,
    fill,
    own_rows,
    part_of,
    read_json,
    write_json,
    write_text,
)

SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)
TENSORS = st.dictionaries(st.sampled_from(["weight", "layers.0.bias", "a", "0.step"]), SHAPES, min_size=1)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64])


def tensors_of(shapes, dtype=torch.float32):
    """Tensors of these shapes in which no two numbers are the same."""
    return {
        name: (torch.arange(math.prod(shape)) + 1000 * index).to(dtype).reshape(shape)
        for index, (name, shape) in enumerate(shapes.items())
    }


def rows_of(shape, rank, ranks):
    """The rows that a rank has of a tensor, as torch.chunk divides it."""
    chunks = torch.arange(shape[0]).chunk(ranks)
    own = chunks[rank].tolist() if rank < len(chunks) else []
    return Rows(own[0] if own else shape[0], len(own), shape)


def write_parts(path, tensors, ranks, header=None):
    """The files of a checkpoint's tensors as ranks write them; of numbers, only the first rank's."""
    for rank in range(ranks):
        own = {name: tensor for name, tensor in tensors.items() if tensor.ndim or rank == 0}
        rows = {name: rows_of(tensor.shape, rank, ranks) for name, tensor in own.items() if tensor.ndim}
        index = {name: (found.first, found.shape) for name, found in rows.items()}
        parts = {
            name: tensor[rows[name].first :][: rows[name].size].contiguous() if tensor.ndim else tensor
            for name, tensor in own.items()
        }
        part = json.dumps({"header": header or {}, "rows": index})
        save_file(parts, part_of(path, rank, ranks), metadata={"part": part})


@given(shapes=TENSORS, dtype=DTYPES, writers=st.integers(1, 5), readers=st.integers(1, 5))
def test_what_some_ranks_wrote_is_read_by_any_number(tmp_path_factory, shapes, dtype, writers, readers):
    path, tensors = tmp_path_factory.mktemp("parts") / "model.safetensors", tensors_of(shapes, dtype)
    write_parts(path, tensors, writers, {"key": "value"})
    stored = StoredTensors(path)
    assert stored.header == {"key": "value"}
    assert stored.shapes == dict(sorted(shapes.items()))
    for name, tensor in tensors.items():
        found = stored.read(name)
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert torch.equal(found, tensor)
        for rank in range(readers if tensor.ndim else 0):
            rows = rows_of(tuple(tensor.shape), rank, readers)
            found = stored.read(name, rows)
            assert found.dtype == dtype
            assert torch.equal(found, tensor[rows.first : rows.first + rows.size])


@given(shape=st.tuples(st.integers(1, 6), st.integers(0, 2)), writers=st.integers(1, 5), data=st.data())
def test_rows_that_no_part_has_are_missed(tmp_path_factory, shape, writers, data):
    path, tensors = tmp_path_factory.mktemp("parts") / "model.safetensors", tensors_of({"weight": shape})
    write_parts(path, tensors, writers)
    lost = data.draw(st.integers(0, writers - 1))
    missing = rows_of(shape, lost, writers)
    part_of(path, lost, writers).unlink()
    if writers == 1:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
            StoredTensors(path)
        return
    stored = StoredTensors(path)
    if missing.size:
        with pytest.raises(CheckpointError, match=rf"tensor weight: {shape[0] - missing.size} of the rows are there"):
            stored.read("weight")
        with pytest.raises(CheckpointError, match="tensor weight: 0 of the rows are there"):
            stored.read("weight", missing)
    else:
        assert torch.equal(stored.read("weight"), tensors["weight"])
    for rank in set(range(writers)) - {lost}:
        rows = rows_of(shape, rank, writers)
        assert torch.equal(stored.read("weight", rows), tensors["weight"][rows.first : rows.first + rows.size])


@pytest.mark.parametrize("name", ["model.safetensors", "model-0.999.safetensors", "power-0.05.safetensors"])
def test_parts_are_found_by_the_name_of_the_whole(tmp_path, name):
    path = tmp_path / name
    write_parts(path, tensors_of({"weight": (30,)}), 12)
    for other in ("raw.safetensors", "model-0.9.safetensors", f"more-{name}"):
        write_parts(tmp_path / other, tensors_of({"other": (3,)}), 2)
    parts = files_of(path)
    assert [part.name for part in parts] == [
        name.replace(".safetensors", f".rank-{rank}-of-12.safetensors") for rank in range(12)
    ]
    assert StoredTensors(path).shapes == {"weight": (30,)}
    # A file of that very name is all there is to read.
    save_file(tensors_of({"whole": (2,)}), path)
    assert files_of(path) == [path]
    assert StoredTensors(path).shapes == {"whole": (2,)}


def test_a_damaged_part_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    write_parts(path, tensors_of({"weight": (30,)}), 3)
    part = part_of(path, 1, 3)
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.rank-1-of-3\.safetensors: cannot be read"):
        StoredTensors(path)


# Writing


@given(shapes=TENSORS, dtype=DTYPES)
def test_what_one_process_wrote_is_read(tmp_path_factory, shapes, dtype):
    path, tensors = tmp_path_factory.mktemp("whole") / "model.safetensors", tensors_of(shapes, dtype)
    Contents(tensors, {"key": "value"}).write(path)
    stored = StoredTensors(path)
    assert stored.header == {"key": "value"}
    for name, tensor in tensors.items():
        assert own_rows(tensor) == Rows(0, tensor.shape[0] if tensor.ndim else 1, tuple(tensor.shape))
        assert torch.equal(stored.read(name), tensor)
        if tensor.ndim:
            assert torch.equal(stored.read(name, Rows(1, len(tensor[1:]), tuple(tensor.shape))), tensor[1:])
    # The same bytes as ever: a checkpoint can be compared with another.
    again = path.with_name("again.safetensors")
    Contents(tensors, {"key": "value"}).write(again)
    assert checksum(path) == checksum(again)


def test_contents_are_a_copy_of_that_moment(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    tensors = {"weight": weight, "tied": weight, "transposed": weight.T, "row": weight[1]}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    contents = Contents(tensors)
    weight.zero_()
    contents.write(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert contents.nbytes == 4 * (3 * 6 + 3)


def test_only_the_first_rank_has_what_is_not_sharded():
    assert Contents({"weight": torch.ones(2)}, is_first=False).nbytes == 0


@pytest.mark.parametrize(
    "write", [lambda path: Contents({"b": torch.ones(3)}).write(path), lambda path: write_text(path, "new")]
)
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, write):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def full(path):
        raise OSError("no space left")

    monkeypatch.setattr(storage, "sync", full)
    with pytest.raises(OSError, match="no space left"):
        write(path)
    assert path.read_bytes() == b"old"


def test_a_refusal_of_the_format_is_one_of_the_system(tmp_path):
    path = tmp_path / "missing" / "model.safetensors"
    with pytest.raises(OSError, match="model"):
        Contents({"a": torch.ones(3)}).write(path)


def test_json_is_read_as_it_was_written(tmp_path):
    path, values = tmp_path / "state.json", {"step": 3, "losses": [0.1, None], "name": "Fréchet"}
    write_json(path, values)
    assert read_json(path) == values
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]
    path.write_text(path.read_text()[:-5])
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"other\.json: cannot be read"):
        read_json(tmp_path / "other.json")


# Filling a module


@pytest.mark.parametrize("writers", [None, 1, 3, 7])
def test_a_module_is_filled_from_parts(tmp_path, writers):
    torch.manual_seed(0)
    source, target = (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    target = target.to(memory_format=torch.channels_last)
    path = tmp_path / "model.safetensors"
    if writers:
        write_parts(path, source.state_dict(), writers)
    else:
        Contents(source.state_dict()).write(path)
    fill(target, StoredTensors(path))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert target[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": (2, 3)}, r"tensor bias: the file has nothing, the network \(2,\)"),
        ({"weight": (2, 3), "bias": (2,), "more": ()}, r"tensor more: the file has \(\), the network nothing"),
        ({"weight": (3, 3), "bias": (2,)}, r"tensor weight: the file has \(3, 3\), the network \(2, 3\)"),
    ],
)
@pytest.mark.parametrize("writers", [1, 2])
def test_what_does_not_fit_a_module_is_named_and_nothing_is_copied(tmp_path, tensors, message, writers):
    path, layer = tmp_path / "model.safetensors", nn.Linear(3, 2)
    write_parts(path, tensors_of(tensors), writers)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        fill(layer, StoredTensors(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
