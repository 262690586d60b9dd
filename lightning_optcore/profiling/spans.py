"""The contexts of actions: whose time runs while one is open.

Some ten are entered in every step, so that each does what it has to and no more.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING, Any

from lightning_optcore.profiling.slots import FETCH

if TYPE_CHECKING:
    from lightning_optcore.profiling.collector import Collector

# The pattern of which steps are detailed repeats, and is of a prime length: what a user does every so many steps meets
# all of it.
PATTERN, DETAILED_STEPS = 251, 31


class Now:
    """Whose time is running, and since when."""

    __slots__ = ("since", "slot")

    def __init__(self, slot: int, since: int) -> None:
        self.slot = slot
        self.since = since


class Span:
    """Times what runs inside it, less what other spans inside it take.

    It runs some ten times a step: what it needs stands in slots, not in the collector's dictionary.
    """

    __slots__ = ("_collector", "_now", "_pop", "_push", "_slot", "_totals")

    def __init__(self, collector: Collector, slot: int) -> None:
        self._collector = collector
        self._now = collector.now
        self._totals = collector.totals
        self._push = collector.stack.append
        self._pop = collector.stack.pop
        self._slot = slot

    def __enter__(self) -> None:
        time = perf_counter_ns()
        now = self._now
        current = now.slot
        self._totals[current] += time - now.since
        self._push(current)
        now.slot = self._slot
        now.since = time

    def __exit__(self, *_: object) -> None:
        now = self._now
        # An action that was left without being opened must not close somebody else's.
        if now.slot == self._slot and self._collector.stack:
            time = perf_counter_ns()
            self._totals[now.slot] += time - now.since
            now.since = time
            now.slot = self._pop()


class Part(Span):
    """A span that is not asked for by an action, so that what is open has to be looked at."""

    __slots__ = ()

    def __enter__(self) -> None:
        if self._collector.lookup is not NOTHING:
            super().__enter__()


class DeviceSpan(Span):
    """Times the device's part too."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._collector.device.edge(self._slot)  # type: ignore[union-attr]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._collector.device.edge(self._now.slot)  # type: ignore[union-attr]


class Fetch(Span):
    """The wait for the next batch: a step ends where it begins."""

    __slots__ = ()

    def __enter__(self) -> None:
        time = perf_counter_ns()
        now = self._now
        self._totals[now.slot] += time - now.since
        now.since = time
        self._collector.mark(time)
        # The step that begins may be none of the detailed ones.
        if self._collector.detailed:
            self._push(now.slot)
            now.slot = self._slot

    def __exit__(self, *_: object) -> None:
        collector = self._collector
        if self._now.slot == FETCH:
            # Of the detailed steps, in the name of the others.
            stands_for = PATTERN / DETAILED_STEPS if collector.short_steps else 1
            collector.data_cpu += round((thread_time_ns() - collector.cpu_at_fetch) * stands_for)
        super().__exit__()


class Counted:
    """A wait for a batch that is not timed: all that is done in a step that is not detailed."""

    __slots__ = ("_collector", "_fetch", "_now")

    def __init__(self, collector: Collector, fetch: Fetch) -> None:
        self._collector = collector
        self._now = collector.now
        self._fetch = fetch

    def __enter__(self) -> None:
        collector = self._collector
        if collector.steps_to_count > 1:
            collector.steps_to_count -= 1
            collector.steps += 1
            if collector.samples_apart and perf_counter_ns() >= collector.sampler.due:  # type: ignore[union-attr]
                collector.sampler.tick()  # type: ignore[union-attr]
        else:
            self._fetch.__enter__()

    def __exit__(self, *_: object) -> None:
        if self._now.slot == FETCH:
            self._fetch.__exit__()


class Whole(Span):
    """A span that has no parts."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._collector.lookup = NOTHING

    def __exit__(self, *_: object) -> None:
        self._collector.lookup = self._collector.of_step
        super().__exit__()


class Both:
    """The user's profiler around the same action."""

    __slots__ = ("_span", "_theirs")

    def __init__(self, theirs: AbstractContextManager[Any], span: AbstractContextManager[Any]) -> None:
        self._theirs = theirs
        self._span = span

    def __enter__(self) -> Any:
        name = self._theirs.__enter__()
        self._span.__enter__()
        return name

    def __exit__(self, *exception: Any) -> Any:
        self._span.__exit__(*exception)
        return self._theirs.__exit__(*exception)


class Untimed:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Nothing(dict[str, Any]):
    """Knows a context for every action, and it does nothing."""

    def get(self, key: str, default: Any = None) -> Any:
        return UNTIMED


UNTIMED = Untimed()
NOTHING = Nothing()
IN_DETAIL = bytes(i in random.Random(0).sample(range(PATTERN), DETAILED_STEPS) for i in range(PATTERN))
# How many steps it is from one to the next detailed one.
UNDETAILED = bytes((IN_DETAIL * 2).index(1, i + 1) - i for i in range(PATTERN))
