"""Many jobs on the processors there are: the same few calls for this machine and for a cluster."""

from __future__ import annotations

import atexit
import logging
import math
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_optcore.executor.backend import Backend
from lightning_optcore.executor.driver import Driver
from lightning_optcore.executor.queue import JobQueue, JobRecord
from lightning_optcore.executor.resources import Resources, check_some_node_fits
from lightning_optcore.executor.scheduling import Scheduling
from lightning_optcore.executor.work import Work, WorkError, work_of
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.store import Store
from lightning_optcore.store_database import without_passwords

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

# How often a handle looks into the store, of a queue that another process drives.
_POLL_S = 0.1
# So often at least, of one that is driven here.
_LOOK_S = 2.0
_HEADROOM = 1.2


class ExecutorError(RuntimeError):
    """An executor that cannot be used as asked."""


class JobError(RuntimeError):
    """A job that did not end well; the message says which, where, and why."""


class JobFailedError(JobError):
    """It raised an error, or its process died."""


class JobCancelledError(JobError):
    """It was cancelled."""


class JobTimeoutError(JobError):
    """It ran longer than its ``timeout_s``."""


class JobOutOfMemoryError(JobError):
    """It took more memory than it may, or than there is."""


class JobLostError(JobError):
    """The nodes that ran it were lost, more often than it is tried again."""


_ERRORS: dict[str, type[JobError]] = {
    "failed": JobFailedError,
    "cancelled": JobCancelledError,
    "timed_out": JobTimeoutError,
    "out_of_memory": JobOutOfMemoryError,
    "lost": JobLostError,
}


class JobHandle:
    """A job that was submitted, as it is now.

    Args:
        executor: Where it was.
        id: Its number in the store.
    """

    def __init__(self, executor: Executor, id: int) -> None:
        self._executor, self.id = executor, id

    def __repr__(self) -> str:
        return f"JobHandle({self.id}, {self.status!r})"

    @property
    def record(self) -> JobRecord:
        """What the store has of it."""
        return self._executor.queue.job(self.id)

    @property
    def status(self) -> str:
        """Queued, running, done, failed, cancelled, timed_out, out_of_memory or lost."""
        return self.record.status

    @property
    def node(self) -> str | None:
        """The node of its newest attempt; ``None`` before the first one."""
        return self.record.node

    @property
    def attempts(self) -> int:
        """How often it was started."""
        return len(self.record.attempts)

    def cancel(self) -> None:
        """End it; one that has ended stays as it is."""
        self._executor.cancel(self)

    def result(self, timeout: float | None = None) -> Any:
        """Wait until it has ended, and return what it returned.

        Args:
            timeout: Seconds to wait.

        Raises:
            TimeoutError: If it has not ended by then; it goes on.
            JobFailedError: If it raised an error; and others of their names for its other endings.
        """
        self._executor.wait([self], timeout)
        record = self.record
        if not record.ended:
            raise TimeoutError(f"job {self.id} ({record.work.kind}) is {record.status} after {timeout:g} s")
        if record.status != "done":
            where = f" on {record.node}" if record.node else ""
            tries = f" (attempt {len(record.attempts)})" if len(record.attempts) > 1 else ""
            status = record.status.replace("_", " ")
            raise _ERRORS[record.status](f"job {self.id} ({record.work.kind}) {status}{where}{tries}: {record.error}")
        value = self._executor.value(self.id)
        return record.result if value is None else pickle.loads(value)


