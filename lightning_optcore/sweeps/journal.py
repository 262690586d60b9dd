"""The journal of sweeps in the store: what was asked for is written before it is launched, results as they come.

A sweep can therefore be killed at any moment: its searcher's state is that of the newest batch, and of that batch
the trials without a result are launched again.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from lightning_optcore import store_schema as tables
from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store import Store, StoreError, now
from lightning_optcore.store_database import without_passwords

JOURNAL_VERSION = 1
ENDED = ("done", "failed", "pruned")


# What every trial runs: statements take longer to build than SQLite to execute.
_OF_JOB = (
    tables.trials.c.sweep_id == sa.bindparam("of_sweep"),
    tables.trials.c.job_num == sa.bindparam("of_job"),
)
# Once it is there, a result stays: a process that was given up may still write one.
_START_JOB = sa.update(tables.trials).where(*_OF_JOB, tables.trials.c.status != "done")
_END_JOB = sa.update(tables.trials).where(*_OF_JOB, tables.trials.c.status.not_in(ENDED))
_END_ATTEMPT = _END_JOB.where(tables.trials.c.started_at == sa.bindparam("of_start"))
_SELECT_JOB = sa.select(tables.trials).where(*_OF_JOB)
_SELECT_BATCH = (
    sa.select(tables.trials)
    .where(tables.trials.c.sweep_id == sa.bindparam("of_sweep"), tables.trials.c.batch == sa.bindparam("of_batch"))
    .order_by(tables.trials.c.number)
)
_SELECT_MEASURED = (
    sa.select(tables.trials)
    .where(
        tables.trials.c.fingerprint == sa.bindparam("of_fingerprint"),
        tables.trials.c.status == "done",
        tables.trials.c.objectives.is_not(None),
        tables.trials.c.cached_from.is_(None),
    )
    .order_by(tables.trials.c.finished_at.desc())
)
_INSERT_TRIALS = sa.insert(tables.trials)
_UPDATE_STATE = sa.update(tables.sweeps).where(tables.sweeps.c.id == sa.bindparam("of_sweep"))


class SweepError(ValueError):
    """A sweep that cannot be run as asked; the message names the key, the value and what would be right."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as stored; ``state`` is its searcher's, without the trials, as of the newest batch."""

    id: int
    journal_version: int
    created_at: str
    finished_at: str | None
    status: str
    error: str | None
    command: str
    directory: str
    space: dict[str, Any]
    directions: list[str]
    state: dict[str, Any] | None
    host: str
    pid: int
    pid_started: float

    @property
    def owner_is_alive(self) -> bool:
        """Whether the process that runs it may still do so; one of another machine is taken to be alive."""
        if self.host != platform.node():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.pid_started) < 1.0
        except psutil.Error:
            return False


