"""What an architecture search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_optcore.measurement.directions import Direction
from lightning_optcore.nas.space import Architecture


@dataclass(frozen=True)
class ArchitectureTrial:
    """An architecture and what it was worth.

    Args:
        number: Counted from 0 in the order of asking.
        architecture: The chosen value of every label.
        objectives: By name; empty where it failed or was never evaluated.
        failure: Why it has none, or which limit it exceeds.
        origin: What proposed it, e.g. ``"random"``.
        evaluated: Whether it was paid for: one over a limit that is known before is not, nor one that builds the same
            network as an earlier one.
        exceeds: Whether it is over a limit.
        directory: Its folder. One that was begun anew has another number there than here.
    """

    number: int
    architecture: Architecture
    objectives: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    origin: str = ""
    evaluated: bool = True
    exceeds: bool = False
    directory: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """A search that has ended.

    Args:
        history: Every trial, in the order of asking.
        front: Those within the limits that no other one beats in every objective, best first in the first one.
        directions: Of the objectives, by name.
        sweep_id: Its number in the store.
        directory: Its folder.
    """

    history: list[ArchitectureTrial]
    front: list[ArchitectureTrial]
    directions: Mapping[str, Direction]
    sweep_id: int
    directory: str

    def best(self, objective: str | None = None) -> ArchitectureTrial:
        """Return the trial with the best value of one objective, by default the first.

        Raises:
            KeyError: If there is no such objective.
        """
        name = next(iter(self.directions)) if objective is None else objective
        if name not in self.directions:
            raise KeyError(f"{name}: expected one of {', '.join(self.directions)}")
        sign = 1.0 if self.directions[name] == "minimize" else -1.0
        return min(self.front, key=lambda trial: sign * trial.objectives[name])
