"""The live table of a sweep: its newest trials and its front, read from the journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lightning_optcore.search.pareto import non_dominated
from lightning_optcore.search.searcher import Direction
from lightning_optcore.sweeps.journal import TrialRecord

_NEWEST = 8
_BEST = 8


class LiveTable:
    """Shows the table while its block runs, and once more at its end; without a terminal only at the end.

    Args:
        trials: Reads the trials from the number ``first`` on.
        directions: Of the objectives.
        objectives: Their names.
        n_trials: How many there will be, if that is known.
    """

    def __init__(
        self,
        trials: Callable[..., list[TrialRecord]],
        directions: Sequence[Direction],
        objectives: Sequence[str],
        n_trials: int | None,
    ) -> None:
        self._trials = trials
        self._directions = directions
        self._objectives = objectives
        self._n_trials = n_trials
        self._console = Console()
        self._live: Live | None = None
        self._ended: list[TrialRecord] = []

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=1)
            self._live.start(refresh=True)

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._console.print(self._table())

    def _table(self) -> RenderableType:
        # What was read as ended stays so.
        records = self._ended + self._trials(first=len(self._ended))
        still = next((i for i, record in enumerate(records) if not record.ended), len(records))
        self._ended = records[:still]
        return sweep_table(records, self._directions, self._objectives, self._n_trials)


def sweep_table(
    records: Sequence[TrialRecord],
    directions: Sequence[Direction],
    objectives: Sequence[str],
    n_trials: int | None = None,
) -> Table:
    """Return the newest trials and the front's best, each with what was searched in it."""
    ended = sum(record.ended for record in records)
    failed = sum(record.status == "failed" for record in records)
    total = f" of {n_trials}" if n_trials is not None else ""
    table = Table(caption=f"{ended}{total} trials ended, {failed} failed; * on the Pareto front")
    table.add_column("trial", justify="right")
    table.add_column("status")
    for name, direction in zip(objectives, directions, strict=True):
        table.add_column(f"{escape(name)}\n{direction}", justify="right")
    table.add_column("candidate")
    best = _front(records, directions)
    newest = [record.number for record in records[-_NEWEST:]]
    shown = sorted({*sorted(best, key=lambda number: best[number])[:_BEST], *newest})
    by_number = {record.number: record for record in records}
    for number in shown:
        record = by_number[number]
        values = [f"{value:.5g}" for value in record.objectives] if record.objectives else ["-"] * len(directions)
        mark = "*" if number in best else ""
        status = "cached" if record.cached_from else record.status
        candidate = " ".join(f"{name}={_short(value)}" for name, value in record.candidate.params.items() if name)
        table.add_row(f"{number}{mark}", status, *values, escape(candidate))
    return table


def _front(records: Sequence[TrialRecord], directions: Sequence[Direction]) -> dict[int, float]:
    """Return the first cost of every trial of the front, by its number."""
    done = [record for record in records if record.feasible]
    if not done:
        return {}
    signs = np.array([1.0 if direction == "minimize" else -1.0 for direction in directions])
    costs = np.array([record.objectives for record in done]) * signs
    mask = non_dominated(costs)
    return {record.number: float(cost[0]) for record, cost, best in zip(done, costs, mask, strict=True) if best}


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