@dataclass(frozen=True)
class TrialRecord:
    """A trial as stored; its status is asked, running, done, failed or pruned.

    ``violation`` is by how much it exceeds limits, as the sum of its shares over them; 0 where it keeps them.
    """

    sweep_id: int
    number: int
    batch: int
    job_num: int | None
    candidate: Candidate
    overrides: list[str]
    status: str
    objectives: list[float] | None = None
    failure: str | None = None
    violation: float = 0.0
    fingerprint: str | None = None
    cached_from: str | None = None
    directory: str | None = None
    started_at: str | None = None
    finished_at: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it has a result."""
        return self.status in ENDED

    @property
    def feasible(self) -> bool:
        """Whether it has objectives and keeps its limits."""
        return self.objectives is not None and not self.failure and not self.violation

    @property
    def reason(self) -> str:
        """Why it has no objectives, or which limit it exceeds, in one line."""
        return (self.failure or "it has no result").splitlines()[0]


class Journal:
    """Reads and writes sweeps and their trials.

    Args:
        store: Where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(self, command: str, directory: str, space: Mapping[str, Any], directions: Sequence[str]) -> int:
        """Open a sweep of this process and return its number.

        Where another sweep runs in the same folder, the new one's gets its number behind the name.
        """
        values = {
            "journal_version": JOURNAL_VERSION,
            "created_at": now(),
            "status": "running",
            "command": without_passwords(command),
            "directory": directory,
            "space": json.dumps(space),
            "directions": json.dumps(list(directions)),
            **_this_process(),
        }
        with self._store.writing() as connection:
            table = tables.sweeps
            query = sa.select(table).where(table.c.directory == directory, table.c.status == "running")
            shared = any(_sweep(row).owner_is_alive for row in connection.execute(query))
            result = connection.execute(sa.insert(table).values(values))
            sweep_id = int(result.inserted_primary_key[0])  # type: ignore[index]
            if shared:
                own = {"directory": f"{directory}_{sweep_id}"}
                connection.execute(sa.update(table).where(table.c.id == sweep_id).values(own))
            return sweep_id

    def unfinished(self, command: str) -> SweepRecord | None:
        """Return the newest sweep of a command that has not ended and whose owner is dead."""
        table = tables.sweeps
        query = sa.select(table).where(table.c.command == without_passwords(command), table.c.status == "running")
        with self._store.reading() as connection:
            found = [_sweep(row) for row in connection.execute(query.order_by(table.c.id.desc()))]
        return next((sweep for sweep in found if not sweep.owner_is_alive), None)

    def take_over(self, sweep_id: int) -> SweepRecord:
        """Make this process the owner of a sweep and return it.

        Raises:
            SweepError: If there is none of that number, its owner is alive, or its journal is of another version.
        """
        table = tables.sweeps
        with self._store.writing() as connection:
            sweep = _find(connection, sweep_id)
            if sweep.journal_version != JOURNAL_VERSION:
                raise SweepError(
                    f"hydra.sweeper.resume={sweep_id}: its journal is of version {sweep.journal_version}, this "
                    f"lightning_optcore writes version {JOURNAL_VERSION}; resume it with the version that began it"
                )
            if sweep.status == "running" and sweep.owner_is_alive and sweep.pid != os.getpid():
                raise SweepError(
                    f"hydra.sweeper.resume={sweep_id}: process {sweep.pid} on {sweep.host} still runs it; "
                    "end that one first, or begin a sweep of its own"
                )
            changed = {"status": "running", "error": None, "finished_at": None, **_this_process()}
            connection.execute(sa.update(table).where(table.c.id == sweep_id).values(changed))
        return sweep

    def finish(self, sweep_id: int, status: str, error: str | None = None) -> None:
        """Close a sweep as done, failed or interrupted."""
        values = {"status": status, "error": without_passwords(error), "finished_at": now()}
        with self._store.writing() as connection:
            connection.execute(sa.update(tables.sweeps).where(tables.sweeps.c.id == sweep_id).values(values))

    def sweep(self, sweep_id: int) -> SweepRecord:
        """Return a sweep.

        Raises:
            SweepError: If there is none of that number.
        """
        with self._store.reading() as connection:
            return _find(connection, sweep_id)

    def sweeps(self, limit: int | None = None) -> list[SweepRecord]:
        """Return sweeps, newest first."""
        query = sa.select(tables.sweeps).order_by(tables.sweeps.c.id.desc()).limit(limit)
        with self._store.reading() as connection:
            return [_sweep(row) for row in connection.execute(query)]

    def add_batch(
        self,
        sweep_id: int,
        batch: int,
        first_job_num: int,
        trials: Sequence[tuple[Candidate, list[str]]],
        state: Mapping[str, Any],
    ) -> list[TrialRecord]:
        """Write what a searcher asked for, with its state after that, before it is launched; return it as written."""
        records = [
            TrialRecord(sweep_id, candidate.id, batch, first_job_num + i, candidate, overrides, "asked")
            for i, (candidate, overrides) in enumerate(trials)
        ]
        rows = [
            {
                "sweep_id": sweep_id,
                "number": record.number,
                "batch": batch,
                "job_num": record.job_num,
                "candidate": json.dumps(asdict(record.candidate)),
                "overrides": json.dumps(without_passwords(record.overrides)),
                "status": record.status,
            }
            for record in records
        ]
        with self._store.writing() as connection:
            connection.execute(_INSERT_TRIALS, rows)
            connection.execute(_UPDATE_STATE, {"of_sweep": sweep_id, "state": json.dumps(state)})
        return records

    def renumber(self, sweep_id: int, numbers: Sequence[int], first_job_num: int) -> None:
        """Give trials that are launched again job numbers of their own: a killed job's folder stays as it was."""
        table = tables.trials
        with self._store.writing() as connection:
            for i, number in enumerate(numbers):
                values = {"job_num": first_job_num + i, "status": "asked", "started_at": None}
                where = (table.c.sweep_id == sweep_id, table.c.number == number)
                connection.execute(sa.update(table).where(*where).values(values))

    def next_job_num(self, directory: str) -> int:
        """Return the first job number that no sweep within a folder has used."""
        table = tables.trials
        inside = sa.select(tables.sweeps.c.id).where(tables.sweeps.c.directory == directory)
        query = sa.select(sa.func.max(table.c.job_num)).where(table.c.sweep_id.in_(inside))
        with self._store.reading() as connection:
            highest = connection.execute(query).scalar()
        return 0 if highest is None else int(highest) + 1

    def trials(self, sweep_id: int, *, batch: int | None = None, first: int = 0) -> list[TrialRecord]:
        """Return the trials of a sweep, or of one batch of it, in the order of asking, from a number on."""
        table = tables.trials
        with self._store.reading() as connection:
            if batch is not None:
                rows = connection.execute(_SELECT_BATCH, {"of_sweep": sweep_id, "of_batch": batch})
                return [_trial(row) for row in rows if row.number >= first]
            query = sa.select(table).where(table.c.sweep_id == sweep_id, table.c.number >= first)
            return [_trial(row) for row in connection.execute(query.order_by(table.c.number))]

    def trial(self, sweep_id: int, number: int) -> TrialRecord:
        """Return a trial by its number.

        Raises:
            StoreError: If there is none.
        """
        table = tables.trials
        query = sa.select(table).where(table.c.sweep_id == sweep_id, table.c.number == number)
        with self._store.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise StoreError(f"trial {number} of sweep {sweep_id} is not in the journal")
        return _trial(row)

    def lineage(self, sweep_id: int, number: int) -> list[TrialRecord]:
        """Return a trial and those whose weights it continued from, the first one first.

        Raises:
            StoreError: If there is no such trial.
        """
        found = [self.trial(sweep_id, number)]
        while (parent := found[-1].candidate.parent) is not None:
            found.append(self.trial(sweep_id, parent))
        return found[::-1]

    def start_trial(
        self, sweep_id: int, job_num: int, directory: str, fingerprint: str | None = None, objectives: int = 1
    ) -> tuple[TrialRecord, TrialRecord | None]:
        """Write that a job runs its trial; one that is done, by an earlier attempt at the same job, stays so.

        Returns:
            The trial, and the newest one of any sweep that was measured with the same fingerprint and as many
            objectives.

        Raises:
            StoreError: If the job has no trial.
        """
        job = {"of_sweep": sweep_id, "of_job": job_num}
        values = {"status": "running", "directory": directory, "fingerprint": fingerprint, "started_at": now()}
        # Lost in a power cut, it is written again by the trial's next start.
        with self._store.writing(durable=False) as connection:
            connection.execute(_START_JOB, {**job, **values})
            row = connection.execute(_SELECT_JOB, job).first()
            if row is None:
                raise StoreError(f"job {job_num} of sweep {sweep_id} is not in the journal")
            return _trial(row), None if fingerprint is None else _measured(connection, fingerprint, objectives)

    def end_trial(
        self,
        trial: TrialRecord,
        objectives: Sequence[float] | None,
        failure: str | None = None,
        cached_from: str | None = None,
        status: str | None = None,
        violation: float = 0.0,
    ) -> None:
        """Write a trial's result, once; it is dropped if the trial was launched or started again meanwhile."""
        values = {
            "status": status or ("failed" if failure is not None else "done"),
            "objectives": None if objectives is None else json.dumps(list(objectives)),
            "failure": without_passwords(failure),
            "violation": violation or None,
            "cached_from": cached_from,
            "finished_at": now(),
        }
        # By the job's number and its start: a worker may outlive its sweep or be given up, and its trial run again.
        job = {"of_sweep": trial.sweep_id, "of_job": trial.job_num}
        statement = _END_JOB if trial.started_at is None else _END_ATTEMPT
        start = {} if trial.started_at is None else {"of_start": trial.started_at}
        with self._store.writing() as connection:
            connection.execute(statement, {**job, **start, **values})

    def report(self, sweep_id: int, number: int, step: int, value: float) -> None:
        """Write an intermediate value of a trial; one of the same step is replaced."""
        table = tables.intermediate_values
        where = (table.c.sweep_id == sweep_id, table.c.number == number, table.c.step == step)
        stored = value if math.isfinite(value) else None
        with self._store.writing() as connection:
            connection.execute(sa.delete(table).where(*where))
            connection.execute(sa.insert(table).values(sweep_id=sweep_id, number=number, step=step, value=stored))

    def intermediate_values(self, sweep_id: int) -> dict[int, dict[int, float]]:
        """Return the finite values that the trials of a sweep reported: value by step, by the trial's number."""
        table = tables.intermediate_values
        query = sa.select(table).where(table.c.sweep_id == sweep_id, table.c.value.is_not(None))
        query = query.order_by(table.c.number, table.c.step)
        values: dict[int, dict[int, float]] = {}
        with self._store.reading() as connection:
            for row in connection.execute(query):
                values.setdefault(row.number, {})[row.step] = row.value
        return values


