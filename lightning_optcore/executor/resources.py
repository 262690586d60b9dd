"""What a job needs and what a node has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_optcore.option_values import is_number

_AMOUNTS = ("cpu", "memory_bytes", "gpu")
# Fractions of a processor or a GPU add up only so exactly.
_TOLERANCE = 1e-6


class ResourcesError(ValueError):
    """What was asked for cannot be had; the message names it, the value and the most there is."""


@dataclass(frozen=True)
class Resources:
    """Amounts of what a job needs, or a node has.

    Args:
        cpu: Processor cores; also the threads that a job may use.
        memory_bytes: Working memory in bytes. A job that was given some is ended when it takes more.
        gpu: GPUs, or a share of one.
        labels: What a node is called and is, e.g. ``{"role": "trainer"}``; a job runs where all of its labels are.

    Raises:
        ResourcesError: If an amount is no number of 0 or more.

    Example:
        >>> Resources(cpu=2, labels={"role": "trainer"}).missing_from(Resources(cpu=4, labels={"role": "head"}))
        ['labels.role=trainer']
    """

    cpu: float = 1.0
    memory_bytes: int = 0
    gpu: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _AMOUNTS:
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value) or value < 0:
                raise ResourcesError(f"resources.{name}={value!r}: expected a number, 0 or more")
        if not isinstance(self.labels, Mapping):
            raise ResourcesError(f"resources.labels={self.labels!r}: expected names with values")
        object.__setattr__(self, "labels", {str(name): str(value) for name, value in self.labels.items()})

    @classmethod
    def of(cls, given: Mapping[str, Any] | Resources | None) -> Resources:
        """Return resources as a user gives them.

        Raises:
            ResourcesError: If there is an unknown name, or an amount out of range.
        """
        if given is None or isinstance(given, Resources):
            return given or cls()
        unknown = sorted(set(given) - {*_AMOUNTS, "labels"})
        if unknown:
            raise ResourcesError(
                f"resources.{unknown[0]}={given[unknown[0]]!r}: unknown; expected {', '.join(_AMOUNTS)} or labels"
            )
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return what :meth:`of` takes."""
        return {**asdict(self), "labels": dict(self.labels)}

    def missing_from(self, node: Resources) -> list[str]:
        """Return what of this a node does not have, as ``name=value``."""
        amounts = [f"{name}={getattr(self, name):g}" for name in _AMOUNTS if not self._fits(node, name)]
        labels = [
            f"labels.{name}={value}" for name, value in sorted(self.labels.items()) if node.labels.get(name) != value
        ]
        return amounts + labels

    def fits(self, node: Resources) -> bool:
        """Whether a node has all of this."""
        return all(self._fits(node, name) for name in _AMOUNTS) and self.labels.items() <= node.labels.items()

    def minus(self, taken: Resources) -> Resources:
        """Return what of a node is left; more may be taken of it than there is."""
        left = {name: max(0, getattr(self, name) - getattr(taken, name)) for name in _AMOUNTS}
        return replace(self, **left)

    def _fits(self, node: Resources, name: str) -> bool:
        return bool(getattr(self, name) <= getattr(node, name) + _TOLERANCE)


def total(several: Iterable[Resources]) -> Resources:
    """Return the sum of amounts; labels do not add up."""
    taken = list(several)
    return Resources(**{name: sum(getattr(one, name) for one in taken) for name in _AMOUNTS})


def check_some_node_fits(needs: Resources, nodes: Sequence[tuple[str, Resources]]) -> None:
    """Refuse what no node has, were it idle.

    Args:
        needs: Of a job.
        nodes: Names of the nodes, with all that each has.

    Raises:
        ResourcesError: With what is missing, and the node that has most.
    """
    if not nodes or any(needs.fits(node) for _, node in nodes):
        return
    # Of the nodes that lack fewest things the one that has most.
    name, nearest = min(nodes, key=lambda node: (len(needs.missing_from(node[1])), -node[1].cpu, -node[1].memory_bytes))
    raise ResourcesError(
        f"resources: no node has {', '.join(needs.missing_from(nearest))}; the nearest of {len(nodes)}, {name}, has "
        f"cpu={nearest.cpu:g}, memory_bytes={nearest.memory_bytes:g}, gpu={nearest.gpu:g}"
        + "".join(f", labels.{label}={value}" for label, value in sorted(nearest.labels.items()))
    )
