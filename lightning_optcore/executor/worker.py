"""The program of a worker process: it runs one job after another, and ends when its driver does."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from lightning_optcore.executor.running import Outcome, run_order


def main(descriptor: int) -> None:
    """Serve the driver at the other end of a connection that this process was started with."""
    connection = Connection(descriptor)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sending = threading.Lock()

    def receive() -> None:
        try:
            while True:
                orders.put(connection.recv())
        except (EOFError, OSError):
            # Nobody is left who wants the result. Children are in the same group of processes.
            os.killpg(0, signal.SIGKILL)

    def over_the_limit(outcome: Outcome) -> None:
        with sending:
            connection.send(outcome)
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=receive, name="optcore-driver", daemon=True).start()
    while True:
        outcome = run_order(orders.get(), over_the_limit)
        with sending:
            connection.send(outcome)


if __name__ == "__main__":
    # Another program's Ctrl-C is none of a job's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(int(sys.argv[1]))
