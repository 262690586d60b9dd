"""Exclusive time per phase, taken from the actions that Lightning's loops report to ``trainer.profiler``.

Every instant belongs to exactly one phase: the innermost action that is open. Once a step, the running totals are
copied into a buffer that was allocated at the start; nothing is analysed here. They are typed memory: between
two steps the caches are the model's, and every number that is an object of its own costs a miss.

To time what every step does costs some fifty microseconds. Where steps are short only one in eight, at random, is timed
in detail; the others are counted, and what happens in them now and then (callbacks, loggers, validation, checkpoints)
is timed. The rest of their time is divided as it is in the detailed ones, by :meth:`Collector.divided`.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from threading import get_ident
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from lightning_optcore.profiling.device_clock import DeviceClock
from lightning_optcore.profiling.phases import (
    BACKWARD,
    DATA_WAIT,
    FORWARD,
    LOGGING,
    OPTIMIZER,
    OTHER,
    PHASES,
    TRANSFER,
    phase_of,
)
from lightning_optcore.profiling.system import Sampler
from lightning_optcore.profiling.worst_steps import WorstSteps

# Columns before the slots: time, the step that begins, CPU time of the training thread while it waited for data.
TIME, STEP, DATA_CPU, HEAD = 0, 1, 2, 3
# One slot for each phase, three that are named below, the rest for the time of single callbacks.
NUM_SLOTS = 48
_ROW = HEAD + NUM_SLOTS
_OTHER = PHASES.index(OTHER)
ON_DEVICE = (TRANSFER, FORWARD, BACKWARD, OPTIMIZER)
# What every step does is timed in the detailed ones alone: these phases, calls of ``log``, and the wait for a batch.
_EVERY_STEP = (TRANSFER, FORWARD, BACKWARD, OPTIMIZER)
# Slots of the time of the others, of the calls, and of the wait.
UNSPLIT, _LOG, FETCH = range(len(PHASES), len(PHASES) + 3)
_DIVIDED = [*(PHASES.index(phase) for phase in _EVERY_STEP), _LOG, FETCH, _OTHER]
# Every so many steps it is seen how long they are. The pattern of which are detailed repeats, and is of a prime length:
# what a user does every so many steps meets all of it.
_LOOK_EVERY, _PATTERN, _DETAILED_STEPS = 64, 251, 31
# Nanoseconds of a step below which not all are detailed; and from which on the sampler cannot wait for those that are.
_SHORT, _SAMPLED_APART = 20_000_000, 1_500_000

# Actions of these modules do nothing unless they are overridden.
_EMPTY_HOOKS = (
    "lightning.pytorch.callbacks.callback",
    "lightning.pytorch.core.hooks",
    "lightning.pytorch.strategies.strategy",
    "pytorch_lightning.callbacks.callback",
    "pytorch_lightning.core.hooks",
    "pytorch_lightning.strategies.strategy",
)


class Collector(Profiler):
    """Stands in for the Trainer's profiler and forwards to it.

    Args:
        inner: The profiler that the user gave the Trainer.
        resolve: Returns the object whose hook an action runs, or ``None``; the actions of hooks that nobody
            overrode are then not timed.
        nested: Hooks that run inside an action of their own phase, and need not be timed again.
        capacity: Marks that are kept; older ones are overwritten. There is one where a detailed step begins or ends.
        device: Times the phases on a device that works through a queue.

    Example:
        >>> collector = Collector()
        >>> with collector.profile("[Strategy]SingleDeviceStrategy.backward"):
        ...     pass
        >>> collector.seconds()["backward"] > 0
        True
    """

    def __init__(
        self,
        inner: Profiler | None = None,
        resolve: Callable[[str], Any] | None = None,
        nested: Collection[str] = (),
        capacity: int = 8192,
        device: DeviceClock | None = None,
    ) -> None:
        self.inner = inner if inner is not None else PassThroughProfiler()
        self._forwards = type(self.inner).__name__ != "PassThroughProfiler"
        self._resolve = resolve
        self._nested = nested
        # The contexts of actions in steps that are detailed, in the others, and of now: one of both, or nothing.
        self._detailed: dict[str, AbstractContextManager[Any]] = {}
        self._undetailed: dict[str, AbstractContextManager[Any]] = {}
        self._of_step = self._lookup = self._detailed
        self._short_steps = False
        self._samples_apart = False
        # The step and the time at which it was last seen how long steps are.
        self._looked_step = self._looked_at = 0
        # Steps until the next one that is detailed.
        self._steps_to_count = 0
        self.slots: list[tuple[str, str | None]] = [(phase, None) for phase in (*PHASES, OTHER, LOGGING, DATA_WAIT)]
        self.totals = array("q", bytes(8 * NUM_SLOTS))
        self._used = memoryview(self.totals)[: len(self.slots)]
        self.stack: list[int] = []
        self._now = _Now(_OTHER, perf_counter_ns())
        self.thread = get_ident()
        self.capacity = capacity
        self.buffer = bytearray(8 * _ROW * capacity)
        self._marks = memoryview(self.buffer).cast("q")
        self.marks = self.steps = 0
        self.device = device
        # Takes a sample of the system between two steps, when one is due.
        self.sampler: Sampler | None = None
        # Records single steps in depth, when it was asked to.
        self.recorder: WorstSteps | None = None
        # What the slots have of the steps that it recorded and of its own work, in nanoseconds.
        self.recorded = [0] * NUM_SLOTS
        self._before_recorded: list[int] | None = None
        self.data_cpu = 0
        # Its value when the fetch began; the thread is asked in detailed steps alone.
        self._cpu_at_fetch = 0
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def profile(self, action_name: str) -> Any:
        """Return the context that times an action."""
        span = self._lookup.get(action_name)
        if span is None:
            span = self._new_span(action_name)
        if self._forwards:
            return _Both(self.inner.profile(action_name), span)
        return span

    def start(self, action_name: str) -> None:
        """Open an action; one that fetches a batch begins a new step."""
        if self._forwards:
            self.inner.start(action_name)
        span = self._lookup.get(action_name)
        if span is None:
            span = self._new_span(action_name)
        span.__enter__()

    def stop(self, action_name: str) -> None:
        """Close an action."""
        span = self._lookup.get(action_name)
        if span is not None:
            span.__exit__(None, None, None)
        if self._forwards:
            self.inner.stop(action_name)

    def span(self, phase: str, detail: str | None = None) -> _Span:
        """Return a context whose time belongs to ``phase``."""
        if self.device is not None and phase in ON_DEVICE:
            return _DeviceSpan(self, self._slot(phase, detail))
        return _Span(self, self._slot(phase, detail))

    def part(self, phase: str) -> _Part:
        """Return a context whose time belongs to ``phase``, unless it is inside of a :meth:`whole`."""
        return _Part(self, self._slot(phase, None))

    def log_call(self) -> _Span:
        """Return a context for what every step logs; to be entered where :attr:`detailed`."""
        return _Span(self, _LOG)

    @property
    def detailed(self) -> bool:
        """Whether what every step does is timed now."""
        return self._lookup is self._detailed

    def whole(self, phase: str) -> _Whole:
        """Return a context in which no action is timed apart: all of it belongs to ``phase``."""
        return _Whole(self, self._slot(phase, None))

    def mark_step(self) -> None:
        """Write the running totals: a step ends here and the next one begins."""
        now = perf_counter_ns()
        self.totals[self._now.slot] += now - self._now.since
        self._now.since = now
        self.mark(now)

    def mark(self, now: int) -> None:
        """Write the running totals, which were brought up to ``now``; what that takes is nobody's wait for data."""
        step, marks, used = self.steps, self._marks, self._used
        row = self.marks % self.capacity * _ROW
        marks[row] = now
        marks[row + STEP] = step
        marks[row + DATA_CPU] = self.data_cpu
        marks[row + HEAD : row + HEAD + len(used)] = used
        self.marks += 1
        self.steps = step + 1
        self._attend(step, now)
        later = perf_counter_ns()
        self.totals[self._now.slot] += later - self._now.since
        self._now.since = later

    def _attend(self, step: int, now: int) -> None:
        """See to all that is not timing, when a step begins."""
        if step - self._looked_step >= _LOOK_EVERY or not step:
            # A device's time is that of all steps.
            length = (now - self._looked_at) // max(step - self._looked_step, 1)
            self._short_steps = step > 0 and length < _SHORT and self.device is None
            self._samples_apart = self.sampler is not None and length > _SAMPLED_APART
            self._looked_step, self._looked_at = step, now
        if (self._short_steps or self._of_step is self._undetailed) and not self.stack:
            self._choose_detail(step)
        if self.detailed:
            self._cpu_at_fetch = thread_time_ns()
        if self.device is not None:
            self.device.collect()
        if self.sampler is not None and now >= self.sampler.due:
            self.sampler.tick()
        if self.recorder is not None and self.recorder.active:
            self._mark_recorder(self.recorder)

    def _choose_detail(self, step: int) -> None:
        recorded = self.recorder is not None and self.recorder.active
        place = step % _PATTERN
        if not self._short_steps or _IN_DETAIL[place] or recorded:
            self._of_step, self._now.slot = self._detailed, _OTHER
        else:
            self._of_step, self._now.slot = self._undetailed, UNSPLIT
            self._steps_to_count = _UNDETAILED[place]
        self._lookup = self._of_step

    def _mark_recorder(self, recorder: WorstSteps) -> None:
        before = self._before_recorded or self.snapshot()
        recorder.mark(self.steps)
        after = self.snapshot()
        for slot, (now, then) in enumerate(zip(after, before, strict=True)):
            self.recorded[slot] += now - then
        self._before_recorded = after if recorder.recording else None

    def rows(self, last: int | None = None) -> np.ndarray:
        """Return the marks that are kept, oldest first: (marks, HEAD + NUM_SLOTS) nanoseconds, running totals.

        Between two of them lies a detailed step, or some that are not.

        Args:
            last: At most so many, the newest.
        """
        marks = self.marks
        kept = min(marks, self.capacity, last if last is not None else marks)
        return self.rows_of(np.arange(marks - kept, marks))

    def rows_of(self, marks: np.ndarray) -> np.ndarray:
        """Return marks by their number; they must be among those that are kept."""
        table = np.frombuffer(self.buffer, dtype=np.int64).reshape(self.capacity, -1)
        return table[marks % self.capacity]

    def snapshot(self) -> list[int]:
        """Return the running totals of the slots at this moment, in nanoseconds."""
        totals = self.totals.tolist()
        totals[self._now.slot] += perf_counter_ns() - self._now.since
        return totals

    def seconds(self, since: list[int] | None = None) -> dict[str, float]:
        """Return seconds by phase, since a snapshot or since the beginning."""
        return self.by_phase(self.snapshot(), since)

    def divided(self, grown: np.ndarray) -> np.ndarray:
        """Divide the time of steps that were not timed in detail.

        Args:
            grown: By how much each slot grew in a step, or in several: (parts, NUM_SLOTS) nanoseconds.

        Returns:
            The same with nothing unsplit: divided as the detailed steps of the same part are, or those of all parts
            where it has hardly any.
        """
        grown = np.asarray(grown, dtype=np.float64).copy()
        unsplit = grown[:, UNSPLIT].copy()
        if not unsplit.any():
            return grown
        timed = grown[:, _DIVIDED]
        everywhere = timed.sum(0) if timed.any() else np.array(self.totals, dtype=np.float64)[_DIVIDED]
        enough = timed.sum(1) > 0.1 * unsplit
        timed[~enough] = everywhere
        grown[:, _DIVIDED] += unsplit[:, None] * timed / np.maximum(timed.sum(1, keepdims=True), 1.0)
        grown[:, UNSPLIT] = 0.0
        return grown

    def by_phase(self, totals: Any, since: Any = None) -> dict[str, float]:
        """Sum slots to seconds by phase."""
        grown = np.array(totals, dtype=np.float64) - (np.array(since) if since is not None else 0.0)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, _), spent in zip(self.slots, self.divided(grown[None])[0].tolist(), strict=False):
            seconds[phase] += spent / 1e9
        return seconds

    def by_detail(self, totals: Any, since: Any = None) -> dict[str, float]:
        """Return seconds of the named parts, e.g. of each callback."""
        return {
            detail: (totals[slot] - (since[slot] if since is not None else 0)) / 1e9
            for slot, (_, detail) in enumerate(self.slots)
            if detail is not None
        }

    def describe(self) -> None:
        """Let the user's profiler report."""
        self.inner.describe()

    def summary(self) -> str:
        """Return the summary of the user's profiler."""
        return self.inner.summary()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Set the user's profiler up."""
        self.inner.setup(stage=stage, local_rank=local_rank, log_dir=log_dir)

    def teardown(self, stage: str | None) -> None:
        """Tear the user's profiler down."""
        self.inner.teardown(stage=stage)

    def __del__(self) -> None:
        """Leave the user's profiler alone: it has its own end."""

    def _slot(self, phase: str, detail: str | None) -> int:
        if detail is None or ((phase, detail) not in self.slots and len(self.slots) == NUM_SLOTS):
            return PHASES.index(phase)
        if (phase, detail) not in self.slots:
            self.slots.append((phase, detail))
            self._used = memoryview(self.totals)[: len(self.slots)]
        return self.slots.index((phase, detail))

    def _new_span(self, action: str) -> AbstractContextManager[Any]:
        span = self._detailed[action] = self._span_of(action)
        if isinstance(span, _Fetch):
            self._undetailed[action] = _Counted(self, span)
        else:
            self._undetailed[action] = _UNTIMED if phase_of(action)[0] in _EVERY_STEP else span
        return self._of_step[action]

    def _span_of(self, action: str) -> AbstractContextManager[Any]:
        phase, detail = phase_of(action)
        hook = action.rpartition(".")[2]
        if hook in self._nested or (self._resolve is not None and _is_empty(self._resolve(action), hook)):
            return _UNTIMED
        if phase == OTHER:
            # What is open around it is other, too.
            return _UNTIMED
        if phase == DATA_WAIT:
            return _Fetch(self, FETCH)
        if action == "save_checkpoint":
            return self.whole(phase)
        return self.span(phase, detail)


