"""The report of a sweep, from its journal: what the page shows is computed here and in :mod:`lightning_optcore.search`.

The sweeper writes it too, and loads no torch for it.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_optcore.report.architectures import PICTURE_FILE, Picture, picture_of
from lightning_optcore.report.html import SweepLine
from lightning_optcore.report.sweep_figures import number, short
from lightning_optcore.report.sweep_html import write_sweep_report
from lightning_optcore.report.sweep_page import Axis, Importance, SweepPage, Trial
from lightning_optcore.search.importance import parameter_importance
from lightning_optcore.search.pareto import hypervolume_history, non_dominated, reference_of
from lightning_optcore.search.searcher import SearchError
from lightning_optcore.search.space import Choice, Interval, Parameter, SpaceError, described_parameter
from lightning_optcore.store import Store, now
from lightning_optcore.sweeps.engine import objective_names
from lightning_optcore.sweeps.journal import Journal, SweepRecord, TrialRecord

log = logging.getLogger(__name__)


def write_own_report(store_path: str, sweep_id: int, status: str) -> Path | None:
    """Write ``sweep_report.html`` into the folder of a sweep that is about to end.

    Args:
        store_path: Path or URL of the store; plotly.js is written once, beside it.
        sweep_id: Number of the sweep.
        status: What the sweep will end with.

    Returns:
        The file, or ``None`` without the extra ``plots``.
    """
    with Store(store_path) as store:
        page = sweep_page(Journal(store), sweep_id)
    page = replace(page, status=status, finished_at=page.finished_at or now())
    assets_dir = None if "://" in store_path else Path(store_path).parent
    try:
        path = write_sweep_report(page, Path(page.directory) / "sweep_report.html", assets_dir=assets_dir)
    except ModuleNotFoundError as error:
        log.info("no report of the sweep: %s", error)
        return None
    log.info("report of the sweep: %s", path)
    return path


def sweep_page(journal: Journal, sweep_id: int) -> SweepPage:
    """Return what the page of a sweep shows.

    Raises:
        SweepError: If there is no sweep of that number.
    """
    sweep = journal.sweep(sweep_id)
    records = journal.trials(sweep_id)
    config = _configuration(sweep)
    names = _objective_names(sweep, config)
    program = str(OmegaConf.select(config, "hydra.help.app_name", default=""))
    program = program if program.startswith("optcore ") else ""
    best = _front(sweep, records)
    # A search trains its points again by another job than its own.
    trial_program = str(OmegaConf.select(config, "trial_program", default=program))
    trials = [_trial(record, record.number in best, trial_program) for record in records]
    parameters = _parameters(sweep, records)
    done = sorted((record for record in records if record.objectives), key=lambda one: (one.finished_at, one.number))
    costs = _costs(sweep, done)
    several = len(names) > 1 and len(done) > 0
    reference = reference_of(costs) if several else np.empty(0)
    shares = hypervolume_history(costs, reference) if several else np.empty(0)
    signs = _signs(sweep)
    front = sorted((one for one in trials if one.best), key=lambda one: signs[0] * (one.objectives or [0.0])[0])
    lowest = np.minimum.accumulate(costs[:, 0]) * signs[0] if len(names) == 1 else np.empty(0)
    return SweepPage(
        id=sweep.id,
        status=status_of(sweep),
        error=sweep.error,
        created_at=sweep.created_at,
        finished_at=sweep.finished_at,
        directory=sweep.directory,
        searcher=(sweep.state or {}).get("searcher"),
        arguments=[one for one in json.loads(sweep.command)[2] if not one.startswith("hydra.mode=")],
        program=program,
        objectives=list(zip(names, sweep.directions, strict=True)),
        axes=[_axis(name, kind) for name, kind in parameters.items()],
        trials=trials,
        front=front,
        best_so_far=[(one.number, float(value)) for one, value in zip(done, lowest, strict=False)],
        history=[(one.number, float(share)) for one, share in zip(done, shares, strict=False)],
        reference=(signs * reference).tolist() if several else [],
        importance=_importance(parameters, done, names),
        pictures=_pictures(front, records),
    )


def sweep_line(journal: Journal, sweep: SweepRecord, page: Path | None) -> SweepLine:
    """Return a sweep's line in the overview."""
    records = journal.trials(sweep.id)
    names = _objective_names(sweep, _configuration(sweep))
    best = _front(sweep, records)
    found = ""
    if len(names) == 1 and best:
        values = next(record.objectives for record in records if record.number in best)
        found = f"{names[0]} {number(values[0])}" if values else ""
    elif best:
        found = f"{len(best)} on the front of {' and '.join(names)}"
    return SweepLine(
        id=sweep.id,
        status=status_of(sweep),
        created_at=sweep.created_at,
        searcher=(sweep.state or {}).get("searcher", ""),
        trials=sum(record.ended for record in records),
        failed=sum(record.status == "failed" for record in records),
        best=found,
        page=page,
    )


def status_of(sweep: SweepRecord) -> str:
    """Return a sweep's status; one that nobody runs any more was interrupted, whatever the journal says."""
    return "interrupted" if sweep.status == "running" and not sweep.owner_is_alive else sweep.status


