"""What a sweep or a search that was killed continues from: its journal, as its searcher is told it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_optcore.search.searcher import Trial, trial_dict
from lightning_optcore.sweeps.journal import Journal, SweepRecord, TrialRecord


@dataclass(frozen=True)
class Continuation:
    """Where a sweep was.

    Args:
        batch: Number of its newest batch.
        state: Of its searcher, with the trials that it was told.
        told: These trials.
        ended: Every trial that has a result, whether or not the searcher was told it.
        unfinished: Every one that has none, and runs again.
    """

    batch: int
    state: dict[str, Any]
    told: list[TrialRecord]
    ended: list[TrialRecord]
    unfinished: list[TrialRecord]


def continuation_of(journal: Journal, sweep: SweepRecord) -> Continuation | None:
    """Return where a sweep was; ``None`` if it had not asked for anything yet."""
    if sweep.state is None:
        return None
    trials = journal.trials(sweep.id)
    waiting = {one["id"] for one in sweep.state["pending"]}
    told = [trial for trial in trials if trial.number not in waiting]
    return Continuation(
        batch=max(trial.batch for trial in trials),
        state={**sweep.state, "trials": [trial_dict(told_of(trial, len(sweep.directions))) for trial in told]},
        told=told,
        ended=[trial for trial in trials if trial.ended],
        unfinished=[trial for trial in trials if not trial.ended],
    )


def relaunched(
    journal: Journal, sweep: SweepRecord, unfinished: list[TrialRecord], first_job_num: int
) -> list[TrialRecord]:
    """Give trials that run again job numbers of their own, and return them so."""
    numbers = [trial.number for trial in unfinished]
    journal.renumber(sweep.id, numbers, first_job_num)
    return [trial for trial in journal.trials(sweep.id) if trial.number in numbers]


def told_of(record: TrialRecord, directions: int) -> Trial:
    """Return a trial as its searcher is told it.

    Args:
        record: A trial that ended.
        directions: How many objectives there are.
    """
    if record.objectives is None and not record.violation:
        return Trial(record.candidate, failure=record.reason)
    # What was never evaluated has no objectives; by how much it exceeds its limits ranks it behind all others.
    return Trial(record.candidate, tuple(record.objectives or [0.0] * directions), violation=record.violation)
