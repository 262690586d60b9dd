"""What a DataLoader's time goes into, measured where the batches are made: in its workers, if it has any.

The collate function is the one part of a loader that can be replaced after it was built. Between two of its calls a
worker fetches samples, or waits because its queue is full; the CPU time between them is the fetching's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

_FIELDS = ("calls", "collate_wall", "collate_cpu", "fetch_wall", "fetch_cpu")
# Workers share no lock: each writes its own row. Rows of more workers than these are shared.
_MAX_WORKERS = 64


class TimedCollate:
    """A collate function that adds up its own time, in memory that all workers share.

    Args:
        collate: The function that does the work.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.nanoseconds = torch.zeros(_MAX_WORKERS, len(_FIELDS), dtype=torch.int64).share_memory_()
        self._last: tuple[int, int] | None = None
        self._row: Any = None

    def __call__(self, samples: Any) -> Any:
        """Collate, and note the time."""
        start, cpu = perf_counter_ns(), thread_time_ns()
        if self._row is None:
            worker = torch.utils.data.get_worker_info()
            self._row = self.nanoseconds[(worker.id if worker is not None else 0) % _MAX_WORKERS].numpy()
            # A copy of this object in a worker must not go on from its parent's clock.
            self._last = None
        row = self._row
        if self._last is not None:
            row[3] += start - self._last[0]
            row[4] += cpu - self._last[1]
        batch = self.collate(samples)
        end, cpu_end = perf_counter_ns(), thread_time_ns()
        row[0] += 1
        row[1] += end - start
        row[2] += cpu_end - cpu
        self._last = (end, cpu_end)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_row": None, "_last": None}


@dataclass(frozen=True)
class LoaderTimes:
    """Seconds that went into the batches of one or more loaders, added over their workers.

    Args:
        batches: Batches that were made.
        collate_wall: Seconds in the collate function.
        collate_cpu: CPU seconds of them.
        fetch_wall: Seconds between two calls of it: fetching samples, or waiting for room in the queue.
        fetch_cpu: CPU seconds of them.
    """

    batches: int = 0
    collate_wall: float = 0.0
    collate_cpu: float = 0.0
    fetch_wall: float = 0.0
    fetch_cpu: float = 0.0

    @classmethod
    def of(cls, table: Tensor) -> LoaderTimes:
        """Add up the rows of a clock."""
        total = table.sum(dim=0).tolist()
        return cls(int(total[0]), *(value / 1e9 for value in total[1:]))


class LoaderClock:
    """Times the loaders that it is shown, until it is taken off."""

    def __init__(self) -> None:
        self.loaders: list[DataLoader[Any]] = []
        self._clocks: list[TimedCollate] = []

    def watch(self, loader: Any) -> None:
        """Time a loader from its next iterator on; what is no DataLoader is left alone."""
        if not isinstance(loader, DataLoader) or any(loader is known for known in self.loaders):
            return
        self.loaders.append(loader)
        collate = getattr(loader, "collate_fn", None)
        if callable(collate) and not isinstance(collate, TimedCollate):
            clock = TimedCollate(collate)
            loader.collate_fn = clock
            self._clocks.append(clock)

    def times(self) -> LoaderTimes:
        """Return what was added up so far."""
        if not self._clocks:
            return LoaderTimes()
        return LoaderTimes.of(torch.stack([clock.nanoseconds for clock in self._clocks]).flatten(0, 1))

    def remove(self) -> None:
        """Give the loaders their own functions back."""
        for loader in self.loaders:
            if isinstance(loader.collate_fn, TimedCollate):
                loader.collate_fn = loader.collate_fn.collate
