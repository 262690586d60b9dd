"""Figures of a profile (Plotly, extra ``plots``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optcore.report.figures import plotly, styled

# One colour a phase in every figure, by its meaning: waiting is warm, computing is cool.
_COLORS = {
    "data_wait": "#d1495b",
    "transfer": "#edae49",
    "forward": "#00798c",
    "backward": "#30638e",
    "communication": "#e07a5f",
    "optimizer": "#52489c",
    "logging": "#b5838d",
    "callback": "#a47148",
    "validation": "#59a96a",
    "checkpoint": "#9bc53d",
    "garbage_collection": "#c5283d",
    "other": "#7a8699",
}


def shares_figure(profile: Mapping[str, Any]) -> Any:
    """Bars of the share of each phase."""
    go, _ = plotly()
    phases = {name: phase["share"] for name, phase in profile["phases"].items() if phase["share"] >= 0.001}
    names = sorted(phases, key=phases.__getitem__)
    bar = go.Bar(
        x=[100 * phases[name] for name in names],
        y=names,
        orientation="h",
        marker_color=[_COLORS.get(name) for name in names],
        hovertemplate="%{y}: %{x:.1f}%<extra></extra>",
    )
    return styled(go.Figure(bar), "share of the time in percent", legend=False)


def phases_figure(timeline: Mapping[str, Any]) -> Any:
    """Milliseconds a step of each phase over time, stacked."""
    go, _ = plotly()
    areas = [
        go.Scatter(
            name=phase,
            x=timeline["seconds"],
            y=values,
            stackgroup="phases",
            mode="lines",
            line={"width": 0.5, "color": _COLORS.get(phase)},
        )
        for phase, values in timeline["phases"].items()
    ]
    return styled(go.Figure(areas), "ms a step over seconds, by phase")


def utilisation_figure(timeline: Mapping[str, Any]) -> Any:
    """The machine over time: each row from its own lowest to its own highest figure."""
    go, _ = plotly()
    system = timeline["system"]
    shades = []
    for values in system.values():
        low, high = min(values), max(values)
        shades.append([(value - low) / (high - low) if high > low else 0.0 for value in values])
    heat = go.Heatmap(
        x=timeline["seconds"],
        y=[f"{name} ({min(values):.3g} to {max(values):.3g})" for name, values in system.items()],
        z=shades,
        text=[[f"{value:.4g}" for value in values] for values in system.values()],
        hovertemplate="%{y}<br>%{text} at %{x:.1f} s<extra></extra>",
        colorscale="Tealgrn",
        showscale=False,
    )
    return styled(go.Figure(heat), "the machine over seconds", legend=False)


def ranks_figure(ranks: Sequence[Mapping[str, float]]) -> Any:
    """Seconds of each phase on each rank."""
    go, _ = plotly()
    names = [name for name in ranks[0] if any(rank[name] > 0 for rank in ranks)]
    heat = go.Heatmap(
        x=names,
        y=[f"rank {i}" for i in range(len(ranks))],
        z=[[rank[name] for name in names] for rank in ranks],
        colorscale="Tealgrn",
        hovertemplate="%{y}, %{x}: %{z:.3g} s<extra></extra>",
    )
    return styled(go.Figure(heat), "seconds by rank and phase", legend=False)


def history_figure(history: Sequence[tuple[int, Mapping[str, Any]]]) -> Any:
    """The step time of the same configuration in past runs, by phase."""
    go, _ = plotly()
    runs = [f"run {run}" for run, _ in history]
    names = [name for name in _COLORS if any(profile["phases"][name]["share"] > 0.001 for _, profile in history)]
    bars = [
        go.Bar(
            name=name,
            x=runs,
            y=[profile["step_ms"].get("mean", 0.0) * profile["phases"][name]["share"] for _, profile in history],
            marker_color=_COLORS[name],
        )
        for name in names
    ]
    return styled(go.Figure(bars, {"barmode": "stack"}), "ms a step in past runs", stacked=True)
