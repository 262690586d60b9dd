"""Particle swarm search in mixed spaces, for one objective or several.

Sources: the constriction is Clerc and Kennedy's, IEEE Transactions on Evolutionary Computation 6(1), 2002; leaders from
the archive of the best are those of MOPSO (Coello, Pulido and Lechuga, IEEE Transactions on Evolutionary Computation
8(3), 2004), chosen by crowding, and with turbulence, as in OMOPSO (Sierra and Coello, EMO 2005); positions that are
probabilities of values follow Strasser, Goodman, Sheppard and Butcher (GECCO 2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lightning_optcore.search.operators import PolynomialMutation
from lightning_optcore.search.pareto import crowding_distances, dominates
from lightning_optcore.search.searcher import Direction, Searcher, SearchError, Trial
from lightning_optcore.search.space import Params, Space, key_of

# How often a particle moves anew where it came to what was asked for before, or is against the rules.
_ATTEMPTS = 50
_FASTEST = 0.5
# What is added to the chances of an unordered choice, shared by its values: none of them ever vanishes.
_UNDECIDED = 0.1


class Swarm(Searcher):
    """Particles that are drawn to the best that they have seen themselves, and to the best that others have.

    Ordered parameters are coordinates of 0 to 1, cut into as many cells as there are values. A choice without order has
    a coordinate for each of its values: its chance to be drawn. With several objectives a leader is drawn from the
    Pareto front, the less crowded of two; with one it is the best of the neighbours. A particle moves when it is its
    turn, whether its last point was told or not.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration; a particle remembers each.
        generations: The search is done after ``generations * particles`` candidates.
        particles: How many there are.
        cognitive: How much a particle is drawn to its own best point.
        social: How much it is drawn to its leader's; both sum to more than 4.
        topology: Who leads where there is one objective: the best of all, ``"global"``, or of two neighbours and
            oneself, ``"ring"``, which is slower and less easily caught by a local optimum.
        turbulence: Chance of a move to be followed by a small mutation.

    Raises:
        SearchError: If a number is out of range, or the topology is unknown.

    Example:
        >>> space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)"})
        >>> searcher = Swarm(space, seed=0, particles=10)
        >>> for _ in range(100):
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
        particles: int = 20,
        cognitive: float = 2.05,
        social: float = 2.05,
        topology: Literal["global", "ring"] = "global",
        turbulence: float = 0.15,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        for name, value in (("generations", generations), ("particles", particles)):
            if value < 1:
                raise SearchError(f"{name}={value}: expected a positive number")
        if min(cognitive, social) < 0 or cognitive + social <= 4:
            raise SearchError(f"cognitive={cognitive}, social={social}: expected a sum above 4, and neither below 0")
        if topology not in ("global", "ring"):
            raise SearchError(f"topology={topology!r}: expected global or ring")
        if not 0 <= turbulence <= 1:
            raise SearchError(f"turbulence={turbulence}: expected 0 to 1")
        self.generations = generations
        self.particles = particles
        self.cognitive = cognitive
        self.social = social
        self.topology = topology
        self.turbulence = turbulence
        total = cognitive + social
        self._constriction = 2 / abs(2 - total - math.sqrt(total**2 - 4 * total))
        self._mutate = PolynomialMutation()
        counts = space.gene_counts
        self._widths = np.where(space.ordered, 1, counts)
        self._starts = np.cumsum(self._widths) - self._widths
        size = int(self._widths.sum())
        self._turn = 0
        self._positions = np.zeros((particles, size))
        self._velocities = np.zeros((particles, size))
        # The trial that a particle remembers, and where that was; -1 if there is none yet.
        self._memories = [-1] * particles
        self._remembered = np.zeros((particles, size))

    @property
    def done(self) -> bool:
        """Whether ``generations * particles`` candidates, or every point, were asked for."""
        return super().done or len(self._seen) >= self.generations * self.particles

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        particle = self._turn
        self._turn = (particle + 1) % self.particles
        leader = self._leader(particle)
        for attempt in range(_ATTEMPTS if leader is not None or self._memories[particle] >= 0 else 0):
            position, velocity = self._moved(particle, leader)
            genome = self._genome(position)
            # Where all of the particle's ways lead to what is known, its surroundings are tried.
            if self._rng.random() < self.turbulence or attempt > _ATTEMPTS // 5:
                rate = 1 / len(self.space)
                genome = self._mutate(self.space, genome[None], rate, self._rng)[0]
                position = np.where(np.repeat(self.space.ordered, self._widths), self._position(genome), position)
            params = self.space.decode(genome)
            if key_of(params) not in self._seen and self.space.is_feasible(params):
                self._positions[particle], self._velocities[particle] = position, velocity
                return [(params, f"particle {particle}")]
        point = self._new_point()
        if point is None:
            return []
        start = self._position(self.space.encode(point))
        self._positions[particle] = start
        self._velocities[particle] = 0.5 * (self._rng.random(len(start)) - start)
        return [(point, f"particle {particle}")]

    def _moved(self, particle: int, leader: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return a particle's next position and velocity."""
        position, velocity = self._positions[particle], self._velocities[particle].copy()
        own = self._remembered[particle] if self._memories[particle] >= 0 else None
        for drawn_to, strength in ((own, self.cognitive), (leader, self.social)):
            if drawn_to is not None:
                # The values of one choice are drawn alike, so that their chances keep their sum.
                share = np.repeat(self._rng.random(len(self.space)), self._widths)
                velocity += strength * share * (drawn_to - position)
        velocity = np.clip(self._constriction * velocity, -_FASTEST, _FASTEST)
        moved = position + velocity
        inside = np.clip(moved, 0.0, 1.0)
        return inside, np.where(moved == inside, velocity, -0.5 * velocity)

    def _leader(self, particle: int) -> np.ndarray | None:
        """Return where a particle's leader is, or ``None`` if nobody has found anything."""
        if len(self.directions) > 1 and self._front:
            distances = crowding_distances(self._front_costs)
            first, second = self._rng.integers(len(distances), size=2)
            chosen = first if distances[first] >= distances[second] else second
            return self._position(self.space.encode(self.trials[self._front[chosen]].params), self._positions[particle])
        neighbours = list(range(self.particles))
        if self.topology == "ring" and len(self.directions) == 1:
            neighbours = [(particle + step) % self.particles for step in (-1, 0, 1)]
        knowing = [one for one in neighbours if self._memories[one] >= 0]
        if not knowing:
            return None
        return self._remembered[min(knowing, key=lambda one: self._merit(self.trials[self._memories[one]]))]

    def _merit(self, trial: Trial) -> tuple[float, float]:
        return trial.violation, float(self.costs_of(trial)[0])

    def _learn(self, trial: Trial) -> None:
        if trial.objectives is None:
            return
        origins = [f"particle {one}" for one in range(self.particles)]
        is_own = trial.candidate.origin in origins
        if is_own:
            particles = [origins.index(trial.candidate.origin)]
        else:
            # A point that no particle found goes to one that knows nothing, else to one that it betters.
            particles = sorted(range(self.particles), key=lambda one: self._memories[one] >= 0)
        for particle in particles:
            known = self._memories[particle]
            if known < 0 or self._is_better(trial, self.trials[known], is_own=is_own):
                self._memories[particle] = len(self.trials) - 1
                where = self._position(self.space.encode(trial.params), self._positions[particle], trial.params)
                self._remembered[particle] = where
                if known < 0:
                    self._positions[particle] = where
                return

    def _is_better(self, trial: Trial, known: Trial, *, is_own: bool) -> bool:
        if trial.violation or known.violation:
            return trial.violation < known.violation
        costs, before = self.costs_of(trial), self.costs_of(known)
        if dominates(costs, before):
            return True
        # Of two that neither beats the other, the newer one is remembered every second time.
        return is_own and not dominates(before, costs) and bool(self._rng.random() < 0.5)

    def _genome(self, position: np.ndarray) -> np.ndarray:
        """Return the genome at a position; choices without order are drawn."""
        genes = []
        for start, width, count in zip(self._starts, self._widths, self.space.gene_counts, strict=True):
            if width > 1:
                chances = position[start : start + width] + _UNDECIDED / width
                genes.append(float(self._rng.choice(width, p=chances / chances.sum())))
            else:
                gene = float(position[start])
                genes.append(min(math.floor(gene * count), count - 1.0) if count else gene)
        return np.array(genes)

    def _position(
        self, genome: np.ndarray, default: np.ndarray | None = None, params: Params | None = None
    ) -> np.ndarray:
        """Return where a genome is; parameters that are not active there stay where ``default`` has them."""
        position = np.zeros(int(self._widths.sum()))
        for gene, start, width, count in zip(genome, self._starts, self._widths, self.space.gene_counts, strict=True):
            if width > 1:
                position[start + int(gene)] = 1.0
            else:
                position[start] = (gene + 0.5) / count if count else gene
        if default is None:
            return position
        active = self.space.decode(genome) if params is None else params
        is_active = np.repeat([name in active for name in self.space.parameters], self._widths)
        return np.where(is_active, position, default)

    def _own_state(self) -> dict[str, Any]:
        return {
            "turn": self._turn,
            "positions": self._positions.tolist(),
            "velocities": self._velocities.tolist(),
            "memories": list(self._memories),
            "remembered": self._remembered.tolist(),
        }

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        if len(own["memories"]) != self.particles:
            raise SearchError(f"particles={self.particles}: the state has {len(own['memories'])}")
        self._turn = own["turn"]
        self._positions = np.array(own["positions"])
        self._velocities = np.array(own["velocities"])
        self._memories = list(own["memories"])
        self._remembered = np.array(own["remembered"])
