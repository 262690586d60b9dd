"""Exclusive time per phase, taken from the actions that Lightning's loops report to ``trainer.profiler``.

Every instant belongs to exactly one phase: the innermost action that is open. Once a step, the running totals are
copied into a buffer that was allocated at the start; nothing is analysed here. They are typed memory: between
two steps the caches are the model's, and every number that is an object of its own costs a miss.

To time what every step does costs some fifty microseconds. Where steps are short only one in eight, at random, is timed
in detail; the others are counted, and what happens in them now and then (callbacks, loggers, validation, checkpoints)
is timed. The rest of their time is divided as it is in the detailed ones, by :meth:`Collector.divided`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from threading import get_ident
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from lightning_optcore.profiling.device_clock import DeviceClock
from lightning_optcore.profiling.phases import DATA_WAIT, LOGGING, OTHER, PHASES, phase_of
from lightning_optcore.profiling.slots import (
    DATA_CPU,
    DIVIDED,
    EVERY_STEP,
    FETCH,
    HEAD,
    LOG,
    NUM_SLOTS,
    ON_DEVICE,
    OTHER_SLOT,
    ROW,
    STEP,
    UNSPLIT,
)
from lightning_optcore.profiling.spans import (
    IN_DETAIL,
    PATTERN,
    UNDETAILED,
    UNTIMED,
    Both,
    Counted,
    DeviceSpan,
    Fetch,
    Now,
    Part,
    Span,
    Whole,
)
from lightning_optcore.profiling.system import Sampler
from lightning_optcore.profiling.worst_steps import WorstSteps

# Every so many steps it is seen how long they are.
_LOOK_EVERY = 64
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
        self.of_step = self.lookup = self._detailed
        self.short_steps = False
        self.samples_apart = False
        # The step and the time at which it was last seen how long steps are.
        self._looked_step = self._looked_at = 0
        # Steps until the next one that is detailed.
        self.steps_to_count = 0
        self.slots: list[tuple[str, str | None]] = [(phase, None) for phase in (*PHASES, OTHER, LOGGING, DATA_WAIT)]
        self.totals = array("q", bytes(8 * NUM_SLOTS))
        self._used = memoryview(self.totals)[: len(self.slots)]
        self.stack: list[int] = []
        self.now = Now(OTHER_SLOT, perf_counter_ns())
        self.thread = get_ident()
        self.capacity = capacity
        self.buffer = bytearray(8 * ROW * capacity)
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
        self.cpu_at_fetch = 0
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def profile(self, action_name: str) -> Any:
        """Return the context that times an action."""
        span = self.lookup.get(action_name)
        if span is None:
            span = self._new_span(action_name)
        if self._forwards:
            return Both(self.inner.profile(action_name), span)
        return span

    def start(self, action_name: str) -> None:
        """Open an action; one that fetches a batch begins a new step."""
        if self._forwards:
            self.inner.start(action_name)
        span = self.lookup.get(action_name)
        if span is None:
            span = self._new_span(action_name)
        span.__enter__()

    def stop(self, action_name: str) -> None:
        """Close an action."""
        span = self.lookup.get(action_name)
        if span is not None:
            span.__exit__(None, None, None)
        if self._forwards:
            self.inner.stop(action_name)

    def span(self, phase: str, detail: str | None = None) -> Span:
        """Return a context whose time belongs to ``phase``."""
        if self.device is not None and phase in ON_DEVICE:
            return DeviceSpan(self, self._slot(phase, detail))
        return Span(self, self._slot(phase, detail))

    def part(self, phase: str) -> Part:
        """Return a context whose time belongs to ``phase``, unless it is inside of a :meth:`whole`."""
        return Part(self, self._slot(phase, None))

    def log_call(self) -> Span:
        """Return a context for what every step logs; to be entered where :attr:`detailed`."""
        return Span(self, LOG)

    @property
    def detailed(self) -> bool:
        """Whether what every step does is timed now."""
        return self.lookup is self._detailed

    def whole(self, phase: str) -> Whole:
        """Return a context in which no action is timed apart: all of it belongs to ``phase``."""
        return Whole(self, self._slot(phase, None))

    def mark_step(self) -> None:
        """Write the running totals: a step ends here and the next one begins."""
        now = perf_counter_ns()
        self.totals[self.now.slot] += now - self.now.since
        self.now.since = now
        self.mark(now)

    def mark(self, now: int) -> None:
        """Write the running totals, which were brought up to ``now``; what that takes is nobody's wait for data."""
        step, marks, used = self.steps, self._marks, self._used
        row = self.marks % self.capacity * ROW
        marks[row] = now
        marks[row + STEP] = step
        marks[row + DATA_CPU] = self.data_cpu
        marks[row + HEAD : row + HEAD + len(used)] = used
        self.marks += 1
        self.steps = step + 1
        self._attend(step, now)
        later = perf_counter_ns()
        self.totals[self.now.slot] += later - self.now.since
        self.now.since = later

    def _attend(self, step: int, now: int) -> None:
        """See to all that is not timing, when a step begins."""
        if step - self._looked_step >= _LOOK_EVERY or not step:
            # A device's time is that of all steps.
            length = (now - self._looked_at) // max(step - self._looked_step, 1)
            self.short_steps = step > 0 and length < _SHORT and self.device is None
            self.samples_apart = self.sampler is not None and length > _SAMPLED_APART
            self._looked_step, self._looked_at = step, now
        if (self.short_steps or self.of_step is self._undetailed) and not self.stack:
            self._choose_detail(step)
        if self.detailed:
            self.cpu_at_fetch = thread_time_ns()
        if self.device is not None:
            self.device.collect()
        if self.sampler is not None and now >= self.sampler.due:
            self.sampler.tick()
        if self.recorder is not None and self.recorder.active:
            self._mark_recorder(self.recorder)

    def _choose_detail(self, step: int) -> None:
        recorded = self.recorder is not None and self.recorder.active
        place = step % PATTERN
        if not self.short_steps or IN_DETAIL[place] or recorded:
            self.of_step, self.now.slot = self._detailed, OTHER_SLOT
        else:
            self.of_step, self.now.slot = self._undetailed, UNSPLIT
            self.steps_to_count = UNDETAILED[place]
        self.lookup = self.of_step

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
        totals[self.now.slot] += perf_counter_ns() - self.now.since
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
        timed = grown[:, DIVIDED]
        everywhere = timed.sum(0) if timed.any() else np.array(self.totals, dtype=np.float64)[DIVIDED]
        enough = timed.sum(1) > 0.1 * unsplit
        timed[~enough] = everywhere
        grown[:, DIVIDED] += unsplit[:, None] * timed / np.maximum(timed.sum(1, keepdims=True), 1.0)
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
        if isinstance(span, Fetch):
            self._undetailed[action] = Counted(self, span)
        else:
            self._undetailed[action] = UNTIMED if phase_of(action)[0] in EVERY_STEP else span
        return self.of_step[action]

    def _span_of(self, action: str) -> AbstractContextManager[Any]:
        phase, detail = phase_of(action)
        hook = action.rpartition(".")[2]
        if hook in self._nested or (self._resolve is not None and _is_empty(self._resolve(action), hook)):
            return UNTIMED
        if phase == OTHER:
            # What is open around it is other, too.
            return UNTIMED
        if phase == DATA_WAIT:
            return Fetch(self, FETCH)
        if action == "save_checkpoint":
            return self.whole(phase)
        return self.span(phase, detail)


def _is_empty(owner: Any, hook: str) -> bool:
    if owner is None or not hook.startswith("on_") or hook in getattr(owner, "__dict__", {}):
        return False
    function = getattr(type(owner), hook, None)
    return getattr(function, "__module__", None) in _EMPTY_HOOKS
