"""Jobs in the store: what is to be run is there before it is started, and how it ended exactly once.

A queue has one driver at a time. It may die at any moment: another one finds in the store what was submitted, what was
started, and what has ended. Each attempt at a job is a row of its own that is closed once, so that a result that comes
late, from a node that was given up, is not taken.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from lightning_optcore import store_schema as tables
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Outcome
from lightning_optcore.executor.work import Work
from lightning_optcore.store import Store, StoreError, now

# After so many seconds without a sign of life, a driver on another machine is taken for dead.
_SILENT_S = 15.0


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job; its status is ``None`` while it runs."""

    number: int
    node: str
    started_at: str
    finished_at: str | None = None
    status: str | None = None
    error: str | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class JobRecord:
    """A job as stored; its status is queued, running, done, failed, cancelled, timed_out, out_of_memory or lost."""

    id: int
    queue: str
    key: str | None
    work: Work
    priority: int
    resources: Resources
    memory_limit_bytes: int | None
    max_retries: int
    timeout_s: float | None
    status: str
    cancel_requested: bool
    submitted_at: str
    finished_at: str | None = None
    result: Any = None
    error: str | None = None
    attempts: tuple[Attempt, ...] = field(default=())

    @property
    def ended(self) -> bool:
        """Whether it will not run any more."""
        return self.status not in ("queued", "running")

    @property
    def node(self) -> str | None:
        """The node of its newest attempt."""
        return self.attempts[-1].node if self.attempts else None


@dataclass(frozen=True)
class Ended:
    """How an attempt at a job ended, and what becomes of the job.

    Args:
        job: Number of the job.
        attempt: Number of the attempt.
        outcome: How the attempt ended.
        again: Whether the job waits again; otherwise it has ended alike.
    """

    job: int
    attempt: int
    outcome: Outcome
    again: bool = False


@dataclass(frozen=True)
class DriverRecord:
    """Who drives a queue, and the nodes as it saw them last."""

    executor: str
    host: str
    pid: int
    pid_started: float
    seen_at: str
    nodes: list[dict[str, Any]]

    @property
    def is_alive(self) -> bool:
        """Whether it may still run; of another machine, whether it was heard of lately."""
        if self.host != platform.node():
            silent = datetime.now(timezone.utc) - datetime.fromisoformat(self.seen_at)
            return silent < timedelta(seconds=_SILENT_S)
        try:
            return abs(psutil.Process(self.pid).create_time() - self.pid_started) < 1.0
        except psutil.Error:
            return False

    @property
    def is_this_process(self) -> bool:
        """Whether it is the caller's process."""
        return self.host == platform.node() and self.pid == os.getpid()


