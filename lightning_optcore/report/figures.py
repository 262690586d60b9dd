"""Interactive figures as HTML fragments (Plotly, extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.store import Run

COLORS = {"before": "#7a8699", "after": "#0b8f6a"}
_GRID = "rgba(128,128,128,0.25)"
_TEXT = "#808894"


def plotly() -> tuple[ModuleType, ModuleType]:
    """Return ``plotly.graph_objects`` and ``plotly.offline``.

    Raises:
        ModuleNotFoundError: If Plotly is not installed; the message names the extra.
    """
    try:
        import plotly.graph_objects
        import plotly.offline
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reports need Plotly: pip install "lightning-optcore[plots]" (or set report.enabled=false)'
        ) from error
    return plotly.graph_objects, plotly.offline


def latency_figure(measurements: Mapping[str, Measurement]) -> str:
    """Bars of the p50 latency per batch size; the whisker reaches to p90."""
    go, _ = plotly()
    bars = []
    for role, measurement in measurements.items():
        values = measurement.latency_ms
        bars.append(
            go.Bar(
                name=role,
                x=[f"batch {size}" for size in values],
                y=[latency.p50 for latency in values.values()],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [latency.p90 - latency.p50 for latency in values.values()],
                    "arrayminus": [0.0 for _ in values],
                },
                marker_color=COLORS.get(role),
            )
        )
    return fragment(styled(go.Figure(bars), "latency in ms, p50 with p90", y_log=True))


def size_figure(measurements: Mapping[str, Measurement]) -> str:
    """Bars of the bytes on disk."""
    go, _ = plotly()
    bar = go.Bar(
        x=list(measurements),
        y=[measurement.size_bytes / 1e6 for measurement in measurements.values()],
        marker_color=[COLORS.get(role) for role in measurements],
    )
    return fragment(styled(go.Figure(bar), "size in MB", legend=False))


def curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Lines of every logged metric over the training step."""
    go, _ = plotly()
    lines = [
        go.Scatter(
            name=plain(name),
            x=[step for step, _ in points],
            y=[value if math.isfinite(value) else None for _, value in points],
            mode="lines+markers",
        )
        for name, points in curves.items()
    ]
    return fragment(styled(go.Figure(lines), "metrics over training steps"))


def pareto_figure(runs: Sequence[Run], front: Sequence[Run], objectives: Sequence[str]) -> str:
    """Points of two objectives; the front is a line through the runs that no other one beats."""
    go, _ = plotly()
    x, y = objectives
    known = [run for run in runs if x in run.objectives and y in run.objectives]
    best = sorted(front, key=lambda run: run.objectives[x])

    def points(of: Sequence[Run], **style: Any) -> Any:
        return go.Scatter(
            x=[run.objectives[x] for run in of],
            y=[run.objectives[y] for run in of],
            text=[plain(f"run {run.id}: {' '.join(run.overrides) or 'no overrides'}") for run in of],
            hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
            **style,
        )

    figure = go.Figure(
        [
            points(known, name="runs", mode="markers", marker={"color": COLORS["before"], "size": 9}),
            points(
                best,
                name="Pareto front",
                mode="lines+markers",
                line={"color": COLORS["after"], "shape": "hv"},
                marker={"size": 12},
            ),
        ]
    )
    figure.update_xaxes(title=plain(x))
    figure.update_yaxes(title=plain(y))
    return fragment(styled(figure, ""))


def plain(text: str) -> str:
    """Plotly reads a subset of HTML in its texts: the user's names must come out as they are."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def styled(figure: Any, title: str, *, legend: bool = True, y_log: bool = False, stacked: bool = False) -> Any:
    """Return a figure in the style of the reports."""
    figure.update_layout(
        title={"text": title, "font": {"size": 14}},
        height=340,
        margin={"l": 60, "r": 16, "t": 48 if title else 16, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "color": _TEXT},
        showlegend=legend,
        legend={"orientation": "h", "y": -0.18},
        barmode="stack" if stacked else "group",
        template="none",
    )
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zerolinecolor=_GRID, automargin=True)
    if y_log:
        figure.update_yaxes(type="log")
    return figure


def fragment(figure: Any) -> str:
    """Return a figure as HTML, without plotly.js itself."""
    _, offline = plotly()
    return str(
        offline.plot(
            figure,
            output_type="div",
            include_plotlyjs=False,
            config={"displaylogo": False, "responsive": True},
        )
    )
