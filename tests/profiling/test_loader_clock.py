from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_optcore.profiling.loader_clock import LoaderClock, LoaderTimes


class Slow(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.002)
        return torch.zeros(3)


def slow_collate(samples):
    end = time.thread_time() + 0.01
    while time.thread_time() < end:
        pass
    return default_collate(samples)


@pytest.mark.parametrize(("num_workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
def test_collating_is_told_from_fetching_wherever_it_happens(num_workers, context):
    loader = DataLoader(
        Slow(), batch_size=4, collate_fn=slow_collate, num_workers=num_workers,
        multiprocessing_context=context,
    )  # fmt: skip
    clock = LoaderClock()
    clock.watch(loader)
    assert len(list(loader)) == 10
    times = clock.times()
    assert times.batches == 10
    assert times.collate_cpu == pytest.approx(0.1, rel=0.3)
    assert times.collate_wall >= times.collate_cpu * 0.9
    # Each worker's first fetch comes before its clock starts.
    assert times.fetch_wall >= 0.9 * 0.008 * (10 - max(num_workers, 1))
    assert times.fetch_cpu < 0.5 * times.fetch_wall
    clock.remove()
    assert loader.collate_fn is slow_collate


def test_what_is_no_loader_is_left_alone():
    clock = LoaderClock()
    clock.watch([1, 2, 3])
    clock.watch(None)
    assert clock.times() == LoaderTimes()
    clock.remove()


def test_a_loader_without_batching_is_timed_too():
    loader = DataLoader(Slow(), batch_size=None)
    clock = LoaderClock()
    clock.watch(loader)
    assert len(list(loader)) == 40
    assert clock.times().batches == 40
    clock.remove()
