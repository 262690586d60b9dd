"""The searchers that learn nothing: every point of a grid, or points at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_optcore.search.searcher import Direction, Searcher, SearchError
from lightning_optcore.search.space import Interval, Params, Space, key_of


class Random(Searcher):
    """Points at random, each once (Bergstra and Bengio, JMLR 13, 2012).

    Example:
        >>> searcher = Random(Space({"width": "choice(16,32)"}), seed=1)
        >>> sorted(candidate.params["width"] for candidate in searcher.ask(10))
        [16, 32]
    """

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        point = self._new_point()
        return [] if point is None else [(point, "random")]


class Grid(Searcher):
    """Every combination of the values, in the order of the parameters, the last one changing fastest.

    Args:
        space: What is searched.
        directions: As in :class:`Searcher`.
        steps: How many evenly spaced values stand for an interval.
        seed: Not used.
        initial: Points to try first.

    Example:
        >>> grid = Grid(Space({"lr": "tag(log,interval(0.001,0.1))"}), steps=3)
        >>> [candidate.params["lr"] for candidate in grid.ask(9)]
        [0.001, 0.01, 0.1]
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        steps: int = 5,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if steps < 1:
            raise SearchError(f"steps={steps}: expected a positive number")
        super().__init__(space, directions, seed=seed, initial=initial)
        self.steps = steps
        self._position = 0
        self._axes = []
        for kind in space.parameters.values():
            count = kind.count
            if isinstance(kind, Interval):
                self._axes.append(np.linspace(0.0, 1.0, steps if count is None else min(steps, count)))
            else:
                self._axes.append(np.arange(kind.count, dtype=float))

    @property
    def done(self) -> bool:
        """Whether every combination was asked for."""
        return self._position >= int(np.prod([len(axis) for axis in self._axes], dtype=object))

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        while not self.done:
            genome, rest = [], self._position
            for axis in reversed(self._axes):
                rest, index = divmod(rest, len(axis))
                genome.append(axis[index])
            self._position += 1
            params = self.space.decode(genome[::-1])
            if key_of(params) not in self._seen and self.space.is_feasible(params):
                return [(params, "grid")]
        return []

    def _own_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        self._position = own["position"]
