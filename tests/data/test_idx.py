import gzip

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sde_diffusion.data import idx_images, read_idx, write_idx

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64]


@given(
    array=st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=4, min_side=0, max_side=5))
    ),
    suffix=st.sampled_from(["", ".gz"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, array, suffix):
    path = tmp_path_factory.mktemp("idx") / f"array{suffix}"
    write_idx(path, array)
    read = read_idx(path)
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


def test_bytes_are_those_of_the_format(tmp_path):
    write_idx(tmp_path / "a", np.array([[1, 2], [3, -4]], np.int16))
    expected = bytes.fromhex("00000b02 00000002 00000002 0001 0002 0003 fffc")
    assert (tmp_path / "a").read_bytes() == expected


def test_compressed_files_are_reproducible(tmp_path):
    array = np.arange(1000, dtype=np.int32)
    write_idx(tmp_path / "a.gz", array)
    write_idx(tmp_path / "b.gz", array)
    content = (tmp_path / "a.gz").read_bytes()
    assert content == (tmp_path / "b.gz").read_bytes()
    assert content[4:8] == bytes(4)  # the time stamp of RFC 1952


VALID = bytes.fromhex("00000801 00000003 010203")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number is missing"),
        (b"\x89PNG\r\n", "magic number is 89 50 4e 47"),
        (bytes.fromhex("00000a01 00000003 010203"), "magic number"),
        (VALID[:6], "truncated in the header"),
        (VALID[:-1], "truncated, 10 bytes"),
        (VALID + b"\0", "over-long, 12 bytes"),
        (gzip.compress(VALID, mtime=0)[:-6], "damaged gzip"),
        (gzip.compress(VALID, mtime=0)[:12] + b"\xff" * 20, "damaged gzip"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "suspicious-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"suspicious-file: .*{message}"):
        read_idx(path)


@pytest.mark.parametrize(
    ("array", "message"), [(np.zeros(3, np.int64), "int64"), (np.uint8(3) * np.ones((), np.uint8), "scalar")]
)
def test_what_idx_cannot_hold_is_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        write_idx(tmp_path / "a", array)


def write_set(folder, prefix, suffix="", count=4):
    images = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
    write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8))
    return torch.from_numpy(images)[:, None]


@pytest.mark.parametrize(("train", "test"), [("train", "t10k"), ("emnist-balanced-train", "emnist-balanced-test")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_names_of_the_mnist_family(tmp_path, train, test, suffix):
    expected = write_set(tmp_path, train, suffix), write_set(tmp_path, test, suffix, count=3)
    for split, images in zip(("train", "test"), expected, strict=True):
        dataset = idx_images(tmp_path, split)
        assert torch.equal(dataset.values, images)
        assert dataset.labels is not None
        assert dataset.labels.tolist() == list(range(len(images)))
        assert dataset.name == tmp_path.name


def test_a_plain_file_and_its_compressed_copy_are_one(tmp_path):
    write_set(tmp_path, "train")
    write_set(tmp_path, "train", ".gz")
    assert len(idx_images(tmp_path)) == 4


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\*train-images-idx3-ubyte\[.gz\]"):
        idx_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        idx_images(tmp_path / "nowhere")
    write_set(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"t10k-images.* or .*test-images"):
        idx_images(tmp_path, "test")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"):
        idx_images(tmp_path)


def test_several_sets_are_refused(tmp_path):
    write_set(tmp_path, "emnist-letters-train")
    write_set(tmp_path, "emnist-digits-train")
    with pytest.raises(ValueError, match=r"emnist-digits-train.*emnist-letters-train"):
        idx_images(tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path):
    write_set(tmp_path, "train")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: shape \(5,\).* 4 images"):
        idx_images(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((4, 2, 3), np.float32))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: .*float32"):
        idx_images(tmp_path)


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="train, test; got 'validation'"):
        idx_images(tmp_path, "validation")
