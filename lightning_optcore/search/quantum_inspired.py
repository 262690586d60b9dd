"""Quantum-inspired evolutionary search: a population of probabilities in the dress of amplitudes.

It runs on an ordinary processor and claims no quantum speed-up. What the words stand for:

- *superposition*: every decision is a vector of amplitudes over its values; their squares are the probabilities;
- *observation*: a candidate is drawn from them;
- *interference*: every trial rotates the amplitudes, towards its values if it was among the better ones, away from
  those that the best has not if it was among the worse (Han and Kim, IEEE Transactions on Evolutionary Computation
  6(6), 2002, whose angle depends on such a comparison, too; here a decision may have more than two values, and the
  rotation is in the plane of the amplitudes and the trial's value); no amplitude vanishes (their gate H-epsilon, 2004);
- *entanglement*: decisions are drawn one after the other, each leaning to what went well together with those drawn
  before it, by the pointwise mutual information within the better trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_optcore.search.operators import PolynomialMutation
from lightning_optcore.search.pareto import contributions
from lightning_optcore.search.searcher import Direction, Searcher, SearchError, Trial
from lightning_optcore.search.space import Params, Space, key_of

# How often a register is observed anew where what it gave was asked for before.
_ATTEMPTS = 50
# Of the trials that succeeded at most twice as many are kept, then the better half.
_KEPT = 1000
# Of a larger front so many members, drawn at random, are weighed against each other.
_WEIGHED = 100


class QuantumInspired(Searcher):
    """Han and Kim's QIEA for several objectives and decisions of many values, with a local search beside it.

    Args:
        space: What is searched; an interval is cut into ``levels`` cells.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration.
        superposition_level: How much of a decision stays undecided, 0 to 1: no value's probability falls below a
            fifth of this share of the uniform one.
        entanglement_strength: How much a decision leans to those drawn before it, 0 to 1.
        target: Index of the objective that every second register attends to alone; ``None`` spreads all of them.
        registers: How many registers there are, each with its own weights of the objectives.
        rotation: Angle by which the best trial rotates the amplitudes, in radians.
        levels: Cells of an interval, and of a range of more values than these.
        local_search: Share of the candidates that are neighbours of the front: of its members the more often, the more
            hypervolume would be lost without them.
        initial_trials: Trials before the first observation: a Latin hypercube, in which every value of every decision
            comes equally often.

    Raises:
        SearchError: If a number is out of range.

    Example:
        >>> space = Space({name: "choice(0,1)" for name in "abcdefgh"})
        >>> searcher = QuantumInspired(space, ["maximize"], seed=0)
        >>> for _ in range(60):
        ...     (candidate,) = searcher.ask()
        ...     trial = searcher.tell(candidate, sum(candidate.params.values()))
        >>> searcher.best().objectives
        (8.0,)
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        superposition_level: float = 0.5,
        entanglement_strength: float = 0.8,
        target: int | None = None,
        registers: int = 5,
        rotation: float = 0.02 * math.pi,
        levels: int = 16,
        local_search: float = 0.6,
        initial_trials: int = 10,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        shares = {
            "superposition_level": superposition_level,
            "entanglement_strength": entanglement_strength,
            "local_search": local_search,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise SearchError(f"{name}={share}: expected 0 to 1")
        for name, value in (("registers", registers), ("levels", levels), ("initial_trials", initial_trials)):
            if value < 1:
                raise SearchError(f"{name}={value}: expected a positive number")
        if target is not None and not 0 <= target < len(directions):
            raise SearchError(f"target={target}: expected the index of one of {len(directions)} objectives")
        if not 0 < rotation <= math.pi / 2:
            raise SearchError(f"rotation={rotation}: expected an angle up to pi/2")
        self.superposition_level = superposition_level
        self.entanglement_strength = entanglement_strength
        self.target = target
        self.rotation = rotation
        self.local_search = local_search
        self.initial_trials = initial_trials
        counts = space.gene_counts
        self._sizes = [
            int(min(count or levels, levels)) if ordered else int(count)
            for count, ordered in zip(counts, space.ordered, strict=True)
        ]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self._amplitudes = [[np.full(k, k**-0.5) for k in self._sizes] for _ in range(registers)]
        self._weights = _spread(registers, len(directions), target)
        self._register = 0
        self._forget()
        self._start = self._hypercube()
        self._mutate = PolynomialMutation()

    def probabilities(self, register: int = 0) -> dict[str, np.ndarray]:
        """Return the probabilities of every decision's values, or cells, in one register."""
        names = self.space.parameters
        return {name: a**2 for name, a in zip(names, self._amplitudes[register], strict=True)}

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        if len(self._seen) < self.initial_trials or not self._front:
            while self._start:
                params = self.space.decode(self._start.pop())
                if key_of(params) not in self._seen and self.space.is_feasible(params):
                    return [(params, "hypercube")]
            return self._anywhere()
        local = self._rng.random() < self.local_search
        register = self._register
        information = None if local else self._information()
        if not local:
            self._register = (register + 1) % len(self._amplitudes)
        for attempt in range(_ATTEMPTS):
            genome = self._neighbour(attempt) if information is None else self._observed(register, information)
            params = self.space.decode(genome)
            if key_of(params) not in self._seen and self.space.is_feasible(params):
                return [(params, "local" if local else f"register {register}")]
        return self._anywhere()

    def _anywhere(self) -> list[tuple[Params, str]]:
        point = self._new_point()
        return [] if point is None else [(point, "random")]

    def _hypercube(self) -> list[np.ndarray]:
        """Return genomes in which the values of each decision come equally often, or one of them once more."""
        rng, count = self._rng, self.initial_trials
        columns = []
        for size in self._sizes:
            rounds = [rng.permutation(size) for _ in range(math.ceil(count / size))]
            columns.append(rng.permutation(np.concatenate(rounds)[:count]))
        return [self._genome(cells) for cells in np.stack(columns, axis=1)]

    def _neighbour(self, attempt: int) -> np.ndarray:
        """Return a genome that differs from a member of the front in one decision, or in several if those are known."""
        low, span = self._scale()
        front = np.arange(len(self._front))
        if len(front) > _WEIGHED:
            front = self._rng.choice(front, size=_WEIGHED, replace=False)
        units = (self._front_costs[front] - low) / span
        worth = contributions(units, np.full(units.shape[1], 1.1))
        # One in five is any of them: what is crowded, or far from the middle, has neighbours, too.
        chances = worth / max(worth.sum(), 1e-12) + 0.2 / len(front)
        member = self.trials[self._front[self._rng.choice(front, p=chances / chances.sum())]]
        genome = self.space.encode(member.params)
        rate = 0.0 if attempt < _ATTEMPTS // 2 else 1 / len(genome)
        return self._mutate(self.space, genome[None], rate, self._rng)[0]

    def _observed(self, register: int, information: np.ndarray) -> np.ndarray:
        """Return a genome drawn from a register, decision after decision."""
        rng, cells, starts = self._rng, np.zeros(len(self.space), dtype=int), self._starts
        drawn: list[int] = []
        for i in rng.permutation(len(self.space)):
            chances = self._amplitudes[register][i] ** 2
            if drawn and self.entanglement_strength > 0:
                values = slice(starts[i], starts[i] + len(chances))
                leaning = information[values, starts[drawn] + cells[drawn]].mean(axis=1)
                chances = chances * np.exp(self.entanglement_strength * leaning)
            cells[i] = rng.choice(len(chances), p=chances / chances.sum())
            drawn.append(int(i))
        return self._genome(cells)

    def _information(self) -> np.ndarray:
        """Return the smoothed pointwise mutual information of every value with every other in the better trials.

        These are the better half of what succeeded, by the register that likes each most. The values of all decisions
        stand one after the other in the rows, and in the columns; it is what the column's value says of the row's.
        """
        liked = np.argsort(self._scores().min(axis=0), kind="stable")
        better = self._tried[liked[: max(4, len(liked) // 2)]]
        chosen = np.zeros((len(better), sum(self._sizes)))
        chosen[np.arange(len(better))[:, None], better + self._starts] = 1.0
        together, alone = chosen.T @ chosen + 1.0, chosen.sum(0) + 1.0
        given = together / np.add.reduceat(together, self._starts).repeat(self._sizes, axis=0)
        shares = alone / np.add.reduceat(alone, self._starts).repeat(self._sizes)
        return np.log(given) - np.log(shares)[:, None]

    def _cells(self, genome: np.ndarray) -> np.ndarray:
        sizes = np.array(self._sizes)
        counts = self.space.gene_counts
        positions = np.where(counts > 0, (genome + 0.5) / np.maximum(counts, 1), genome)
        return np.minimum((positions * sizes).astype(int), sizes - 1)

    def _genome(self, cells: np.ndarray) -> np.ndarray:
        sizes, counts = np.array(self._sizes), self.space.gene_counts
        positions = (cells + self._rng.random(len(cells))) / sizes
        return np.where(counts > 0, np.minimum(np.floor(positions * counts), counts - 1), positions)

    def _forget(self) -> None:
        self._costs = np.empty((0, len(self.directions)))
        self._tried = np.empty((0, len(self.space)), dtype=int)

    def _remember(self, trial: Trial) -> bool:
        """Keep the costs and the cells of a success, and return whether it is one."""
        if trial.objectives is None or trial.violation > 0:
            return False
        if len(self._costs) == 2 * _KEPT:
            best = np.sort(np.argsort(self._scores().min(axis=0), kind="stable")[:_KEPT])
            self._costs, self._tried = self._costs[best], self._tried[best]
        self._costs = np.vstack([self._costs, self.costs_of(trial)])
        self._tried = np.vstack([self._tried, self._cells(self.space.encode(trial.params))])
        return True

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the least of every cost, and how far above it the median is."""
        low = self._costs.min(0)
        return low, np.maximum(np.median(self._costs, 0) - low, 1e-12)

    def _scores(self) -> np.ndarray:
        """Return what every success is worth to each register: the augmented Chebyshev norm, less being better.

        A row a register.
        """
        low, span = self._scale()
        weighted = self._weights.T[:, :, None] * ((self._costs - low) / span).T[:, None, :]
        return weighted.max(0) + 0.05 * weighted.sum(0)

    def _learn(self, trial: Trial) -> None:
        if not self._remember(trial):
            return
        scores = self._scores()
        beaten = 0.5 * ((scores > scores[:, -1:]).mean(1) + (scores >= scores[:, -1:]).mean(1))
        for register, share in enumerate(beaten):
            # What a register likes best draws it by the whole angle, the median not at all; the worst repels it.
            angle = self.rotation * (2 * float(share) - 1)
            self._rotate(register, self._tried[-1], angle, self._tried[scores[register].argmin()])

    def _rotate(self, register: int, cells: np.ndarray, angle: float, best: np.ndarray) -> None:
        """Turn a register's amplitudes towards the values in these cells, or away from those that the best has not."""
        for i, amplitudes in enumerate(self._amplitudes[register]):
            k = len(amplitudes)
            if k == 1 or (angle < 0 and cells[i] == best[i]):
                continue
            value = amplitudes[cells[i]]
            rest = math.sqrt(max(0.0, 1.0 - value**2))
            least = math.sqrt(self.superposition_level / (5 * k))
            turned_to = min(max(math.asin(min(1.0, value)) + angle, 0.0), math.pi / 2)
            turned = amplitudes * (math.cos(turned_to) / rest if rest > 0 else 0.0)
            turned[cells[i]] = math.sin(turned_to)
            turned = np.maximum(turned, least)
            self._amplitudes[register][i] = turned / np.linalg.norm(turned)

    def _own_state(self) -> dict[str, Any]:
        return {
            "amplitudes": [[a.tolist() for a in register] for register in self._amplitudes],
            "register": self._register,
            "start": [genome.tolist() for genome in self._start],
        }

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        self._amplitudes = [[np.array(a) for a in register] for register in own["amplitudes"]]
        self._register = own["register"]
        self._start = [np.array(genome) for genome in own["start"]]
        self._forget()
        for trial in self.trials:
            self._remember(trial)


def _spread(registers: int, objectives: int, target: int | None) -> np.ndarray:
    """Return weights of the objectives for every register, evenly spread over the simplex, of shape (both)."""
    rng = np.random.default_rng(0)
    if objectives == 2:
        first = np.linspace(0.05, 0.95, registers) if registers > 1 else np.array([0.5])
        weights = np.stack([first, 1 - first], axis=1)
    else:
        weights = rng.dirichlet(np.ones(objectives), size=registers)
    if target is not None:
        weights[::2] = 0.01
        weights[::2, target] = 1.0
    return weights
