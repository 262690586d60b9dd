"""Strategies of architecture search by name. Each is a searcher of :mod:`lightning_optcore.search`: asked and told.

NNI's own strategies drive their engine themselves, and cannot be stopped between two trials and continued. Its random
and grid search are the searchers' own; its regularized evolution is here, by the same rule.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_optcore.search.evolutionary import Evolutionary
from lightning_optcore.search.searcher import Direction, Searcher, SearchError, Trial
from lightning_optcore.search.space import Params, Space, key_of

Strategy = str | Callable[..., Searcher]

# By name, where it is; each takes a space, directions, ``seed`` and ``initial``.
STRATEGIES = {
    "random": "lightning_optcore.search.sampling.Random",
    "grid": "lightning_optcore.search.sampling.Grid",
    "regularized_evolution": "lightning_optcore.nas.strategies.RegularizedEvolution",
    "nsga2": "lightning_optcore.nas.strategies.nsga2",
    "evolutionary": "lightning_optcore.search.evolutionary.Evolutionary",
    "adaptive_evolution": "lightning_optcore.nas.adaptive_evolution.AdaptiveEvolution",
}
# Those that train a supernet first; see :mod:`lightning_optcore.nas.one_shot`.
ONE_SHOT = ("random_one_shot", "once_for_all", "darts", "gumbel_darts", "proxyless")
# NNI tries as often for a child that is new.
_RETRIES = 500


def searcher_of(
    strategy: Strategy,
    space: Space,
    directions: Sequence[Direction],
    *,
    seed: int = 0,
    initial: Sequence[Mapping[str, Any]] = (),
    **offered: Any,
) -> Searcher:
    """Return the searcher of a strategy.

    Args:
        strategy: A name, or whatever returns a :class:`~lightning_optcore.search.Searcher` from a space, directions,
            ``seed`` and ``initial``: one of its classes, or a partial of one.
        space: What is searched.
        directions: Of the objectives.
        seed: Makes the candidates repeatable.
        initial: Points to try first.
        offered: What is passed on to a strategy that has an argument of that name, unless it is set already.

    Raises:
        SearchError: If the name is unknown, or what was built is no searcher.

    Example:
        >>> searcher_of("random", Space({"op": "conv,pool"}), ["maximize"]).ask()[0].origin
        'random'
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            known = ", ".join((*STRATEGIES, *ONE_SHOT))
            raise SearchError(f"strategy={strategy!r}: expected one of {known}, or a Searcher's class")
        module, _, name = STRATEGIES[strategy].rpartition(".")
        strategy = getattr(importlib.import_module(module), name)
    build: Callable[..., Any] = strategy  # type: ignore[assignment]
    set_already = getattr(build, "keywords", {})
    wanted = inspect.signature(build).parameters
    extra = {
        name: value
        for name, value in offered.items()
        if name in wanted and set_already.get(name) is None and value is not None
    }
    searcher = build(space, directions, seed=seed, initial=initial, **extra)
    if not isinstance(searcher, Searcher):
        raise SearchError(f"strategy={strategy!r}: made a {type(searcher).__name__}; expected a Searcher")
    return searcher


def nsga2(
    space: Space,
    directions: Sequence[Direction] = ("minimize",),
    *,
    seed: int = 0,
    initial: Sequence[Mapping[str, Any]] = (),
    max_iterations: int = 100,
    population_size: int = 50,
    elite_size: int = 5,
    mutation_rate: float = 0.1,
    crossover_rate: float = 0.8,
) -> Evolutionary:
    """Return NSGA-II without a model of the trials and with fixed rates (Deb et al., IEEE TEC 6(2), 2002).

    Args:
        space: What is searched.
        directions: Of the objectives.
        seed: Makes the candidates repeatable.
        initial: Points to try first.
        max_iterations: It is done after ``max_iterations * population_size`` candidates.
        population_size: How many of the best are bred from; as many first ones are random.
        elite_size: How many of these are preferred as first parent.
        mutation_rate: Chance of every gene to change.
        crossover_rate: Chance of a child to have two parents.

    Example:
        >>> nsga2(Space({"op": "conv,pool"})).population_size
        50
    """
    return Evolutionary(
        space,
        directions,
        seed=seed,
        initial=initial,
        generations=max_iterations,
        population_size=population_size,
        elite_size=elite_size,
        mutation_rate=mutation_rate,
        crossover_rate=crossover_rate,
        adaptive=False,
        surrogate=False,
    )


