"""Time of the phases on a device that works through a queue, without ever waiting for it.

An event is put into the queue wherever a phase begins or ends; some steps later, when the device has passed it, the
time between two of them is read. Nothing synchronizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


class Event(Protocol):
    """What is needed of ``torch.cuda.Event(enable_timing=True)``."""

    def record(self) -> None:
        """Put the event into the queue."""

    def query(self) -> bool:
        """Return whether the device has passed it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds to a later event."""


class DeviceClock:
    """Adds up milliseconds by slot between events.

    Args:
        make_event: Makes an event; they are used again.
        most_pending: Events in flight from which on edges are left out; ``skipped`` counts them.
    """

    def __init__(self, make_event: Callable[[], Event], most_pending: int = 1024) -> None:
        self.milliseconds: dict[int, float] = {}
        self.skipped = 0
        self._make_event = make_event
        self._most_pending = most_pending
        self._pending: deque[tuple[Event, int]] = deque()
        self._free: list[Event] = []

    def edge(self, slot: int) -> None:
        """Note that what the device is given from here on belongs to ``slot``."""
        if len(self._pending) >= self._most_pending:
            self.skipped += 1
            return
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        self._pending.append((event, slot))

    def collect(self) -> None:
        """Read the events that the device has passed."""
        pending = self._pending
        while len(pending) > 1 and pending[1][0].query():
            event, slot = pending.popleft()
            self.milliseconds[slot] = self.milliseconds.get(slot, 0.0) + event.elapsed_time(pending[0][0])
            self._free.append(event)
