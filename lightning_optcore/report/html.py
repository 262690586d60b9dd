"""Write the report of one run, and the overview of all runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_optcore.files import write_atomically
from lightning_optcore.measurement.comparison import Comparison, compare
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.report import figures, profile_figures
from lightning_optcore.report.continual_figures import matrix_figure
from lightning_optcore.store import Run


@dataclass(frozen=True)
class SweepLine:
    """A sweep in the overview.

    Args:
        id: Its number.
        status: As on its page.
        created_at: Start (ISO 8601, UTC).
        searcher: Name of its searcher.
        trials: How many ended.
        failed: How many of them failed.
        best: What it found, in some words.
        page: Its own page, if that was written.
    """

    id: int
    status: str
    created_at: str
    searcher: str
    trials: int
    failed: int
    best: str
    page: Path | None


def write_run_report(
    run: Run,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    *,
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    history: Sequence[tuple[int, Mapping[str, Any]]] = (),
    matrix: Mapping[str, Any] | None = None,
    assets_dir: str | Path | None = None,
    self_contained: bool = False,
) -> Path:
    """Write the report of one run: before and after, profile, learning curves, recipe, environment, command.

    Args:
        run: The run.
        curves: Its learning curves: (step, value) by name.
        path: The file to write.
        profiles: What the profiler said, by stage.
        history: Profiles of the same configuration: (run, profile), oldest first.
        matrix: Of a sequence of tasks: what :func:`matrix_figure` draws, and its ``summary``: figures by name.
        assets_dir: Folder of plotly.js, written there once for all reports; the report's own by default.
        self_contained: Put plotly.js into the file instead (4.8 MB).

    Raises:
        ModuleNotFoundError: If Plotly is not installed; the message names the extra.
        OSError: If the file cannot be written; nothing is left half-written.
    """
    measurements: dict[str, Measurement] = {
        role: run.measurements[role] for role in ("before", "after") if role in run.measurements
    }
    drawn = [figures.latency_figure(measurements), figures.size_figure(measurements)] if measurements else []
    both = compare(measurements["before"], measurements["after"]) if len(measurements) == 2 else None
    last = list(measurements.values())[-1] if measurements else None
    return write_page(
        "run.html.j2",
        Path(path),
        assets_dir,
        self_contained,
        run=run,
        rows=_rows(measurements),
        roles=list(measurements),
        note=both.note if both is not None else "",
        cards=_cards(both),
        figures=[Markup(fragment) for fragment in drawn],
        curves=Markup(figures.curves_figure(curves)) if curves else "",
        profiles=[(stage, profile, _profile_figures(profile)) for stage, profile in (profiles or {}).items()],
        matrix=Markup(figures.fragment(matrix_figure(matrix))) if matrix is not None and matrix["rows"] else "",
        transfers=[(name.replace("_", " "), f"{v:+.4f}") for name, v in matrix["summary"].items()] if matrix else [],
        history=Markup(figures.fragment(profile_figures.history_figure(history))) if len(history) > 1 else "",
        recipe=(run.recipe or {}).get("steps", []),
        environment=_environment(last),
        config=json.dumps(run.config, indent=2),
        command=shlex.join(["optcore", run.job, *run.overrides]),
    )


def write_overview_report(
    runs: Sequence[Run],
    front: Sequence[Run],
    objectives: Sequence[str],
    path: str | Path,
    *,
    sweeps: Sequence[SweepLine] = (),
    assets_dir: str | Path | None = None,
    self_contained: bool = False,
) -> Path:
    """Write the overview: all sweeps, all runs, and the Pareto front of two objectives.

    Args:
        runs: The runs to list.
        front: Those on the front.
        objectives: Names of the two objectives; the first one is the abscissa.
        path: The file to write.
        sweeps: The sweeps to list.
        assets_dir: As in :func:`write_run_report`.
        self_contained: As in :func:`write_run_report`.

    Raises:
        ModuleNotFoundError: If Plotly is not installed; the message names the extra.
        OSError: If the file cannot be written; nothing is left half-written.
    """
    target = Path(path)
    missing = [run.id for run in runs if any(name not in run.objectives for name in objectives)]
    return write_page(
        "overview.html.j2",
        target,
        assets_dir,
        self_contained,
        runs=[(run, _link(run, target), [run.objectives.get(name) for name in objectives]) for run in runs],
        objectives=list(objectives),
        best={run.id for run in front},
        missing=missing,
        sweeps=[(sweep, _link_to(sweep.page, target)) for sweep in sweeps],
        figure=Markup(figures.pareto_figure(runs, front, objectives)),
    )


def _profile_figures(profile: Mapping[str, Any]) -> list[Markup]:
    drawn = [profile_figures.shares_figure(profile)]
    if profile.get("timeline"):
        drawn.append(profile_figures.phases_figure(profile["timeline"]))
        if profile["timeline"]["system"]:
            drawn.append(profile_figures.utilisation_figure(profile["timeline"]))
    if len(profile.get("ranks", ())) > 1:
        drawn.append(profile_figures.ranks_figure(profile["ranks"]))
    return [Markup(figures.fragment(figure)) for figure in drawn]


def write_page(template: str, path: Path, assets_dir: str | Path | None, self_contained: bool, **values: Any) -> Path:
    """Write a page from its template."""
    environment = Environment(
        loader=PackageLoader("lightning_optcore.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    values["plotly_tag"] = _plotly_tag(path, Path(assets_dir or path.parent), self_contained)
    write_atomically(path, environment.get_template(template).render(**values))
    return path


def _plotly_tag(path: Path, assets_dir: Path, self_contained: bool) -> Markup:
    _, offline = figures.plotly()
    if self_contained:
        return Markup("<script>{}</script>").format(Markup(offline.get_plotlyjs()))
    script = assets_dir / f"plotly-{offline.get_plotlyjs_version()}.min.js"
    if not script.exists():
        assets_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(script, offline.get_plotlyjs())
    relative = Path(os.path.relpath(script.resolve(), path.resolve().parent)).as_posix()
    return Markup('<script src="{}"></script>').format(quote(relative))


def _rows(measurements: Mapping[str, Measurement]) -> list[tuple[str, list[str], str]]:
    """Return (quantity, one text per measurement, change) for the table."""
    if not measurements:
        return []
    first, *_, last = [*measurements.values(), *measurements.values()]
    rows = []
    for row in compare(first, last).rows:
        digits = 4 if row.kind == "quality" else None
        values = [row.before, row.after][: len(measurements)]
        spread = _spreads(measurements, row.name)
        texts = [_number(value, digits) + noise for value, noise in zip(values, spread, strict=True)]
        rows.append((row.name, texts, row.change if len(measurements) > 1 else ""))
    return rows


def _spreads(measurements: Mapping[str, Measurement], name: str) -> list[str]:
    quantity, _, size = name.partition("/")
    texts = []
    for measurement in measurements.values():
        known = quantity == "latency_ms" and size.isdigit() and int(size) in measurement.latency_ms
        texts.append(f" ± {measurement.latency_ms[int(size)].spread:.2g}" if known else "")
    return texts


def _number(value: float | None, digits: int | None) -> str:
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cards(both: Comparison | None) -> list[tuple[str, str]]:
    if both is None:
        return []
    cards = []
    for row in both.rows:
        if row.name == "size_bytes" and row.ratio is not None:
            cards.append((f"{row.ratio:.2f}x", "of the bytes"))
        elif row.name.startswith("latency_ms/") and row.ratio:
            cards.append((f"{1 / row.ratio:.1f}x", f"as fast at batch {row.name.partition('/')[2]}"))
        elif row.kind == "quality" and row.difference is not None:
            cards.append((f"{row.difference:+.4f}", row.name))
    return cards


def _environment(measurement: Measurement | None) -> list[tuple[str, str]]:
    if measurement is None:
        return []
    return [
        ("hardware", measurement.hardware),
        ("device", measurement.device),
        ("threads", str(measurement.num_threads)),
        *measurement.versions.items(),
        ("measured at", measurement.measured_at),
    ]


def _link(run: Run, overview: Path) -> str | None:
    if run.directory is None:
        return None
    return _link_to(Path(run.directory) / "report.html", overview)


def _link_to(page: Path | None, overview: Path) -> str | None:
    if page is None or not page.is_file():
        return None
    return quote(Path(os.path.relpath(page.resolve(), overview.resolve().parent)).as_posix())
