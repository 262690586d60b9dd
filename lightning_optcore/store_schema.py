"""The tables of the store, and the migrations that make them."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

metadata = sa.MetaData()

versions = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, nullable=False))

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("error", sa.Text),
    sa.Column("overrides", sa.Text, nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("model_fingerprint", sa.Text, index=True),
    sa.Column("data_fingerprint", sa.Text, index=True),
    sa.Column("hardware_fingerprint", sa.Text, index=True),
    sa.Column("recipe", sa.Text),
    sa.Column("recipe_fingerprint", sa.Text, index=True),
    # Up to 2**32 - 1, which a server's integers are too small for.
    sa.Column("seed", sa.BigInteger),
    sa.Column("parent", sa.Integer, sa.ForeignKey("runs.id")),
    sa.Column("directory", sa.Text),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
)

measurements = sa.Table(
    "measurements",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("role", sa.Text, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),
)

# The numbers of the measurements once more, flat, for queries.
scalars = sa.Table(
    "scalars",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("role", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True, index=True),
    sa.Column("value", sa.Float),
)

curves = sa.Table(
    "curves",
    metadata,
    # SQLite counts up its INTEGER alone.
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("value", sa.Float),
)

# Milliseconds of single layers in a backend, by what they are (JSON): measured once per machine.
layer_latencies = sa.Table(
    "layer_latencies",
    metadata,
    sa.Column("hardware_fingerprint", sa.Text, primary_key=True),
    sa.Column("backend", sa.Text, primary_key=True),
    sa.Column("layer", sa.Text, primary_key=True),
    sa.Column("milliseconds", sa.Float, nullable=False),
)

# What the profiler said of a run (JSON), by what the Trainer did.
profiles = sa.Table(
    "profiles",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("stage", sa.Text, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),
)

# Sweeps and their trials: what a searcher asked for is here before it is launched.
sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("journal_version", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("error", sa.Text),
    sa.Column("command", sa.Text, nullable=False),
    sa.Column("directory", sa.Text, nullable=False),
    sa.Column("space", sa.Text, nullable=False),
    sa.Column("directions", sa.Text, nullable=False),
    # The searcher's state, without its trials, as of the newest batch.
    sa.Column("state", sa.Text),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    # Tells a process from a later one of the same number.
    sa.Column("pid_started", sa.Float, nullable=False),
)

trials = sa.Table(
    "trials",
    metadata,
    sa.Column("sweep_id", sa.Integer, sa.ForeignKey("sweeps.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("batch", sa.Integer, nullable=False),
    # Hydra's number of the job that ran it; another one after every launch.
    sa.Column("job_num", sa.Integer),
    sa.Column("candidate", sa.Text, nullable=False),
    sa.Column("overrides", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("objectives", sa.Text),
    sa.Column("failure", sa.Text),
    # By how much limits are exceeded, as shares of these; null where there are none, or they are kept.
    sa.Column("violation", sa.Float),
    sa.Column("fingerprint", sa.Text, index=True),
    sa.Column("cached_from", sa.Text),
    sa.Column("directory", sa.Text),
    sa.Column("started_at", sa.Text),
    sa.Column("finished_at", sa.Text),
    sa.UniqueConstraint("sweep_id", "job_num"),
    sa.Index("trials_of_a_batch", "sweep_id", "batch"),
)

# What a trial reported on its way, by which bad ones are stopped early.
intermediate_values = sa.Table(
    "intermediate_values",
    metadata,
    sa.Column("sweep_id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("value", sa.Float),
    sa.ForeignKeyConstraint(["sweep_id", "number"], ["trials.sweep_id", "trials.number"]),
)

# Jobs of the executors. A queue is served by one process at a time, which is here as the driver.
job_queues = sa.Table(
    "job_queues",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("executor", sa.Text),
    sa.Column("host", sa.Text),
    sa.Column("pid", sa.Integer),
    sa.Column("pid_started", sa.Float),
    sa.Column("seen_at", sa.Text),
    # What the driver knows of its nodes (JSON), as of seen_at.
    sa.Column("nodes", sa.Text),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("queue", sa.Text, sa.ForeignKey("job_queues.name"), nullable=False),
    # A job that is submitted again under its key is the same job.
    sa.Column("key", sa.Text),
    # What it runs, in a word: jobs of a kind are expected to need alike.
    sa.Column("kind", sa.Text, nullable=False),
    # What it runs, by name (JSON); null where that is in the memory of its driver only.
    sa.Column("work", sa.Text),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("resources", sa.Text, nullable=False),
    sa.Column("max_retries", sa.Integer, nullable=False),
    sa.Column("timeout_s", sa.Float),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("submitted_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("result", sa.Text),
    sa.Column("error", sa.Text),
    sa.UniqueConstraint("queue", "key"),
    sa.Index("jobs_by_status", "queue", "status"),
)

job_attempts = sa.Table(
    "job_attempts",
    metadata,
    sa.Column("job_id", sa.Integer, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    # How it ended: like a job, or lost; null while it runs.
    sa.Column("status", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("seconds", sa.Float),
    sa.Column("peak_memory_bytes", sa.BigInteger),
)

_FIRST = (versions, runs, measurements, scalars, curves)


def _create_first_tables(connection: Connection) -> None:
    metadata.create_all(connection, tables=_FIRST)


def _create_layer_latencies(connection: Connection) -> None:
    layer_latencies.create(connection)


def _create_profiles(connection: Connection) -> None:
    profiles.create(connection)


def _create_sweeps(connection: Connection) -> None:
    for table in (sweeps, trials, intermediate_values):
        table.create(connection)


def _add_violations(connection: Connection) -> None:
    # A store that is new has the column from the migration before.
    if "violation" not in {column["name"] for column in sa.inspect(connection).get_columns("trials")}:
        connection.execute(sa.text("ALTER TABLE trials ADD COLUMN violation FLOAT"))


def _create_jobs(connection: Connection) -> None:
    for table in (job_queues, jobs, job_attempts):
        table.create(connection)


# Migration i brings schema version i to i + 1. Append; never change one that was released.
MIGRATIONS = (
    _create_first_tables,
    _create_layer_latencies,
    _create_profiles,
    _create_sweeps,
    _add_violations,
    _create_jobs,
)
SCHEMA_VERSION = len(MIGRATIONS)
