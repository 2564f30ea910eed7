import numpy as np
import pytest
import torch

from sde_diffusion.data import DataInfo, fashion_mnist, write_idx


@pytest.fixture(autouse=True)
def _no_folder_from_outside(monkeypatch):
    monkeypatch.delenv("SDE_DIFFUSION_DATA", raising=False)


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
def test_the_slice_in_the_package(split, count):
    dataset = fashion_mnist(split)
    assert dataset.values.shape == (count, 1, 28, 28)
    assert dataset.values.dtype == torch.uint8
    assert (dataset.classes, dataset.data, dataset.name) == (10, DataInfo(), "fashion_mnist")
    assert dataset.labels is not None
    # Class counts of a random slice are binomial; five standard deviations.
    per_class = torch.bincount(dataset.labels, minlength=10)
    assert (per_class - count / 10).abs().max() < 5 * (count * 0.1 * 0.9) ** 0.5
    # The whole training set's mean is 72.94, and its images' means have standard deviation 32.1.
    assert abs(dataset.values.double().mean() - 72.94) < 5 * 32.1 / count**0.5


def test_the_first_labels_are_the_original_ones():
    train, test = fashion_mnist("train"), fashion_mnist("test")
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]


def write_files(folder):
    for prefix, count in (("train", 3), ("t10k", 2)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", np.full((count, 28, 28), 7, np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.zeros(count, np.uint8))


def test_a_folder_from_the_argument_or_the_environment(tmp_path, monkeypatch):
    write_files(tmp_path)
    assert len(fashion_mnist("train", tmp_path)) == 3
    monkeypatch.setenv("SDE_DIFFUSION_DATA", str(tmp_path))
    assert len(fashion_mnist("test")) == 2
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        fashion_mnist("test", tmp_path / "elsewhere")


def test_unknown_split():
    with pytest.raises(ValueError, match="train, test"):
        fashion_mnist("valid")
