"""Evolutionary search: steady-state NSGA-II without duplicates, with operators and a space that adapt.

Sources: Deb et al., NSGA-II (2002); steady state after Durillo et al. (2009); the screening of children by a
surrogate is "pre-selection" (Emmerich, Giannakoglou and Naujoks, 2006); see :mod:`~lightning_optcore.search.operators`
and :mod:`~lightning_optcore.search.surrogate` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lightning_optcore.search.operators import (
    Crossover,
    Mutation,
    OperatorRates,
    PolynomialMutation,
    Selection,
    SimulatedBinaryCrossover,
    TournamentSelection,
    UniformCrossover,
)
from lightning_optcore.search.pareto import survivors
from lightning_optcore.search.searcher import Direction, Proposal, Searcher, SearchError, Trial
from lightning_optcore.search.space import Params, Space, key_of

# What a limit that is exceeded weighs against every cost: whoever keeps the limits comes first (Deb's rule).
_EXCEEDED = 1e12
# The surrogate learns from the population and this many of the newest trials.
_NEWEST = 100
# One fit serves for this many children at most.
_BRED = 60
# So many children are made without a surrogate: enough to find one that is new.
_UNSCREENED = 40
_CROSSOVERS: Mapping[str, Crossover] = {"uniform": UniformCrossover(), "sbx": SimulatedBinaryCrossover()}


class Evolutionary(Searcher):
    """NSGA-II that replaces one member at a time, learns which operators pay, and screens children by a surrogate.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration.
        generations: The search is done after ``generations * population_size`` candidates.
        population_size: How many of the best are bred from.
        elite_size: How many of these are preferred as first parent.
        mutation_rate: Chance of every gene to change.
        crossover_rate: Chance of a child to have two parents, before the rates adapt.
        adaptive: Whether operators earn their rates by what they produced, and the space contracts and re-opens.
        surrogate: Whether children are screened by a model of the trials.
        pool_size: How many children are screened at a time.
        exploration: How many standard deviations below its mean a child's cost is taken to be.
        initial_trials: Random trials before the first child; default 10 with a surrogate, else ``population_size``.
        selection: How a parent is chosen.
        crossovers: How two parents make a child, by name.
        mutation: How a child is changed.

    Raises:
        SearchError: If a size or a rate is out of range.

    Example:
        >>> space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)"})
        >>> searcher = Evolutionary(space, seed=0)
        >>> for _ in range(60):
        ...     (candidate,) = searcher.ask()
        ...     trial = searcher.tell(candidate, candidate.params["x"] ** 2 + candidate.params["y"] ** 2)
        >>> searcher.best().objectives[0] < 0.01
        True
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        generations: int = 50,
        population_size: int = 30,
        elite_size: int = 5,
        mutation_rate: float = 0.15,
        crossover_rate: float = 0.8,
        adaptive: bool = True,
        surrogate: bool = True,
        pool_size: int = 200,
        exploration: float = 1.0,
        initial_trials: int | None = None,
        selection: Selection | None = None,
        crossovers: Mapping[str, Crossover] | None = None,
        mutation: Mutation | None = None,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        sizes = {"generations": generations, "population_size": population_size, "pool_size": pool_size}
        for name, value in sizes.items():
            if value < 1:
                raise SearchError(f"{name}={value}: expected a positive number")
        if population_size < 2:
            raise SearchError(f"population_size={population_size}: expected at least two parents")
        if not 0 <= elite_size <= population_size:
            raise SearchError(f"elite_size={elite_size}: expected 0 to population_size={population_size}")
        for name, rate in (("mutation_rate", mutation_rate), ("crossover_rate", crossover_rate)):
            if not 0 <= rate <= 1:
                raise SearchError(f"{name}={rate}: expected 0 to 1")
        self.generations = generations
        self.population_size = population_size
        self.elite_size = elite_size
        self.mutation_rate = mutation_rate
        self.crossover_rate = crossover_rate
        self.adaptive = adaptive
        self.surrogate = surrogate
        self.pool_size = pool_size
        self.exploration = exploration
        self.initial_trials = initial_trials or (min(10, population_size) if surrogate else population_size)
        self._select = selection or TournamentSelection()
        self._crossovers: dict[str, Crossover] = dict(crossovers or _CROSSOVERS)
        self._mutate = mutation or PolynomialMutation()
        self._rates = OperatorRates([*self._crossovers, "mutation", "focus", "random"], floor=0.05)
        self._openness = 0.5
        self._logs: list[list[float]] = []
        self._population: list[int] = []
        self._queue: list[tuple[Params, str]] = []

    @property
    def done(self) -> bool:
        """Whether ``generations * population_size`` candidates, or every point, were asked for."""
        return super().done or len(self._seen) >= self.generations * self.population_size

    @property
    def population(self) -> list[Trial]:
        """The trials that are bred from."""
        return [self.trials[i] for i in self._population]

    def _propose(self, n: int) -> Sequence[Proposal]:
        taken = self._taken(n)
        if not taken and len(self._seen) >= self.initial_trials and len(self._population) > 1:
            # With many trials a fit costs more than one of them can change it: it then serves for several.
            count = max(n, min(len(self.trials) // 15 - 6, _BRED)) if self.surrogate else n
            self._queue = self._bred(count)
            taken = self._taken(n)
        if taken:
            return taken
        point = self._new_point()
        return [] if point is None else [(point, "random")]

    def _taken(self, n: int) -> list[tuple[Params, str]]:
        """Take up to ``n`` children from the queue that were not asked for, or told, since they were bred."""
        taken: list[tuple[Params, str]] = []
        while self._queue and len(taken) < n:
            one = self._queue.pop(0)
            if key_of(one[0]) not in self._seen:
                taken.append(one)
        return taken

    def _bred(self, count: int) -> list[tuple[Params, str]]:
        """Return up to ``count`` children that were not asked for yet, the most promising first."""
        genomes, operators = self._children(max(self.pool_size if self.surrogate else _UNSCREENED, 4 * count))
        distinct = np.sort(np.unique(genomes, axis=0, return_index=True)[1])
        genomes, operators = genomes[distinct], operators[distinct]
        children: dict[str, tuple[Params, str]] = {}
        rows = []
        for row, genome in enumerate(genomes):
            params = self.space.decode(genome)
            key = key_of(params)
            if key not in self._seen and key not in children and self.space.is_feasible(params):
                children[key] = (params, str(operators[row]))
                rows.append(row)
                if not self.surrogate and len(rows) == count:
                    break
        listed = list(children.values())
        return [listed[i] for i in self._screened(genomes[rows], count)] if self.surrogate and rows else listed

    def _children(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return genomes of children and which operator made each."""
        rng, space = self._rng, self.space
        costs = self._ranking_costs(self._population)
        parents = np.array([space.encode(self.trials[i].params) for i in self._population])
        first = self._select(costs, count, rng)
        if self.elite_size:
            elite = survivors(costs, self.elite_size)
            first = np.where(rng.random(count) < 0.5, elite[rng.integers(len(elite), size=count)], first)
        second = self._select(costs, count, rng)
        operators = self._operators(count)

        children = parents[first]
        for name, cross in self._crossovers.items():
            rows = operators == name
            children[rows] = cross(space, parents[first[rows]], parents[second[rows]], rng)
        crossed = np.isin(operators, list(self._crossovers))
        chance = 1 - (1 - self.mutation_rate) ** len(space)
        same = np.all(children == parents[first], axis=1)
        mutated = (operators == "mutation") | (crossed & (same | (rng.random(count) < chance)))
        children[mutated] = self._mutate(space, children[mutated], self.mutation_rate, rng)
        anywhere = space.random_genomes(count, rng)
        focused = self._focused(parents, anywhere)
        children = np.where((operators == "focus")[:, None], focused, children)
        return np.where((operators == "random")[:, None], anywhere, children), operators

    def _operators(self, count: int) -> np.ndarray:
        if self.adaptive:
            return self._rates.draw(count, self._rng)
        crossed = self._rng.choice(list(self._crossovers), size=count)
        return np.where(self._rng.random(count) < self.crossover_rate, crossed, "mutation")

    def _focused(self, parents: np.ndarray, anywhere: np.ndarray) -> np.ndarray:
        """Return points of the contracted space: genes as the population has them, some from anywhere."""
        rng, shape = self._rng, anywhere.shape
        genes = parents[rng.integers(len(parents), size=shape), np.arange(shape[1])]
        near = np.clip(genes + rng.normal(0, 0.25 * self._openness, size=shape), 0.0, 1.0)
        genes = np.where(self.space.gene_counts > 0, genes, near)
        return np.where(rng.random(shape) < self._openness, anywhere, genes)

    def _screened(self, children: np.ndarray, count: int) -> list[int]:
        """Return the most promising children, the best first."""
        from lightning_optcore.search.surrogate import Surrogate, most_promising, scaled

        chosen = sorted({*self._population, *range(max(0, len(self.trials) - _NEWEST), len(self.trials))})
        good = [i for i in chosen if self.trials[i].objectives is not None and not self.trials[i].violation]
        bad = sorted(set(chosen) - set(good))
        if len(good) < 2:
            return list(range(min(count, len(children))))
        costs = scaled(np.array([self.costs_of(self.trials[i]) for i in good]))
        targets = np.vstack([costs, np.ones((len(bad), costs.shape[1]))])
        tried = np.array([self.space.encode(self.trials[i].params) for i in [*good, *bad]])
        model = Surrogate(self._groups).fit(self.space.features(tried), targets, self._logs)
        self._logs = model.logs
        mean, deviation = model.predict(self.space.features(children))
        return most_promising(mean - self.exploration * deviation, costs, count)

    @cached_property
    def _groups(self) -> list[int]:
        """To which parameter every column of the space's features belongs."""
        counts, ordered = self.space.gene_counts, self.space.ordered
        widths = np.where(~ordered & (counts > 2), counts, 1)
        return [int(i) for i in np.repeat(np.arange(len(widths)), widths)]

    def _ranking_costs(self, indices: Sequence[int]) -> np.ndarray:
        rows = [self.costs_of(self.trials[i]) + _EXCEEDED * self.trials[i].violation for i in indices]
        return np.array(rows).reshape(len(rows), len(self.directions))

    def _learn(self, trial: Trial) -> None:
        index = len(self.trials) - 1
        if trial.objectives is not None:
            members = [*self._population, index]
            self._population = [members[i] for i in survivors(self._ranking_costs(members), self.population_size)]
        if not self.adaptive or len(self.trials) <= self.initial_trials:
            return
        improved = index in self._front
        self._rates.learn(trial.candidate.origin, improved)
        # The one-fifth rule (Rechenberg, 1973): contract where that pays, re-open where it does not.
        self._openness = float(np.clip(self._openness * (0.9 if improved else 0.9**-0.25), 0.1, 0.9))

    def _own_state(self) -> dict[str, Any]:
        return {
            "rates": self._rates.state(),
            "openness": self._openness,
            "logs": self._logs,
            "population": list(map(int, self._population)),
            "queue": [list(one) for one in self._queue],
        }

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        self._rates.load(own["rates"])
        self._openness = own["openness"]
        self._logs = [list(logs) for logs in own["logs"]]
        self._population = list(own["population"])
        self._queue = [(dict(params), origin) for params, origin in own["queue"]]
