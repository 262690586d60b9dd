"""What a sweep leaves in its folder: Hydra's ``optimization_results.yaml``, and every trial in a table."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_optcore.files import write_atomically
from lightning_optcore.search.searcher import Candidate, Searcher
from lightning_optcore.sweeps.journal import TrialRecord


def write_results(
    directory: Path, sweep_id: int, searcher: Searcher, objectives: Sequence[str], records: Sequence[TrialRecord]
) -> None:
    """Write ``optimization_results.yaml`` and ``trials.csv``."""
    by_number = {record.number: record for record in records}
    solutions: list[dict[str, Any]] = [
        {
            "trial": trial.candidate.id,
            "params": trial.params,
            "values": list(trial.objectives or ()),
            "overrides": _overrides(by_number.get(trial.candidate.id)),
            **_lineage(by_number, trial.candidate),
        }
        for trial in searcher.pareto_front()
    ]
    content: dict[str, Any] = {
        "name": "optcore",
        "searcher": type(searcher).__name__,
        "sweep": sweep_id,
        "objectives": dict(zip(objectives, searcher.directions, strict=True)),
        "trials": len(records),
        "failed": sum(record.status == "failed" for record in records),
        "pruned": sum(record.status == "pruned" for record in records),
    }
    if len(searcher.directions) == 1 and solutions:
        best = solutions[0]
        content |= {"best_params": best["params"], "best_value": best["values"][0], "best_overrides": best["overrides"]}
        content |= {f"best_{name}": best[name] for name in ("trial", "lineage") if "lineage" in best}
    else:
        content["solutions"] = solutions
    write_atomically(directory / "optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
    write_atomically(directory / "trials.csv", _table(searcher, objectives, records))


def _overrides(record: TrialRecord | None) -> str:
    return "" if record is None else shlex.join(record.overrides)


def _lineage(records: Mapping[int, TrialRecord], candidate: Candidate) -> dict[str, Any]:
    """Return how a candidate came to its weights, trial by trial, where it did not start anew."""
    path = [candidate]
    while (parent := path[-1].parent) is not None:
        path.append(records[parent].candidate)
    if len(path) == 1:
        return {}
    return {"lineage": [{"trial": one.id, "overrides": _overrides(records.get(one.id))} for one in reversed(path)]}


def _table(searcher: Searcher, objectives: Sequence[str], records: Sequence[TrialRecord]) -> str:
    names = list(searcher.space.parameters)
    best = {trial.candidate.id for trial in searcher.pareto_front()}
    text = io.StringIO()
    writer = csv.writer(text)
    known = ["started_at", "finished_at", "directory", "cached_from", "failure"]
    writer.writerow(["trial", "job", "status", "pareto", "origin", "parent", *names, *objectives, *known])
    for record in records:
        values: Sequence[Any] = record.objectives or [""] * len(objectives)
        failure = record.reason if record.failure else None
        described = [record.started_at, record.finished_at, record.directory, record.cached_from, failure]
        mark = int(record.number in best)
        chosen = [record.candidate.params.get(name) for name in names]
        candidate = record.candidate
        found = [record.number, record.job_num, record.status, mark, candidate.origin, candidate.parent]
        writer.writerow([*found, *chosen, *values, *described])
    return text.getvalue()
