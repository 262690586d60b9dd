"""Jobs in processes of this machine: the embedded default, without a server."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from lightning_optcore.executor.backend import Node, Tell
from lightning_optcore.executor.executor import Executor
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Order, Outcome
from lightning_optcore.executor.scheduling import Scheduling
from lightning_optcore.executor.usage import benchmark, gpu_names, machine_usage
from lightning_optcore.executor.work import Work
from lightning_optcore.store import Store

log = logging.getLogger(__name__)


class LocalExecutor(Executor):
    """Runs jobs in processes of this machine, which end with this one.

    Args:
        resources: What jobs may take together; by default all processors, GPUs and memory of the machine. Labels are
            those of the machine, for jobs that ask for some.
        store: Path or URL of the store; ``None`` keeps jobs in a temporary one, until the executor is closed.
        queue: Name of the queue.
        scheduling: How jobs are ordered: options of :class:`Scheduling`.
        estimate: Returns what a job is likely to need of which nothing was said, and nothing is known of its kind.
        drive: Whether this process runs what is in the queue, if no other one does; otherwise it only hands jobs in.

    Raises:
        ResourcesError: If an amount is out of range.

    Example:
        >>> from functools import partial
        >>> with LocalExecutor(resources={"cpu": 2}) as executor:
        ...     jobs = [executor.submit(partial(pow, 2, power)) for power in range(3)]
        ...     [job.result(timeout=60) for job in jobs]
        [1, 2, 4]
    """

    def __init__(
        self,
        resources: Mapping[str, Any] | Resources | None = None,
        *,
        store: str | Path | Store | None = None,
        queue: str = "default",
        scheduling: Scheduling | Mapping[str, Any] | None = None,
        estimate: Callable[[Work], Resources | None] | None = None,
        drive: bool = True,
    ) -> None:
        given = resources.to_dict() if isinstance(resources, Resources) else dict(resources or {})
        has = Resources.of({**this_machine().to_dict(), **given})
        backend = LocalWorkers(has)
        super().__init__(backend, store=store, queue=queue, scheduling=scheduling, estimate=estimate, drive=drive)


def this_machine() -> Resources:
    """Return the processors, the memory and the GPUs that this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    cpu = len(available(0)) if available is not None else os.cpu_count() or 1
    return Resources(cpu=cpu, memory_bytes=psutil.virtual_memory().total, gpu=len(gpu_names()))


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    gpus: str
    attempt: tuple[int, int] | None = None
    began: float = 0.0


class LocalWorkers:
    """Worker processes that are used for one job after another."""

    name = "local"
    outlives_driver = False

    def __init__(self, has: Resources) -> None:
        self._has = has
        self._benchmark = benchmark()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        # Of every GPU the share that is taken.
        self._gpus: dict[str, float] = dict.fromkeys(gpu_names(), 0.0)
        self._held: dict[tuple[int, int], tuple[tuple[str, ...], float]] = {}
        self._closing = False
        self._tell: Tell = lambda job, attempt, outcome: None
        self._woken, self._waker = socket.socketpair()
        self._pump = threading.Thread(target=self._receive, name="optcore-workers", daemon=True)

    def open(self, tell: Tell) -> None:
        """Begin to listen to workers."""
        self._tell = tell
        self._pump.start()

    def nodes(self) -> list[Node]:
        """Return this machine."""
        return [Node("local", self._has, self._benchmark, machine_usage())]

    def start(self, order: Order, needs: Resources, node: str) -> None:
        """Give an order to a worker that is idle, or to a new one."""
        attempt = (order.job, order.attempt)
        try:
            gpus = self._take_gpus(attempt, needs.gpu)
            with self._lock:
                worker = next((one for one in self._workers if one.attempt is None and one.gpus == gpus), None)
                if worker is None:
                    worker = _started(gpus)
                    self._workers.append(worker)
                worker.attempt, worker.began = attempt, time.monotonic()
            worker.connection.send(order)
        except OSError as error:
            # Its end, if it began, is told by the listener: there is a worker then.
            if not any(one.attempt == attempt for one in self._workers):
                self._tell(*attempt, Outcome("failed", error=f"no worker could be started: {error}"))
        self._waker.send(b"\0")

    def kill(self, job: int, attempt: int) -> None:
        """End the worker that runs an attempt, with all of its children."""
        with self._lock:
            found = [one for one in self._workers if one.attempt == (job, attempt)]
        for worker in found:
            _kill(worker)

    def adopt(self, attempts: Sequence[tuple[int, int, str]]) -> list[tuple[int, int]]:
        """Return none: workers end with their driver."""
        return []

    def close(self, *, abandon: bool) -> None:
        """End all workers."""
        self._closing = True
        self._waker.send(b"\0")
        if self._pump.is_alive():
            self._pump.join(10)
        for worker in self._workers:
            _kill(worker)
            worker.connection.close()
        self._woken.close()
        self._waker.close()

    def _receive(self) -> None:
        while not self._closing:
            with self._lock:
                by_connection = {worker.connection: worker for worker in self._workers}
            for ready in wait([*by_connection, self._woken]):
                if ready is self._woken:
                    self._woken.recv(4096)
                    continue
                worker = by_connection[ready]  # type: ignore[index]
                self._ended(worker)

    def _ended(self, worker: _Worker) -> None:
        try:
            outcome = worker.connection.recv()
            # One that took more memory than it may is about to end itself.
            spent = outcome.status == "out_of_memory"
        except (EOFError, OSError):
            outcome, spent = _outcome_of_the_dead(worker), True
        with self._lock:
            attempt, worker.attempt = worker.attempt, None
            if spent:
                self._workers.remove(worker)
        if spent:
            _kill(worker)
            worker.connection.close()
        if attempt is not None:
            self._give_gpus_back(attempt)
            self._tell(*attempt, outcome)

    def _take_gpus(self, attempt: tuple[int, int], amount: float) -> str:
        """Return the GPUs, by number, that an attempt sees."""
        if not amount:
            return ""
        share = min(amount, 1.0)
        emptiest = sorted(self._gpus, key=self._gpus.__getitem__)
        # A share goes where others are already; whole ones are empty.
        fitting = [gpu for gpu in reversed(emptiest) if self._gpus[gpu] + share <= 1.0 + 1e-6]
        taken = tuple(fitting[: max(1, round(amount))])
        for gpu in taken:
            self._gpus[gpu] += share
        self._held[attempt] = (taken, share)
        return ",".join(taken)

    def _give_gpus_back(self, attempt: tuple[int, int]) -> None:
        taken, share = self._held.pop(attempt, ((), 0.0))
        for gpu in taken:
            self._gpus[gpu] -= share


def _started(gpus: str) -> _Worker:
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_optcore.executor.worker", str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": _python_path()},
        )
    return _Worker(process, Connection(here.detach()), gpus)


def _python_path() -> str:
    """Let a worker find this package where this process did."""
    root = str(Path(__file__).parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()


def _outcome_of_the_dead(worker: _Worker) -> Outcome:
    code = worker.process.wait()
    seconds = time.monotonic() - worker.began
    if code == -signal.SIGKILL and _memory_is_short():
        return Outcome("out_of_memory", error="its process was killed when memory was short", seconds=seconds)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Outcome("failed", error=f"its process {how}", seconds=seconds)


def _memory_is_short() -> bool:
    return bool(psutil.virtual_memory().percent > 90)
