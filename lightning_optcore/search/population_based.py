"""Population-based training: a population is trained together, and its worst members become copies of its best.

Sources: Jaderberg et al., "Population Based Training of Neural Networks", 2017, https://arxiv.org/abs/1711.09846:
exploitation by truncation selection, exploration by perturbing or resampling (section 4.1.1). Several objectives are
ranked as in NSGA-II (Deb et al., IEEE Transactions on Evolutionary Computation 6(2), 2002).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_optcore.search.pareto import crowding_distances, ranks
from lightning_optcore.search.searcher import Candidate, Direction, Searcher, SearchError, Trial
from lightning_optcore.search.space import Interval, Parameter, Params, Space, key_of

# How often a donor's parameters are perturbed anew where the result is against the rules.
_ATTEMPTS = 100


class PopulationBasedTraining(Searcher):
    """A population whose members train a while, are compared, and train on: the worst as changed copies of the best.

    The first generation is random. In every later one a member continues, with the parameters that it has; one of the
    worst ``quantile``, and one that failed, becomes a copy of a member of the best ``quantile`` instead, with that
    one's parameters perturbed. :attr:`Candidate.parent` is the earlier candidate whose weights are to be continued
    from. A generation is ranked when all of it was told: until then :meth:`ask` returns no more than what is left of
    it, or nothing.

    Perturbed, a parameter is drawn anew with ``resample_probability``. Otherwise a number of an interval is multiplied
    by one of the factors, a range or an ordered choice moves to a neighbour, both within their bounds, and a choice
    without order stays.

    Args:
        space: What is searched: parameters that can change while a model trains, e.g. a learning rate, not a width.
        directions: ``"minimize"`` or ``"maximize"`` for every objective; several are ranked by their fronts.
        seed: Makes the candidates repeatable.
        initial: Members of the first generation, e.g. the default configuration.
        population_size: How many members there are.
        generations: How often each of them trains.
        quantile: The share of the members that is replaced, and of those that are copied; above 0, at most 0.5.
        perturbation_factors: By which a number is multiplied, one of them at random.
        resample_probability: Chance of a perturbed parameter to be drawn anew.

    Raises:
        SearchError: If a number is out of range.

    Example:
        >>> space = Space({"lr": "tag(log, interval(1e-4, 1.0))"})
        >>> searcher = PopulationBasedTraining(space, ["maximize"], population_size=4, generations=2)
        >>> for candidate in searcher.ask(4):
        ...     trial = searcher.tell(candidate, candidate.params["lr"])
        >>> best = searcher.best().candidate
        >>> len([candidate for candidate in searcher.ask(4) if candidate.parent == best.id])
        2
    """

    continues = True

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        population_size: int = 10,
        generations: int = 10,
        quantile: float = 0.25,
        perturbation_factors: Sequence[float] = (0.8, 1.25),
        resample_probability: float = 0.25,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        for name, number, least in (("population_size", population_size, 2), ("generations", generations, 1)):
            if number < least:
                raise SearchError(f"{name}={number}: expected at least {least}")
        if not 0 < quantile <= 0.5:
            raise SearchError(f"quantile={quantile}: expected more than 0 and at most 0.5")
        if not perturbation_factors or not all(0 < factor < math.inf for factor in perturbation_factors):
            raise SearchError(f"perturbation_factors={list(perturbation_factors)}: expected numbers above 0")
        if not 0 <= resample_probability <= 1:
            raise SearchError(f"resample_probability={resample_probability}: expected 0 to 1")
        if len(initial) > population_size:
            raise SearchError(f"initial: {len(initial)} points; expected at most population_size={population_size}")
        self.population_size = population_size
        self.generations = generations
        self.quantile = quantile
        self.perturbation_factors = tuple(perturbation_factors)
        self.resample_probability = resample_probability
        # How many generations were planned; of the newest one, who was asked for and who waits for that.
        self._planned = 0
        self._members: list[int] = []
        self._waiting: list[tuple[Params, str, int | None]] = []
        # The newest generation of which anybody lives, from the best to the worst.
        self._survivors: list[int] = []

    @property
    def done(self) -> bool:
        """Whether all of the last generation was asked for; of a space of one point, whether that was."""
        if self.space.size == 1:
            return super().done
        return self._planned == self.generations and not self._waiting

    @property
    def generation(self) -> int:
        """Which generation is asked for or told, counted from 0."""
        return max(0, self._planned - 1)

    def ask(self, n: int = 1) -> list[Candidate]:
        """Return up to ``n`` candidates of one generation; none where it is not told yet, or at the end.

        Raises:
            SearchError: If ``n`` is not positive.
        """
        if n > 0 and self._planned == 0:
            self._plan()
        candidates = super().ask(n)
        self._members += [candidate.id for candidate in candidates]
        return candidates

    def _propose(self, n: int) -> list[tuple[Params, str, int | None]]:
        if not self._waiting:
            # Those that this very ask takes are no members yet.
            is_told = not any(member in self._pending for member in self._members)
            if len(self._members) < self.population_size or not is_told:
                return []
            self._plan()
        asked, self._waiting = self._waiting[:n], self._waiting[n:]
        return asked

    def _plan(self) -> None:
        """Decide on the next generation."""
        if self._planned == 0:
            self._waiting = self._first_generation()
        else:
            told = {trial.candidate.id: trial for trial in self.trials}
            members = [told[member] for member in self._members]
            ranked = self._ranked([trial for trial in members if trial.objectives is not None])
            if ranked:
                self._survivors = [trial.candidate.id for trial in ranked]
            cut = min(math.ceil(self.quantile * self.population_size), self.population_size // 2)
            donors = [told[one] for one in self._survivors[:cut]]
            # What failed is not ranked, and so among the worst.
            going_on = {trial.candidate.id for trial in ranked[: self.population_size - cut]}
            self._waiting = [
                (dict(member.params), "continued", member.candidate.id)
                if member.candidate.id in going_on
                else self._replacement(donors)
                for member in members
            ]
        self._members = []
        self._planned += 1

    def _first_generation(self) -> list[tuple[Params, str, int | None]]:
        if self.space.size == 1:
            self._initial = []
            return [(self.space.sample(self._rng), "random", None)]
        points: list[tuple[Params, str, int | None]] = [(point, "initial", None) for point in self._initial]
        self._seen.update(key_of(point) for point in self._initial)
        self._initial = []
        while len(points) < self.population_size:
            # A space with fewer points than members has them more than once.
            point = self._new_point() or self.space.sample(self._rng)
            self._seen.add(key_of(point))
            points.append((point, "random", None))
        return points

    def _replacement(self, donors: Sequence[Trial]) -> tuple[Params, str, int | None]:
        """Return a changed copy of one of the donors; a new beginning if nobody ever lived."""
        if not donors:
            return self.space.sample(self._rng), "random", None
        donor = donors[int(self._rng.integers(len(donors)))]
        for _ in range(_ATTEMPTS):
            params = self._perturbed(donor.params)
            if self.space.is_feasible(params):
                return params, "perturbed", donor.candidate.id
        return dict(donor.params), "copied", donor.candidate.id

    def _perturbed(self, params: Params) -> Params:
        genome = self.space.encode(params)
        drawn = self.space.random_genomes(1, self._rng)[0]
        for i, (name, kind) in enumerate(self.space.parameters.items()):
            # What was not active has no value to change.
            if name not in params or self._rng.random() < self.resample_probability:
                genome[i] = drawn[i]
            else:
                genome[i] = self._moved(kind, params[name])
        return self.space.decode(genome)

    def _moved(self, kind: Parameter, value: Any) -> float:
        """Return the gene of a value near another."""
        if not isinstance(kind, Interval):
            step = int(self._rng.choice([-1, 1])) if kind.ordered else 0
            return float(np.clip(kind.gene(value) + step, 0, kind.count - 1))
        factor = self.perturbation_factors[self._rng.integers(len(self.perturbation_factors))]
        number = value * factor
        if kind.integer:
            # At least one step: a small number would stay for ever.
            step = max(1, round(abs(number - value))) * (1 if factor > 1 else -1)
            number = value + step
        return kind.gene(min(max(number, kind.low), kind.high))

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return successful trials from the best to the worst: within the limits, by front, the least crowded."""
        if not trials:
            return []
        costs = np.array([self.costs_of(trial) for trial in trials])
        fronts = ranks(costs)
        crowding = np.zeros(len(trials))
        for front in set(fronts.tolist()):
            crowding[fronts == front] = crowding_distances(costs[fronts == front])
        violations = np.array([trial.violation for trial in trials])
        return [trials[i] for i in np.lexsort((np.arange(len(trials)), -crowding, fronts, violations))]

    def _own_state(self) -> dict[str, Any]:
        return {
            "population_size": self.population_size,
            "generations": self.generations,
            "planned": self._planned,
            "members": list(self._members),
            "waiting": [list(one) for one in self._waiting],
            "survivors": list(self._survivors),
        }

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        if own["population_size"] != self.population_size:
            raise SearchError(f"population_size={self.population_size}: the state has {own['population_size']}")
        self._planned = own["planned"]
        self._members = list(own["members"])
        self._waiting = [(dict(params), origin, parent) for params, origin, parent in own["waiting"]]
        self._survivors = list(own["survivors"])
        self._seen.update(key_of(params) for params, _, _ in self._waiting)
