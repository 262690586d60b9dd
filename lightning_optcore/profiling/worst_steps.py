"""What the slowest steps did, by operator: windows of torch.profiler, of which the worst is kept."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# torch.profiler slows a step and keeps every operator of it: short windows, and not many.
WINDOW_STEPS, WINDOWS = 10, 10
_OPERATORS = 10


class WorstSteps:
    """Records ten windows of ten steps each, and keeps the trace of the one with the slowest step.

    Args:
        path: Where the Chrome trace goes.

    Attributes:
        slowest: Step and milliseconds of the slowest that was recorded.
        operators: Share of the kept window's operator time by operator, the most costly first.
        steps: First and last step that were recorded: torch.profiler has slowed them.
        failure: Why nothing more is recorded, if something went wrong.

    Example:
        >>> import tempfile
        >>> recorder = WorstSteps(Path(tempfile.mkdtemp()) / "worst.json")
        >>> recorder.start()
        >>> for step in range(WINDOW_STEPS + 1):
        ...     _ = torch.ones(64, 64) @ torch.ones(64, 64)
        ...     recorder.mark(step)
        >>> "aten::mm" in recorder.operators
        True
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slowest: tuple[int, float] | None = None
        self.operators: dict[str, float] = {}
        self.steps: tuple[int, int] | None = None
        self.failure = ""
        self._left = 0
        self._first_step = 0
        self._profile: Any = None
        self._lengths: list[int] = []
        self._since = 0
        # What torch.profiler does only once must not look like a slow step.
        with profile(activities=_activities()):
            torch.ones(1) + 1

    @property
    def recording(self) -> bool:
        """Whether the step that runs is recorded."""
        return self._profile is not None

    @property
    def active(self) -> bool:
        """Whether a step is recorded, or will be."""
        return self._left > 0 or self.recording

    def start(self, first_step: int = 0) -> None:
        """Record from this step on, or from the next one if it has passed."""
        self._first_step = first_step
        self._left = WINDOWS

    def mark(self, step: int) -> None:
        """A step ends here, in the thread that runs it; ``step`` begins."""
        now = perf_counter_ns()
        try:
            if self._profile is not None:
                self._lengths.append(now - self._since)
                if len(self._lengths) == WINDOW_STEPS:
                    self._close(step)
            elif self._left and step >= self._first_step:
                self.steps = (self.steps[0] if self.steps else step, step)
                self._lengths = []
                self._profile = profile(activities=_activities(), acc_events=True)
                self._profile.start()
        except Exception as error:
            # The run is worth more than a look into it.
            self.failure = f"{type(error).__name__}: {error}"
            self._profile, self._left = None, 0
        self._since = perf_counter_ns()

    def stop(self, step: int) -> None:
        """Record no more."""
        self._left = 0
        try:
            self._close(step)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _close(self, step: int) -> None:
        """End the window that is open, and keep it if its slowest step is the slowest so far."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        recorded.stop()
        self._left = max(self._left - 1, 0)
        assert self.steps is not None
        self.steps = (self.steps[0], step)
        if not self._lengths:
            return
        worst = max(self._lengths)
        if self.slowest is not None and worst / 1e6 <= self.slowest[1]:
            return
        self.slowest = (step - len(self._lengths) + self._lengths.index(worst), worst / 1e6)
        self.operators = _shares(recorded)
        self._export(recorded)

    def _export(self, recorded: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.stem}.{os.getpid()}.json")
        try:
            recorded.export_chrome_trace(str(unfinished))
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]


def _shares(recorded: Any) -> dict[str, float]:
    spent = {event.key: event.self_cpu_time_total + event.self_device_time_total for event in recorded.key_averages()}
    total = sum(spent.values())
    largest = sorted(spent.items(), key=lambda item: -item[1])[:_OPERATORS]
    return {name: time / total for name, time in largest if time > 0}
