"""The loop that drives a queue: takes what ended, starts what fits, and looks after what runs."""

from __future__ import annotations

import json
import logging
import math
import queue as queues
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from lightning_optcore.executor.backend import Backend, Node
from lightning_optcore.executor.queue import Ended, JobQueue, JobRecord
from lightning_optcore.executor.resources import Resources, ResourcesError, check_some_node_fits
from lightning_optcore.executor.running import Order, Outcome
from lightning_optcore.executor.scheduling import Durations, Offer, Scheduling, Waiting, speeds, starts
from lightning_optcore.executor.work import Work
from lightning_optcore.store import StoreError

log = logging.getLogger(__name__)

_TICK_S = 0.25
# Of a job that was killed and does not end, the node's resources are counted as free after so many seconds.
_KILL_GRACE_S = 15.0
_THROUGHPUT_WINDOW_S = 60.0
# So long the store may refuse to be written.
_STORE_PATIENCE_S = 120.0


@dataclass
class _Running:
    record: JobRecord
    attempt: int
    node: str
    needs: Resources
    since: float
    # Why it is being killed, and since when.
    ending: str | None = None
    ending_since: float = 0.0


@dataclass
class NodeTally:
    """What came of the jobs of one node."""

    finished: int = 0
    failed: int = 0
    lost: int = 0
    # When the newest ones ended, on the monotonic clock.
    ended: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def per_minute(self, clock: float) -> float:
        """Return how many jobs ended in the last minute."""
        return sum(clock - one < _THROUGHPUT_WINDOW_S for one in self.ended) * 60.0 / _THROUGHPUT_WINDOW_S


