"""One trial of an architecture search, in whatever process: it evaluates, and writes down what came of it."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_optcore.nas.limits import described_excess, excess_of, violation_of
from lightning_optcore.nas.space import Architecture
from lightning_optcore.sweeps.journal import TrialRecord, open_journal
from lightning_optcore.sweeps.task import TrialPrunedError, described, named_trial

Evaluate = Callable[[Architecture], Mapping[str, float]]

# Stands in every failure of a name that no metric has.
UNREPORTED = "was never reported: expected one of"


def run_trial(
    evaluate: Evaluate,
    record: TrialRecord,
    store: str,
    objectives: Sequence[str],
    limits: Mapping[str, float],
    directory: str,
) -> None:
    """Evaluate one architecture and write its result to the journal.

    Args:
        evaluate: Returns numbers by name for an architecture.
        record: The trial as it was asked for.
        store: Path or URL of the store.
        objectives: Names of what is searched for.
        limits: What is checked with the numbers that came.
        directory: Folder of the trial.
    """
    journal = open_journal(store)
    assert record.job_num is not None
    record, _ = journal.start_trial(record.sweep_id, record.job_num, directory, None)
    if record.status == "done":
        # By an attempt before this one, whose machine was lost after it.
        return
    try:
        with named_trial(record.sweep_id, record.number, store):
            metrics = dict(_evaluated(evaluate, dict(record.candidate.params)))
    except TrialPrunedError as error:
        journal.end_trial(record, None, failure=f"pruned {error}", status="pruned")
        return
    except Exception as error:
        journal.end_trial(record, None, failure=described(error))
        return
    values, failure = _objectives(metrics, objectives)
    missing = [name for name in limits if name not in metrics and not hasattr(evaluate, "estimate")]
    if failure is None and missing:
        failure = f"constraints.{missing[0]} {UNREPORTED} {', '.join(sorted(metrics))}"
    if failure is not None:
        journal.end_trial(record, None, failure=failure)
        return
    excess = excess_of(metrics, limits)
    failure = described_excess(excess) or None
    journal.end_trial(record, values, failure=failure, status="done", violation=violation_of(excess))


def _evaluated(evaluate: Evaluate, architecture: Architecture) -> Mapping[str, float]:
    try:
        metrics = evaluate(architecture)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from end
        raise RuntimeError(f"the evaluation ended with exit code {end.code}") from end
    if not isinstance(metrics, Mapping):
        raise TypeError(f"evaluate returned {metrics!r:.100}: expected numbers by name, e.g. {{'acc': 0.9}}")
    return metrics


def _objectives(metrics: Mapping[str, Any], names: Sequence[str]) -> tuple[list[float], str | None]:
    """Return the objectives, or why there are none."""
    for name in names:
        if name not in metrics:
            return [], f"objective {name!r} {UNREPORTED} {', '.join(sorted(map(str, metrics))) or 'nothing'}"
    try:
        values = [float(metrics[name]) for name in names]
    except (TypeError, ValueError) as error:
        return [], f"objectives {list(names)}: {error}"
    bad = [f"{name} is {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    return values, "; ".join(bad) or None
