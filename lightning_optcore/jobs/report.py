"""``optcore report``: list the store's runs and draw the Pareto front of two objectives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.objective import parse_objective
from lightning_optcore.profiling.comparison import compare_profiles
from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.report.html import write_overview_report
from lightning_optcore.store import Run, Store


def run(config: DictConfig) -> None:
    """Read the store, write the overview, list the runs."""
    objective = parse_objective(config.objective)
    if len(objective) != 2:
        raise ConfigurationError(f"objective={list(objective)}: expected two names, e.g. [latency_ms,val/acc]")
    if isinstance(config.limit, bool) or not isinstance(config.limit, int) or config.limit < 1:
        raise ConfigurationError(f"limit={config.limit!r}: expected a whole number of at least 1")
    path = Path(config.store.path)
    if "://" not in config.store.path and not path.is_file():
        raise ConfigurationError(f"store.path={path}: no such file; run `optcore train` first, or name another")
    with Store(config.store.path) as store:
        runs = store.runs(limit=config.limit)
        front = store.pareto_front(objective)
    known = {name for run in runs for name in run.objectives}
    for name in objective:
        if known and name not in known:
            expected = ", ".join(sorted(known))
            raise ConfigurationError(f"objective={name!r} is in none of the runs: expected one of {expected}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if config.compare is not None:
        _compare(config, console)
        return
    console.print(_table(runs, front, list(objective)))
    try:
        report = write_overview_report(
            runs,
            front,
            list(objective),
            Path(config.report.path),
            self_contained=config.report.self_contained,
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(str(error)) from error
    console.print(f"report  {report}", soft_wrap=True, highlight=False, markup=False)


def _compare(config: DictConfig, console: Console) -> None:
    chosen = list(config.compare) if isinstance(config.compare, ListConfig) else config.compare
    if not isinstance(chosen, list) or len(chosen) != 2 or not all(isinstance(one, int) for one in chosen):
        raise ConfigurationError(f"compare={chosen}: expected the numbers of two runs, e.g. [3,7]")
    reports = []
    with Store(config.store.path) as store:
        for number in chosen:
            store.run(number)
            profile = store.profiles(number).get("fit")
            if profile is None:
                raise ConfigurationError(
                    f"compare={chosen}: run {number} has no profile; run it with callbacks=profiler"
                )
            reports.append(ProfileReport.from_json(json.dumps(profile)))
    try:
        changes = compare_profiles(reports[0], reports[1])
    except ValueError as error:
        raise ConfigurationError(f"compare={chosen}: {error}") from error
    table = Table(caption="median ms a step; * more than noise (p <= .01, permutation test)")
    for title in ("phase", f"run {chosen[0]}", f"run {chosen[1]}", "change", "p"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for one in changes:
        ratio = f"{one.second_ms / one.first_ms:.2f}x" if one.first_ms > 0 else "-"
        mark = " *" if one.significant else ""
        table.add_row(one.name, f"{one.first_ms:.4g}", f"{one.second_ms:.4g}", ratio + mark, f"{one.p_value:.2g}")
    console.print(table)


def _table(runs: list[Run], front: list[Run], objectives: list[str]) -> Table:
    table = Table(caption="* on the Pareto front")
    for title in ("run", "job", "status", "started", *objectives, "overrides"):
        table.add_column(title, justify="right" if title in objectives or title == "run" else "left")
    best = {run.id for run in front}
    for run in runs:
        known = run.objectives
        figures = [f"{known[name]:.4g}" if name in known else "-" for name in objectives]
        mark = "*" if run.id in best else ""
        overrides = escape(" ".join(run.overrides))
        table.add_row(f"{run.id}{mark}", run.job, run.status, run.created_at[:19], *figures, overrides)
    return table