class RegularizedEvolution(Searcher):
    """Evolution in which the oldest die (Real et al., AAAI 2019), by the rule of NNI 3.0.

    The first ``population_size`` architectures are random. After that the best of ``sample_size`` members, drawn
    anew for every child, is the parent: each of its genes is drawn again with chance ``mutation_prob``, possibly as it
    was. Whoever has a result joins the population, and the oldest member leaves it. What was asked before is never
    asked again. It knows one objective: several are a weighted sum, each scaled by what was seen of it.

    Where 500 attempts make no new child, NNI stops; here a random architecture that is new is asked for.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first.
        population_size: How many members there are.
        sample_size: How many of them compete to be the parent.
        mutation_prob: Chance of every gene to be drawn again.
        weights: Of the objectives; default equal ones.

    Raises:
        SearchError: If an argument is out of range.

    Example:
        >>> searcher = RegularizedEvolution(Space({"a": "range(0,9)", "b": "range(0,9)"}), population_size=5,
        ...                                 sample_size=3, mutation_prob=0.5)
        >>> for _ in range(40):
        ...     (candidate,) = searcher.ask()
        ...     trial = searcher.tell(candidate, candidate.params["a"] + candidate.params["b"])
        >>> searcher.best().objectives[0] <= 2
        True
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        population_size: int = 100,
        sample_size: int = 25,
        mutation_prob: float = 0.05,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        if not 1 <= sample_size <= population_size:
            raise SearchError(f"sample_size={sample_size}: expected 1 to population_size={population_size}")
        if not 0 < mutation_prob <= 1:
            raise SearchError(f"mutation_prob={mutation_prob}: expected more than 0, up to 1")
        if weights is not None and (len(weights) != len(directions) or min(weights) < 0 or sum(weights) <= 0):
            raise SearchError(f"weights={list(weights)}: expected {len(directions)} numbers of at least 0, not all 0")
        self.population_size = population_size
        self.sample_size = sample_size
        self.mutation_prob = mutation_prob
        self.weights = np.array(weights if weights is not None else np.ones(len(directions)), dtype=float)
        # Indices of the members among the trials, the oldest first.
        self._population: list[int] = []
        self._spawned = False

    @property
    def population(self) -> list[Trial]:
        """The members, the oldest first."""
        return [self.trials[i] for i in self._population]

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        proposed: list[tuple[Params, str]] = []
        taken = set(self._seen)
        while len(proposed) < n:
            members = len(self._population) + len(self._pending) + len(proposed)
            self._spawned = self._spawned or members >= self.population_size
            child = self._child(taken) if self._spawned and self._population else None
            one = (child, "mutation") if child is not None else (self._new_point(), "random")
            if one[0] is None or key_of(one[0]) in taken:
                break
            taken.add(key_of(one[0]))
            proposed.append((one[0], one[1]))
        return proposed

    def _child(self, taken: set[str]) -> Params | None:
        """Return a mutated parent that is none of what is taken."""
        for _ in range(_RETRIES):
            genome = self.space.encode(self.trials[self._parent()].params)
            drawn = self.space.random_genomes(1, self._rng)[0]
            again = self._rng.random(len(genome)) < self.mutation_prob
            params = self.space.decode(np.where(again, drawn, genome))
            if key_of(params) not in taken and self.space.is_feasible(params):
                return params
        return None

    def _parent(self) -> int:
        """Return the best of some members."""
        competing = self._rng.permutation(len(self._population))[: self.sample_size]
        sums = self._weighted_sums()
        return self._population[min(competing, key=lambda i: sums[i])]

    def _weighted_sums(self) -> np.ndarray:
        """Return the members' costs as one number each, less being better."""
        done = [i for i, trial in enumerate(self.trials) if trial.objectives is not None and not trial.violation]
        costs = np.array([self.costs_of(self.trials[i]) for i in self._population])
        violations = np.array([self.trials[i].violation for i in self._population])
        seen = np.array([self.costs_of(self.trials[i]) for i in done]) if done else costs
        low, span = seen.min(0), np.ptp(seen, axis=0)
        scaled = (costs - low) / np.where(span > 0, span, 1.0)
        # Whoever exceeds a limit stands behind all that keep them.
        return scaled @ self.weights + np.where(violations > 0, 1e6 * (1 + violations), 0.0)

    def _learn(self, trial: Trial) -> None:
        if trial.objectives is None:
            return
        self._population = [*self._population, len(self.trials) - 1][-self.population_size :]

    def _own_state(self) -> dict[str, Any]:
        return {"population": list(self._population), "spawned": self._spawned}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        self._population = list(own["population"])
        self._spawned = own["spawned"]
