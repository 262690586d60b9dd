"""Jobs on the nodes of a Ray cluster (https://docs.ray.io).

Ray knows the nodes and carries orders and results between processes that have its token. Which job starts where is
decided here: Ray has no priorities.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optcore.executor.backend import Node, Tell
from lightning_optcore.executor.executor import Executor, ExecutorError
from lightning_optcore.executor.ray_connection import NAMESPACE, connect
from lightning_optcore.executor.reachability import Address, refused
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Order, Outcome
from lightning_optcore.executor.scheduling import Scheduling
from lightning_optcore.executor.work import Work
from lightning_optcore.store import Store

log = logging.getLogger(__name__)

# So long are agents waited for at the beginning; one that is later is used later.
_AGENT_START_S = 30.0
_LISTEN_S = 10.0
# So often in a row nobody must listen at a node's address.
_REFUSALS = 2
# What only the head of a cluster has.
_HEAD = "node:__internal_head__"


class RayExecutor(Executor):
    """Runs jobs on the nodes of a Ray cluster.

    What runs goes on when this process dies: an executor of the same store and queue finds it again.

    Args:
        address: Of the cluster's head, ``"10.0.0.1:6379"``; ``"auto"`` finds one that runs on this machine. ``None``
            starts one of this machine alone, at 127.0.0.1, that ends with this process.
        store: Path or URL of the store; ``None`` keeps jobs in a temporary one, until the executor is closed.
        queue: Name of the queue.
        scheduling: How jobs are ordered and spread: options of :class:`Scheduling`.
        health_check_period_s: So often every node is asked whether it lives.
        health_check_timeout_s: A node that does not answer for so long is lost, until it answers again.
        outlives_driver: Whether what runs goes on when this process dies; only with a store.
        estimate: Returns what a job is likely to need of which nothing was said, and nothing is known of its kind.
        drive: Whether this process runs what is in the queue, if no other one does; otherwise it only hands jobs in.

    Raises:
        ExecutorError: If Ray is not installed, the cluster is not there, runs another version of Ray, or wants a token
            that this process does not have.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        store: str | Path | Store | None = None,
        queue: str = "default",
        scheduling: Scheduling | Mapping[str, Any] | None = None,
        health_check_period_s: float = 0.5,
        health_check_timeout_s: float = 3.0,
        outlives_driver: bool = True,
        estimate: Callable[[Work], Resources | None] | None = None,
        drive: bool = True,
    ) -> None:
        if not 0 < health_check_period_s < health_check_timeout_s:
            raise ExecutorError(
                f"health_check_period_s={health_check_period_s!r}: expected seconds above 0, and below "
                f"health_check_timeout_s={health_check_timeout_s!r}"
            )
        backend = RayCluster(
            address,
            queue,
            period_s=health_check_period_s,
            timeout_s=health_check_timeout_s,
            outlives_driver=outlives_driver and store is not None,
        )
        super().__init__(backend, store=store, queue=queue, scheduling=scheduling, estimate=estimate, drive=drive)


@dataclass
class _Known:
    """A node of the cluster, and what its agent says."""

    id: str
    name: str
    has: Resources
    # Of its raylet, Ray's own process on every node.
    address: Address
    agent: Any
    asked: Any
    # When its agent answered last: nothing is started on a node before it did.
    heard_at: float = -math.inf
    refusals: int = 0
    # It lost an attempt: before then nothing is started on it, whatever a process of it still answers.
    doubted_until: float = -math.inf
    benchmark: float = 1.0
    usage: dict[str, float] = field(default_factory=dict)


