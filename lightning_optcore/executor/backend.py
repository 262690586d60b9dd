"""What a driver asks of the machines that run its jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Order, Outcome

# Called with job, attempt and outcome, from any thread.
Tell = Callable[[int, int, Outcome], None]


@dataclass(frozen=True)
class Node:
    """A machine, or a part of one, as it was seen last.

    Args:
        name: Its own.
        has: All of its resources.
        benchmark: How fast it computes, the more the faster.
        usage: What it uses, whoever runs there: ``cpu_percent``, ``memory_percent``, ``disk_free_bytes``,
            ``gpu_percent``.
    """

    name: str
    has: Resources
    benchmark: float = 1.0
    usage: dict[str, float] = field(default_factory=dict)


class Backend(Protocol):
    """Starts attempts on nodes, and tells how they end. Every attempt that was started is told of once."""

    name: str
    # Whether attempts go on when their driver dies, so that the next one finds them.
    outlives_driver: bool

    def open(self, tell: Tell) -> None:
        """Begin; ``tell`` is told of every attempt that ends."""
        ...

    def nodes(self) -> list[Node]:
        """Return the nodes that are there and healthy now, without waiting for them."""
        ...

    def start(self, order: Order, needs: Resources, node: str) -> None:
        """Start an attempt on a node; whatever goes wrong is told as its outcome."""
        ...

    def kill(self, job: int, attempt: int) -> None:
        """End an attempt by force; that it ended is told."""
        ...

    def adopt(self, attempts: Sequence[tuple[int, int, str]]) -> list[tuple[int, int]]:
        """Return those attempts, of another driver before, that run still or have an outcome to tell."""
        ...

    def close(self, *, abandon: bool) -> Any:
        """End; attempts that still run are ended, unless they are left to the next driver."""
        ...
