"""The recorded steps as a Chrome trace, which opens in Perfetto (ui.perfetto.dev) and in chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_optcore.profiling.collector import HEAD, Collector

# Only totals by step are kept, so the phases of a step are drawn in the order in which the loop runs them.
_COUNTERS = {"rss": ("memory in MB", 1e-6), "memory_used": ("memory used in percent", 100.0)}


def chrome_trace(collector: Collector, system: Mapping[str, np.ndarray]) -> str:
    """Return a Chrome trace: one slice for each step and each phase in it, and counters of the memory.

    Args:
        collector: The recorded steps.
        system: Columns of the sampler's table.
    """
    rows = collector.rows()
    first = collector.steps - len(rows)
    events: list[dict[str, Any]] = []
    spent = collector.divided(np.diff(rows[:, HEAD:], axis=0)) / 1e3
    for i, (row, following) in enumerate(pairwise(rows)):
        start, end = row[0] / 1e3, following[0] / 1e3
        events.append(_slice(f"step {first + i}", start, end - start))
        for (phase, detail), took in zip(collector.slots, spent[i], strict=False):
            if took > 0:
                events.append(_slice(detail or phase, start, took))
                start += took
    for name, (title, factor) in _COUNTERS.items():
        for time, value in zip(system.get("time", ()), system.get(name, ()), strict=True):
            events.append({"name": title, "ph": "C", "ts": time * 1e6, "pid": 0, "args": {name: value * factor}})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _slice(name: str, start: float, duration: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": float(start), "dur": float(duration), "pid": 0, "tid": 0}
