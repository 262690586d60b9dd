"""Limits of a search: which of them an architecture exceeds, before it is evaluated and after."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from lightning_optcore.measurement.directions import direction_of
from lightning_optcore.nas.space import Architecture

log = logging.getLogger(__name__)

# What an architecture exceeds: by name, its value and the limit.
Excess = Mapping[str, tuple[float, float]]
Constraints = Mapping[str, float] | Callable[[Architecture], Excess]
Estimate = Callable[[Architecture], Mapping[str, float]]


class Limits:
    """Checks architectures before they are evaluated, and remembers what came nearest.

    Args:
        constraints: The limits by name, or a function of an architecture that returns what it exceeds.
        estimate: Returns what is known of an architecture before it is evaluated.
    """

    def __init__(self, constraints: Constraints | None, estimate: Estimate | None = None) -> None:
        self._constraints = constraints
        self._estimate = estimate
        self._nearest: dict[str, tuple[float, float, Architecture]] = {}

    @property
    def by_name(self) -> dict[str, float]:
        """The limits; none where a function knows them."""
        return dict(self._constraints) if isinstance(self._constraints, Mapping) else {}

    def excess(self, architecture: Architecture) -> Excess:
        """Return which limits an architecture exceeds, as far as that is known before it is evaluated."""
        if self._constraints is None:
            return {}
        if callable(self._constraints):
            excess = self._constraints(dict(architecture))
            for name, (value, limit) in excess.items():
                self._note(name, value, limit, architecture)
            return excess
        if self._estimate is None:
            return {}
        try:
            known = self._estimate(dict(architecture))
        except Exception as error:
            # A network that cannot be built fails where every failure is recorded.
            log.debug("no estimate of %s: %s", architecture, error)
            return {}
        for name, limit in self._constraints.items():
            if name in known:
                self._note(name, known[name], limit, architecture)
        return excess_of(known, self._constraints)

    def unmet(self, count: int) -> str:
        """Return what to say where a number of architectures met none of the limits; empty if nothing was checked."""
        return "; ".join(
            f"constraints.{name}={limit:g}: met by none of {count} architectures, "
            f"the {'smallest' if direction_of(name) == 'minimize' else 'largest'} found is {value:g} ({architecture})"
            for name, (value, limit, architecture) in self._nearest.items()
        )

    def _note(self, name: str, value: float, limit: float, architecture: Architecture) -> None:
        sign = 1.0 if direction_of(name) == "minimize" else -1.0
        if name not in self._nearest or sign * value < sign * self._nearest[name][0]:
            self._nearest[name] = (value, limit, architecture)


def excess_of(values: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return which limits are exceeded, with value and limit; what is not among the values is left out.

    Args:
        values: By name.
        limits: By name: at most so much, or at least so much of what is better the more of it there is.

    Example:
        >>> excess_of({"latency_ms": 3.0, "val/acc": 0.9}, {"latency_ms": 2.0, "val/acc": 0.8})
        {'latency_ms': (3.0, 2.0)}
    """
    found = {}
    for name, limit in limits.items():
        if name in values:
            sign = 1.0 if direction_of(name) == "minimize" else -1.0
            # A number that is none keeps no limit.
            if not sign * values[name] <= sign * limit:
                found[name] = (values[name], limit)
    return found


def violation_of(excess: Excess) -> float:
    """Return the sum of the relative excesses.

    Example:
        >>> violation_of({"latency_ms": (3.0, 2.0)})
        0.5
    """
    return sum(_share(value, limit) for value, limit in excess.values())


def described_excess(excess: Excess) -> str:
    """Return what is exceeded.

    Example:
        >>> described_excess({"latency_ms": (3.0, 2.0)})
        'latency_ms 3 over its limit 2'
    """
    return ", ".join(f"{name} {value:.6g} over its limit {limit:.6g}" for name, (value, limit) in excess.items())


def _share(value: float, limit: float) -> float:
    share = abs(value - limit) / max(abs(limit), 1e-12)
    return float(min(share, 1e6)) if math.isfinite(share) else 1e6
