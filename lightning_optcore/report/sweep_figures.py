"""Figures of a sweep (Plotly, extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_optcore.report.figures import COLORS, plain, plotly, styled
from lightning_optcore.report.sweep_page import Axis, Importance, SweepPage, Trial

_OTHER, _FRONT = COLORS["before"], COLORS["after"]
_MOST_LINES = 14
_LONGEST = 22
_ABSENT = "absent"


def front_figure(page: SweepPage) -> Any:
    """One objective: its value over the trials; two: the front; more: the front in every pair of them."""
    if len(page.objectives) == 1:
        return _progress(page)
    return _plane(page) if len(page.objectives) == 2 else _pairs(page)


def history_figure(page: SweepPage) -> Any:
    """The share of the final hypervolume after every finished trial."""
    go, _ = plotly()
    line = go.Scatter(
        x=list(range(1, len(page.history) + 1)),
        y=[100 * share for _, share in page.history],
        text=[f"trial {number}" for number, _ in page.history],
        hovertemplate="%{text}: %{y:.1f}%<extra></extra>",
        mode="lines",
        line={"color": _FRONT, "shape": "hv"},
    )
    figure = styled(go.Figure(line), "percent of the final hypervolume", legend=False)
    figure.update_yaxes(range=[0, 104])
    figure.update_xaxes(title="finished trials")
    return figure


def parallel_figure(page: SweepPage) -> Any:
    """A line a trial across all parameters and objectives; a range of any axis can be marked with the mouse."""
    go, _ = plotly()
    done = [trial for trial in page.trials if trial.objectives]
    axes = [_parameter_axis(axis, done) for axis in page.axes if axis.name]
    for i, (name, direction) in enumerate(page.objectives):
        values = [(trial.objectives or [])[i] for trial in done]
        axes.append(_numbers(name, values, log=_is_wide(values)) | {"label": f"{cut(name)} ({direction[:3]})"})
    best = [float(trial.best) for trial in done]
    axes.append(_axis("best" if len(page.objectives) == 1 else "front", best, [0.0, 1.0], ["no", "yes"], (0.0, 1.0)))
    colours = axes[-1 - len(page.objectives)]["values"]
    lines = go.Parcoords(
        dimensions=axes,
        line={
            "color": [-value for value in colours] if page.objectives[0][1] == "minimize" else colours,
            "colorscale": "Viridis",
        },
        labelangle=-20,
        labelfont={"size": 13},
        tickfont={"size": 12},
        unselected={"line": {"opacity": 0.08}},
    )
    figure = styled(go.Figure(lines), "", legend=False)
    # Wider than the page, it can be scrolled.
    width = 120 * len(axes) if len(axes) > 9 else None
    figure.update_layout(height=420, width=width, margin={"l": 70, "r": 60, "t": 90, "b": 30})
    return figure


def importance_figure(found: Sequence[Importance]) -> Any:
    """Bars of each parameter's importance, with twice the standard error."""
    go, _ = plotly()
    names = [name for name, _, _ in found[0].bars]
    bars = []
    for one in found:
        known = {name: (value, error) for name, value, error in one.bars}
        bars.append(
            go.Bar(
                name=plain(one.objective),
                orientation="h",
                x=[max(known[name][0], 0.0) for name in names],
                y=[plain(cut(name, 40)) for name in names],
                error_x={"type": "data", "array": [2 * known[name][1] for name in names], "color": _OTHER},
                customdata=[[known[name][0], 2 * known[name][1]] for name in names],
                hovertemplate="%{y}: %{customdata[0]:.3f} ± %{customdata[1]:.3f}<extra></extra>",
            )
        )
    figure = styled(go.Figure(bars), "", legend=len(found) > 1)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title="growth of the squared error, as a share of the variance", rangemode="tozero")
    figure.update_layout(height=130 + len(names) * (16 + 16 * len(found)), legend={"y": 1, "yanchor": "bottom"})
    return figure


