"""What runs on the nodes of a Ray cluster: one actor that owns the tasks of a queue, and one on every node."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Order, Outcome, run_order
from lightning_optcore.executor.usage import benchmark, machine_usage

# So long an attempt whose process vanished is not told of: is it the node that is gone?
_DOUBT_S = 3.0


class NodeAgent:
    """Answers for its node: whoever hears of it knows that the node lives."""

    def __init__(self) -> None:
        self._benchmark = benchmark()

    def usage(self) -> tuple[float, dict[str, float]]:
        """Return how fast the node computes, and what it uses."""
        return self._benchmark, machine_usage()


class JobOwner:
    """Starts attempts as Ray tasks and keeps how they ended until the driver has heard of it.

    A detached one outlives the driver, and so do its tasks.
    """

    def __init__(self) -> None:
        self._references: dict[tuple[int, int], Any] = {}
        self._ended: dict[tuple[int, int], Outcome] = {}
        self._told = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, order: Order, needs: Resources, node_id: str, agent: Any, threads: int) -> None:
        """Start an attempt on a node."""
        attempt = (order.job, order.attempt)
        if attempt in self._references or attempt in self._ended:
            return
        me = ray.get_runtime_context().current_actor
        task = _run.options(
            num_cpus=needs.cpu,
            num_gpus=needs.gpu,
            memory=needs.memory_bytes or None,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            name=f"job {order.job}: {order.work.kind}",
        )
        try:
            self._references[attempt] = task.remote(order, me)
        except Exception as error:
            self._tell(attempt, Outcome("failed", error=f"Ray could not start it: {type(error).__name__}: {error}"))
            return
        following = asyncio.ensure_future(self._follow(attempt, agent))
        self._tasks.add(following)
        following.add_done_callback(self._tasks.discard)

    async def over_the_limit(self, job: int, attempt: int, outcome: Outcome) -> None:
        """Learn why an attempt is about to end its process."""
        self._tell((job, attempt), outcome)

    async def kill(self, job: int, attempt: int) -> None:
        """End an attempt by force."""
        reference = self._references.get((job, attempt))
        if reference is not None:
            ray.cancel(reference, force=True)

    async def ended(self, heard: Sequence[tuple[int, int]], seconds: float) -> list[tuple[tuple[int, int], Outcome]]:
        """Return how attempts ended, as soon as there are some.

        Args:
            heard: Those of which the driver has written down what it was told.
            seconds: How long to wait for some.
        """
        for attempt in heard:
            self._ended.pop(attempt, None)
        if not self._ended:
            self._told.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._told.wait(), seconds)
        return list(self._ended.items())

    async def known(self) -> list[tuple[int, int]]:
        """Return the attempts that run, or have ended without the driver's having heard."""
        return [*self._references, *self._ended]

    async def _follow(self, attempt: tuple[int, int], agent: Any) -> None:
        try:
            outcome = await self._references[attempt]
        except exceptions.TaskCancelledError:
            outcome = Outcome("cancelled", error="it was cancelled")
        except exceptions.OutOfMemoryError as error:
            outcome = Outcome("out_of_memory", error=f"Ray ended it: {_line(error)}")
        except (exceptions.NodeDiedError, exceptions.TaskUnschedulableError, exceptions.ActorDiedError) as error:
            outcome = Outcome("lost", error=f"its node was lost: {_line(error)}")
        except (exceptions.WorkerCrashedError, exceptions.LocalRayletDiedError) as error:
            outcome = await self._of_the_crashed(agent, error)
        except Exception as error:
            outcome = Outcome("failed", error=f"{type(error).__name__}: {_line(error)}")
        self._tell(attempt, outcome)

    async def _of_the_crashed(self, agent: Any, error: Exception) -> Outcome:
        # Ray tells that the process is gone before it knows of the node.
        try:
            await asyncio.wait_for(asyncio.wrap_future(agent.usage.remote().future()), _DOUBT_S)
        except Exception:
            return Outcome("lost", error="its node was lost with its process")
        return Outcome("failed", error=f"its process died: {_line(error)}")

    def _tell(self, attempt: tuple[int, int], outcome: Outcome) -> None:
        if self._references.pop(attempt, None) is not None or attempt not in self._ended:
            self._ended.setdefault(attempt, outcome)
        self._told.set()


@ray.remote
def _run(order: Order, owner: Any) -> Outcome:
    def over_the_limit(outcome: Outcome) -> None:
        ray.get(owner.over_the_limit.remote(order.job, order.attempt, outcome))
        os._exit(1)

    return run_order(order, over_the_limit)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
