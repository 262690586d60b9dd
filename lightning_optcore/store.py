"""The store: every run, its measurements and its curves in one database that many processes write at once.

The embedded default is one SQLite file in WAL mode; a PostgreSQL server serves several machines. Every method is one
transaction, so that a process killed at any moment loses at most the row it was writing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from lightning_optcore import store_schema as tables
from lightning_optcore.measurement.directions import Direction, direction_of
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.store_database import Database, StoreError, without_passwords

__all__ = ["STATUSES", "Run", "Store", "StoreError", "now"]

STATUSES = ("running", "done", "failed", "interrupted")


@dataclass(frozen=True)
class Run:
    """One run as stored.

    Args:
        id: Its number.
        job: The job, e.g. ``"train"``.
        status: ``"running"``, ``"done"``, ``"failed"`` or ``"interrupted"``.
        created_at: Start (ISO 8601, UTC).
        finished_at: End, or ``None``.
        overrides: Hydra's command-line overrides.
        config: The resolved configuration.
        model_fingerprint: What identifies the model's configuration and source.
        data_fingerprint: What identifies the data.
        hardware_fingerprint: What identifies the machine.
        recipe: What was done to the model, or ``None``.
        seed: The seed, or ``None``.
        parent: Number of the run that this one continues, or ``None``.
        directory: Where its files are.
        error: Why it failed.
        host: Name of the machine.
        pid: Number of the process.
        measurements: Measurements by role: ``"before"``, ``"after"``.
    """

    id: int
    job: str
    status: str
    created_at: str
    finished_at: str | None
    overrides: list[str]
    config: dict[str, Any]
    model_fingerprint: str | None
    data_fingerprint: str | None
    hardware_fingerprint: str | None
    recipe: dict[str, Any] | None
    seed: int | None
    parent: int | None
    directory: str | None
    error: str | None
    host: str
    pid: int
    measurements: dict[str, Measurement] = field(default_factory=dict)

    @property
    def objectives(self) -> dict[str, float]:
        """Every number of the final model: of ``"after"`` if there is one, else of ``"before"``."""
        final = self.measurements.get("after") or self.measurements.get("before")
        return final.scalars() if final is not None else {}


class Store:
    """Opens a store, creating or upgrading it where needed.

    Args:
        target: Path of a SQLite file, or a URL: ``postgresql://USER@HOST/DATABASE`` (extra ``postgresql``).

    Raises:
        StoreError: If it cannot be opened or written, or was written by a newer version.

    Example:
        >>> import tempfile
        >>> with Store(tempfile.mkdtemp() + "/optcore.db") as store:
        ...     run_id = store.start("train", overrides=["model.width=8"], seed=0)
        ...     store.finish(run_id)
        ...     store.run(run_id).status
        'done'
    """

    def __init__(self, target: str | Path) -> None:
        # What it was opened with, for other processes to open it too.
        self.target = str(target)
        self._database = Database(self.target)
        self._migrate()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the connections."""
        self._database.close()

    def start(
        self,
        job: str,
        *,
        overrides: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        model_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
        hardware_fingerprint: str | None = None,
        seed: int | None = None,
        parent: int | None = None,
        directory: str | None = None,
    ) -> int:
        """Open a row with status ``"running"`` and return its number.

        Raises:
            StoreError: If ``parent`` is no run.
        """
        values = {
            "created_at": now(),
            "job": job,
            "status": "running",
            "overrides": _dump(without_passwords(list(overrides))),
            "config": _dump(without_passwords(dict(config or {}))),
            "model_fingerprint": model_fingerprint,
            "data_fingerprint": data_fingerprint,
            "hardware_fingerprint": hardware_fingerprint,
            "seed": seed,
            "parent": parent,
            "directory": directory,
            "host": platform.node(),
            "pid": os.getpid(),
        }
        with self.writing() as connection:
            if parent is not None:
                self._require(connection, parent)
            result = connection.execute(sa.insert(tables.runs).values(values))
            return int(result.inserted_primary_key[0])  # type: ignore[index]

    def update(
        self,
        run_id: int,
        *,
        model_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
        directory: str | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what became known after the start; ``None`` leaves a column as it is."""
        values: dict[str, Any] = {
            "model_fingerprint": model_fingerprint,
            "data_fingerprint": data_fingerprint,
            "directory": directory,
        }
        if recipe is not None:
            values |= {"recipe": _dump(dict(recipe)), "recipe_fingerprint": _recipe_fingerprint(recipe)}
        self._set(run_id, {name: value for name, value in values.items() if value is not None})

    def finish(self, run_id: int, status: str = "done", *, error: str | None = None) -> None:
        """Close a row.

        Raises:
            StoreError: If ``status`` is not one of done, failed, interrupted.
        """
        if status not in STATUSES[1:]:
            raise StoreError(f"status={status!r}: expected one of {', '.join(STATUSES[1:])}")
        self._set(run_id, {"status": status, "error": without_passwords(error), "finished_at": now()})

    def add_measurement(self, run_id: int, role: str, measurement: Measurement) -> None:
        """Write a measurement as ``"before"`` or ``"after"``; one of the same role is replaced."""
        rows = [
            {"run_id": run_id, "role": role, "name": name, "value": _storable(value)}
            for name, value in measurement.scalars().items()
        ]
        with self.writing() as connection:
            self._require(connection, run_id)
            for table in (tables.measurements, tables.scalars):
                connection.execute(sa.delete(table).where(table.c.run_id == run_id, table.c.role == role))
            content = measurement.to_json()
            connection.execute(sa.insert(tables.measurements).values(run_id=run_id, role=role, content=content))
            connection.execute(sa.insert(tables.scalars), rows)

    def log_curve(self, run_id: int, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write one point of every learning curve."""
        rows = [
            {"run_id": run_id, "step": step, "epoch": epoch, "name": name, "value": _storable(value)}
            for name, value in values.items()
        ]
        with self.writing() as connection:
            self._require(connection, run_id)
            if rows:
                connection.execute(sa.insert(tables.curves), rows)

    def add_profile(self, run_id: int, stage: str, content: Mapping[str, Any]) -> None:
        """Write what the profiler said of a run; of the same stage the newest stays."""
        table = tables.profiles
        with self.writing() as connection:
            self._require(connection, run_id)
            connection.execute(sa.delete(table).where(table.c.run_id == run_id, table.c.stage == stage))
            connection.execute(sa.insert(table).values(run_id=run_id, stage=stage, content=_dump(dict(content))))

    def profiles(self, run_id: int) -> dict[str, dict[str, Any]]:
        """Return what the profiler said of a run, by stage: ``"fit"``, ``"test"`` and so on."""
        query = sa.select(tables.profiles).where(tables.profiles.c.run_id == run_id)
        query = query.order_by(tables.profiles.c.stage)
        with self.reading() as connection:
            return {row.stage: json.loads(row.content) for row in connection.execute(query)}

    def run(self, run_id: int) -> Run:
        """Return one run.

        Raises:
            StoreError: If there is none of that number.
        """
        found = self._select(tables.runs.c.id == run_id)
        if not found:
            raise StoreError(f"run {run_id} is not in {self._database.name}")
        return found[0]

    def runs(self, *, job: str | None = None, status: str | None = None, limit: int | None = None) -> list[Run]:
        """Return runs, newest first."""
        return self._select(*_equal({"job": job, "status": status}), limit=limit)

    def by_fingerprint(
        self,
        *,
        model: str | None = None,
        data: str | None = None,
        hardware: str | None = None,
        status: str | None = "done",
    ) -> list[Run]:
        """Return the runs of the given fingerprints, newest first; ``None`` matches any."""
        wanted = {
            "model_fingerprint": model,
            "data_fingerprint": data,
            "hardware_fingerprint": hardware,
            "status": status,
        }
        return self._select(*_equal(wanted))

    def by_recipe(self, recipe: Mapping[str, Any], *, status: str | None = "done") -> list[Run]:
        """Return the runs that did the same to their model, newest first."""
        wanted = {"recipe_fingerprint": _recipe_fingerprint(recipe), "status": status}
        return self._select(*_equal(wanted))

    def history(self, objective: str, *, job: str | None = None) -> list[tuple[Run, float]]:
        """Return the runs with a finite value of ``objective`` and that value, oldest first."""
        having = sa.select(tables.scalars.c.run_id).where(tables.scalars.c.name == objective)
        runs = self._select(tables.runs.c.id.in_(having), *_equal({"job": job}))
        pairs = ((run, run.objectives.get(objective, math.nan)) for run in reversed(runs))
        return [(run, value) for run, value in pairs if math.isfinite(value)]

    def pareto_front(
        self, objectives: Mapping[str, Direction] | Sequence[str], *, status: str | None = "done"
    ) -> list[Run]:
        """Return the runs that no other run beats in every objective, best first in the first one.

        Args:
            objectives: Directions by name, or names with the yardstick's own directions. Runs that
                lack one, or whose value is not finite, do not take part. Equal points all stay.
            status: Only runs of this status; ``None`` takes all.
        """
        directions = (
            dict(objectives) if isinstance(objectives, Mapping) else {name: direction_of(name) for name in objectives}
        )
        points = []
        for run in self.runs(status=status):
            values = run.objectives
            costs = [
                values.get(name, math.nan) * (1 if direction == "minimize" else -1)
                for name, direction in directions.items()
            ]
            if all(math.isfinite(cost) for cost in costs):
                points.append((costs, run))
        front = [(costs, run) for costs, run in points if not any(_dominates(other, costs) for other, _ in points)]
        return [run for _, run in sorted(front, key=lambda pair: pair[0])]

    def curves(self, run_id: int) -> dict[str, list[tuple[int, float]]]:
        """Return the learning curves of a run: (step, value) by name; a lost value is NaN."""
        query = sa.select(tables.curves).where(tables.curves.c.run_id == run_id).order_by(tables.curves.c.id)
        found: dict[str, list[tuple[int, float]]] = {}
        with self.reading() as connection:
            for row in connection.execute(query):
                found.setdefault(row.name, []).append((row.step, _restored(row.value)))
        return found

    def layer_latencies(self, hardware: str, backend: str) -> dict[str, float]:
        """Return the milliseconds of the layers that were timed on a machine, by their description."""
        table = tables.layer_latencies
        query = sa.select(table.c.layer, table.c.milliseconds).where(
            table.c.hardware_fingerprint == hardware, table.c.backend == backend
        )
        with self.reading() as connection:
            return {row.layer: row.milliseconds for row in connection.execute(query)}

    def add_layer_latencies(self, hardware: str, backend: str, milliseconds: Mapping[str, float]) -> None:
        """Write the milliseconds of layers; a layer that is there already gets the new figure."""
        table = tables.layer_latencies
        rows = [
            {"hardware_fingerprint": hardware, "backend": backend, "layer": layer, "milliseconds": value}
            for layer, value in milliseconds.items()
        ]
        same = (table.c.hardware_fingerprint == hardware, table.c.backend == backend)
        with self.writing() as connection:
            connection.execute(sa.delete(table).where(*same, table.c.layer.in_(list(milliseconds))))
            connection.execute(sa.insert(table), rows)

    def _migrate(self) -> None:
        # Looking first spares a write lock at every opening but the first.
        with self.reading() as connection:
            version = _version_of(connection)
        if version < tables.SCHEMA_VERSION:
            self._database.write_ahead()
            with self.writing() as connection:
                version = _version_of(connection)
                for migrate in tables.MIGRATIONS[version:]:
                    migrate(connection)
                if version < tables.SCHEMA_VERSION:
                    connection.execute(sa.delete(tables.versions))
                    connection.execute(sa.insert(tables.versions).values(version=tables.SCHEMA_VERSION))
        if version > tables.SCHEMA_VERSION:
            raise StoreError(
                f"store.path={self._database.name}: its schema is version {version}, this lightning_optcore reads "
                f"up to {tables.SCHEMA_VERSION}; upgrade lightning-optcore, or name another store"
            )

    def _select(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Run]:
        query = sa.select(tables.runs).where(*conditions).order_by(tables.runs.c.id.desc()).limit(limit)
        with self.reading() as connection:
            rows = connection.execute(query).all()
            taken = connection.execute(
                sa.select(tables.measurements).where(tables.measurements.c.run_id.in_(sa.select(query.subquery().c.id)))
            ).all()
        measurements: dict[int, dict[str, Measurement]] = {}
        for row in taken:
            measurements.setdefault(row.run_id, {})[row.role] = Measurement.from_json(row.content)
        return [_run(row, measurements.get(row.id, {})) for row in rows]

    def _set(self, run_id: int, values: Mapping[str, Any]) -> None:
        with self.writing() as connection:
            self._require(connection, run_id)
            if values:
                connection.execute(sa.update(tables.runs).where(tables.runs.c.id == run_id).values(**values))

    def _require(self, connection: Connection, run_id: int) -> None:
        if connection.execute(sa.select(tables.runs.c.id).where(tables.runs.c.id == run_id)).first() is None:
            raise StoreError(f"run {run_id} is not in {self._database.name}")

    def reading(self) -> AbstractContextManager[Connection]:
        """Give a connection to read with; its errors become a StoreError."""
        return self._database.reading()

    def writing(self, *, durable: bool = True) -> AbstractContextManager[Connection]:
        """Give a connection within one transaction, which an exception takes back; no other writes meanwhile.

        Args:
            durable: Whether it is kept through a power cut. A process that is killed loses nothing either way.
        """
        return self._database.writing(durable=durable)

    def held_open(self) -> AbstractContextManager[None]:
        """Keep a connection from one transaction to the next within the block: many short ones are faster so."""
        return self._database.held_open()


def _version_of(connection: Connection) -> int:
    if not sa.inspect(connection).has_table(tables.versions.name):
        return 0
    return int(connection.execute(sa.select(tables.versions.c.version)).scalar() or 0)


def _equal(wanted: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    return [tables.runs.c[name] == value for name, value in wanted.items() if value is not None]


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _run(row: Row[Any], measurements: dict[str, Measurement]) -> Run:
    values = dict(row._mapping)
    values.pop("recipe_fingerprint")
    for name in ("overrides", "config", "recipe"):
        values[name] = json.loads(values[name]) if values[name] is not None else None
    return Run(**values, measurements=measurements)


def _dump(value: Any) -> str:
    return json.dumps(value, default=str)


def _recipe_fingerprint(recipe: Mapping[str, Any]) -> str:
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _storable(value: float) -> float | None:
    """NULL stands for NaN, which SQL does not know; infinities are kept as the largest numbers."""
    number = float(value)
    if math.isnan(number):
        return None
    return math.copysign(1.7976931348623157e308, number) if math.isinf(number) else number


def _restored(value: float | None) -> float:
    if value is None:
        return math.nan
    return math.copysign(math.inf, value) if abs(value) == 1.7976931348623157e308 else value


def now() -> str:
    """Return the time as the store writes it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
