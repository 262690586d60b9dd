"""Arithmetic of several objectives, against what can be counted by hand or by chance."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_optcore.search import pareto


def test_fronts_of_a_known_set():
    costs = np.array([[0, 3], [1, 1], [3, 0], [1, 2], [3, 3], [1, 1]])
    assert pareto.ranks(costs).tolist() == [0, 0, 0, 1, 2, 0]
    assert pareto.non_dominated(costs).tolist() == [True, True, True, False, False, True]


def test_crowding_favours_the_ends_and_the_lonely():
    costs = np.array([[0.0, 10.0], [1.0, 9.0], [2.0, 8.0], [8.0, 2.0], [10.0, 0.0]])
    distances = pareto.crowding_distances(costs)
    assert np.isinf(distances[[0, 4]]).all()
    assert distances[3] > distances[2] > distances[1]
    assert set(pareto.survivors(costs, 3)) == {0, 3, 4} or set(pareto.survivors(costs, 3)) == {0, 2, 4}


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(objectives):
    rng = np.random.default_rng(objectives)
    front = rng.random((12, objectives))
    samples = rng.random((100_000, objectives))
    dominated = np.zeros(len(samples), dtype=bool)
    for point in front:
        dominated |= np.all(point <= samples, axis=1)
    assert pareto.hypervolume(front, np.ones(objectives)) == pytest.approx(dominated.mean(), abs=0.01)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_gains_are_differences_of_hypervolumes(objectives):
    rng = np.random.default_rng(0)
    front, points = rng.random((6, objectives)), rng.random((20, objectives)) * 1.2
    reference = np.ones(objectives)
    before = pareto.hypervolume(front, reference)
    expected = [pareto.hypervolume(np.vstack([front, point]), reference) - before for point in points]
    assert pareto.hypervolume_gains(points, front, reference) == pytest.approx(np.array(expected), abs=1e-12)


def test_points_beyond_the_reference_add_nothing():
    assert pareto.hypervolume(np.array([[2.0, 0.0]]), np.array([1.0, 1.0])) == 0.0
    assert pareto.hypervolume(np.empty((0, 2)), np.array([1.0, 1.0])) == 0.0
