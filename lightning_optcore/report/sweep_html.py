"""Write the report of a sweep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from lightning_optcore.report import sweep_figures
from lightning_optcore.report.architecture_svg import KINDS, svgs_of
from lightning_optcore.report.architectures import Picture
from lightning_optcore.report.figures import fragment
from lightning_optcore.report.html import write_page
from lightning_optcore.report.sweep_page import SweepPage, Trial

# A table of more rows is slow to load; trials.csv in the sweep's folder has all.
_MOST_ROWS = 1_000
_MOST_COLUMNS = 6
_MOST_PICTURES = 30


def write_sweep_report(
    page: SweepPage, path: str | Path, *, assets_dir: str | Path | None = None, self_contained: bool = False
) -> Path:
    """Write the report of a sweep: front, architectures, history, parallel coordinates, importance, overrides, trials.

    Args:
        page: The sweep.
        path: The file to write.
        assets_dir: Folder of plotly.js, written there once for all reports; the report's own by default.
        self_contained: Put plotly.js into the file instead (4.8 MB).

    Raises:
        ModuleNotFoundError: If Plotly is not installed; the message names the extra.
        OSError: If the file cannot be written; nothing is left half-written.
    """
    target = Path(path)
    finished = sum(bool(trial.objectives) for trial in page.trials)
    shown = _shown(page.trials)
    names = [axis.name for axis in page.axes if axis.name]
    bars = [one for one in page.importance if one.bars]
    pictures = page.pictures[:_MOST_PICTURES]
    layers = [layer for _, picture in pictures for layer in picture.layers]
    widest = max((layer.width for layer in layers), default=1)
    kinds = {layer.kind if layer.kind in KINDS else KINDS[-1] for layer in layers}
    return write_page(
        "sweep.html.j2",
        target,
        assets_dir,
        self_contained,
        page=page,
        front=_drawn(sweep_figures.front_figure(page)) if finished else None,
        history=_drawn(sweep_figures.history_figure(page)) if len(page.history) > 1 else None,
        parallel=_drawn(sweep_figures.parallel_figure(page)) if finished > 1 and names else None,
        importance=_drawn(sweep_figures.importance_figure(bars)) if bars else None,
        pictures=[(trial, svgs_of(picture, widest), _unseen(trial, picture)) for trial, picture in pictures],
        pictures_left_out=len(page.pictures) - len(pictures),
        kinds=[(i, kind) for i, kind in enumerate(KINDS) if kind in kinds],
        columns=names if len(names) <= _MOST_COLUMNS else [],
        rows=[(trial, _link(trial, target), _folder(trial, page)) for trial in shown],
        left_out=len(page.trials) - len(shown),
        absent=any(name not in trial.params for trial in page.trials for name in names),
        noted=any(trial.note for trial in shown),
        cached=sum(trial.cached for trial in page.trials),
        ended=sum(page.count(status) for status in ("done", "failed", "pruned")),
        reference=", ".join(
            f"{name} {sweep_figures.short(value)}"
            for (name, _), value in zip(page.objectives, page.reference, strict=False)
        ),
        short=sweep_figures.short,
        number=sweep_figures.number,
    )


def _drawn(figure: Any) -> Markup:
    return Markup(fragment(figure))


def _unseen(trial: Trial, picture: Picture) -> str:
    """Return the choices that a picture of cells does not show; layers show them all, in their way."""
    if not picture.cells:
        return ""
    chosen = trial.params.items()
    return ", ".join(f"{name}={sweep_figures.short(value)}" for name, value in chosen if name not in picture.labels)


def _shown(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of the table: those of the front, and the newest."""
    best = [trial for trial in trials if trial.best][:_MOST_ROWS]
    others = [trial for trial in trials if not trial.best][::-1][: _MOST_ROWS - len(best)]
    return sorted([*best, *others], key=lambda trial: trial.number)


def _link(trial: Trial, page: Path) -> str | None:
    if trial.directory is None:
        return None
    report = Path(trial.directory) / "report.html"
    return quote(_relative(report, page.parent)) if report.is_file() else None


def _folder(trial: Trial, page: SweepPage) -> str:
    return _relative(Path(trial.directory), Path(page.directory)) if trial.directory is not None else ""


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
