"""What a sweep leaves in its folder: Hydra's ``optimization_results.yaml``, and every trial in a table."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_optcore.files import write_atomically
from lightning_optcore.search.searcher import Searcher
from lightning_optcore.sweeps.journal import TrialRecord


def write_results(
    directory: Path, sweep_id: int, searcher: Searcher, objectives: Sequence[str], records: Sequence[TrialRecord]
) -> None:
    """Write ``optimization_results.yaml`` and ``trials.csv``."""
    overrides = {record.number: record.overrides for record in records}
    solutions: list[dict[str, Any]] = [
        {
            "trial": trial.candidate.id,
            "params": trial.params,
            "values": list(trial.objectives or ()),
            "overrides": shlex.join(overrides.get(trial.candidate.id, [])),
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
    else:
        content["solutions"] = solutions
    write_atomically(directory / "optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
    write_atomically(directory / "trials.csv", _table(searcher, objectives, records))


def _table(searcher: Searcher, objectives: Sequence[str], records: Sequence[TrialRecord]) -> str:
    names = list(searcher.space.parameters)
    best = {trial.candidate.id for trial in searcher.pareto_front()}
    text = io.StringIO()
    writer = csv.writer(text)
    known = ["started_at", "finished_at", "directory", "cached_from", "failure"]
    writer.writerow(["trial", "job", "status", "pareto", "origin", *names, *objectives, *known])
    for record in records:
        values: Sequence[Any] = record.objectives or [""] * len(objectives)
        failure = record.failure.splitlines()[0] if record.failure else None
        described = [record.started_at, record.finished_at, record.directory, record.cached_from, failure]
        mark = int(record.number in best)
        chosen = [record.candidate.params.get(name) for name in names]
        writer.writerow(
            [record.number, record.job_num, record.status, mark, record.candidate.origin, *chosen, *values, *described]
        )
    return text.getvalue()