class Driver:
    """Drives a queue in a thread of its own.

    Args:
        queue: Its jobs; this process leads it.
        backend: Where they run.
        scheduling: How they are ordered and spread.
    """

    def __init__(self, queue: JobQueue, backend: Backend, scheduling: Scheduling) -> None:
        self.queue, self.backend, self.scheduling = queue, backend, scheduling
        # What was returned and has no word in JSON, by job, for handles in this process.
        self.values: dict[int, bytes] = {}
        # The jobs that ended under this driver.
        self.over: set[int] = set()
        self.failure: BaseException | None = None
        self.tallies: dict[str, NodeTally] = {}
        self._inbox: queues.SimpleQueue[tuple[int, int, Outcome] | None] = queues.SimpleQueue()
        self._waiting: dict[int, tuple[JobRecord, Waiting]] = {}
        self._running: dict[int, _Running] = {}
        # What runs cannot be told by name only: it comes from who submits it, in this process.
        self._work: dict[int, Work] = {}
        self._newest = 0
        self._nodes: dict[str, Node] = {}
        self._durations = Durations()
        # What was told of and is not in the store yet.
        self._told: list[tuple[int, int, Outcome]] = []
        self._looked = -math.inf
        self._leads = True
        # An attempt was lost: which nodes are there is asked before anything starts.
        self._node_in_doubt = False
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._winding_down = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"optcore-{queue.name}", daemon=True)

    # ---- for the executor, in other threads ----

    def start(self) -> None:
        """Take over what the driver before left, and begin."""
        self.backend.open(lambda job, attempt, outcome: self._inbox.put((job, attempt, outcome)))
        self._look_at_nodes()
        self._take_over()
        self._thread.start()

    def submitted(self, job: int, work: Work) -> None:
        """Learn of a job that was just written."""
        if work.named is None:
            self._work[job] = work
        self._inbox.put(None)

    def wake(self) -> None:
        """Look at once at what is asked in the store."""
        self._inbox.put(None)

    def wait_for_change(self, seconds: float) -> None:
        """Wait until some job has ended, or some time has passed."""
        with self._changed:
            self._changed.wait(seconds)

    def wind_down(self) -> None:
        """Start nothing more, also not again."""
        self._winding_down.set()

    def nodes(self) -> list[Node]:
        """Return the nodes as they were seen last."""
        return list(self._nodes.values())

    def close(self, *, abandon: bool) -> None:
        """Stop; what runs is ended and waits again, or is left to the next driver."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(60)
        self.backend.close(abandon=abandon)
        if self.failure is None:
            if not (abandon and self.backend.outlives_driver):
                outcome = Outcome("interrupted", error="its driver was closed")
                self.queue.end([Ended(one.record.id, one.attempt, outcome, True) for one in self._running.values()])
            self.queue.leave()

    # ---- the loop ----

    def _run(self) -> None:
        try:
            worked = time.monotonic()
            while not self._closing.is_set():
                try:
                    self._once()
                    worked = time.monotonic()
                except StoreError as error:
                    # A disk that is full or a server that starts again may be mended; nothing is forgotten meanwhile.
                    if not self._leads or time.monotonic() - worked > _STORE_PATIENCE_S:
                        raise
                    log.warning("the queue %r is tried again: %s", self.queue.name, error)
                    self._closing.wait(1.0)
        except BaseException as error:
            self.failure = error
            log.exception("the driver of queue %r ended", self.queue.name)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _once(self) -> None:
        self._told += self._ended()
        self._take(self._told)
        self._told = []
        clock = time.monotonic()
        if clock - self._looked >= _TICK_S or self._node_in_doubt:
            self._look_at_nodes()
            self._look_at_jobs(clock)
            self._looked = clock
        self._admit()
        self._start_what_fits()

    def _ended(self) -> list[tuple[int, int, Outcome]]:
        found = []
        try:
            first = self._inbox.get(timeout=_TICK_S)
            while True:
                if first is not None:
                    found.append(first)
                first = self._inbox.get_nowait()
        except queues.Empty:
            return found

    def _take(self, told: Iterable[tuple[int, int, Outcome]]) -> None:
        by_job: dict[int, Ended] = {}
        for job, attempt, outcome in told:
            running = self._running.get(job)
            if running is None or running.attempt != attempt or job in by_job:
                continue
            judged = self._judged(running, outcome)
            by_job[job] = Ended(job, attempt, judged, self._again(running, judged))
        if not by_job:
            return
        ended = list(by_job.values())
        for one in ended:
            # Before anybody can read that it is done.
            if one.outcome.value is not None and not one.again:
                self.values[one.job] = one.outcome.value
        taken = {one.job for one in self.queue.end(ended)}
        for one in ended:
            running = self._running.pop(one.job)
            if one.job in taken:
                self._tally(running, one.outcome)
            if not self._waits_again(one.job):
                self.over.add(one.job)
                self._work.pop(one.job, None)
            elif one.job in taken:
                log.info("job %d (%s) waits again: %s", one.job, running.record.work.kind, _line(one.outcome.error))
        with self._changed:
            self._changed.notify_all()

    def _waits_again(self, job: int) -> bool:
        record = self.queue.job(job)
        if record.status == "queued":
            self._let_wait(record)
        return record.status == "queued"

    def _again(self, running: _Running, outcome: Outcome) -> bool:
        """Whether a job is to be tried again, as its node was at fault."""
        if not self.scheduling.fault_tolerance or outcome.status not in ("lost", "failed", "interrupted"):
            return False
        if outcome.status == "interrupted":
            return True
        record = running.record
        faults = 1 + sum(one.status == "lost" or self._avoids(one.status) for one in record.attempts)
        if faults > record.max_retries:
            return False
        if outcome.status == "lost":
            return True
        avoided = {one.node for one in record.attempts if self._avoids(one.status)} | {running.node}
        others = [node.has for node in self._nodes.values() if node.name not in avoided]
        return outcome.elsewhere and any(running.needs.fits(has) for has in others)

    @staticmethod
    def _avoids(status: str | None) -> bool:
        # A job that failed and is tried again failed by its node.
        return status == "failed"

    def _judged(self, running: _Running, outcome: Outcome) -> Outcome:
        """Say why an attempt ended that was killed from here, and of a command which runs it recorded."""
        if outcome.status != "done" and running.ending is not None:
            return replace(outcome, status=running.ending, error=_told_of(running))
        named = running.record.work.named
        if outcome.status != "done" or named is None or "command" not in named:
            return outcome
        told = json.loads(outcome.stored or "{}")
        return replace(outcome, stored=json.dumps({**told, "runs": self.queue.runs_of(told["host"], told["pid"])}))

    def _tally(self, running: _Running, outcome: Outcome) -> None:
        tally = self.tallies.setdefault(running.node, NodeTally())
        if outcome.status == "done":
            tally.finished += 1
            tally.ended.append(time.monotonic())
            self._durations.add(running.record.work.kind, running.node, outcome.seconds)
        elif outcome.status == "lost":
            tally.lost += 1
            self._node_in_doubt = True
        elif outcome.status in ("failed", "out_of_memory", "timed_out"):
            tally.failed += 1

    def _admit(self) -> None:
        """Learn of jobs that were submitted, by whatever process."""
        for record in self.queue.jobs(after=self._newest):
            self._newest = max(self._newest, record.id)
            if record.status == "queued":
                self._let_wait(record)

    def _let_wait(self, record: JobRecord) -> None:
        submitted = datetime.fromisoformat(record.submitted_at).timestamp()
        rank = self.scheduling.rank(record.priority, submitted)
        avoids = frozenset(one.node for one in record.attempts if self._avoids(one.status))
        self._waiting[record.id] = record, Waiting(record.id, rank, record.resources, submitted, avoids)
        try:
            check_some_node_fits(record.resources, [(node.name, node.has) for node in self._nodes.values()])
        except ResourcesError as error:
            # It was submitted when nobody drove, or to other nodes; one that can hold it may still come.
            log.warning("job %d (%s) waits until there is a node for it: %s", record.id, record.work.kind, error)

    def _start_what_fits(self) -> None:
        if not self._waiting or self._winding_down.is_set():
            return
        waiting = [one for _, one in self._waiting.values()]
        chosen = starts(waiting, self._offers(), self.scheduling, time.time())
        begin = [(job, len(self._waiting[job][0].attempts) + 1, node) for job, node in chosen]
        if not begin:
            return
        begun = set(self.queue.start(begin))
        for job, attempt, node in begin:
            record, _ = self._waiting.pop(job)
            if job not in begun and self.queue.job(job).status != "running":
                self.over.add(job)
                continue
            needs = record.resources
            self._running[job] = _Running(record, attempt, node, needs, time.monotonic())
            order = Order(
                job,
                attempt,
                self._work.get(job, record.work),
                threads=max(1, int(needs.cpu)),
                memory_limit_bytes=record.memory_limit_bytes,
                search_path=tuple(path for path in sys.path if path),
            )
            self.backend.start(order, needs, node)

    def _offers(self) -> list[Offer]:
        fast = speeds({node.name: node.benchmark for node in self._nodes.values()}, self._durations.seconds)
        free = {node.name: node.has for node in self._nodes.values()}
        for running in self._running.values():
            if running.node in free:
                free[running.node] = free[running.node].minus(running.needs)
        return [Offer(node.name, node.has, free[node.name], fast[node.name]) for node in self._nodes.values()]

    # ---- what runs ----

    def _look_at_nodes(self) -> None:
        self._node_in_doubt = False
        nodes = {node.name: node for node in self.backend.nodes()}
        gone = set(self._nodes) - set(nodes)
        for name in sorted(set(nodes) - set(self._nodes)):
            log.info("node %s is there: cpu=%g, gpu=%g", name, nodes[name].has.cpu, nodes[name].has.gpu)
        self._nodes = nodes
        if gone:
            log.warning("lost: node %s", ", ".join(sorted(gone)))
        lost = [one for one in self._running.values() if one.node not in nodes]
        for one in lost:
            # It may be there and only be silent: what it says later comes too late.
            self.backend.kill(one.record.id, one.attempt)
        self._take([(one.record.id, one.attempt, Outcome("lost", error=f"node {one.node} was lost")) for one in lost])

    def _look_at_jobs(self, clock: float) -> None:
        if not self.queue.seen([self._told_of_node(node, clock) for node in self._nodes.values()]):
            self._leads = False
            raise StoreError(f"queue {self.queue.name!r}: another process took it over, as this one was silent")
        for job in self.queue.to_cancel():
            self._kill(job, "cancelled", clock)
        if self._waiting:
            # Of those that wait, some may have been cancelled by another process.
            for job in set(self._waiting) - set(self.queue.waiting()):
                del self._waiting[job]
                self.over.add(job)
            with self._changed:
                self._changed.notify_all()
        for one in list(self._running.values()):
            limit = one.record.timeout_s
            if limit is not None and clock - one.since > limit:
                self._kill(one.record.id, "timed_out", clock)
            if one.ending is not None and clock - one.ending_since > _KILL_GRACE_S:
                self._take([(one.record.id, one.attempt, Outcome(one.ending, error=_told_of(one)))])

    def _told_of_node(self, node: Node, clock: float) -> dict[str, Any]:
        tally = self.tallies.setdefault(node.name, NodeTally())
        return {
            **asdict(replace(node, has=Resources())),
            "has": node.has.to_dict(),
            "running": Counter(one.node for one in self._running.values())[node.name],
            "finished": tally.finished,
            "failed": tally.failed,
            "lost": tally.lost,
            "per_minute": tally.per_minute(clock),
        }

    def _kill(self, job: int, why: str, clock: float) -> None:
        running = self._running.get(job)
        if running is not None and running.ending is None:
            running.ending, running.ending_since = why, clock
            self.backend.kill(job, running.attempt)

    # ---- what another driver left ----

    def _take_over(self) -> None:
        left = self.queue.jobs(status="running")
        alive = set(self.backend.adopt([(one.id, len(one.attempts), one.attempts[-1].node) for one in left]))
        closed = []
        for record in left:
            attempt = record.attempts[-1]
            if (record.id, attempt.number) in alive:
                began = time.time() - datetime.fromisoformat(attempt.started_at).timestamp()
                since = time.monotonic() - began
                self._running[record.id] = _Running(record, attempt.number, attempt.node, record.resources, since)
                continue
            again = record.work.named is not None
            error = "its driver ended"
            if not again:
                error += ", and what it runs was in the memory of that one only: submit a function of a module"
            outcome = Outcome("interrupted" if again else "lost", error=error)
            closed.append(Ended(record.id, attempt.number, outcome, again))
        self.queue.end(closed)
        for record in self.queue.jobs(status="queued"):
            if record.work.named is None:
                error = "its driver ended before it began, and what it runs was in the memory of that one only"
                self.queue.end_waiting(record.id, "lost", error)
        if left:
            log.info("of %d jobs that ran under another driver, %d go on", len(left), len(left) - len(closed))


def _told_of(running: _Running) -> str:
    reasons = {
        "cancelled": "it was cancelled",
        "timed_out": f"it ran longer than timeout_s={running.record.timeout_s or 0:g}",
    }
    return reasons[str(running.ending)]


def _line(error: str | None) -> str:
    return (error or "").splitlines()[0] if error else ""
