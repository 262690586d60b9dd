from __future__ import annotations

import json
import math

import pytest

from lightning_optcore.meta.continual import AccuracyMatrix

# Three tasks, by hand.
BEFORE = [0.1, 0.2, 0.1]
ROWS = [[0.9, 0.3, 0.1], [0.95, 0.8, 0.4], [0.7, 0.6, 0.9]]


def test_the_figures_are_those_of_the_papers():
    matrix = AccuracyMatrix(["a", "b", "c"], "acc", "maximize", BEFORE, ROWS)
    assert matrix.average == pytest.approx((0.7 + 0.6 + 0.9) / 3)
    assert matrix.forgetting == pytest.approx(((0.95 - 0.7) + (0.8 - 0.6)) / 2)
    assert matrix.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.3 - 0.2) + (0.4 - 0.1)) / 2)


def test_of_a_loss_less_is_better():
    def negated(rows):
        return [[-value for value in row] for row in rows]

    accuracy = AccuracyMatrix(["a", "b", "c"], "acc", "maximize", BEFORE, ROWS)
    loss = AccuracyMatrix(["a", "b", "c"], "loss", "minimize", negated([BEFORE])[0], negated(ROWS))
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        assert getattr(loss, name) == pytest.approx(getattr(accuracy, name))


def test_a_plan_in_the_middle_knows_what_it_can():
    matrix = AccuracyMatrix(["a", "b", "c"], "acc", "maximize", BEFORE, ROWS[:1])
    assert matrix.summary() == {"average": 0.9}
    assert math.isnan(AccuracyMatrix(["a"], "acc").average)
    two = AccuracyMatrix(["a", "b", "c"], "acc", "maximize", [], ROWS[:2])
    assert two.summary() == pytest.approx({"average": 0.875, "forgetting": -0.05, "backward_transfer": 0.05})


def test_it_is_json_and_back():
    matrix = AccuracyMatrix(["a", "b", "c"], "acc", "maximize", BEFORE, ROWS)
    content = json.loads(json.dumps(matrix.to_dict()))
    assert AccuracyMatrix.from_dict(content) == matrix
    assert content["summary"] == pytest.approx(matrix.summary())