class _Now:
    """Whose time is running, and since when."""

    __slots__ = ("since", "slot")

    def __init__(self, slot: int, since: int) -> None:
        self.slot = slot
        self.since = since


class _Span:
    """Times what runs inside it, less what other spans inside it take.

    It runs some ten times a step: what it needs stands in slots, not in the collector's dictionary.
    """

    __slots__ = ("_collector", "_now", "_pop", "_push", "_slot", "_totals")

    def __init__(self, collector: Collector, slot: int) -> None:
        self._collector = collector
        self._now = collector._now
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


class _Part(_Span):
    """A span that is not asked for by an action, so that what is open has to be looked at."""

    __slots__ = ()

    def __enter__(self) -> None:
        if self._collector._lookup is not _NOTHING:
            super().__enter__()


class _DeviceSpan(_Span):
    """Times the device's part too."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._collector.device.edge(self._slot)  # type: ignore[union-attr]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._collector.device.edge(self._now.slot)  # type: ignore[union-attr]


class _Fetch(_Span):
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
            stands_for = _PATTERN / _DETAILED_STEPS if collector._short_steps else 1
            collector.data_cpu += round((thread_time_ns() - collector._cpu_at_fetch) * stands_for)
        super().__exit__()


class _Counted:
    """A wait for a batch that is not timed: all that is done in a step that is not detailed."""

    __slots__ = ("_collector", "_fetch", "_now")

    def __init__(self, collector: Collector, fetch: _Fetch) -> None:
        self._collector = collector
        self._now = collector._now
        self._fetch = fetch

    def __enter__(self) -> None:
        collector = self._collector
        if collector._steps_to_count > 1:
            collector._steps_to_count -= 1
            collector.steps += 1
            if collector._samples_apart and perf_counter_ns() >= collector.sampler.due:  # type: ignore[union-attr]
                collector.sampler.tick()  # type: ignore[union-attr]
        else:
            self._fetch.__enter__()

    def __exit__(self, *_: object) -> None:
        if self._now.slot == FETCH:
            self._fetch.__exit__()


class _Whole(_Span):
    """A span that has no parts."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._collector._lookup = _NOTHING

    def __exit__(self, *_: object) -> None:
        self._collector._lookup = self._collector._of_step
        super().__exit__()


class _Both:
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


class _Untimed:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Nothing(dict[str, Any]):
    """Knows a context for every action, and it does nothing."""

    def get(self, key: str, default: Any = None) -> Any:
        return _UNTIMED


_UNTIMED = _Untimed()
_NOTHING = _Nothing()
_IN_DETAIL = bytes(i in random.Random(0).sample(range(_PATTERN), _DETAILED_STEPS) for i in range(_PATTERN))
# How many steps it is from one to the next detailed one.
_UNDETAILED = bytes((_IN_DETAIL * 2).index(1, i + 1) - i for i in range(_PATTERN))


def _is_empty(owner: Any, hook: str) -> bool:
    if owner is None or not hook.startswith("on_") or hook in getattr(owner, "__dict__", {}):
        return False
    function = getattr(type(owner), hook, None)
    return getattr(function, "__module__", None) in _EMPTY_HOOKS
