"""How many transactions a second the store takes, from one process and from four at once.

    OMP_NUM_THREADS=1 python benchmarks/store_writers.py [postgresql://USER@HOST/DATABASE]

Each writer adds points of a learning curve to a run of its own, as durable transactions. Without a URL there is only
the SQLite file in the current folder. On a server the same is measured once more with transactions that do not wait
for each other: what the promise costs that a transaction's reads are still true when it writes. The ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import Connection

from lightning_optcore.store import Store
from lightning_optcore.store_database import Database

TRANSACTIONS = 300
ROUNDS = 5


def write(target: str, waits: bool) -> None:
    """Write once the first line comes, and say so before."""
    if not waits:
        Database._begin_on_server = _begin_without_waiting  # type: ignore[method-assign]
    with Store(target) as store, store.held_open():
        run_id = store.start("train")
        print("ready", flush=True)
        sys.stdin.readline()
        for step in range(TRANSACTIONS):
            store.log_curve(run_id, step, 0, {"train/loss": 1.0, "val/loss": 1.0})


def _begin_without_waiting(self: Database, connection: Connection, durable: bool) -> None:
    connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'; SELECT 1")


def measured(target: str, writers: int, waits: bool) -> float:
    """Return the transactions a second of so many processes at once."""
    command = [sys.executable, __file__, "--writer", target, *([] if waits else ["--unlocked"])]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(writers)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        if process.wait() != 0:
            raise RuntimeError(f"a writer ended with exit code {process.returncode}")
    return writers * TRANSACTIONS / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--writer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--unlocked", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.writer:
        write(given.url, not given.unlocked)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        ways = {"SQLite": (str(Path(folder) / "optcore.db"), True)}
        if given.url:
            ways |= {"PostgreSQL": (given.url, True), "PostgreSQL, no waiting": (given.url, False)}
        for target, _ in ways.values():
            Store(target).close()
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for writers in (1, 4):
                for name, (target, waits) in ways.items():
                    found.setdefault((name, writers), []).append(measured(target, writers, waits))
    table = Table(caption=f"transactions a second: median (lowest to highest) of {ROUNDS}")
    for title in ("store", "1 writer", "4 writers"):
        table.add_column(title, justify="left" if title == "store" else "right")
    for name in ways:
        figures = [found[name, writers] for writers in (1, 4)]
        table.add_row(name, *(f"{statistics.median(one):.0f} ({min(one):.0f} to {max(one):.0f})" for one in figures))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