class Executor:
    """Runs jobs, the most urgent ones first, where they fit.

    The jobs are in a store. An executor of a queue that another living process drives hands its jobs to that one.

    Args:
        backend: Where jobs run.
        store: Path or URL of the store; ``None`` keeps jobs in a temporary one, until the executor is closed.
        queue: Name of the queue.
        scheduling: How jobs are ordered and spread: a :class:`Scheduling`, or its options.
        estimate: Returns what a job is likely to need of which nothing was said, and nothing is known of its kind.
        drive: Whether this process runs what is in the queue, if no other one does; otherwise it only hands jobs in.

    Raises:
        ResourcesError: If an option is out of range.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        store: str | Path | Store | None = None,
        queue: str = "default",
        scheduling: Scheduling | Mapping[str, Any] | None = None,
        estimate: Callable[[Work], Resources | None] | None = None,
        drive: bool = True,
    ) -> None:
        if scheduling is None or not isinstance(scheduling, Scheduling):
            scheduling = Scheduling(**dict(scheduling or {}))
        self._estimate = estimate
        self._temporary = tempfile.TemporaryDirectory(prefix="optcore-jobs-") if store is None else None
        target = Path(self._temporary.name) / "jobs.db" if self._temporary is not None else store
        assert target is not None
        self._owns_store = not isinstance(target, Store)
        self.store = target if isinstance(target, Store) else Store(target)
        self.queue = JobQueue(self.store, queue)
        self._submitted: list[JobHandle] = []
        self.driver: Driver | None = None
        self._closed = False
        self._held = ExitStack()
        if self._owns_store:
            self._held.enter_context(self.store.held_open())
        if drive and self.queue.lead(backend.name):
            self.driver = Driver(self.queue, backend, scheduling)
            try:
                self.driver.start()
            except BaseException:
                self.close()
                raise
        # Registered now, as what is registered last runs first: before Ray's own end.
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait(self._submitted)
        self.close()

    def submit(
        self,
        work: Callable[..., Any] | Sequence[str],
        *,
        priority: int = 0,
        resources: Mapping[str, Any] | Resources | None = None,
        key: str | None = None,
        kind: str | None = None,
        timeout_s: float | None = None,
        max_retries: int = 3,
    ) -> JobHandle:
        """Hand in a job.

        Args:
            work: A function (arguments by ``functools.partial``), or the words of an ``optcore`` command:
                ``["train", "model.width=64"]``. A function of a module, with arguments that JSON has words for, is
                found again by a driver that is started after this one died; any other is lost with it.
            priority: The higher, the sooner.
            resources: ``{"cpu": 1, "memory_bytes": ..., "gpu": 0, "labels": {...}}``. What is left out is estimated
                from earlier jobs of its kind; memory that is given is also the limit.
            key: What identifies it within the queue: submitted again, it is the same job, not another one.
            kind: Jobs of a kind need alike; by default the function's name, or the command with its groups.
            timeout_s: Seconds after which an attempt is ended.
            max_retries: How often it is tried again when its node is lost, or was at fault.

        Raises:
            ResourcesError: If no node has as much.
            WorkError: If ``work`` is nothing that can be run.
        """
        if self._closed:
            raise ExecutorError("submit: this executor is closed")
        check_options(priority, timeout_s, max_retries)
        what = work_of(work, kind)
        if what.named is not None and without_passwords(what.named) != what.named:
            raise WorkError(
                f"{what.kind}: a URL in it holds a password, which the queue would keep: leave it out, and give it as "
                "PGPASSWORD, or in ~/.pgpass"
            )
        needs, limit = self._needs(what, resources)
        if self.driver is None and what.named is None:
            raise ExecutorError(
                f"queue {self.queue.name!r} is not driven by this process, and no other one can be handed {what.kind}: "
                "expected a function of a module, with arguments that JSON has words for"
            )
        check_some_node_fits(needs, self._nodes_there_are())
        number, new = self.queue.add(
            what,
            key=key,
            priority=priority,
            resources=needs,
            memory_limit_bytes=limit,
            max_retries=max_retries,
            timeout_s=timeout_s,
        )
        if not new:
            self._warn_if_other_work(number, what)
        elif self.driver is not None:
            self.driver.submitted(number, what)
        handle = JobHandle(self, number)
        self._submitted.append(handle)
        return handle

    def wait(self, handles: Iterable[JobHandle], timeout: float | None = None) -> list[JobHandle]:
        """Wait until jobs have ended, or so many seconds have passed; return those that have not.

        Raises:
            ExecutorError: If the driver, in this process, has ended for an error.
        """
        end = None if timeout is None else time.monotonic() + timeout
        open_still = {handle.id: handle for handle in handles}
        looked = -math.inf
        while open_still:
            if self.driver is None or time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                statuses = self.queue.statuses(open_still)
                open_still = {id: one for id, one in open_still.items() if statuses.get(id) in ("queued", "running")}
            else:
                open_still = {id: one for id, one in open_still.items() if id not in self.driver.over}
            if not open_still or (end is not None and time.monotonic() >= end):
                break
            left = 1.0 if end is None else max(0.0, min(1.0, end - time.monotonic()))
            if self.driver is None:
                time.sleep(min(left, _POLL_S))
            elif self.driver.failure is not None:
                raise ExecutorError(f"queue {self.queue.name!r}: its driver ended") from self.driver.failure
            elif self._closed:
                raise ExecutorError("this executor was closed before the job had ended")
            else:
                self.driver.wait_for_change(left)
        return list(open_still.values())

    def cancel(self, handle: JobHandle) -> None:
        """End a job, whether it waits or runs."""
        self.queue.request_cancel(handle.id)
        if self.driver is not None:
            self.driver.wake()

    def status(self, handle: JobHandle) -> str:
        """Return the status of a job."""
        return handle.status

    def jobs(self, status: str | None = None) -> list[JobHandle]:
        """Return the jobs of the queue, also those that another process submitted."""
        return [JobHandle(self, record.id) for record in self.queue.jobs(status=status)]

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes, with what each has, what it uses, and what came of its jobs."""
        driver = self.queue.driver()
        return [] if driver is None else driver.nodes

    def value(self, job: int) -> bytes | None:
        """Return what a job returned, pickled, where JSON has no word for it and it ended under this driver."""
        return None if self.driver is None else self.driver.values.get(job)

    def wind_down(self) -> None:
        """Start nothing more, and wait until what runs under this driver has ended. What waits stays in the store."""
        if self.driver is not None:
            self.driver.wind_down()
            self.wait(self.jobs(status="running"))

    def forget(self, handle: JobHandle) -> None:
        """Let go of what a job returned that JSON has no word for, once it was read."""
        if self.driver is not None:
            self.driver.values.pop(handle.id, None)

    def close(self, *, abandon: bool = False) -> None:
        """Stop driving. What waits stays in the store for the next driver; what runs is ended and waits again.

        Args:
            abandon: Leave what runs running, where it can (on a cluster), for the next driver.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self.driver is not None:
            self.driver.close(abandon=abandon)
        self._held.close()
        if self._owns_store:
            self.store.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _warn_if_other_work(self, number: int, what: Work) -> None:
        before = self.queue.job(number)
        if (before.work.named, before.work.kind) != (what.named, what.kind):
            log.warning(
                "key=%r is that of job %d (%s), which runs other work: that one is kept", before.key, number,
                before.work.kind,
            )  # fmt: skip

    def _nodes_there_are(self) -> list[tuple[str, Resources]]:
        """Return the nodes of whoever drives; where nobody does, none are known."""
        if self.driver is not None:
            return [(node.name, node.has) for node in self.driver.nodes()]
        driver = self.queue.driver()
        known = driver.nodes if driver is not None and driver.is_alive else []
        return [(node["name"], Resources.of(node["has"])) for node in known]

    def _needs(self, work: Work, given: Mapping[str, Any] | Resources | None) -> tuple[Resources, int | None]:
        """Return what a job is taken to need, and the memory that it may not exceed."""
        if isinstance(given, Resources):
            return given, given.memory_bytes or None
        asked = Resources.of(given)
        if asked.memory_bytes:
            return asked, asked.memory_bytes
        known = estimated(work, self.queue, self._estimate)
        if known is None:
            return asked, None
        return Resources.of({**known.to_dict(), **dict(given or {})}), None


def check_options(priority: Any, timeout_s: Any, max_retries: Any) -> None:
    """Refuse options of a job that are out of range.

    Raises:
        ExecutorError: With the option, its value, and what would be right.
    """
    if not is_whole(priority):
        raise ExecutorError(f"priority={priority!r}: expected a whole number")
    if not is_whole(max_retries, least=0):
        raise ExecutorError(f"max_retries={max_retries!r}: expected a whole number, 0 or more")
    if timeout_s is None:
        return
    if not is_number(timeout_s) or not timeout_s > 0:
        raise ExecutorError(f"timeout_s={timeout_s!r}: expected a number above 0")


def estimated(
    work: Work, queue: JobQueue, of_work: Callable[[Work], Resources | None] | None = None
) -> Resources | None:
    """Return what a job is likely to need, or ``None`` where nothing is known.

    Args:
        work: What it runs.
        queue: In whose store earlier jobs of its kind are looked for.
        of_work: Answers where there are none.
    """
    peaks = queue.peak_memory_bytes(work.kind)
    if peaks:
        # The worst one with some room: a job more is cheaper than a job again.
        return Resources(memory_bytes=int(max(peaks) * _HEADROOM))
    return None if of_work is None else of_work(work)
