"""How a run went over time, thinned to what a picture can show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.phases import PHASES
from lightning_optcore.profiling.slots import HEAD, STEP, TIME
from lightning_optcore.profiling.system_readers import TIME_OF

_RATES = {
    "cores used": ("cpu", "worker_cpu"),
    "waiting for a core": ("main_wait", "worker_wait"),
    "MB/s from disks": ("read_bytes",),
}
_LEVELS = {"memory used, percent": ("memory_used", 100.0), "GPU busy, percent": ("gpu_busy", 1.0)}


def timeline(collector: Collector, system: Mapping[str, np.ndarray], bins: int = 120) -> dict[str, Any]:
    """Return the recorded steps and samples in at most ``bins`` parts.

    Returns:
        ``seconds``: where each part begins, from the first step; ``phases``: milliseconds a step of each phase;
        ``step_ms``: those of whole steps; ``system``: figures by name, ``None`` where there was no sample.
    """
    marks = collector.marks
    first = max(marks - collector.capacity, 0)
    if marks - first < 2:
        return {}
    edges = np.unique(np.linspace(first, marks - 1, min(bins, marks - 1 - first) + 1).astype(int))
    rows = collector.rows_of(edges)
    parts = np.diff(rows, axis=0)
    counts = np.maximum(parts[:, STEP], 1)
    times = rows[:, TIME] / 1e9
    by_phase, grown = np.zeros((len(parts), len(PHASES))), collector.divided(parts[:, HEAD:])
    for slot, (phase, _) in enumerate(collector.slots):
        by_phase[:, PHASES.index(phase)] += grown[:, slot]
    per_step = by_phase / counts[:, None] / 1e6
    return {
        "seconds": _rounded(times[:-1] - times[0]),
        "step_ms": _rounded(parts[:, TIME] / counts / 1e6),
        "phases": {phase: _rounded(per_step[:, i]) for i, phase in enumerate(PHASES) if per_step[:, i].any()},
        "system": _system(system, times),
    }


def _system(system: Mapping[str, np.ndarray], times: np.ndarray) -> dict[str, list[float | None]]:
    sampled = system.get("time", np.zeros(0))
    if len(sampled) < 2:
        return {}
    figures: dict[str, list[float | None]] = {}
    for title, names in _RATES.items():
        total = sum(np.interp(times, _readings(system, name), system[name]) for name in names)
        rate = np.maximum(np.diff(total) / np.maximum(np.diff(times), 1e-9), 0.0)
        figures[title] = _rounded(rate / (1e6 if "MB" in title else 1.0))
    for title, (name, factor) in _LEVELS.items():
        if system[name].any():
            figures[title] = _rounded(np.interp(times[:-1], sampled, system[name]) * factor)
    return figures


def _readings(system: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return when the values of a column were read."""
    read = system.get(TIME_OF.get(name, "time"), system["time"])
    return read if read.any() else system["time"]


def _rounded(values: np.ndarray) -> list[Any]:
    return [float(f"{value:.4g}") for value in values]