class JobQueue:
    """Reads and writes the jobs of one queue.

    Args:
        store: Where they are.
        name: The queue's own.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    # ---- who drives it ----

    def lead(self, executor: str) -> bool:
        """Make this process the driver, if no other one is alive."""
        table = tables.job_queues
        process = psutil.Process()
        values = {
            "executor": executor,
            "host": platform.node(),
            "pid": process.pid,
            "pid_started": process.create_time(),
            "seen_at": now(),
            "nodes": "[]",
        }
        with self.store.writing() as connection:
            self._ensure(connection)
            driver = _driver(connection.execute(sa.select(table).where(table.c.name == self.name)).one())
            if driver is not None and driver.is_alive:
                return False
            connection.execute(sa.update(table).where(table.c.name == self.name).values(values))
        return True

    def seen(self, nodes: Sequence[Mapping[str, Any]]) -> bool:
        """Write that the driver lives, and what it knows of its nodes; whether it is this process still."""
        table = tables.job_queues
        mine = (table.c.name == self.name, table.c.host == platform.node(), table.c.pid == os.getpid())
        values = {"seen_at": now(), "nodes": json.dumps(list(nodes))}
        # The next one follows soon: lost in a power cut, it is not missed.
        with self.store.writing(durable=False) as connection:
            return connection.execute(sa.update(table).where(*mine).values(values)).rowcount == 1

    def leave(self) -> None:
        """Let another process drive."""
        table = tables.job_queues
        mine = (table.c.name == self.name, table.c.host == platform.node(), table.c.pid == os.getpid())
        with self.store.writing() as connection:
            connection.execute(sa.update(table).where(*mine).values(pid=None, nodes="[]"))

    def driver(self) -> DriverRecord | None:
        """Return who drives, alive or not; ``None`` where nobody did, or it left."""
        table = tables.job_queues
        with self.store.reading() as connection:
            row = connection.execute(sa.select(table).where(table.c.name == self.name)).first()
        return None if row is None else _driver(row)

    # ---- jobs ----

    def add(
        self,
        work: Work,
        *,
        key: str | None,
        priority: int,
        resources: Resources,
        memory_limit_bytes: int | None,
        max_retries: int,
        timeout_s: float | None,
    ) -> tuple[int, bool]:
        """Write a job, and return its number and whether it is new: one of the same key is not written again."""
        table = tables.jobs
        values = {
            "queue": self.name,
            "key": key,
            "kind": work.kind,
            "work": None if work.named is None else json.dumps(work.named),
            "priority": priority,
            "resources": json.dumps({**resources.to_dict(), "limit": memory_limit_bytes}),
            "max_retries": max_retries,
            "timeout_s": timeout_s,
            "status": "queued",
            "cancel_requested": False,
            "submitted_at": now(),
        }
        with self.store.writing() as connection:
            self._ensure(connection)
            if key is not None:
                same = sa.select(table.c.id).where(table.c.queue == self.name, table.c.key == key)
                found = connection.execute(same).scalar()
                if found is not None:
                    return int(found), False
            result = connection.execute(sa.insert(table).values(values))
            return int(result.inserted_primary_key[0]), True  # type: ignore[index]

    def job(self, number: int) -> JobRecord:
        """Return a job.

        Raises:
            StoreError: If there is none of that number in this queue.
        """
        found = self._select(tables.jobs.c.id == number)
        if not found:
            raise StoreError(f"job {number} is not in the queue {self.name!r}")
        return found[0]

    def jobs(self, *, status: str | None = None, after: int = 0, limit: int | None = None) -> list[JobRecord]:
        """Return jobs with numbers above one, the newest last; of many, the newest."""
        table = tables.jobs
        conditions = [table.c.id > after]
        if status is not None:
            conditions.append(table.c.status == status)
        return self._select(*conditions, limit=limit)

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are, by status."""
        table = tables.jobs
        query = sa.select(table.c.status, sa.func.count()).where(table.c.queue == self.name).group_by(table.c.status)
        with self.store.reading() as connection:
            return {status: int(count) for status, count in connection.execute(query)}

    def statuses(self, numbers: Iterable[int]) -> dict[int, str]:
        """Return the status of jobs by their number."""
        table = tables.jobs
        query = sa.select(table.c.id, table.c.status).where(table.c.id.in_(list(numbers)))
        with self.store.reading() as connection:
            return {int(number): status for number, status in connection.execute(query)}

    def waiting(self) -> list[int]:
        """Return the jobs that wait."""
        table = tables.jobs
        query = sa.select(table.c.id).where(table.c.queue == self.name, table.c.status == "queued")
        with self.store.reading() as connection:
            return [int(number) for number in connection.execute(query).scalars()]

    def start(self, starts: Sequence[tuple[int, int, str]]) -> list[int]:
        """Write which attempts begin, as job, number and node; return the jobs that do: others have been cancelled."""
        begun = []
        with self.store.writing() as connection:
            for job, number, node in starts:
                if self._move(connection, job, "queued", {"status": "running"}):
                    values = {"job_id": job, "number": number, "node": node, "started_at": now()}
                    connection.execute(sa.insert(tables.job_attempts).values(values))
                    begun.append(job)
        return begun

    def end(self, several: Sequence[Ended]) -> list[Ended]:
        """Write how attempts ended; return those that were taken: an attempt that was closed before is not."""
        table = tables.job_attempts
        taken = []
        with self.store.writing() as connection:
            for one in several:
                outcome = one.outcome
                open_still = (
                    table.c.job_id == one.job,
                    table.c.number == one.attempt,
                    table.c.status.is_(None),
                )
                closed = {
                    "status": outcome.status,
                    "finished_at": now(),
                    "error": outcome.error,
                    "seconds": outcome.seconds,
                    "peak_memory_bytes": outcome.peak_memory_bytes,
                }
                if connection.execute(sa.update(table).where(*open_still).values(closed)).rowcount != 1:
                    continue
                values: dict[str, Any] = {"status": "queued"}
                if not one.again:
                    values = {
                        "status": outcome.status,
                        "finished_at": now(),
                        "result": outcome.stored,
                        "error": outcome.error,
                    }
                self._move(connection, one.job, "running", values)
                taken.append(one)
        return taken

    def end_waiting(self, job: int, status: str, error: str | None) -> bool:
        """End a job that waits; whether it did."""
        values = {"status": status, "finished_at": now(), "error": error}
        with self.store.writing() as connection:
            return self._move(connection, job, "queued", values)

    def request_cancel(self, job: int) -> None:
        """Ask the driver to cancel a job; one that waits is cancelled at once.

        Raises:
            StoreError: If there is none of that number.
        """
        self.job(job)
        table = tables.jobs
        with self.store.writing() as connection:
            values = {"status": "cancelled", "finished_at": now(), "cancel_requested": True}
            if not self._move(connection, job, "queued", values):
                where = (table.c.id == job, table.c.status == "running")
                connection.execute(sa.update(table).where(*where).values(cancel_requested=True))

    def to_cancel(self) -> list[int]:
        """Return the jobs that run and are to be cancelled."""
        table = tables.jobs
        where = (table.c.queue == self.name, table.c.status == "running", table.c.cancel_requested.is_(True))
        with self.store.reading() as connection:
            return [int(number) for number in connection.execute(sa.select(table.c.id).where(*where)).scalars()]

    def peak_memory_bytes(self, kind: str) -> list[int]:
        """Return the most memory that the newest jobs of a kind had, in any queue, of those that ended well."""
        table, attempts = tables.jobs, tables.job_attempts
        query = (
            sa.select(attempts.c.peak_memory_bytes)
            .join(table, table.c.id == attempts.c.job_id)
            .where(table.c.kind == kind, attempts.c.status == "done", attempts.c.peak_memory_bytes > 0)
            .order_by(table.c.id.desc())
            .limit(20)
        )
        with self.store.reading() as connection:
            return [int(value) for value in connection.execute(query).scalars()]

    def runs_of(self, host: str, pid: int) -> list[int]:
        """Return the runs in the store that a process recorded."""
        table = tables.runs
        query = sa.select(table.c.id).where(table.c.host == host, table.c.pid == pid).order_by(table.c.id)
        with self.store.reading() as connection:
            return [int(number) for number in connection.execute(query).scalars()]

    def _ensure(self, connection: Connection) -> None:
        table = tables.job_queues
        if connection.execute(sa.select(table.c.name).where(table.c.name == self.name)).first() is None:
            connection.execute(sa.insert(table).values(name=self.name))

    def _move(self, connection: Connection, job: int, status: str, values: Mapping[str, Any]) -> bool:
        """Change a job of this status; whether it was in it."""
        table = tables.jobs
        where = (table.c.id == job, table.c.queue == self.name, table.c.status == status)
        return connection.execute(sa.update(table).where(*where).values(**values)).rowcount == 1

    def _select(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[JobRecord]:
        table, attempts = tables.jobs, tables.job_attempts
        query = sa.select(table).where(table.c.queue == self.name, *conditions).order_by(table.c.id.desc()).limit(limit)
        with self.store.reading() as connection:
            rows = connection.execute(query).all()
            of_jobs = attempts.c.job_id.in_(sa.select(query.subquery().c.id))
            taken = connection.execute(sa.select(attempts).where(of_jobs).order_by(attempts.c.number)).all()
        by_job: dict[int, list[Attempt]] = {}
        for row in taken:
            values = dict(row._mapping)
            by_job.setdefault(values.pop("job_id"), []).append(Attempt(**values))
        return [_job(row, tuple(by_job.get(row.id, ()))) for row in reversed(rows)]


def queue_names(store: Store) -> list[str]:
    """Return the queues of a store."""
    table = tables.job_queues
    with store.reading() as connection:
        return list(connection.execute(sa.select(table.c.name).order_by(table.c.name)).scalars())


def _job(row: Row[Any], attempts: tuple[Attempt, ...]) -> JobRecord:
    values = dict(row._mapping)
    resources = json.loads(values.pop("resources"))
    named, result, kind = (values.pop(name) for name in ("work", "result", "kind"))
    return JobRecord(
        **values,
        work=Work(kind, None if named is None else json.loads(named)),
        memory_limit_bytes=resources.pop("limit"),
        resources=Resources.of(resources),
        result=None if result is None else json.loads(result),
        attempts=attempts,
    )


def _driver(row: Row[Any]) -> DriverRecord | None:
    values = dict(row._mapping)
    if values.pop("name") is None or values["pid"] is None:
        return None
    return DriverRecord(**{**values, "nodes": json.loads(values["nodes"] or "[]")})
