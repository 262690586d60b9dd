"""A training set that is split for the weights and for the architecture."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from lightning_optcore.nas.split_loader import split_training_loader


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_parts_of_the_training_set_share_no_sample(shuffle):
    data = [(torch.tensor([float(i)]), i) for i in range(50)]
    whole = DataLoader(data, batch_size=4, shuffle=shuffle, drop_last=True)
    weights, architecture = split_training_loader(whole, 0.4, 0, lambda: 0, lambda: 0)
    batches = iter(architecture)
    of_weights = [int(i) for batch in weights for i in batch[1]]
    of_architecture = [int(i) for _ in range(10) for i in next(batches)[1]]
    assert len(weights) == 7
    assert len(set(of_weights)) == 28
    assert len(set(of_architecture)) == 20
    assert not set(of_weights) & set(of_architecture)
    assert (of_weights == sorted(of_weights)) is not shuffle


def test_the_order_follows_from_the_seed_and_the_place():
    data = [(torch.tensor([float(i)]), i) for i in range(40)]

    def orders(seed, trained, stepped):
        weights, architecture = split_training_loader(
            DataLoader(data, batch_size=4, shuffle=True), 0.5, seed, lambda: trained, lambda: stepped
        )
        batches = iter(architecture)
        return [b[1].tolist() for b in weights], [next(batches)[1].tolist() for _ in range(8)]

    assert orders(0, 5, 0) == orders(0, 5, 0)
    assert orders(0, 5, 0)[0] != orders(0, 10, 0)[0]
    assert orders(0, 0, 0)[1] != orders(1, 0, 0)[1]
    # The third batch of one that began anew is the first of one that goes on after two.
    assert orders(0, 0, 0)[1][2:] == orders(0, 0, 2)[1][:6]


def test_data_that_cannot_be_split_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1])

    data = [(torch.zeros(1), 0)] * 16
    for given, message in [
        ([1, 2], "of type list cannot be split"),
        (DataLoader(Stream()), r"\(Stream\) cannot be split"),
        (DataLoader(data, sampler=WeightedRandomSampler([1.0] * 16, 16)), "WeightedRandomSampler cannot be split"),
        (
            DataLoader(data, batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(data), 2, False)),
            "batches made by batch_size and shuffle",
        ),
        (DataLoader(data, batch_size=12), r"validation_fraction=0\.5: 16 samples leave less than one batch of 12"),
    ]:
        with pytest.raises(MisconfigurationException, match=message):
            split_training_loader(given, 0.5, 0, lambda: 0, lambda: 0)
