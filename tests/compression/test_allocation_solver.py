from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_optcore.compression.allocation_solver import AllocationError, AllocationProblem, solve_ilp, solver_of


def random_problem(rng, layers=5, options=4, num_pairs=0, tightness=0.5):
    layer = np.repeat(np.arange(layers), options)
    costs = rng.uniform(1, 10, (2, layers * options))
    pairs = (
        np.array(
            [
                rng.choice(np.flatnonzero(layer == a)).item()
                if side == 0
                else rng.choice(np.flatnonzero(layer == b)).item()
                for a, b in (sorted(rng.choice(layers, 2, replace=False)) for _ in range(num_pairs))
                for side in (0, 1)
            ]
        )
        .reshape(num_pairs, 2)
        .astype(int)
    )
    least = np.array([sum(row[layer == i].min() for i in range(layers)) for row in costs])
    most = np.array([sum(row[layer == i].max() for i in range(layers)) for row in costs])
    return AllocationProblem(
        layer=layer,
        loss=rng.uniform(0, 1, layers * options),
        costs=costs,
        budgets=least + tightness * (most - least),
        pairs=pairs,
        pair_loss=rng.normal(0, 0.5, num_pairs),
        pair_costs=rng.normal(0, 1, (2, num_pairs)),
    )


def best_by_enumeration(problem):
    options = [np.flatnonzero(problem.layer == i) for i in range(problem.layer.max() + 1)]
    best = np.inf
    for taken in itertools.product(*options):
        loss, costs = problem.totals(np.array(taken))
        if (costs <= problem.budgets).all():
            best = min(best, loss)
    return best


@pytest.mark.parametrize("num_pairs", [0, 6])
def test_the_program_finds_the_best_of_all_choices(num_pairs):
    rng = np.random.default_rng(0)
    for _ in range(15):
        problem = random_problem(rng, num_pairs=num_pairs)
        taken = solve_ilp(problem)
        loss, costs = problem.totals(taken)
        assert sorted(problem.layer[taken].tolist()) == list(range(5))
        assert (costs <= problem.budgets + 1e-6).all()
        assert loss == pytest.approx(best_by_enumeration(problem), abs=1e-6)


def test_a_budget_below_the_least_is_refused_with_the_least():
    problem = AllocationProblem(np.array([0, 0]), np.array([0.0, 1.0]), np.array([[8.0, 4.0]]), np.array([3.0]))
    with pytest.raises(AllocationError, match="as small as 4 for 3"):
        solve_ilp(problem)


def test_a_budget_of_nothing_more_is_kept_exactly():
    problem = AllocationProblem(np.array([0, 0]), np.array([1.0, 0.0]), np.array([[0.0, 900.0]]), np.array([0.0]))
    assert solve_ilp(problem).tolist() == [0]


def test_a_layer_without_options_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one option"):
        AllocationProblem(np.array([0, 2]), np.zeros(2), np.zeros((1, 2)), np.zeros(1))
    with pytest.raises(ValueError, match=r"loss is of shape \(3,\): expected \(2,\)"):
        AllocationProblem(np.array([0, 1]), np.zeros(3), np.zeros((1, 2)), np.zeros(1))


def test_a_solver_is_a_name_or_a_function():
    assert solver_of("ilp") is solve_ilp
    assert solver_of(best_by_enumeration) is best_by_enumeration
    with pytest.raises(ValueError, match="solver='annealing': expected one of ilp"):
        solver_of("annealing")
