"""What the page of a sweep shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_optcore.report.architectures import Picture


@dataclass(frozen=True)
class Axis:
    """A parameter.

    Args:
        name: Its name.
        kind: How its values are laid out: ``"choice"`` one beside the other, whatever they are.
        choices: The values of a choice.
    """

    name: str
    kind: Literal["linear", "log", "choice"]
    choices: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """A trial.

    Args:
        number: Its number, from 0.
        job_num: Hydra's number of the job that ran it.
        status: ``"asked"``, ``"running"``, ``"done"``, ``"failed"`` or ``"pruned"``.
        params: The values of its active parameters.
        objectives: What it was worth, or ``None``.
        best: Whether it is on the Pareto front; of one objective, whether it is the best.
        note: Why it failed or was pruned, or where its result was taken from.
        cached: Whether its result was taken from an earlier trial.
        directory: Its folder.
        seconds: How long it took.
        command: What runs it again, ready to paste.
    """

    number: int
    job_num: int | None
    status: str
    params: dict[str, Any]
    objectives: list[float] | None
    best: bool
    note: str
    cached: bool
    directory: str | None
    seconds: float | None
    command: str


@dataclass(frozen=True)
class Importance:
    """How much each parameter decides an objective.

    Args:
        objective: Its name.
        bars: Parameter, value and standard error, the largest first; none where nothing can be said.
        note: How much the values are worth, or why there are none.
    """

    objective: str
    bars: list[tuple[str, float, float]]
    note: str


@dataclass(frozen=True)
class SweepPage:
    """A sweep.

    Args:
        id: Its number.
        status: ``"running"``, ``"done"``, ``"failed"`` or ``"interrupted"``.
        error: Why it failed.
        created_at: Start (ISO 8601, UTC).
        finished_at: End, or ``None``.
        directory: Its folder.
        searcher: Name of its searcher, if it asked for anything.
        arguments: The overrides of its command line.
        program: What stands before a trial's overrides on the command line; empty if that is not known.
        objectives: Name and direction of each.
        axes: The parameters.
        trials: In the order of asking.
        front: The best trials, the best of the first objective first.
        best_so_far: Of one objective: number of a finished trial and the best value until then, in the order of time.
        history: Of several: number of a finished trial and share of the final hypervolume, in the order of time.
        reference: The hypervolume's reference point.
        importance: One an objective.
        pictures: Of an architecture search: trials of the front and what their networks look like.
    """

    id: int
    status: str
    error: str | None
    created_at: str
    finished_at: str | None
    directory: str
    searcher: str | None
    arguments: list[str]
    program: str
    objectives: list[tuple[str, str]]
    axes: list[Axis]
    trials: list[Trial]
    front: list[Trial]
    best_so_far: list[tuple[int, float]]
    history: list[tuple[int, float]]
    reference: list[float]
    importance: list[Importance]
    pictures: list[tuple[Trial, Picture]] = field(default_factory=list)

    def count(self, status: str) -> int:
        """How many trials have a status."""
        return sum(trial.status == status for trial in self.trials)