def _configuration(sweep: SweepRecord) -> DictConfig:
    """Return the configuration that the sweep left in its folder, or nothing if that is gone."""
    try:
        config = OmegaConf.load(Path(sweep.directory) / "multirun.yaml")
    except (OSError, OmegaConfBaseException):
        return OmegaConf.create()
    return config if isinstance(config, DictConfig) else OmegaConf.create()


def _objective_names(sweep: SweepRecord, config: DictConfig) -> list[str]:
    """Return the objectives' names; an architecture search has them beside its space."""
    return list(sweep.space.get("objectives") or objective_names(config, len(sweep.directions)))


def _signs(sweep: SweepRecord) -> np.ndarray:
    return np.array([1.0 if direction == "minimize" else -1.0 for direction in sweep.directions])


def _costs(sweep: SweepRecord, done: Sequence[TrialRecord]) -> np.ndarray:
    """Return objectives with less being better, of shape (trials, objectives)."""
    values = np.array([record.objectives for record in done], dtype=float)
    return values.reshape(len(done), len(sweep.directions)) * _signs(sweep)


def _front(sweep: SweepRecord, records: Sequence[TrialRecord]) -> set[int]:
    done = [record for record in records if record.feasible]
    mask = non_dominated(_costs(sweep, done))
    return {record.number for record, best in zip(done, mask, strict=True) if best}


def _trial(record: TrialRecord, best: bool, program: str) -> Trial:
    note = record.reason if record.failure else ""
    if record.status == "pruned":
        note = note.removeprefix("pruned ")
    if record.cached_from:
        note = f"as {record.cached_from}"
    seconds = None
    if record.started_at and record.finished_at:
        passed = datetime.fromisoformat(record.finished_at) - datetime.fromisoformat(record.started_at)
        seconds = passed.total_seconds()
    return Trial(
        number=record.number,
        job_num=record.job_num,
        status=record.status,
        params=record.candidate.params,
        objectives=record.objectives,
        best=best,
        note=note,
        cached=record.cached_from is not None,
        directory=record.directory,
        seconds=seconds,
        command=" ".join([*program.split(), shlex.join(record.overrides)]),
    )


def _pictures(front: Sequence[Trial], records: Sequence[TrialRecord]) -> list[tuple[Trial, Picture]]:
    """Return the pictures that trials of the front left in their folders."""
    by_number = {record.number: record for record in records}
    found = []
    for trial in front:
        record = by_number[trial.number]
        # What builds the same network as an earlier trial was not trained again, and has no folder.
        source = re.fullmatch(rf"trial (\d+) of sweep {record.sweep_id}", record.cached_from or "")
        drawn = by_number.get(int(source[1]), record) if source is not None else record
        if drawn.directory is None:
            continue
        path = Path(drawn.directory) / PICTURE_FILE
        try:
            found.append((trial, picture_of(json.loads(path.read_text(encoding="utf-8")))))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("%s: not shown: %s", path, error)
    return found


def _parameters(sweep: SweepRecord, records: Sequence[TrialRecord]) -> dict[str, Parameter]:
    """Return the parameters as the space describes them, but for the one that stands for an empty space."""
    parameters: dict[str, Parameter] = {}
    for name, text in sweep.space["parameters"].items():
        tried = {short(one.candidate.params[name]): one.candidate.params[name] for one in records
                 if name in one.candidate.params}  # fmt: skip
        try:
            kind = described_parameter(name, text)
            for value in tried.values():
                kind.gene(value)
        except SpaceError:
            # A value that JSON does not know was described by its text: what was tried stands for the space.
            if not tried:
                continue
            kind = Choice(tuple(tried.values()))
        if name:
            parameters[name] = kind
    return parameters


def _axis(name: str, kind: Parameter) -> Axis:
    if isinstance(kind, Choice) and not kind.ordered:
        return Axis(name, "choice", list(kind.values))
    if isinstance(kind, Choice):
        # Numbers that grow by factors stand evenly on a log axis; a few of any kind are ticks of their own.
        return Axis(name, "choice" if kind.count <= 12 else "linear", list(kind.values))
    return Axis(name, "log" if isinstance(kind, Interval) and kind.log else "linear")


def _importance(
    parameters: Mapping[str, Parameter], done: Sequence[TrialRecord], names: Sequence[str]
) -> list[Importance]:
    points: list[dict[str, Any]] = [record.candidate.params for record in done]
    if not parameters:
        return []
    found = []
    for i, name in enumerate(names):
        try:
            one = parameter_importance(parameters, points, [(record.objectives or [])[i] for record in done])
        except SearchError as error:
            found.append(Importance(name, [], str(error)))
            continue
        ranked = sorted(one.values, key=one.values.__getitem__, reverse=True)
        note = f"the forest explains {max(one.explained, 0.0):.0%} of the variance in {one.trials} trials"
        if one.explained < 0.2:
            note += ", too little to trust the bars"
        found.append(Importance(name, [(key, one.values[key], one.errors[key]) for key in ranked], note))
    return found
