from __future__ import annotations

import numpy as np
import pytest

from lightning_optcore.search import SearchError, Space, parameter_importance

SPACE = Space(
    {"a": "interval(0.0,1.0)", "b": "choice(x,y,z)", "c": "range(1,9)", "d": "tag(log, interval(1e-4, 1))"},
    conditions={"d": "c > 4"},
)


def points(count, seed=0):
    rng = np.random.default_rng(seed)
    return [SPACE.sample(rng) for _ in range(count)]


def sure(found):
    return {name for name, value in found.values.items() if value > 2 * found.errors[name]}


def test_what_decides_stands_out_of_the_noise():
    tried = points(80)
    noise = np.random.default_rng(1).normal(0, 0.05, 80)
    values = [3 * one["a"] + (one["b"] == "y") + extra for one, extra in zip(tried, noise, strict=True)]
    found = parameter_importance(SPACE.parameters, tried, values)
    assert sure(found) >= {"a", "b"}
    assert found.values["a"] > found.values["b"] > 10 * max(abs(found.values["c"]), abs(found.values["d"]))
    assert found.explained > 0.8


def test_a_monotone_change_of_the_objective_changes_nothing():
    tried = points(40)
    values = np.array([one["a"] for one in tried])
    plain = parameter_importance(SPACE.parameters, tried, values)
    assert parameter_importance(SPACE.parameters, tried, np.exp(30 * values)) == plain
    assert parameter_importance(SPACE.parameters, tried, values, seed=1) != plain


def test_noise_decides_nothing():
    alarms = 0
    for seed in range(6):
        found = parameter_importance(SPACE.parameters, points(40, seed), np.random.default_rng(seed).normal(size=40))
        assert found.explained < 0.2
        alarms += len(sure(found))
    assert alarms <= 4, "of 24"


def test_whether_a_parameter_is_there_counts():
    tried = points(60)
    found = parameter_importance(SPACE.parameters, tried, [float("d" in one) for one in tried])
    assert found.values["c"] + found.values["d"] > 0.5 > found.values["a"] + 0.4


def test_too_few_and_equal_trials_are_refused():
    with pytest.raises(SearchError, match="at least 20 finished trials, there are 19"):
        parameter_importance(SPACE.parameters, points(19), range(19))
    with pytest.raises(SearchError, match="all have the same value"):
        parameter_importance(SPACE.parameters, points(20), [1.0] * 20)


def test_of_very_many_trials_some_are_looked_at():
    tried = points(2_500)
    assert parameter_importance(SPACE.parameters, tried, [one["a"] for one in tried]).trials == 2_000
