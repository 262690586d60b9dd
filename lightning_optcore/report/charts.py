"""Charts as files: png, svg or pdf (matplotlib, extra ``plots``). No browser is needed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg", "pdf")


def line(path: str | Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str = "",
         x_label: str = "", y_label: str = "", stacked: bool = False) -> Path:  # fmt: skip
    """Draw lines, or stacked areas.

    Args:
        path: The file; its ending picks the format.
        series: (x, y) by name; stacked areas share the first one's x.
        title: Above the chart.
        x_label: Below it.
        y_label: Beside it.
        stacked: Draw areas, one above the other.

    Raises:
        ValueError: If the ending is not one of png, svg, pdf.
        ModuleNotFoundError: If matplotlib is not installed; the message names the extra.

    Example:
        >>> line(tempfile.mkdtemp() + "/chart.svg", {"loss": ([0, 1, 2], [3.0, 2.0, 1.5])}).name
        'chart.svg'
    """
    figure, axes = _axes(path, title, x_label, y_label)
    if stacked:
        x = next(iter(series.values()))[0]
        axes.stackplot(x, *(y for _, y in series.values()), labels=list(series))
    else:
        for name, (x, y) in series.items():
            axes.plot(x, y, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _saved(figure, path)


def bar(path: str | Path, values: Mapping[str, float], *, title: str = "", x_label: str = "") -> Path:
    """Draw one horizontal bar for each value.

    Args:
        path: As in :func:`line`.
        values: Lengths by name, the first on top.
        title: Above the chart.
        x_label: Below it.

    Raises:
        ValueError: As in :func:`line`.
        ModuleNotFoundError: As in :func:`line`.
    """
    figure, axes = _axes(path, title, x_label, "")
    axes.barh(list(values)[::-1], list(values.values())[::-1])
    return _saved(figure, path)


def heatmap(path: str | Path, rows: Mapping[str, Sequence[float]], *, columns: Sequence[str] = (), title: str = "",
            x_label: str = "") -> Path:  # fmt: skip
    """Draw a field of colours, one row for each name.

    Args:
        path: As in :func:`line`.
        rows: Values by name, all of one length.
        columns: Names of the columns.
        title: Above the chart.
        x_label: Below it.

    Raises:
        ValueError: As in :func:`line`.
        ModuleNotFoundError: As in :func:`line`.
    """
    figure, axes = _axes(path, title, x_label, "")
    image = axes.imshow(list(rows.values()), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows))
    if columns:
        axes.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right")
    figure.colorbar(image, ax=axes)
    return _saved(figure, path)


def profile_charts(profile: Mapping[str, Any], folder: str | Path, file_format: str = "png") -> list[Path]:
    """Draw the charts of a profile: shares, phases over time, and the machine over time.

    Args:
        profile: What ``profile.json`` holds.
        folder: Where the files go.
        file_format: ``"png"``, ``"svg"`` or ``"pdf"``.

    Raises:
        ValueError: As in :func:`line`.
        ModuleNotFoundError: As in :func:`line`.
    """
    folder = Path(folder)
    phases = {name: 100 * phase["share"] for name, phase in profile["phases"].items() if phase["share"] >= 0.001}
    ranked = dict(sorted(phases.items(), key=lambda item: -item[1]))
    drawn = [bar(folder / f"shares.{file_format}", ranked, title="share of the time", x_label="percent")]
    timeline = profile.get("timeline") or {}
    if timeline:
        seconds = timeline["seconds"]
        series = {name: (seconds, values) for name, values in timeline["phases"].items()}
        path = folder / f"phases.{file_format}"
        drawn.append(line(path, series, title="ms a step", x_label="seconds", stacked=True))
        if timeline["system"]:
            path = folder / f"machine.{file_format}"
            shades = {name: _spread(values) for name, values in timeline["system"].items()}
            drawn.append(heatmap(path, shades, title="the machine, each row from its lowest to its highest"))
    return drawn


def _spread(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _axes(path: str | Path, title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    ending = Path(path).suffix.lstrip(".")
    if ending not in FORMATS:
        raise ValueError(f"{path}: expected one of the endings {', '.join(FORMATS)}")
    try:
        # Without pyplot: no global state, no window system.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('charts need matplotlib: pip install "lightning-optcore[plots]"') from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    return figure, axes


def _saved(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".chart-", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        figure.savefig(temporary)
        temporary.replace(target)
    return target
