"""The figure of a sequence of tasks (Plotly, extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_optcore.report.figures import plain, plotly, styled


def matrix_figure(matrix: Mapping[str, Any]) -> Any:
    """A field of colours: the metric of every task before the first one, and after each.

    Args:
        matrix: ``tasks``, ``metric``, ``direction``, ``before`` (a number for each task) and ``rows`` (one such list
            for each task that was learned).
    """
    go, _ = plotly()
    names = [plain(f"{number + 1}: {name}") for number, name in enumerate(matrix["tasks"])]
    rows = [(f"after {number + 1}", row) for number, row in enumerate(matrix["rows"])]
    if matrix["before"]:
        rows.insert(0, ("before", matrix["before"]))
    values = [[value if math.isfinite(value) else None for value in row] for _, row in rows]
    field = go.Heatmap(
        x=names,
        y=[name for name, _ in rows],
        z=values,
        text=[["-" if value is None else f"{value:.3f}" for value in row] for row in values],
        texttemplate="%{text}",
        hovertemplate="%{x}, %{y}: %{z:.4f}<extra></extra>",
        colorscale="Viridis",
        reversescale=matrix["direction"] == "minimize",
        xgap=2,
        ygap=2,
    )
    figure = styled(go.Figure(field), plain(f"{matrix['metric']} of every task, after each"), legend=False)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(height=140 + 44 * len(rows))
    return figure
