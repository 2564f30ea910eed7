"""Ranks see together what one process would, whatever their number, and wherever a run is taken up."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion.training import resolve_config
from sde_diffusion.training.batches import Order, batches
from sde_diffusion.training.distributed import Ranks

CPU = torch.device("cpu")


def order(size=10, seed=0, first_step=0, steps=7, batch_size=4, rank=0, ranks=1):
    return list(Order(size, seed, first_step, steps, batch_size, Ranks(rank, ranks)))


@given(size=st.integers(1, 12), ranks=st.integers(1, 4), share=st.integers(1, 3), first_step=st.integers(0, 7))
def test_the_batches_of_ranks_are_parts_of_that_of_one(size, ranks, share, first_step):
    options = {"size": size, "batch_size": ranks * share}
    whole = order(**options)
    parts = [order(**options, first_step=first_step, rank=rank, ranks=ranks) for rank in range(ranks)]
    joined = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert joined == whole[first_step:]
    assert len(Order(size, 0, first_step, 7, ranks * share, Ranks())) == 7 - first_step


@given(size=st.integers(1, 12), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size, batch_size, seed):
    indices = list(itertools.chain(*order(size, seed, batch_size=batch_size, steps=30)))
    assert len(indices) == 30 * batch_size
    epochs = [indices[first : first + size] for first in range(0, len(indices), size)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(size))
    assert max(Counter(epochs[-1]).values()) == 1


def test_permutations_are_of_seed_and_epoch():
    one, again, other = (order(50, seed, batch_size=50, steps=3) for seed in (0, 0, 1))
    assert one == again
    assert len({tuple(epoch) for epoch in [*one, *other]}) == 6


def options(**train):
    return resolve_config({"seed": 3, "train": {"steps": 5, "batch_size": 4, **train}})


def values(dataset, config, first_step=0, ranks=None, has_label=True):
    return list(batches(dataset, config, first_step, ranks or Ranks(), CPU, has_label))


@pytest.mark.parametrize("train", [{}, {"workers": 1, "prefetch": 1}, {"workers": 2, "prefetch": 3}])
def test_examples_come_with_their_labels_in_that_order(images, train):
    found = values(images, options(**train))
    expected = order(len(images), 3, steps=5)
    assert len(found) == len(expected)
    for (pictures, labels), indices in zip(found, expected, strict=True):
        assert pictures.dtype == torch.uint8
        assert torch.equal(pictures, images.values[indices])
        assert torch.equal(labels, torch.tensor(indices) % 3)


def test_a_rank_fetches_its_share_of_what_remains(images):
    whole = values(images, options())
    shares = [values(images, options(), 2, Ranks(rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    for (pictures, labels), *parts in zip(whole[2:], *shares, strict=True):
        assert all(len(part) == 2 for part, _ in parts)
        assert torch.equal(torch.cat([part for part, _ in parts]), pictures)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


def test_labels_are_left_out_where_nothing_asks_for_them(images):
    assert all(label is None for _, label in values(images, options(), has_label=False))


def test_accumulation_leaves_a_batch_whole(images):
    one, other = (values(images, options(accumulation=parts)) for parts in (1, 4))
    for (pictures, _), (others, _) in zip(one, other, strict=True):
        assert np.array_equal(pictures, others)


@pytest.mark.parametrize("step", [0, 2])
def test_the_step_of_a_value_that_is_not_finite_is_named(step):
    class Points:
        def __init__(self):
            self.fetched = 0

        def __len__(self):
            return 20

        def __getitem__(self, index):
            self.fetched += 1
            return torch.tensor([0.0, torch.inf if self.fetched == 4 * step + 1 else 1.0])

    found = batches(Points(), options(), 0, Ranks(), CPU, False)
    for _ in range(step):
        next(found)
    with pytest.raises(ValueError, match=f"dataset: a value in the batch of step {step} is NaN or infinite"):
        next(found)