def short(value: Any) -> str:
    """Return a value as a table has room for it.

    Example:
        >>> short(0.123456), short("relu"), short(None), short(True), short(1200000.0)
        ('0.1235', 'relu', 'null', 'true', '1.2e+06')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """Return an objective's value.

    Example:
        >>> number(0.9336312), number(327680.0), number(1.2e-7)
        ('0.93363', '327,680', '1.2e-07')
    """
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e12 else f"{value:.5g}"


def cut(text: str, longest: int = _LONGEST) -> str:
    """Return a text of at most so many characters; its end tells more than its beginning.

    Example:
        >>> cut("model.encoder.layers.0.width", 14)
        '…ayers.0.width'
    """
    return text if len(text) <= longest else "…" + text[1 - longest :]


def _progress(page: SweepPage) -> Any:
    go, _ = plotly()
    ((name, direction),) = page.objectives
    done = [trial for trial in page.trials if trial.objectives]
    values = [(trial.objectives or [])[0] for trial in done]
    order = list(range(1, len(page.best_so_far) + 1))
    by_number = {trial.number: trial for trial in done}
    timed = [by_number[number] for number, _ in page.best_so_far]
    figure = go.Figure(
        [
            go.Scatter(
                name="trials",
                x=order,
                y=[(trial.objectives or [])[0] for trial in timed],
                mode="markers",
                marker={"color": _OTHER, "size": 7, "opacity": 0.7},
                **_hover(timed, "%{y:.5g}"),
            ),
            go.Scatter(
                name="best so far",
                x=order,
                y=[value for _, value in page.best_so_far],
                mode="lines",
                line={"color": _FRONT, "shape": "hv"},
                hoverinfo="skip",
            ),
        ]
    )
    styled(figure, "", y_log=_is_wide(values))
    figure.update_xaxes(title="finished trials")
    figure.update_yaxes(title=plain(f"{cut(name, 40)} ({direction})"))
    return figure


def _plane(page: SweepPage) -> Any:
    go, _ = plotly()
    figure = go.Figure(_points(page, 0, 1, line=True))
    styled(figure, "")
    for i, update in enumerate((figure.update_xaxes, figure.update_yaxes)):
        name, direction = page.objectives[i]
        update(title=plain(f"{cut(name, 40)} ({direction})"), type=_scale(page, i))
    figure.update_layout(height=420)
    return figure


def _pairs(page: SweepPage) -> Any:
    from plotly.subplots import make_subplots

    count = len(page.objectives)
    figure = make_subplots(
        rows=count - 1,
        cols=count - 1,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.03,
    )
    for row in range(1, count):
        for column in range(row):
            first = row == 1 and column == 0
            for trace in _points(page, column, row, line=False):
                figure.add_trace(trace.update(showlegend=first, legendgroup=trace.name), row=row, col=column + 1)
            figure.update_xaxes(type=_scale(page, column), row=row, col=column + 1)
            figure.update_yaxes(type=_scale(page, row), row=row, col=column + 1)
            if row == count - 1:
                figure.update_xaxes(title=_title(page, column), row=row, col=column + 1)
            if column == 0:
                figure.update_yaxes(title=_title(page, row), row=row, col=1)
    styled(figure, "")
    figure.update_layout(height=120 + 240 * (count - 1), legend={"x": 1, "xanchor": "right", "y": 1})
    return figure


def _points(page: SweepPage, i: int, j: int, *, line: bool) -> list[Any]:
    """Return the other trials and the front in two objectives."""
    go, _ = plotly()
    others = [trial for trial in page.trials if trial.objectives and not trial.best]
    front = sorted((trial for trial in page.front), key=lambda trial: (trial.objectives or [])[i])
    # What the front reaches ends at its points: the steps turn to where the trials are.
    shape = "hv" if page.objectives[i][1] == "minimize" else "vh"

    def drawn(of: Sequence[Trial], **style: Any) -> Any:
        x, y = ([(trial.objectives or [])[axis] for trial in of] for axis in (i, j))
        return go.Scatter(x=x, y=y, **style, **_hover(of, "%{x:.5g}, %{y:.5g}"))

    grey = {"color": _OTHER, "size": 7, "opacity": 0.6}
    return [
        drawn(others, name="trials", mode="markers", marker=grey),
        drawn(
            front,
            name="Pareto front",
            mode="lines+markers" if line else "markers",
            line={"color": _FRONT, "shape": shape},
            marker={"color": _FRONT, "size": 10 if line else 8},
        ),
    ]


def _hover(trials: Sequence[Trial], values: str) -> dict[str, Any]:
    texts = []
    for trial in trials:
        lines = [f"{name}={short(value)}" for name, value in trial.params.items() if name]
        more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        head = f"trial {trial.number}{' (cached)' if trial.cached else ''}"
        texts.append("<br>".join(plain(cut(line, 80)) for line in [head, *lines[:_MOST_LINES], *more]))
    return {"text": texts, "hovertemplate": f"%{{text}}<br>{values}<extra></extra>"}


def _title(page: SweepPage, i: int) -> str:
    name, direction = page.objectives[i]
    return f"{plain(cut(name))}<br>({direction})"


def _scale(page: SweepPage, i: int) -> str:
    return "log" if _is_wide([trial.objectives[i] for trial in page.trials if trial.objectives]) else "linear"


def _is_wide(values: Sequence[float]) -> bool:
    """Return whether values would lie upon each other on a linear axis."""
    return min(values) > 0 and max(values) > 1000 * min(values)


def _parameter_axis(axis: Axis, trials: Sequence[Trial]) -> dict[str, Any]:
    values = [trial.params.get(axis.name) for trial in trials]
    there = [axis.name in trial.params for trial in trials]
    if axis.kind == "choice":
        texts = [short(value) for value in axis.choices]
        # A value that the space does not list is left to stand after those that it does.
        texts += sorted({short(value) for value, one in zip(values, there, strict=True) if one} - set(texts))
        numbers = [float(texts.index(short(v))) if one else -1.0 for v, one in zip(values, there, strict=True)]
        ticks, low = list(range(len(texts))), 0.0
        if not all(there):
            ticks, texts, low = [-1, *ticks], [_ABSENT, *texts], -1.0
        high = max(1.0, float(ticks[-1]))
        return _axis(axis.name, numbers, ticks, [cut(text, 16) for text in texts], (low, high))
    known = [float(value) for value, one in zip(values, there, strict=True) if one and value is not None]
    if not known:
        return _axis(axis.name, [0.0] * len(values), [0.0], [_ABSENT], (0.0, 1.0))
    filled = [float(value) if one and value is not None else None for value, one in zip(values, there, strict=True)]
    return _numbers(axis.name, filled, log=axis.kind == "log" and min(known) > 0)


def _numbers(name: str, values: Sequence[float | None], *, log: bool) -> dict[str, Any]:
    """Return an axis of numbers; what is inactive stands below all of them."""
    scaled = [value if value is None else math.log10(value) if log else value for value in values]
    known = [value for value in scaled if value is not None]
    low, high = min(known), max(known)
    span = (high - low) or abs(high) or 1.0
    if high == low:
        low, high = low - span / 2, high + span / 2
    whole = not log and all(float(value).is_integer() for value in known)
    ticks = _ticks(low, high, log, whole)
    texts = [f"{10**tick if log else tick:.4g}" for tick in ticks]
    if len(known) < len(scaled):
        below = low - 0.15 * (high - low)
        scaled = [below if value is None else value for value in scaled]
        ticks, texts, low = [below, *ticks], [_ABSENT, *texts], below
    return _axis(name, scaled, ticks, texts, (low, high))


def _ticks(low: float, high: float, log: bool, whole: bool) -> list[float]:
    """Return about five round numbers within an axis, or the powers of ten if there are at least two."""
    if log:
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(powers) >= 2:
            step = math.ceil(len(powers) / 8)
            return [float(power) for power in powers[::step]]
        return [low + (high - low) * i / 4 for i in range(5)]
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(math.floor(high / step + 1e-9) - first + 1)]


def _axis(
    name: str, values: Sequence[Any], ticks: Sequence[float], texts: Sequence[str], bounds: tuple[float, float]
) -> dict[str, Any]:
    return {
        "label": cut(name),
        "values": list(values),
        "tickvals": list(ticks),
        "ticktext": list(texts),
        "range": list(bounds),
    }
