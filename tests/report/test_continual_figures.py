from __future__ import annotations

import math

import pytest

from lightning_optcore.report.continual_figures import matrix_figure


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_matrix_is_drawn_row_by_row(direction):
    matrix = {
        "tasks": ["<first>", "second"],
        "metric": "val/acc",
        "direction": direction,
        "before": [0.1, math.nan],
        "rows": [[0.9, 0.2], [0.7, 0.8]],
    }
    (field,) = matrix_figure(matrix).data
    assert list(field.x) == ["1: &lt;first&gt;", "2: second"]
    assert list(field.y) == ["before", "after 1", "after 2"]
    assert [list(row) for row in field.z] == [[0.1, None], [0.9, 0.2], [0.7, 0.8]]
    assert [list(row) for row in field.text] == [["0.100", "-"], ["0.900", "0.200"], ["0.700", "0.800"]]
    assert bool(field.reversescale) == (direction == "minimize")


def test_what_was_not_measured_before_is_no_row():
    matrix = {"tasks": ["a"], "metric": "acc", "direction": "maximize", "before": [], "rows": [[0.5]]}
    assert list(matrix_figure(matrix).data[0].y) == ["after 1"]
