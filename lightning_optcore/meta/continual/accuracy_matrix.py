"""What a model knows of every task after each: the accuracy matrix, and what is read from it.

Average accuracy, backward and forward transfer: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual
Learning", NeurIPS 2017 (arXiv:1706.08840). Forgetting: Chaudhry et al., "Riemannian Walk for Incremental Learning",
ECCV 2018 (arXiv:1801.10112).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_optcore.measurement.directions import Direction


@dataclass
class AccuracyMatrix:
    """A metric of every task before the first one, and after each.

    Args:
        tasks: Their names, in the order in which they are learned.
        metric: Name of the metric.
        direction: Whether more of it is better.
        before: The metric of every task before the first was learned.
        rows: The metric of every task, a row for each task that was learned.

    Example:
        >>> matrix = AccuracyMatrix(["a", "b"], "acc", "maximize", [0.1, 0.2], [[0.9, 0.4], [0.7, 0.8]])
        >>> matrix.average, matrix.forgetting, matrix.backward_transfer, matrix.forward_transfer
        (0.75, 0.2, -0.2, 0.2)
    """

    tasks: list[str]
    metric: str
    direction: Direction = "maximize"
    before: list[float] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)

    @property
    def average(self) -> float:
        """Mean over the tasks that were learned, after the last of them."""
        return _mean(self.rows[-1][: len(self.rows)]) if self.rows else math.nan

    @property
    def forgetting(self) -> float:
        """Mean over the earlier tasks of what was lost since each was known best; NaN before there are two tasks."""
        earlier = self.rows[:-1]
        best = [self._best(row[j] for row in earlier) for j in range(len(earlier))]
        return _mean([self._loss(value, self.rows[-1][j]) for j, value in enumerate(best)])

    @property
    def backward_transfer(self) -> float:
        """Mean over the earlier tasks of what was gained since they were learned; below 0 is forgetting."""
        last = len(self.rows) - 1
        return _mean([-self._loss(self.rows[j][j], self.rows[-1][j]) for j in range(last)])

    @property
    def forward_transfer(self) -> float:
        """Mean over the later tasks of what was known before they were learned, beyond what was before the first."""
        learned = range(1, len(self.rows))
        return _mean([-self._loss(self.before[j], self.rows[j - 1][j]) for j in learned]) if self.before else math.nan

    def summary(self) -> dict[str, float]:
        """Return the four figures by name, those that are known."""
        figures = {
            "average": self.average,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
        }
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "tasks": self.tasks,
            "metric": self.metric,
            "direction": self.direction,
            "before": self.before,
            "rows": self.rows,
            "summary": self.summary(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AccuracyMatrix:
        """Read what :meth:`to_dict` gave."""
        return cls(**{name: content[name] for name in ("tasks", "metric", "direction", "before", "rows")})

    def _best(self, values: Any) -> float:
        return max(values) if self.direction == "maximize" else min(values)

    def _loss(self, before: float, after: float) -> float:
        return before - after if self.direction == "maximize" else after - before


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 12) if values else math.nan
