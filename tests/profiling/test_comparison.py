from __future__ import annotations

import numpy as np
import pytest

from lightning_optcore.profiling.comparison import compare_profiles
from lightning_optcore.profiling.profile_report import ProfileReport


def report(forward: float, waiting: float, parts: int = 60, seed: int = 0) -> ProfileReport:
    rng = np.random.default_rng(seed)
    phases = {
        "forward": (forward * rng.normal(1, 0.1, parts)).tolist(),
        "data_wait": (waiting * rng.normal(1, 0.1, parts)).tolist(),
    }
    step = [a + b for a, b in zip(*phases.values(), strict=True)]
    timeline = {"seconds": list(range(parts)), "step_ms": step, "phases": phases, "system": {}}
    return ProfileReport("fit", {}, parts, 1.0, timeline=timeline)


def test_what_changed_is_told_from_noise():
    changes = {c.name: c for c in compare_profiles(report(5.0, 10.0), report(5.0, 2.0, seed=1))}
    assert next(iter(changes)) == "step"
    assert changes["step"].significant
    assert changes["data_wait"].significant
    assert changes["data_wait"].first_ms == pytest.approx(10, rel=0.1)
    assert changes["data_wait"].second_ms == pytest.approx(2, rel=0.1)
    assert not changes["forward"].significant


def test_two_like_runs_seldom_differ():
    wrong = sum(compare_profiles(report(5, 5, seed=i), report(5, 5, seed=100 + i))[0].significant for i in range(40))
    assert wrong <= 2


def test_a_phase_that_one_run_lacks_is_zero_there():
    first, second = report(5.0, 10.0), report(5.0, 10.0, seed=1)
    del second.timeline["phases"]["data_wait"]
    assert next(c for c in compare_profiles(first, second) if c.name == "data_wait").second_ms == 0


def test_short_runs_are_refused():
    with pytest.raises(ValueError, match="too short to compare"):
        compare_profiles(report(5, 5), report(5, 5, parts=4))