@contextmanager
def held_journal(path: str) -> Iterator[Journal]:
    """Give the journal in a store that is held open within the block; :func:`open_journal` gives the same here."""
    with Store(path) as store, store.held_open():
        journal = _shared[path, os.getpid()] = Journal(store)
        try:
            yield journal
        finally:
            del _shared[path, os.getpid()]


def open_journal(path: str) -> Journal:
    """Return the journal in a store; a process opens each store once, and compiles each query once."""
    return _shared.get((path, os.getpid())) or _journal_of_process(path, os.getpid())


_shared: dict[tuple[str, int], Journal] = {}


@lru_cache(maxsize=8)
def _journal_of_process(path: str, process: int) -> Journal:
    return Journal(Store(path))


def _measured(connection: Connection, fingerprint: str, objectives: int) -> TrialRecord | None:
    found = map(_trial, connection.execute(_SELECT_MEASURED, {"of_fingerprint": fingerprint}))
    return next((trial for trial in found if len(trial.objectives or ()) == objectives), None)


def _find(connection: Connection, sweep_id: int) -> SweepRecord:
    row = connection.execute(sa.select(tables.sweeps).where(tables.sweeps.c.id == sweep_id)).first()
    if row is None:
        known = connection.execute(sa.select(tables.sweeps.c.id).order_by(tables.sweeps.c.id)).scalars().all()
        there = ", ".join(map(str, known)) or "none"
        raise SweepError(f"hydra.sweeper.resume={sweep_id}: no sweep of that number in the store; there are: {there}")
    return _sweep(row)


def _sweep(row: Row[Any]) -> SweepRecord:
    values = dict(row._mapping)
    for name in ("space", "directions", "state"):
        values[name] = json.loads(values[name]) if values[name] is not None else None
    return SweepRecord(**values)


def _trial(row: Row[Any]) -> TrialRecord:
    values = dict(row._mapping)
    for name in ("candidate", "overrides", "objectives"):
        values[name] = json.loads(values[name]) if values[name] is not None else None
    return TrialRecord(
        **{**values, "candidate": Candidate(**values["candidate"]), "violation": values["violation"] or 0.0}
    )


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "pid_started": psutil.Process().create_time()}
