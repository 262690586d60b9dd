"""``optcore report``: list the store's runs and sweeps, and draw the Pareto front of two objectives."""

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
from lightning_optcore.jobs.sweep_reporting import sweep_line, sweep_page
from lightning_optcore.option_values import is_whole
from lightning_optcore.profiling.comparison import compare_profiles
from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.report.html import SweepLine, write_overview_report
from lightning_optcore.report.sweep_figures import number
from lightning_optcore.report.sweep_html import write_sweep_report
from lightning_optcore.report.sweep_page import SweepPage
from lightning_optcore.store import Run, Store
from lightning_optcore.store_database import without_passwords
from lightning_optcore.sweeps.journal import Journal


def run(config: DictConfig) -> None:
    """Read the store, write the overview, list the runs."""
    objective = parse_objective(config.objective)
    if len(objective) != 2:
        raise ConfigurationError(f"objective={list(objective)}: expected two names, e.g. [latency_ms,val/acc]")
    for name, lowest in (("limit", 1), ("sweep_pages", 0), ("sweep", 1)):
        number = config[name]
        if number is None and name == "sweep":
            continue
        if not is_whole(number, least=lowest):
            raise ConfigurationError(f"{name}={number!r}: expected a whole number of at least {lowest}")
    path = Path(config.store.path)
    if "://" not in config.store.path and not path.is_file():
        raise ConfigurationError(f"store.path={path}: no such file; run `optcore train` first, or name another")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if config.sweep is not None:
        _one_sweep(config, console)
        return
    with Store(config.store.path) as store:
        runs = store.runs(limit=config.limit)
        front = store.pareto_front(objective)
    known = {name for run in runs for name in run.objectives}
    for name in objective:
        if known and name not in known:
            expected = ", ".join(sorted(known))
            raise ConfigurationError(f"objective={name!r} is in none of the runs: expected one of {expected}")
    if config.compare is not None:
        _compare(config, console)
        return
    console.print(_table(runs, front, list(objective)))
    try:
        sweeps = _sweeps(config)
        report = write_overview_report(
            runs,
            front,
            list(objective),
            Path(config.report.path),
            sweeps=sweeps,
            self_contained=config.report.self_contained,
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(str(error)) from error
    for sweep in sweeps:
        if sweep.page is not None:
            _say(console, f"sweep {sweep.id}  {sweep.page}")
    _say(console, f"report  {report}")


def _sweeps(config: DictConfig) -> list[SweepLine]:
    """Write the pages of the newest sweeps and return the lines of all."""
    with Store(config.store.path) as store:
        journal = Journal(store)
        lines = []
        for i, sweep in enumerate(journal.sweeps(config.limit)):
            page = _write_sweep(config, sweep_page(journal, sweep.id)) if i < config.sweep_pages else None
            lines.append(sweep_line(journal, sweep, page))
        return lines


def _one_sweep(config: DictConfig, console: Console) -> None:
    with Store(config.store.path) as store:
        journal = Journal(store)
        known = [sweep.id for sweep in journal.sweeps()]
        if config.sweep not in known:
            there = ", ".join(map(str, known)) or "none"
            raise ConfigurationError(
                f"sweep={config.sweep}: not in {without_passwords(config.store.path)}; there are: {there}"
            )
        page = sweep_page(journal, config.sweep)
    try:
        path = _write_sweep(config, page)
    except ModuleNotFoundError as error:
        raise ConfigurationError(str(error)) from error
    for trial in page.front:
        values = ", ".join(
            f"{name} {number(value)}" for (name, _), value in zip(page.objectives, trial.objectives or (), strict=True)
        )
        _say(console, f"trial {trial.number}: {values}\n  {trial.command}")
    _say(console, f"sweep {page.id}  {path}")


def _write_sweep(config: DictConfig, page: SweepPage) -> Path:
    report = Path(config.report.path)
    path = report.with_name(f"{report.stem}_sweep_{page.id}.html")
    return write_sweep_report(page, path, self_contained=config.report.self_contained)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


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
