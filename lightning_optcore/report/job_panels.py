"""Jobs and nodes of the executors for a page, read from the store's tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import sqlalchemy as sa

from lightning_optcore import store_schema as tables
from lightning_optcore.store import Store

_HEARD_S = 15.0
_COLUMNS = {
    "jobs": (
        "job", "queue", "kind", "status", "priority", "node", "attempts", "waited s", "ran s", "memory MB", "error"
    ),
    "nodes": (
        "queue", "node", "cpu", "memory GB", "gpu", "cpu %", "memory %", "gpu %", "running", "finished", "failed",
        "lost", "jobs a minute", "seen s ago",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class JobsSeen:
    """What a store says of jobs now.

    Args:
        counts: Jobs by status.
        per_minute: How many ended well in the last minute.
        rows: The newest jobs, newest first, by column.
    """

    counts: dict[str, int] = field(default_factory=dict)
    per_minute: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def jobs_seen(store: Store, *, limit: int = 30, clock: datetime | None = None) -> JobsSeen:
    """Read the jobs of all queues.

    Args:
        store: Where they are.
        limit: So many of the newest are rows.
        clock: The time now, with its zone.
    """
    clock = clock or datetime.now(timezone.utc)
    jobs, attempts = tables.jobs, tables.job_attempts
    newest = sa.select(jobs).order_by(jobs.c.id.desc()).limit(limit)
    since = (clock - timedelta(minutes=1)).isoformat(timespec="milliseconds")
    lately = sa.select(sa.func.count()).where(jobs.c.status == "done", jobs.c.finished_at > since)
    with store.reading() as connection:
        rows = connection.execute(newest).all()
        of_these = attempts.c.job_id.in_([row.id for row in rows])
        tried = connection.execute(sa.select(attempts).where(of_these).order_by(attempts.c.number)).all()
        counted = connection.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)).all()
        per_minute = int(connection.execute(lately).scalar() or 0)
    by_job: dict[int, list[Any]] = {}
    for one in tried:
        by_job.setdefault(one.job_id, []).append(one)
    counts = {status: int(count) for status, count in counted}
    return JobsSeen(counts, per_minute, [_job_row(row, by_job.get(row.id, []), clock) for row in rows])


def nodes_seen(store: Store, *, clock: datetime | None = None) -> list[dict[str, Any]]:
    """Read the nodes of all queues as their drivers saw them last, by column; of a driver that is silent, none.

    Args:
        store: Where they are.
        clock: The time now, with its zone.
    """
    clock = clock or datetime.now(timezone.utc)
    table = tables.job_queues
    with store.reading() as connection:
        rows = connection.execute(sa.select(table).where(table.c.pid.is_not(None)).order_by(table.c.name)).all()
    found = []
    for row in rows:
        silent = (clock - datetime.fromisoformat(row.seen_at)).total_seconds()
        if silent > _HEARD_S:
            continue
        for node in json.loads(row.nodes or "[]"):
            has, usage = node["has"], node["usage"]
            values = (
                row.name, node["name"], has["cpu"], round(has["memory_bytes"] / 1e9, 1), has["gpu"],
                *(usage.get(name, "") for name in ("cpu_percent", "memory_percent", "gpu_percent")),
                *(node[name] for name in ("running", "finished", "failed", "lost")), round(node["per_minute"], 1),
                round(silent),
            )  # fmt: skip
            found.append(dict(zip(_COLUMNS["nodes"], values, strict=True)))
    return found


def jobs_panel(html: Any, seen: JobsSeen) -> Any:
    """Return a line of counts and a table of jobs, as components of Dash."""
    if not seen.rows:
        return html.P("no jobs: `optcore submit` hands some in")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(seen.counts.items()))
    return html.Div([html.P(f"jobs: {counts}; {seen.per_minute} done in the last minute"), _table(html, seen.rows)])


def nodes_panel(html: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """Return a table of nodes, as components of Dash."""
    if not rows:
        return html.P("no nodes: no queue is driven now; `optcore jobs serve=true` drives one")
    queues = Counter(row["queue"] for row in rows)
    counted = ", ".join(f"{count} of queue {name}" for name, count in queues.items())
    return html.Div([html.P(f"nodes: {counted}"), _table(html, rows)])


def _job_row(row: Any, attempts: Sequence[Any], clock: datetime) -> dict[str, Any]:
    began = datetime.fromisoformat(attempts[0].started_at) if attempts else None
    ended = datetime.fromisoformat(row.finished_at) if row.finished_at else None
    waited = (began or ended or clock) - datetime.fromisoformat(row.submitted_at)
    ran = None
    if attempts:
        newest = attempts[-1]
        until = datetime.fromisoformat(newest.finished_at) if newest.finished_at else clock
        ran = round((until - datetime.fromisoformat(newest.started_at)).total_seconds(), 1)
    peak = max((one.peak_memory_bytes or 0 for one in attempts), default=0)
    values = (
        row.id, row.queue, row.kind, row.status, row.priority, attempts[-1].node if attempts else "", len(attempts),
        round(waited.total_seconds(), 1), "" if ran is None else ran, round(peak / 1e6) or "",
        (row.error or "").partition("\n")[0][:200],
    )  # fmt: skip
    return dict(zip(_COLUMNS["jobs"], values, strict=True))


def _table(html: Any, rows: Sequence[dict[str, Any]]) -> Any:
    padded = {"padding": "0 1rem .3rem 0", "textAlign": "left"}
    head = html.Tr([html.Th(name, style=padded) for name in rows[0]])
    body = [html.Tr([html.Td(str(value), style=padded) for value in row.values()]) for row in rows]
    return html.Table([html.Thead(head), html.Tbody(body)], style={"fontSize": ".85rem"})
