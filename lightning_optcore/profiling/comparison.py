"""Two runs side by side: what changed, and whether that is more than noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_optcore.profiling.phases import PHASES
from lightning_optcore.profiling.profile_report import ProfileReport

# The first parts of a run pay for allocations and caches.
_SKIPPED = 0.1
_PERMUTATIONS = 5000


@dataclass(frozen=True)
class Change:
    """One quantity in two runs.

    Args:
        name: A phase, or ``"step"``.
        first_ms: Milliseconds a step in the first run.
        second_ms: In the second.
        p_value: Probability of a difference this large if the two were alike (permutation test of the medians over
            parts of the runs).
    """

    name: str
    first_ms: float
    second_ms: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Return whether the difference is hardly noise: at most one in a hundred."""
        return self.p_value <= 0.01


def compare_profiles(first: ProfileReport, second: ProfileReport, seed: int = 0) -> list[Change]:
    """Compare the step and every phase of two runs; the whole step comes first.

    Args:
        first: A report.
        second: Another one.
        seed: Of the permutations.

    Raises:
        ValueError: If a report has fewer than eight parts: too short to compare.
    """
    parts = [_parts(report) for report in (first, second)]
    if any(len(one["step"]) < 8 for one in parts):
        raise ValueError("too short to compare: each run needs some ten steps")
    names = ["step", *(phase for phase in PHASES if any(phase in one for one in parts))]
    changes = []
    for name in names:
        a, b = (one.get(name, np.zeros(len(one["step"]))) for one in parts)
        changes.append(Change(name, float(np.median(a)), float(np.median(b)), _p_value(a, b, seed)))
    return changes


def _parts(report: ProfileReport) -> dict[str, np.ndarray]:
    timeline = report.timeline
    if not timeline:
        return {"step": np.zeros(0)}
    start = int(_SKIPPED * len(timeline["step_ms"]))
    series = {"step": timeline["step_ms"], **timeline["phases"]}
    return {name: np.asarray(values[start:], dtype=float) for name, values in series.items()}


def _p_value(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    rng = np.random.default_rng(seed)
    both = np.concatenate([a, b])
    observed = abs(np.median(a) - np.median(b))
    shuffled = rng.permuted(np.tile(both, (_PERMUTATIONS, 1)), axis=1)
    differences = np.abs(np.median(shuffled[:, : len(a)], axis=1) - np.median(shuffled[:, len(a) :], axis=1))
    return float((1 + (differences >= observed - 1e-12).sum()) / (1 + _PERMUTATIONS))
