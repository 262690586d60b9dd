"""The recorded steps as a Chrome trace, which opens in Perfetto (ui.perfetto.dev) and in chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.slots import HEAD, STEP, TIME

# Only totals by step are kept, so the phases of a step are drawn in the order in which the loop runs them.
_COUNTERS = {"rss": ("memory in MB", 1e-6), "memory_used": ("memory used in percent", 100.0)}


def chrome_trace(collector: Collector, system: Mapping[str, np.ndarray]) -> str:
    """Return a Chrome trace: a slice for each step, or several short ones, and each phase; counters of the memory.

    Args:
        collector: The recorded steps.
        system: Columns of the sampler's table.
    """
    rows = collector.rows()
    events: list[dict[str, Any]] = []
    spent = collector.divided(np.diff(rows[:, HEAD:], axis=0)) / 1e3
    for i, (row, following) in enumerate(pairwise(rows)):
        start, end = row[TIME] / 1e3, following[TIME] / 1e3
        first, last = row[STEP], following[STEP] - 1
        events.append(_slice(f"step {first}" if last <= first else f"steps {first} to {last}", start, end - start))
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
