"""Samples of the system: this process, its workers and the machine, ten times a second.

To wake a thread costs more than what it then reads. So the training thread takes the samples itself, between two steps,
whenever one is due, as raw as they come; the sampler's own thread wakes once a second, in a long run once in three, to
make rows of them and to read what is read seldom. It only takes over where the steps are too long to keep the interval.

Ten times a second there is the CPU time of the process; its workers, memory, the machine and its pressures are read
ever more seldom as a run goes on, down to once in .5, 2, 5 and 15 seconds. When they were read stands beside them, so
that rates are not those of figures that had grown old.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter, perf_counter_ns, process_time, sleep
from typing import Any

import numpy as np

from lightning_optcore.profiling.system_readers import COLUMNS, Reader, new_row, system_readers

# What is dear to read, or moves slowly: at first, and in the long run.
_SELDOM_SECONDS, _MOST_SELDOM_SECONDS, _SHARE = 1.0, 3.0, 0.2
_NEVER, _WIDTH = 1 << 62, len(COLUMNS)


class Sampler:
    """Samples the system, from a thread of its own and from whoever calls :meth:`tick`.

    Args:
        interval: Seconds between two samples.
        capacity: Samples that are kept; older ones are overwritten.
        readers: Where the figures come from; what this machine has by default.
        on_sample: Called in the sampler's thread after each sample.

    Example:
        >>> sampler = Sampler(interval=0.01)
        >>> sampler.start(); sampler.stop()
        >>> bool(sampler.table()["rss"][0] > 0)
        True
    """

    def __init__(
        self,
        interval: float = 0.1,
        capacity: int = 6000,
        readers: list[Reader] | None = None,
        on_sample: Callable[[], None] | None = None,
    ) -> None:
        self.interval = interval
        self._interval_ns = round(interval * 1e9)
        self.capacity = capacity
        self.samples = 0
        self.dropped = 0
        # perf_counter_ns() from which on a tick samples.
        self.due = _NEVER
        self.failures: dict[str, str] = {}
        self._readers = readers
        self._on_sample = on_sample
        # Between two steps the caches are the model's, and every object that is touched costs a miss: a tick takes
        # things as raw as they come, and the sampler's thread makes rows of them.
        self._waiting: deque[tuple[int, float, list[Any] | None]] = deque()
        # perf_counter_ns() from which on some reader wants to be asked for more than the process's CPU time.
        self._glance_due = 0.0
        self._row = new_row()
        self._values = memoryview(self._row)
        self._kept = bytearray(8 * len(COLUMNS) * capacity)
        self._rows = memoryview(self._kept).cast("d")
        self._relaxed = False
        self._lock = threading.Lock()
        # The thread that may sample; one that was stopped finds another here, or none, and ends.
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether samples are being taken."""
        return self._thread is not None

    def start(self) -> None:
        """Begin, or go on after a stop."""
        if self._thread is not None:
            return
        if self._readers is None:
            self._readers = system_readers()
        # While it was off nothing was dropped.
        self._row[0] = perf_counter()
        self._sample(seldom=True)
        self._thread = threading.Thread(target=self._run, name="optcore-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample; the thread ends by itself when it wakes."""
        with self._lock:
            if self._thread is None:
                return
            self._thread = None
            self._sample(seldom=True, last=True)
            self.due = _NEVER

    def tick(self) -> None:
        """Sample; to be called when ``due`` has passed."""
        now = perf_counter_ns()
        # A little late, as not every step asks, is no reason for fewer samples.
        self.due = now + self._interval_ns - min(max(now - self.due, 0), self._interval_ns // 2)
        self._waiting.append((now, process_time(), self._glances(now) if now >= self._glance_due else None))

    def relax(self) -> None:
        """Leave the interval to those who call :meth:`tick`, as long as they keep it."""
        self._relaxed = True

    def close(self) -> None:
        """Stop, and close the files."""
        self.stop()
        with self._lock:
            for reader in self._readers or []:
                reader.close()
            self._readers = None

    def table(self) -> dict[str, np.ndarray]:
        """Return the samples that are kept, oldest first, by column."""
        with self._lock:
            self._write_waiting()
        rows = np.frombuffer(self._kept, dtype=np.float64).reshape(self.capacity, -1)
        if self.samples <= self.capacity:
            rows = rows[: self.samples].copy()
        else:
            rows = np.roll(rows, -(self.samples % self.capacity), axis=0)
        return {name: rows[:, i] for i, name in enumerate(COLUMNS)}

    def _run(self) -> None:
        me = threading.current_thread()
        began = last_seldom = perf_counter()
        pause = self.interval
        while True:
            # An Event to wait on would end the thread sooner, and costs twice as much each time.
            sleep(pause)
            with self._lock:
                if self._thread is not me:
                    return
                self._write_waiting()
                now = perf_counter()
                kept = self._relaxed and now - self._row[0] < 2 * self.interval
                every = min(max(_SELDOM_SECONDS, _SHARE * (now - began)), _MOST_SELDOM_SECONDS)
                seldom = now - last_seldom >= every * 0.99
                if seldom or not kept:
                    self._sample(seldom)
                if seldom:
                    last_seldom = now
                pause = max(every, self.interval) if kept else self.interval
            if self._on_sample is not None:
                self._on_sample()

    def _sample(self, seldom: bool, last: bool = False) -> None:
        self._write_waiting()
        now = perf_counter_ns()
        self.due = now + self._interval_ns
        if not self._fill(now, process_time(), self._glances(now)):
            return
        for reader in self._readers or () if seldom else ():
            try:
                reader.seldom(self._row, last)
            except Exception as error:
                self._failed(reader, error)
        self._ask_readers()
        self._keep()

    def _glances(self, now: int) -> list[Any]:
        glances = []
        for reader in self._readers or ():
            try:
                glances.append(reader.glance(now) if now >= reader.due else None)
            except Exception as error:
                self._failed(reader, error)
                glances.append(None)
        self._ask_readers()
        return glances

    def _ask_readers(self) -> None:
        self._glance_due = min((reader.due for reader in self._readers or ()), default=_NEVER)

    def _write_waiting(self) -> None:
        while self._waiting:
            if self._fill(*self._waiting.popleft()):
                self._keep()

    def _fill(self, now: int, cpu: float, glances: list[Any] | None) -> bool:
        """Write a sample into the row; return whether it is a new one."""
        row, time = self._row, now / 1e9
        if self.samples and time <= row[0]:
            return False  # the sampler's thread has just taken one itself
        if self.samples and time - row[0] >= 2 * self.interval:
            # A thread that gets no core in time, or steps that are long: what was left out is counted.
            self.dropped += int((time - row[0]) / self.interval) - 1
        row[0], row[1] = time, cpu
        if glances is not None:
            for reader, glance in zip(self._readers or (), glances, strict=True):
                try:
                    if glance is not None:
                        reader.fill(row, glance)
                except Exception as error:
                    self._failed(reader, error)
        return True

    def _keep(self) -> None:
        first = self.samples % self.capacity * _WIDTH
        self._rows[first : first + _WIDTH] = self._values
        self.samples += 1

    def _failed(self, reader: Reader, error: Exception) -> None:
        # A GPU that falls off the bus, a /proc file that goes away: the run is worth more than a figure.
        self.failures.setdefault(type(reader).__name__, f"{type(error).__name__}: {error}")
