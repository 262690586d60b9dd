"""Where the time of each rank goes, and which rank keeps the others waiting.

A collective ends on all ranks at once, so that whole steps take as long everywhere. What tells ranks apart is what each
does before it: waiting for data, and computing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal["data", "compute", "link"]

# A rank is a straggler whose own time is so many times that of the others, and is so much of a step longer.
_FACTOR, _SHARE = 1.25, 0.1
# The link is the cause where ranks are alike, and spend so much of a step, and so many milliseconds, waiting.
_LINK_SHARE, _LINK_MS = 0.3, 3.0


@dataclass(frozen=True)
class RankTimes:
    """Milliseconds of one rank, the mean over steps.

    Args:
        rank: Its number.
        host: Its host.
        data_ms: From the end of a step to the next batch.
        compute_ms: Forward and backward passes, until the gradients are there.
        step_ms: Whole steps.
    """

    rank: int
    host: str
    data_ms: float
    compute_ms: float
    step_ms: float

    @property
    def own_ms(self) -> float:
        """What the rank does without the others."""
        return self.data_ms + self.compute_ms


@dataclass(frozen=True)
class Straggler:
    """What keeps ranks waiting.

    Args:
        rank: The slowest rank; ``None`` where it is the link.
        cause: Of its slowness.
        message: The same in words, with the figures.
    """

    rank: int | None
    cause: Cause
    message: str


def straggler_of(times: Sequence[RankTimes]) -> Straggler | None:
    """Return what keeps ranks waiting, if anything does.

    Example:
        >>> found = straggler_of([RankTimes(0, "a", 1.0, 50.0, 100.0), RankTimes(1, "b", 40.0, 55.0, 100.0)])
        >>> found.rank, found.cause
        (1, 'data')
    """
    slowest = max(times, key=lambda one: one.own_ms)
    others = [one for one in times if one is not slowest]
    usual = statistics.median(one.own_ms for one in others)
    if slowest.own_ms > _FACTOR * usual and slowest.own_ms - usual > _SHARE * slowest.step_ms:
        more_data = slowest.data_ms - statistics.median(one.data_ms for one in others)
        more_compute = slowest.compute_ms - statistics.median(one.compute_ms for one in others)
        cause: Cause = "data" if more_data > more_compute else "compute"
        advice = {
            "data": f"it waits {more_data:.3g} ms longer for its data: give its loader workers, or look at its disk",
            "compute": f"it computes {more_compute:.3g} ms longer: look for other work on its host, or longer batches",
        }[cause]
        message = (
            f"rank {slowest.rank} ({slowest.host}) keeps the others waiting: it needs {slowest.own_ms:.3g} ms a step "
            f"by itself, and they {usual:.3g} ms; {advice}"
        )
        return Straggler(slowest.rank, cause, message)
    waiting = slowest.step_ms - slowest.own_ms
    if waiting > max(_LINK_SHARE * slowest.step_ms, _LINK_MS):
        message = (
            f"ranks wait {waiting:.3g} of {slowest.step_ms:.3g} ms a step for the link between them; "
            "communication=auto chooses what it carries"
        )
        return Straggler(None, "link", message)
    return None


class StepClock:
    """Adds up what this rank does by itself; every call is a reading of the clock."""

    def __init__(self) -> None:
        self.data = self.compute = 0.0
        self.steps = 0
        self._begun = self._now = time.perf_counter()
        self._computing = False

    def batch_arrived(self) -> None:
        """Say that a batch is there, before the forward pass."""
        now = time.perf_counter()
        self.data += now - self._now
        self._now, self._computing = now, True

    def computed(self) -> None:
        """Say that gradients are there, before the others are waited for."""
        if self._computing:
            now = time.perf_counter()
            self.compute += now - self._now
            self._now, self._computing = now, False

    def step_ended(self) -> None:
        """Say that the optimizer's step was made."""
        self.steps += 1
        self._now = time.perf_counter()

    def leave_out(self, waits: Callable[[], object]) -> None:
        """Call what waits for other ranks between two steps; the data did not take that time."""
        start = time.perf_counter()
        try:
            waits()
        finally:
            self._now += time.perf_counter() - start

    def means(self) -> tuple[float, float, float]:
        """Return the milliseconds of data, compute and whole steps since the last call, and begin anew."""
        now = time.perf_counter()
        per_step = 1e3 / max(1, self.steps)
        means = self.data * per_step, self.compute * per_step, (now - self._begun) * per_step
        self.data = self.compute = 0.0
        self.steps, self._begun = 0, now
        return means

    def pause(self) -> None:
        """Leave out what passed since the last step, as a validation."""
        now = time.perf_counter()
        self._begun += now - self._now
        self._now = now
