"""Which job starts where: strict priorities that rise with waiting, on nodes of unlike resources and speeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_optcore.executor.resources import Resources

# A node's speed is that of its benchmark until so many jobs were seen on it.
_TRUSTED_AFTER = 3


@dataclass(frozen=True)
class Scheduling:
    """How jobs are ordered and spread.

    Args:
        algorithm: ``"priority_based"``, or ``"fifo"``: in the order in which they were submitted.
        ageing_s: A job that has waited so many seconds counts as of one priority more.
        reserve_after_s: For the first job in order that has waited so many seconds and fits nowhere, a node is kept
            free until it fits; ``math.inf`` never keeps one.
        load_balancing: Whether a job goes to the node that is least loaded for its speed; otherwise to the first one
            that it fits on.
        fault_tolerance: Whether a job is tried again when its node is lost.

    Raises:
        ValueError: If an option is out of range.
    """

    algorithm: str = "priority_based"
    ageing_s: float = 600.0
    reserve_after_s: float = 60.0
    load_balancing: bool = True
    fault_tolerance: bool = True

    def __post_init__(self) -> None:
        if self.algorithm not in ("priority_based", "fifo"):
            raise ValueError(f"scheduling.algorithm={self.algorithm!r}: expected priority_based or fifo")
        for name in ("ageing_s", "reserve_after_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"scheduling.{name}={getattr(self, name)!r}: expected seconds above 0")

    def rank(self, priority: int, submitted_at: float) -> float:
        """Return where a job stands: the lowest comes first.

        All that wait age alike, so that the order of two jobs never changes while they wait.

        Args:
            priority: The higher, the sooner.
            submitted_at: Seconds since the epoch.
        """
        return submitted_at if self.algorithm == "fifo" else submitted_at - priority * self.ageing_s


@dataclass(frozen=True)
class Waiting:
    """A job that can be started.

    Args:
        id: Its number.
        rank: See :meth:`Scheduling.rank`.
        needs: What it takes.
        submitted_at: Seconds since the epoch.
        avoids: Nodes on which it shall not run, as it failed there.
    """

    id: int
    rank: float
    needs: Resources
    submitted_at: float = 0.0
    avoids: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Offer:
    """A node that takes jobs.

    Args:
        name: Its own.
        has: All of its resources.
        free: What of them is not taken.
        speed: Relative to the other nodes.
    """

    name: str
    has: Resources
    free: Resources
    speed: float = 1.0


def starts(
    waiting: Iterable[Waiting], offers: Sequence[Offer], scheduling: Scheduling, clock: float = 0.0
) -> list[tuple[int, str]]:
    """Return which jobs start now, and where, in the order of starting.

    No job starts while one before it fits: it would have been started first. A job that fits nowhere does not hold up
    others that do, until a node is reserved for it.

    Args:
        waiting: The jobs.
        offers: The nodes.
        scheduling: How jobs are ordered and spread.
        clock: The time, in seconds since the epoch.

    Example:
        >>> jobs = [Waiting(1, rank=5.0, needs=Resources(cpu=1)), Waiting(2, rank=0.0, needs=Resources(cpu=2))]
        >>> node = Offer("n", Resources(cpu=2), Resources(cpu=2))
        >>> starts(jobs, [node], Scheduling())
        [(2, 'n')]
    """
    by_name = {offer.name: offer for offer in offers}
    open_to_all = set(by_name)
    chosen: list[tuple[int, str]] = []
    hopeless: set[tuple[object, ...]] = set()
    may_reserve = True
    for job in sorted(waiting, key=lambda one: (one.rank, one.id)):
        shape = (
            job.needs.cpu,
            job.needs.memory_bytes,
            job.needs.gpu,
            tuple(sorted(job.needs.labels.items())),
            job.avoids,
        )
        if shape in hopeless:
            continue
        fitting = [
            by_name[name] for name in open_to_all if name not in job.avoids and job.needs.fits(by_name[name].free)
        ]
        if fitting:
            node = _best(job.needs, fitting, scheduling, list(by_name))
            by_name[node.name] = Offer(node.name, node.has, node.free.minus(job.needs), node.speed)
            chosen.append((job.id, node.name))
            continue
        hopeless.add(shape)
        if may_reserve and clock - job.submitted_at >= scheduling.reserve_after_s:
            able = [one for one in by_name.values() if one.name not in job.avoids and job.needs.fits(one.has)]
            if able:
                # The one from which least is still to be given back.
                open_to_all.discard(min(able, key=lambda one: _share(job.needs, one.free)).name)
                may_reserve = False
    return chosen


def speeds(benchmarks: Mapping[str, float], seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return how fast nodes are, relative to their mean.

    Jobs of a kind are compared with their own kind elsewhere; until some were seen, a benchmark stands in.

    Args:
        benchmarks: A figure of every node, the more the faster.
        seconds: How long jobs took, by kind and by node.

    Example:
        >>> found = speeds({"a": 1.0, "b": 1.0}, {"train": {"a": [1.0] * 100, "b": [2.0] * 100}})
        >>> round(found["a"] / found["b"], 1)
        2.0
    """
    prior = {name: math.log(max(figure, 1e-12)) for name, figure in benchmarks.items()}
    middle = sum(prior.values()) / len(prior) if prior else 0.0
    gains: dict[str, list[tuple[float, int]]] = {}
    for by_node in seconds.values():
        means = {
            node: (sum(math.log(max(one, 1e-6)) for one in taken) / len(taken), len(taken))
            for node, taken in by_node.items()
            if taken and node in prior
        }
        if len(means) < 2:
            continue
        usual = sum(mean for mean, _ in means.values()) / len(means)
        for node, (mean, count) in means.items():
            gains.setdefault(node, []).append((usual - mean, count))
    found = {}
    for node, figure in prior.items():
        seen = gains.get(node, [])
        count = sum(number for _, number in seen)
        weighted = sum(gain * number for gain, number in seen)
        found[node] = math.exp(((figure - middle) * _TRUSTED_AFTER + weighted) / (_TRUSTED_AFTER + count))
    return found


def _best(needs: Resources, fitting: Sequence[Offer], scheduling: Scheduling, order: Sequence[str]) -> Offer:
    def preference(offer: Offer) -> tuple[bool, float, int]:
        # GPUs are kept for those who need them.
        wasteful = offer.has.gpu > 0 and not needs.gpu
        load = _share(needs, offer.free, offer.has) / offer.speed if scheduling.load_balancing else 0.0
        return wasteful, load, order.index(offer.name)

    return min(fitting, key=preference)


def _share(needs: Resources, free: Resources, has: Resources | None = None) -> float:
    """Return how full a node is with a job, by what is scarcest: 1 is full."""
    whole = has or free
    taken = [
        (getattr(whole, name) - getattr(free, name) + getattr(needs, name)) / max(getattr(whole, name), 1e-9)
        for name in ("cpu", "memory_bytes", "gpu")
        if getattr(needs, name)
    ]
    return max(taken, default=0.0)


@dataclass
class Durations:
    """How long jobs took, by kind and by node: the newest of each.

    Args:
        keep: So many of each.
    """

    keep: int = 20
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, kind: str, node: str, seconds: float) -> None:
        """Note one job that ended well."""
        taken = self.seconds.setdefault(kind, {}).setdefault(node, [])
        taken.append(seconds)
        del taken[: -self.keep]