class RayCluster:
    """The nodes of a cluster, each with an agent that is asked whether it lives."""

    name = "ray"

    def __init__(
        self, address: str | None, queue: str, *, period_s: float, timeout_s: float, outlives_driver: bool
    ) -> None:
        self.outlives_driver = outlives_driver
        self._address, self._queue = address, queue
        self._period_s, self._timeout_s = period_s, timeout_s
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._tell: Tell = lambda job, attempt, outcome: None
        # What this driver started or adopted and was not told of yet, with its node.
        self._open: dict[tuple[int, int], str] = {}
        self._connected = False
        self._owner: Any = None
        self._threads: list[threading.Thread] = []

    def open(self, tell: Tell) -> None:
        """Connect, and find the nodes."""
        connect(self._address)
        self._connected = True
        self._tell = tell
        self._owner = self._found_owner()
        self._find_nodes()
        self._meet_nodes()
        for run in (self._watch, self._listen):
            thread = threading.Thread(target=run, name=f"optcore-ray{run.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def nodes(self) -> list[Node]:
        """Return the nodes that have answered lately."""
        with self._lock:
            return [
                Node(one.name, one.has, one.benchmark, one.usage) for one in self._known.values() if self._is_well(one)
            ]

    def start(self, order: Order, needs: Resources, node: str) -> None:
        """Have an attempt started."""
        attempt = (order.job, order.attempt)
        with self._lock:
            known = self._known.get(node)
            self._open[attempt] = node
        if known is None:
            self._told(attempt, Outcome("lost", error=f"node {node} was lost"))
            return
        self._owner.start.remote(order, needs, known.id, known.agent, order.threads)

    def kill(self, job: int, attempt: int) -> None:
        """Have an attempt ended."""
        self._owner.kill.remote(job, attempt)

    def adopt(self, attempts: Sequence[tuple[int, int, str]]) -> list[tuple[int, int]]:
        """Return the attempts that the owner of the queue's tasks knows of."""
        import ray

        if not attempts:
            return []
        known = set(map(tuple, ray.get(self._owner.known.remote(), timeout=30)))
        found = {(job, number): node for job, number, node in attempts if (job, number) in known}
        with self._lock:
            self._open.update(found)
        return list(found)

    def close(self, *, abandon: bool) -> None:
        """End the actors, and with them what runs."""
        self._closing.set()
        if not self._connected:
            return
        import ray

        if not ray.is_initialized():
            return
        with contextlib.suppress(Exception):
            for known in self._known.values():
                ray.kill(known.agent)
            if self._owner is not None and not (abandon and self.outlives_driver):
                for job, attempt in list(self._open):
                    ray.get(self._owner.kill.remote(job, attempt), timeout=5)
                ray.kill(self._owner)
        for thread in self._threads:
            thread.join(_LISTEN_S)
        if self._address is None:
            ray.shutdown()

    # ---- nodes ----

    def _is_well(self, known: _Known) -> bool:
        now = time.monotonic()
        return now >= known.doubted_until and now - known.heard_at < self._timeout_s

    def _doubt(self, known: _Known) -> None:
        """Take a node for lost until it answers again, in a while."""
        known.heard_at = -math.inf
        known.doubted_until = time.monotonic() + self._timeout_s
        known.asked = known.agent.usage.remote()

    def _watch(self) -> None:
        """Ask every node, again and again, whether it lives."""
        while not self._closing.wait(self._period_s):
            try:
                self._find_nodes()
                self._knock()
                self._hear_nodes()
            except Exception as error:
                if not self._closing.is_set():
                    log.warning("the cluster does not answer: %s: %s", type(error).__name__, str(error)[:300])

    def _find_nodes(self) -> None:
        import ray

        alive = {one["NodeID"]: one for one in ray.nodes() if one["Alive"]}
        with self._lock:
            ids = {known.id for known in self._known.values()}
        fresh = {id: self._met(alive[id]) for id in alive if id not in ids}
        with self._lock:
            self._known = {name: known for name, known in self._known.items() if known.id in alive}
            for known in fresh.values():
                if known.name in self._known:
                    known.name = f"{known.name}-{known.id[:8]}"
                self._known[known.name] = known

    def _met(self, node: Mapping[str, Any]) -> _Known:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from lightning_optcore.executor.ray_actors import NodeAgent

        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor: Any = ray.remote(NodeAgent)
        agent = actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        has = node["Resources"]
        labels = node.get("Labels", {})
        return _Known(
            node["NodeID"],
            labels.get("node_id") or f"node-{node['NodeID'][:8]}",
            Resources(
                cpu=has.get("CPU", 0.0), memory_bytes=int(has.get("memory", 0)), gpu=has.get("GPU", 0.0), labels=labels
            ),
            (node["NodeManagerAddress"], int(node["NodeManagerPort"])),
            agent,
            agent.usage.remote(),
        )

    def _meet_nodes(self) -> None:
        """Wait for the first answers, so that it is known at once what can be asked for."""
        end = time.monotonic() + _AGENT_START_S
        while time.monotonic() < end and any(
            one.heard_at == -math.inf and one.refusals < _REFUSALS for one in self._known.values()
        ):
            self._knock()
            self._hear_nodes()
            time.sleep(0.05)

    def _knock(self) -> None:
        """Find the nodes whose raylet is gone: other processes of theirs still answer for seconds."""
        with self._lock:
            known = list(self._known.values())
        gone = refused(one.address for one in known)
        with self._lock:
            for one in known:
                one.refusals = one.refusals + 1 if one.address in gone else 0
                if one.refusals >= _REFUSALS:
                    self._doubt(one)

    def _hear_nodes(self) -> None:
        import ray

        with self._lock:
            known = list(self._known.values())
        waiting = {one.asked: one for one in known}
        answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        for reference in answered:
            one, heard = waiting[reference], True
            try:
                benchmark, usage = ray.get(reference, timeout=1)
            except Exception:
                heard = False
            with self._lock:
                if one.asked is not reference:
                    continue
                if heard:
                    one.benchmark, one.usage, one.heard_at = benchmark, usage, time.monotonic()
                one.asked = one.agent.usage.remote()

    # ---- attempts ----

    def _found_owner(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from lightning_optcore.executor.ray_actors import JobOwner

        # With the head, the whole cluster is lost.
        head = next(one["NodeID"] for one in ray.nodes() if one["Alive"] and _HEAD in one["Resources"])
        here = NodeAffinitySchedulingStrategy(head, soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
        if self.outlives_driver:
            name = f"jobs of {self._queue}"
            options |= {"name": name, "lifetime": "detached", "get_if_exists": True, "namespace": NAMESPACE}
        return ray.remote(JobOwner).options(**options).remote()

    def _listen(self) -> None:
        """Hear how attempts ended."""
        import ray

        heard: list[tuple[int, int]] = []
        while not self._closing.is_set():
            try:
                told = ray.get(self._owner.ended.remote(heard, _LISTEN_S / 2), timeout=_LISTEN_S * 2)
            except Exception as error:
                if self._closing.is_set():
                    return
                if isinstance(error, ray.exceptions.ActorDiedError):
                    self._lose_all(error)
                # Until then it only cannot be reached; what was not heard is told again.
                heard = []
                self._closing.wait(self._period_s)
                continue
            heard = [attempt for attempt, _ in told]
            for attempt, outcome in told:
                self._told(tuple(attempt), outcome)

    def _told(self, attempt: tuple[int, int], outcome: Outcome) -> None:
        with self._lock:
            node = self._open.pop(attempt, None)
            if node is None:
                return
            if outcome.status == "lost" and node in self._known:
                self._doubt(self._known[node])
        self._tell(*attempt, outcome)

    def _lose_all(self, error: Exception) -> None:
        """Begin anew: who owned the tasks is gone, and the tasks with it."""
        log.warning("the tasks of queue %r are lost: %s: %s", self._queue, type(error).__name__, str(error)[:300])
        with contextlib.suppress(Exception):
            self._owner = self._found_owner()
        for attempt in list(self._open):
            self._told(attempt, Outcome("lost", error="the process that owned its task was lost"))
