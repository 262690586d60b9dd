"""One training set for two who learn: a part for the weights, and one for the architecture."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, Subset


def split_training_loader(
    loader: Any, fraction: float, seed: int, trained: Callable[[], int], stepped: Callable[[], int]
) -> tuple[DataLoader, DataLoader]:
    """Split a training loader into one for the weights and one, without end, for the architecture.

    The order of either is a function of the seed and of how many batches there were, so that a resumed training sees
    what an uninterrupted one would.

    Args:
        loader: Of a data set with a length.
        fraction: Of the samples, for the architecture.
        seed: Of the split and of the orders.
        trained: How many batches the weights saw; asked when an epoch begins.
        stepped: How many the architecture saw; asked once.

    Raises:
        MisconfigurationException: If the loader cannot be split, or one part would be less than a batch.
    """
    name = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(f"a training loader of type {name} cannot be split: expected a DataLoader")
    if not hasattr(loader.dataset, "__len__") or type(loader.batch_sampler) is not BatchSampler:
        raise MisconfigurationException(
            f"the training data ({type(loader.dataset).__name__}) cannot be split for the architecture: expected a "
            "data set with a length, and batches made by batch_size and shuffle"
        )
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise MisconfigurationException(
            f"a training loader with a {type(loader.sampler).__name__} cannot be split: expected shuffle=true or false"
        )
    count = len(loader.dataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    size = int(loader.batch_size or 1)
    at = count - round(count * fraction)
    if min(at, count - at) < size:
        raise MisconfigurationException(
            f"validation_fraction={fraction}: {count} samples leave less than one batch of {size} for either part"
        )
    weights, architecture = (Subset(loader.dataset, sorted(part)) for part in (order[:at], order[at:]))
    shared = {
        "num_workers": loader.num_workers,
        "prefetch_factor": loader.prefetch_factor,
        "timeout": loader.timeout,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "worker_init_fn": loader.worker_init_fn,
        "persistent_workers": loader.persistent_workers,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    shuffle = isinstance(loader.sampler, RandomSampler)
    # A generator of its own: beginning an epoch leaves the global one as it is.
    return (
        DataLoader(
            weights,
            batch_size=size,
            sampler=_Shuffled(len(weights), seed, trained) if shuffle else SequentialSampler(weights),
            drop_last=loader.drop_last,
            generator=torch.Generator().manual_seed(seed),
            **shared,
        ),
        DataLoader(
            architecture,
            batch_sampler=_Endless(len(architecture), size, seed, stepped),
            generator=torch.Generator().manual_seed(seed),
            **shared,
        ),
    )


class _Shuffled(Sampler[int]):
    """An epoch's order, which follows from how many batches there were before it."""

    def __init__(self, count: int, seed: int, before: Callable[[], int]) -> None:
        self.count, self.seed, self.before = count, seed, before

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(_order(self.count, f"weights {self.seed} {self.before()}"))


class _Endless(Sampler[list[int]]):
    """Whole batches without end, one pass after the other, from a given one on."""

    def __init__(self, count: int, size: int, seed: int, before: Callable[[], int]) -> None:
        self.count, self.size, self.seed, self.before = count, size, seed, before

    def __iter__(self) -> Iterator[list[int]]:
        step, of_a_pass = self.before(), self.count // self.size
        while True:
            turn, at = divmod(step, of_a_pass)
            order = _order(self.count, f"architecture {self.seed} {turn}")
            for i in range(at, of_a_pass):
                yield order[i * self.size : (i + 1) * self.size]
            step = (turn + 1) * of_a_pass


def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
