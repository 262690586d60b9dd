"""The operators of evolutionary search, as small objects that can be exchanged: selection, crossover, mutation.

All of them work on genomes (see :mod:`lightning_optcore.search.space`) and draw from the generator they are given.

Sources: binary tournament on rank and crowding, simulated binary crossover and polynomial mutation are those of
NSGA-II (Deb and Agrawal, 1995; Deb et al., 2002); operators that earn their rates are adaptive pursuit by
probability matching (Thierens, GECCO 2005).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_optcore.search.pareto import crowding_distances, ranks
from lightning_optcore.search.space import Space


class Selection(Protocol):
    """Chooses parents."""

    def __call__(self, costs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return ``count`` indices of rows of ``costs``, whose shape is (members, objectives)."""


class Crossover(Protocol):
    """Makes children of pairs of parents."""

    def __call__(self, space: Space, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return one genome a pair; all arrays are of shape (pairs, parameters)."""


class Mutation(Protocol):
    """Changes genomes."""

    def __call__(self, space: Space, genomes: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        """Return new genomes, each gene changed with probability ``rate``, and one of each genome at least."""


@dataclass(frozen=True)
class TournamentSelection:
    """The best of ``size`` at random: by front, then the least crowded.

    Args:
        size: How many take part.
    """

    size: int = 2

    def __call__(self, costs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        fronts = ranks(costs)
        crowding = np.zeros(len(costs))
        for front in range(fronts.max() + 1):
            members = fronts == front
            crowding[members] = crowding_distances(costs[members])
        place = np.empty(len(costs), dtype=int)
        place[np.lexsort((-crowding, fronts))] = np.arange(len(costs))
        entrants = rng.integers(len(costs), size=(count, self.size))
        return entrants[np.arange(count), np.argmin(place[entrants], axis=1)]


@dataclass(frozen=True)
class CrowdingSelection:
    """Members of the best front, the less crowded the likelier."""

    def __call__(self, costs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        front = np.flatnonzero(ranks(costs) == 0)
        distances = crowding_distances(costs[front])
        finite = distances[np.isfinite(distances)]
        ends = 2 * finite.max() if len(finite) and finite.max() > 0 else 1.0
        weights = np.where(np.isfinite(distances), distances, ends) + 1e-9
        return rng.choice(front, size=count, p=weights / weights.sum())


@dataclass(frozen=True)
class UniformCrossover:
    """Every gene from either parent."""

    def __call__(self, space: Space, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.where(rng.random(first.shape) < 0.5, first, second)


@dataclass(frozen=True)
class SimulatedBinaryCrossover:
    """Ordered genes around the parents' own, as near as ``eta`` says; the others from either parent.

    Args:
        eta: Distribution index: the larger, the nearer to a parent.
    """

    eta: float = 15.0

    def __call__(self, space: Space, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        u = rng.random(first.shape)
        beta = np.where(u < 0.5, (2 * u) ** (1 / (self.eta + 1)), (2 * (1 - u) + 1e-12) ** (-1 / (self.eta + 1)))
        sign = np.where(rng.random(first.shape) < 0.5, 1.0, -1.0)
        blended = 0.5 * ((first + second) + sign * beta * (first - second))
        children = np.where(space.ordered, blended, np.where(sign > 0, first, second))
        # Rounded up or down by chance: genes between two indices would otherwise always fall to the same side.
        floor = np.floor(children)
        stepped = floor + (rng.random(first.shape) < children - floor)
        return _within(space, np.where(space.gene_counts > 0, stepped, children))


@dataclass(frozen=True)
class PolynomialMutation:
    """Ordered genes a little, as ``eta`` says; a gene without order becomes any other value.

    Args:
        eta: Distribution index: the larger, the smaller the change.
    """

    eta: float = 20.0

    def __call__(self, space: Space, genomes: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        counts, shape = space.gene_counts, genomes.shape
        free = np.flatnonzero(counts != 1)
        if not len(free):
            return genomes.copy()
        chosen = rng.random(shape) < rate
        idle = ~chosen[:, free].any(axis=1)
        chosen[np.flatnonzero(idle), free[rng.integers(len(free), size=int(idle.sum()))]] = True

        u = rng.random(shape)
        power = 1 / (self.eta + 1)
        change = np.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)
        # At least one step, and into the range: a step that rounds to nothing would change nothing.
        steps = np.maximum(1, np.round(np.abs(change) * (counts - 1))) * np.sign(change + 1e-300)
        steps = np.where((genomes + steps < 0) | (genomes + steps > counts - 1), -steps, steps)
        others = rng.integers(np.maximum(1, counts - 1), size=shape)
        any_other = others + (others >= genomes)
        mutated = np.where(counts == 0, genomes + change, np.where(space.ordered, genomes + steps, any_other))
        return _within(space, np.where(chosen & (counts != 1), mutated, genomes))


def _within(space: Space, genomes: np.ndarray) -> np.ndarray:
    return np.clip(genomes, 0.0, np.where(space.gene_counts > 0, space.gene_counts - 1, 1.0))


class OperatorRates:
    """Rates of alternatives that follow what each has produced lately: probability matching.

    Args:
        names: The alternatives.
        floor: The least rate of each.
        memory: The weight of what was known at every new outcome.
    """

    def __init__(self, names: Sequence[str], floor: float = 0.1, memory: float = 0.9) -> None:
        self.names = list(names)
        self._floor = floor
        self._memory = memory
        self._worth = dict.fromkeys(self.names, 0.5)

    def rates(self) -> dict[str, float]:
        """Return the rates, which sum to 1."""
        total = sum(self._worth.values())
        free = 1 - self._floor * len(self.names)
        return {name: self._floor + free * worth / total for name, worth in self._worth.items()}

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return names, each by its rate."""
        rates = self.rates()
        return rng.choice(self.names, size=count, p=[rates[name] for name in self.names])

    def learn(self, name: str, success: bool) -> None:
        """Take an outcome."""
        if name in self._worth:
            self._worth[name] = max(1e-3, self._memory * self._worth[name] + (1 - self._memory) * success)

    def state(self) -> dict[str, float]:
        """Return what was learned."""
        return dict(self._worth)

    def load(self, state: Mapping[str, float]) -> None:
        """Restore it."""
        self._worth.update(state)
