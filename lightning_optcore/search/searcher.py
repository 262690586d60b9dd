"""The protocol of all searchers: ask for candidates, tell what they were worth, save and restore.

A searcher knows nothing of what is searched. Whoever drives it may ask for several candidates before telling
any, tell them in any order, and never tell some.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_optcore.search.space import Params, Space, SpaceError, key_of

STATE_VERSION = 1
Direction = Literal["minimize", "maximize"]
# A point, what proposed it, and its parent where it has one.
Proposal = tuple[Params, str] | tuple[Params, str, int | None]


class SearchError(ValueError):
    """A searcher that was used or built in a way that cannot be; the message says what would be right."""


@dataclass(frozen=True)
class Candidate:
    """A point to try.

    Args:
        id: Its number, counted from 0 in the order of asking.
        params: The values of the active parameters by name.
        origin: What proposed it, e.g. ``"random"`` or ``"crossover"``.
        parent: Number of the earlier candidate whose weights it continues from; ``None`` if it starts anew.
    """

    id: int
    params: Params
    origin: str = ""
    parent: int | None = None


@dataclass(frozen=True)
class Trial:
    """A candidate and what it was worth.

    Args:
        candidate: What was tried.
        objectives: One number an objective; ``None`` if it failed.
        failure: Why it failed.
        violation: By how much a limit on what was measured is exceeded; 0 if none is.
    """

    candidate: Candidate
    objectives: tuple[float, ...] | None = None
    failure: str | None = None
    violation: float = 0.0

    @property
    def params(self) -> Params:
        """The values that were tried."""
        return self.candidate.params


class Searcher(ABC):
    """Keeps the trials, their Pareto front and what was asked before; a subclass proposes.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration.

    Raises:
        SearchError: If a direction is unknown.
        SpaceError: If an initial point is not in the space.
    """

    # Whether candidates continue from the weights of earlier ones, so that each has to leave its own.
    continues = False

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        known = ("minimize", "maximize")
        if isinstance(directions, str) or not directions or any(one not in known for one in directions):
            raise SearchError(f"directions={directions!r}: expected a list of minimize or maximize for every objective")
        self.space = space
        self.directions: tuple[Direction, ...] = tuple(directions)
        self.seed = seed
        self.trials: list[Trial] = []
        self._initial = [dict(point) for point in initial]
        for point in self._initial:
            space.encode(point)
            if not space.is_feasible(point):
                raise SpaceError(f"initial point {point} does not meet the constraints {list(space.constraints)}")
        self._rng = np.random.default_rng(seed)
        self._signs = np.array([1.0 if direction == "minimize" else -1.0 for direction in directions])
        self._next_id = 0
        self._pending: dict[int, Candidate] = {}
        self._seen: set[str] = set()
        # Indices of the trials that no other dominates, and their costs, a row each.
        self._front: list[int] = []
        self._front_costs = np.empty((0, len(directions)))

    @property
    def done(self) -> bool:
        """Whether it has nothing more to propose: its own budget is spent, or every point was asked for."""
        return len(self._seen) >= self.space.size

    @property
    def pending(self) -> list[Candidate]:
        """What was asked for and not told."""
        return list(self._pending.values())

    def ask(self, n: int = 1) -> list[Candidate]:
        """Return up to ``n`` candidates; fewer, or none, where the searcher is at its end.

        Raises:
            SearchError: If ``n`` is not positive.
        """
        if n < 1:
            raise SearchError(f"ask({n}): expected a positive number")
        points: list[Proposal] = []
        while self._initial and len(points) < n:
            point = self._initial.pop(0)
            if key_of(point) not in self._seen:
                points.append((point, "initial"))
                self._seen.add(key_of(point))
        while len(points) < n and not self.done:
            proposed = self._propose(n - len(points))
            if not proposed:
                break
            points += proposed
            self._seen.update(key_of(point[0]) for point in proposed)
        candidates = [Candidate(self._next_id + i, *point) for i, point in enumerate(points)]
        self._next_id += len(candidates)
        self._pending.update((candidate.id, candidate) for candidate in candidates)
        return candidates

    def tell(
        self,
        candidate: Candidate,
        objectives: Sequence[float] | float | None = None,
        *,
        failure: str | None = None,
        violation: float = 0.0,
    ) -> Trial:
        """Say what a candidate was worth.

        Args:
            candidate: What :meth:`ask` returned, or a point of your own (``Candidate(-1, params)``).
            objectives: One finite number an objective. Anything else makes the trial a failure.
            failure: Why there are none.
            violation: By how much limits on what was measured are exceeded, summed; 0 where all are kept.

        Raises:
            SearchError: If the number of objectives is wrong, or the candidate was told before.
        """
        if candidate.id >= 0 and candidate.id not in self._pending:
            raise SearchError(f"candidate {candidate.id} was not asked for, or was told before")
        if candidate.id < 0:
            self.space.encode(candidate.params)
            candidate = Candidate(self._next_id, dict(candidate.params), candidate.origin or "told")
        trial = self._trial(candidate, objectives, failure, violation)
        # What cannot be told raised by now, and is still pending.
        if self._pending.pop(candidate.id, None) is None:
            self._next_id += 1
            self._seen.add(key_of(candidate.params))
        self._add(trial)
        self._learn(trial)
        return trial

    def pareto_front(self) -> list[Trial]:
        """Return the trials that no other beats in every objective, best first in the first one."""
        front = [self.trials[i] for i in self._front]
        return sorted(front, key=lambda trial: tuple(self.costs_of(trial)))

    def best(self, objective: int = 0) -> Trial | None:
        """Return the trial with the best value of one objective, or ``None`` if none succeeded."""
        front = [self.trials[i] for i in self._front]
        return min(front, key=lambda trial: self.costs_of(trial)[objective], default=None)

    def costs_of(self, trial: Trial) -> np.ndarray:
        """Return a successful trial's objectives with less being better."""
        assert trial.objectives is not None
        return self._signs * np.array(trial.objectives)

    def state_dict(self, *, trials: bool = True) -> dict[str, Any]:
        """Return the whole state as JSON-able data.

        Args:
            trials: With the trials. Whoever keeps these elsewhere (a journal) may leave them out, and put them
                into ``state["trials"]`` again, in the order of telling, before :meth:`load_state_dict`.
        """
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "searcher": type(self).__name__,
            "space": self.space.to_dict(),
            "directions": list(self.directions),
            "seed": self.seed,
            "next_id": self._next_id,
            "rng": copy.deepcopy(self._rng.bit_generator.state),
            "initial": self._initial,
            "pending": [candidate_dict(candidate) for candidate in self._pending.values()],
            "own": self._own_state(),
        }
        if trials:
            state["trials"] = [trial_dict(trial) for trial in self.trials]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; what is asked for next is what would have been asked for then.

        Raises:
            SearchError: If it is of another searcher, version or number of objectives.
            SpaceError: If the space differs; the message shows where.
        """
        for name, mine in (("version", STATE_VERSION), ("searcher", type(self).__name__)):
            if state.get(name) != mine:
                raise SearchError(f"state of {name} {state.get(name)!r}: expected {mine!r}")
        if list(state["directions"]) != list(self.directions):
            raise SearchError(f"state of directions {state['directions']}: expected {list(self.directions)}")
        differences = self.space.differences(state["space"])
        if differences:
            raise SpaceError(f"the space is not the one of the state: {'; '.join(differences)}")
        self.seed = state["seed"]
        self._next_id = state["next_id"]
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = state["rng"]
        self._initial = [dict(point) for point in state["initial"]]
        self._pending = {one["id"]: Candidate(**one) for one in state["pending"]}
        self.trials, self._front = [], []
        self._front_costs = np.empty((0, len(self.directions)))
        for one in state["trials"]:
            self._add(trial_of(one))
        asked = [*self._pending.values(), *(trial.candidate for trial in self.trials)]
        self._seen = {key_of(candidate.params) for candidate in asked}
        self._load_own_state(state["own"])

    @abstractmethod
    def _propose(self, n: int) -> Sequence[Proposal]:
        """Return about ``n`` points and what proposed each; none at the end.

        None of them is in ``self._seen``, except where it continues from a parent.
        """

    def _learn(self, trial: Trial) -> None:  # noqa: B027 - optional
        """Take a new trial, which is in ``self.trials`` by now."""

    def _own_state(self) -> dict[str, Any]:
        """Return what does not follow from the trials."""
        return {}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Restore it; the trials are there by now."""

    def _new_point(self) -> Params | None:
        """Return a random point that was not asked for yet, or ``None`` if there is none (or too few to meet one)."""
        for _ in range(100):
            try:
                params = self.space.sample(self._rng)
            except SpaceError:
                # The rules leave so few points that chance met none: try on, up to the same end.
                continue
            if key_of(params) not in self._seen:
                return params
        points = self.space.points()
        left = [point for point in points or [] if key_of(point) not in self._seen]
        return left[self._rng.integers(len(left))] if left else None

    def _trial(
        self, candidate: Candidate, objectives: Sequence[float] | float | None, failure: str | None, violation: float
    ) -> Trial:
        if failure is not None:
            return Trial(candidate, failure=failure)
        if objectives is None:
            return Trial(candidate, failure="no objective was returned")
        values = tuple(float(v) for v in (objectives if isinstance(objectives, Sequence) else [objectives]))
        if len(values) != len(self.directions):
            raise SearchError(f"{len(values)} objectives were told, {len(self.directions)} directions were given")
        bad = [f"objective {i} is {value}" for i, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            return Trial(candidate, failure="; ".join(bad))
        return Trial(candidate, values, violation=float(violation))

    def _add(self, trial: Trial) -> None:
        index = len(self.trials)
        self.trials.append(trial)
        if trial.objectives is None or trial.violation > 0:
            return
        costs, others = self.costs_of(trial), self._front_costs
        if np.any(np.all(others <= costs, axis=1) & np.any(others < costs, axis=1)):
            return
        stay = np.any(others < costs, axis=1) | np.all(others == costs, axis=1)
        self._front = [*(i for i, stays in zip(self._front, stay, strict=True) if stays), index]
        self._front_costs = np.vstack([others[stay], costs])


def trial_dict(trial: Trial) -> dict[str, Any]:
    """Return a trial as JSON-able data."""
    return {
        "candidate": candidate_dict(trial.candidate),
        "objectives": None if trial.objectives is None else list(trial.objectives),
        "failure": trial.failure,
        "violation": trial.violation,
    }


def trial_of(data: Mapping[str, Any]) -> Trial:
    """Return the trial of :func:`trial_dict`."""
    objectives = data["objectives"]
    return Trial(
        Candidate(**data["candidate"]),
        None if objectives is None else tuple(objectives),
        data["failure"],
        data["violation"],
    )


def candidate_dict(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as JSON-able data."""
    return {
        "id": candidate.id,
        "params": candidate.params,
        "origin": candidate.origin,
        "parent": candidate.parent,
    }
