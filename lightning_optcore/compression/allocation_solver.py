"""Which option for every layer: the problem as plain arrays, and an integer linear program that solves it.

Knows nothing of networks: any function from a problem to its choice can take the program's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp


class AllocationError(ValueError):
    """A budget that nothing meets, or options out of which nothing can be chosen; the message says the nearest."""


@dataclass(frozen=True)
class AllocationProblem:
    """Options of layers, of which each layer takes one.

    What is minimised is the sum of the losses of the options taken, plus those of the pairs of which both are taken;
    every cost, summed alike, stays within its budget.

    Args:
        layer: (options,) whole numbers: of which layer each option is, counted from 0.
        loss: (options,).
        costs: (budgets, options).
        budgets: (budgets,).
        pairs: (pairs, 2) indices of options of two layers that act together.
        pair_loss: (pairs,).
        pair_costs: (budgets, pairs).

    Raises:
        ValueError: If the shapes do not fit, or a layer has no option.
    """

    layer: np.ndarray
    loss: np.ndarray
    costs: np.ndarray
    budgets: np.ndarray
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), int))
    pair_loss: np.ndarray = field(default_factory=lambda: np.zeros(0))
    pair_costs: np.ndarray | None = None

    def __post_init__(self) -> None:
        options, budgets, pairs = len(self.layer), len(self.budgets), len(self.pairs)
        if self.pair_costs is None:
            object.__setattr__(self, "pair_costs", np.zeros((budgets, pairs)))
        for name, shape in (
            ("loss", (options,)),
            ("costs", (budgets, options)),
            ("pairs", (pairs, 2)),
            ("pair_loss", (pairs,)),
            ("pair_costs", (budgets, pairs)),
        ):
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(f"{name} is of shape {np.shape(getattr(self, name))}: expected {shape}")
        if options == 0 or set(self.layer.tolist()) != set(range(int(self.layer.max()) + 1)):
            raise ValueError("every layer needs at least one option")

    def totals(self, taken: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and the costs (budgets,) of a choice.

        Args:
            taken: (layers,) the index of the option that each layer takes.
        """
        chosen = np.zeros(len(self.layer), bool)
        chosen[taken] = True
        both = chosen[self.pairs[:, 0]] & chosen[self.pairs[:, 1]]
        assert self.pair_costs is not None
        loss = float(self.loss[chosen].sum() + self.pair_loss[both].sum())
        return loss, self.costs[:, chosen].sum(1) + self.pair_costs[:, both].sum(1)


# Returns, for every layer, the index of the option that it takes; raises AllocationError where none meets the budgets.
Solver = Callable[[AllocationProblem], np.ndarray]


def solve_ilp(problem: AllocationProblem) -> np.ndarray:
    """Solve a problem to optimality as an integer linear program (HiGHS).

    A pair is a variable of its own, which is 1 exactly where both of its options are taken.

    Args:
        problem: The options.

    Returns:
        (layers,) the index of the option that each layer takes.

    Raises:
        AllocationError: If no choice meets the budgets; it says the least that each cost can be.

    Example:
        >>> problem = AllocationProblem(
        ...     layer=np.array([0, 0, 1, 1]), loss=np.array([0.0, 1.0, 0.0, 3.0]),
        ...     costs=np.array([[8.0, 4.0, 8.0, 4.0]]), budgets=np.array([12.0]))
        >>> solve_ilp(problem).tolist()
        [1, 2]
    """
    taken = _minimum(problem, problem.loss, problem.pair_loss, problem.budgets)
    if taken is not None:
        return taken
    assert problem.pair_costs is not None
    least = []
    for i, budget in enumerate(problem.budgets):
        best = _minimum(problem, problem.costs[i], problem.pair_costs[i], np.full(len(problem.budgets), np.inf))
        least.append(f"{problem.totals(best)[1][i]:.6g} for {budget:.6g}" if best is not None else "unknown")
    raise AllocationError(f"no choice meets the budgets; alone each cost can be as small as {', '.join(least)}")


SOLVERS: dict[str, Solver] = {"ilp": solve_ilp}


def solver_of(solver: str | Solver) -> Solver:
    """Return a solver by its name, or as it is.

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}, or a function of a problem")
    return SOLVERS[solver]


def _minimum(
    problem: AllocationProblem, loss: np.ndarray, pair_loss: np.ndarray, budgets: np.ndarray
) -> np.ndarray | None:
    options, pairs = len(problem.layer), len(problem.pairs)
    objective = np.concatenate([loss, pair_loss])
    scale = np.abs(objective).max(initial=0.0)
    constraints = [_one_option_each(problem, pairs)]
    assert problem.pair_costs is not None
    costs = np.concatenate([problem.costs, problem.pair_costs], axis=1)
    for row, budget in zip(costs, budgets, strict=True):
        if np.isfinite(budget):
            unit = max(np.abs(row).max(initial=0.0), abs(float(budget)), 1e-12)
            constraints.append(LinearConstraint(row[None] / unit, -np.inf, budget / unit))
    if pairs:
        constraints.append(_both_or_not(problem, options, pairs))
    found = milp(
        objective / scale if scale > 0 else objective,
        integrality=np.concatenate([np.ones(options), np.zeros(pairs)]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    return np.array([i for i in range(options) if found.x[i] > 0.5])[np.argsort(problem.layer[found.x[:options] > 0.5])]


def _one_option_each(problem: AllocationProblem, pairs: int) -> LinearConstraint:
    options = len(problem.layer)
    layers = int(problem.layer.max()) + 1
    rows = sparse.csr_array((np.ones(options), (problem.layer, np.arange(options))), shape=(layers, options + pairs))
    return LinearConstraint(rows, 1, 1)


def _both_or_not(problem: AllocationProblem, options: int, pairs: int) -> LinearConstraint:
    """Bind each pair's variable: at most either option's, at least their sum less one."""
    rows, columns, values = [], [], []
    upper: list[float] = []
    for pair, (first, second) in enumerate(problem.pairs):
        for option in (first, second):
            rows += [len(upper)] * 2
            columns += [options + pair, option]
            values += [1.0, -1.0]
            upper.append(0.0)
        rows += [len(upper)] * 3
        columns += [first, second, options + pair]
        values += [1.0, 1.0, -1.0]
        upper.append(1.0)
    matrix = sparse.csr_array((values, (rows, columns)), shape=(len(upper), options + pairs))
    return LinearConstraint(matrix, -np.inf, np.array(upper))
