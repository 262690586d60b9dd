"""Jobs and nodes as tables: once, or live while something waits or runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lightning_optcore.executor.queue import DriverRecord, JobQueue, JobRecord

_STYLES = {"done": "green", "running": "cyan", "queued": "dim", "cancelled": "yellow"}


def jobs_table(records: Sequence[JobRecord], clock: datetime | None = None) -> Table:
    """Return a table of jobs, as given.

    Args:
        records: The jobs.
        clock: The time now, with its zone.
    """
    clock = clock or datetime.now(timezone.utc)
    table = Table(title="jobs", title_justify="left")
    for name in ("job", "kind", "status", "priority", "node", "attempts", "waited", "ran", "memory", "error"):
        right = name in ("job", "priority", "attempts", "waited", "ran", "memory")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for record in records:
        style = _STYLES.get(record.status, "red")
        peak = max((one.peak_memory_bytes or 0 for one in record.attempts), default=0)
        table.add_row(
            str(record.id),
            escape(record.work.kind),
            f"[{style}]{record.status}[/]",
            str(record.priority),
            escape(record.node or ""),
            str(len(record.attempts) or ""),
            duration(waited_s(record, clock)),
            duration(ran_s(record, clock)),
            size(peak) if peak else "",
            escape(first_line(record.error)),
        )
    return table


def nodes_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the nodes as their driver saw them last."""
    table = Table(title="nodes", title_justify="left")
    names = ("node", "cpu", "memory", "gpu", "cpu used", "memory used", "gpu used")
    for name in (*names, "running", "finished", "failed", "lost", "jobs/min"):
        table.add_column(name, justify="left" if name == "node" else "right", overflow="fold")
    for node in nodes:
        has, usage = node["has"], node["usage"]
        used = [
            f"{usage[key]:.0f}%" if key in usage else "" for key in ("cpu_percent", "memory_percent", "gpu_percent")
        ]
        tallies = [str(node[name]) for name in ("running", "finished", "failed", "lost")]
        table.add_row(
            escape(node["name"]), f"{has['cpu']:g}", size(has["memory_bytes"]), f"{has['gpu']:g}", *used, *tallies,
            f"{node['per_minute']:.3g}",
        )  # fmt: skip
    return table


def driven_by(driver: DriverRecord | None) -> str:
    """Say who drives a queue, and when it was heard of."""
    if driver is None:
        return "driven by nobody"
    if not driver.is_alive:
        return f"driven by nobody since {driver.seen_at[:19]} UTC"
    silent = max(0.0, (datetime.now(timezone.utc) - _time(driver.seen_at)).total_seconds())
    return f"driven by {driver.executor} on {driver.host} (process {driver.pid}), seen {duration(silent)} ago"


def overview(queue: JobQueue, limit: int) -> RenderableType:
    """Return both tables of a queue, with its newest jobs."""
    driver, counts = queue.driver(), queue.counts()
    # A dead driver's nodes are no one's.
    nodes = driver.nodes if driver is not None and driver.is_alive else []
    numbers = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no jobs"
    parts = [nodes_table(nodes)] if nodes else []
    return Group(jobs_table(queue.jobs(limit=limit)), *parts, f"queue {queue.name}: {numbers}; {driven_by(driver)}")


def job_details(record: JobRecord) -> RenderableType:
    """Return all that is known of one job."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    named = record.work.named or {}
    what = " ".join(["optcore", *named["command"]]) if "command" in named else named.get("call", "in memory only")
    needs = {name: value for name, value in record.resources.to_dict().items() if value}
    rows = {
        "job": f"{record.id} in queue {record.queue}" + (f", key {record.key}" if record.key else ""),
        "runs": what,
        "folder": named.get("directory"),
        "kind": record.work.kind,
        "status": record.status + (", to be cancelled" if record.cancel_requested and not record.ended else ""),
        "priority": record.priority,
        "needs": ", ".join(f"{name}={value}" for name, value in needs.items()),
        "memory limit": None if record.memory_limit_bytes is None else size(record.memory_limit_bytes),
        "timeout_s": record.timeout_s,
        "max_retries": record.max_retries,
        "submitted": record.submitted_at,
        "finished": record.finished_at,
        "result": record.result,
    }
    for name, value in rows.items():
        if value is not None:
            facts.add_row(name, escape(str(value)))
    attempts = Table(title="attempts", title_justify="left")
    for name in ("attempt", "node", "status", "started", "seconds", "memory", "error"):
        attempts.add_column(name, overflow="fold")
    for one in record.attempts:
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        peak = size(one.peak_memory_bytes) if one.peak_memory_bytes else ""
        status = one.status or "running"
        row = (str(one.number), one.node, status, one.started_at[:19], seconds, peak, first_line(one.error))
        attempts.add_row(*map(escape, row))
    parts: list[RenderableType] = [facts, attempts] if record.attempts else [facts]
    return Group(*parts, escape(told(record.error))) if record.error else Group(*parts)


def told(error: str | None) -> str:
    """Return what is worth reading of an error: of a command, how it ended and what it printed last."""
    _, mark, last = (error or "").rpartition("CommandError: ")
    return last.rstrip() if mark else (error or "").rstrip()


@contextmanager
def live(queue: JobQueue, limit: int, output: Path) -> Iterator[None]:
    """Show a queue while the block runs; without a terminal once, at its end.

    Args:
        queue: What is shown.
        limit: So many of the newest jobs.
        output: Where goes meanwhile what this process and its jobs print, if there is a terminal.
    """
    if not sys.stdout.isatty():
        yield
        Console(width=160).print(overview(queue, limit))
        return
    with _printing_to(output) as terminal, os.fdopen(terminal, "w", closefd=False) as file:
        console = Console(file=file, force_terminal=True)

        def table() -> RenderableType:
            return overview(queue, limit)

        with Live(
            get_renderable=table, console=console, refresh_per_second=1,
            redirect_stdout=False, redirect_stderr=False,
        ):  # fmt: skip
            yield


def duration(seconds: float | None) -> str:
    """Return a time as one reads it: ``"12s"``, ``"3m10s"``, ``"2h05m"``.

    Example:
        >>> [duration(seconds) for seconds in (4.4, 190, 7500, None)]
        ['4s', '3m10s', '2h05m', '']
    """
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Return a number of bytes as one reads it.

    Example:
        >>> size(629_678_080)
        '630 MB'
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def first_line(text: str | None) -> str:
    """Return the first line of an error, not too long."""
    lines = (text or "").splitlines()
    return lines[0][:200] if lines else ""


def waited_s(record: JobRecord, clock: datetime) -> float:
    """Return how long a job waited for its first attempt, in seconds."""
    until = record.attempts[0].started_at if record.attempts else record.finished_at
    return ((_time(until) if until else clock) - _time(record.submitted_at)).total_seconds()


def ran_s(record: JobRecord, clock: datetime) -> float | None:
    """Return how long the newest attempt at a job ran, in seconds."""
    if not record.attempts:
        return None
    newest = record.attempts[-1]
    return ((_time(newest.finished_at) if newest.finished_at else clock) - _time(newest.started_at)).total_seconds()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@contextmanager
def _printing_to(output: Path) -> Iterator[int]:
    """Send this process's output, and that of those it starts, to a file; give the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with output.open("ab") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        yield kept[0]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)
