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


@pytest.mark.parametrize("objectives", [1, 2])
def test_the_history_is_the_hypervolume_after_every_point(objectives):
    costs = np.random.default_rng(0).random((40, objectives))
    reference = pareto.reference_of(costs)
    exact = np.array([pareto.hypervolume(costs[: i + 1], reference) for i in range(40)])
    np.testing.assert_allclose(pareto.hypervolume_history(costs, reference), exact / exact[-1])


def test_the_history_of_many_objectives_is_near_the_exact_one():
    costs = np.random.default_rng(0).random((30, 3))
    reference = np.full(3, 1.1)
    exact = np.array([pareto.hypervolume(costs[: i + 1], reference) for i in range(30)])
    np.testing.assert_allclose(pareto.hypervolume_history(costs, reference), exact / exact[-1], atol=0.02)


def test_the_history_of_points_that_do_not_count_is_zero():
    assert pareto.hypervolume_history(np.array([[2.0, 2.0], [3.0, 0.0]]), np.ones(2)).tolist() == [0.0, 0.0]


def test_every_point_of_the_front_is_better_than_the_reference():
    rng = np.random.default_rng(0)
    flat = np.column_stack([np.zeros(20), rng.random(20)])
    for costs in (rng.random((20, 3)), flat, np.ones((4, 2)), np.zeros((1, 3)), np.array([[0.0, 1.0], [9.0, 9.0]])):
        front = costs[pareto.non_dominated(costs)]
        assert (front < pareto.reference_of(costs)).all()
    outlier = np.vstack([costs, [[1e9, 1e9]]])
    assert (pareto.reference_of(np.vstack([[[1.0, 0.0]], outlier])) < 10).all(), "a bad trial does not set the scale"


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_contributions_are_what_the_volume_loses(objectives):
    rng = np.random.default_rng(0)
    front = rng.random((30, objectives)) * 1.2
    front = front[pareto.non_dominated(front)]
    reference = np.ones(objectives)
    whole = pareto.hypervolume(front, reference)
    expected = [whole - pareto.hypervolume(np.delete(front, i, 0), reference) for i in range(len(front))]
    # Counted with 4096 random points beyond two objectives.
    tolerance = 1e-12 if objectives < 3 else 0.01
    assert pareto.contributions(front, reference) == pytest.approx(np.array(expected), abs=tolerance)


def test_equal_members_contribute_nothing():
    front = np.array([[0.0, 0.5], [0.0, 0.5], [0.5, 0.0], [2.0, -1.0]])
    assert pareto.contributions(front, np.ones(2)).tolist() == [0.0, 0.0, 0.25, 0.0]
