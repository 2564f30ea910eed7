import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sde_diffusion.data import ArrayDataset, DataInfo, DataSource, WrappedDataset, as_dataset


def byte_images(count=6, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, 6, 5), generator=generator, dtype=torch.uint8)


class UserDataset(Dataset):
    """A list of items, with whatever attributes a test wants."""

    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_array_dataset_serves_values_and_labels():
    values, labels = byte_images(), torch.tensor([0, 2, 1, 0, 2, 1], dtype=torch.int32)
    dataset = ArrayDataset(values, labels, name="tiny")
    assert isinstance(dataset, DataSource)
    assert (len(dataset), dataset.data_shape, dataset.classes, dataset.data) == (6, (3, 6, 5), 3, DataInfo())
    value, label = dataset[4]
    assert torch.equal(value, values[4])
    assert (label.item(), label.dtype) == (2, torch.int64)


@pytest.mark.parametrize("source", ["array", "wrapped"])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_loader_batches_items(source, labelled):
    values, labels = byte_images(), torch.tensor([0, 2, 1, 0, 2, 1])
    dataset: Dataset
    if source == "array":
        dataset = ArrayDataset(values, labels if labelled else None)
    else:
        dataset = WrappedDataset(UserDataset(list(zip(values, labels, strict=True)), classes=3 * labelled))
    batches = list(DataLoader(dataset, batch_size=4, sampler=[5, 0, 3, 2, 1, 4]))
    if labelled:
        assert torch.equal(torch.cat([batch[1] for batch in batches]), labels[[5, 0, 3, 2, 1, 4]])
        batches = [batch[0] for batch in batches]
    assert [len(batch) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat(batches), values[[5, 0, 3, 2, 1, 4]])


def test_codes_are_stored_in_the_smallest_type():
    assert ArrayDataset(torch.full((2, 3), 31), data=DataInfo(bits=5)).values.dtype == torch.uint8
    deep = ArrayDataset(torch.full((2, 3), 4095, dtype=torch.uint16), data=DataInfo(bits=12))
    assert deep.values.dtype == torch.int32
    assert deep.values.max() == 4095


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_keep_their_type(dtype):
    dataset = ArrayDataset(torch.ones(3, 2, dtype=dtype))
    assert dataset.values.dtype == dtype
    assert dataset.data.bits is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_value_that_is_not_finite_is_named(bad):
    values = torch.zeros(9, 2)
    values[4, 1] = values[7, 0] = bad
    with pytest.raises(ValueError, match=r"finite; .* index 4"):
        ArrayDataset(values)


@pytest.mark.parametrize(
    ("values", "data", "message"),
    [
        (torch.tensor([[0], [32]], dtype=torch.uint8), DataInfo(bits=5), r"\[0, 32\).* index 1"),
        (torch.tensor([[0], [3], [-1]]), DataInfo(bits=5), r"\[0, 32\).* index 2"),
        (torch.zeros(2, 3), DataInfo(bits=8), r"DataInfo\(bits=None\)"),
        (torch.zeros(2, 3, dtype=torch.uint8), DataInfo(bits=None), "data.bits=None"),
        (torch.zeros(2, 3, dtype=torch.int64), None, "bit depth"),
        (torch.zeros(2, 3, dtype=torch.bool), DataInfo(), "torch.bool"),
        (torch.zeros(0, 3), None, r"\(0, 3\)"),
        (torch.zeros(4), None, r"\(4,\)"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, data, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataset(values, data=data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"shape \(6,\)"),
        (torch.zeros(6), "integers"),
        (torch.tensor([0, 1, 2, 0, -1, 0]), "negative"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataset(byte_images(), labels)


def test_arrays_become_datasets():
    grey = as_dataset(np.zeros((3, 8, 9), np.uint8))
    assert (grey.data_shape, grey.data.bits) == ((1, 8, 9), 8)
    points = as_dataset(np.ones((3, 2), ">f4"))
    assert (points.data_shape, points.data.bits) == ((2,), None)
    assert torch.equal(torch.as_tensor(points[2]), torch.ones(2))
    assert as_dataset(torch.zeros(3, 8, 9)).data_shape == (8, 9)
    assert as_dataset(byte_images(), DataInfo(low=0.0)).data.low == 0


def test_channels_last_is_refused_not_guessed():
    with pytest.raises(ValueError, match="permute"):
        as_dataset(byte_images().permute(0, 2, 3, 1))
    assert as_dataset(torch.zeros(2, 3, 8, 4, dtype=torch.uint8)).data_shape == (3, 8, 4)


def test_a_dataset_is_returned_as_it_is():
    dataset = ArrayDataset(byte_images())
    assert as_dataset(dataset) is dataset
    with pytest.raises(ValueError, match="contradicts"):
        as_dataset(dataset, DataInfo(low=0.0))


def test_a_users_dataset_is_wrapped():
    values, labels = byte_images(), torch.arange(6) % 2
    named = as_dataset(UserDataset([(v, int(i)) for v, i in zip(values, labels, strict=True)], classes=["a", "b"]))
    assert (named.data_shape, named.classes, named.data.bits, len(named)) == ((3, 6, 5), 2, 8, 6)
    value, label = named[3]
    assert torch.equal(value, values[3])
    assert label == 1
    assert as_dataset(TensorDataset(torch.zeros(4, 2))).data_shape == (2,)
    assert as_dataset(UserDataset(list(values), data=DataInfo(low=0.0))).data.low == 0


def test_labels_without_a_number_of_classes_are_left_out():
    dataset = as_dataset(TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)))
    assert dataset.classes == 0
    assert torch.equal(torch.as_tensor(dataset[1]), torch.zeros(2))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3), r"item 1 has shape \(3,\)"),
        (torch.tensor([0.0, float("nan")]), "index 1"),
        ("text", "item 1 of UserDataset must be a tensor"),
    ],
)
def test_a_bad_item_is_named_when_it_is_fetched(item, message):
    dataset = as_dataset(UserDataset([torch.zeros(2), item]))
    with pytest.raises(ValueError, match=message):
        dataset[1]


def test_a_bad_label_is_named():
    dataset = as_dataset(UserDataset([(torch.zeros(2), 0), (torch.zeros(2), 5)], classes=2))
    with pytest.raises(ValueError, match=r"item 1 has label 5.*\[0, 2\)"):
        dataset[1]


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="empty"):
        as_dataset(UserDataset([]))


@pytest.mark.parametrize("source", [(torch.zeros(3, 2), torch.zeros(3)), "folder", None, iter([1])])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match=type(source).__name__):
        as_dataset(source)
