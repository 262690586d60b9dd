"""What whoever evaluates architectures can say of one before it is paid for, as strategies take it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_optcore.nas.space import Architecture

log = logging.getLogger(__name__)

# What of the yardstick is counted before a training; a latency is only predicted.
COSTS = ("params", "size_bytes", "flops")
# One in so many candidates is trained on where weights are inherited.
_TRAIN_ON = 3


def offered_by(evaluate: Any, objectives: Sequence[str]) -> dict[str, Any]:
    """Return what is offered to strategies, by the names of their arguments.

    Args:
        evaluate: With a method ``estimate(architecture)`` it offers ``known_costs``, which has those of ``params``,
            ``size_bytes`` and ``flops`` that are objectives; with ``proxies``, functions of an architecture by name,
            it offers ``known_proxies``. One whose ``inherits`` is true lets a network begin with the weights of its
            candidate's parent: it offers ``train_on``.
        objectives: Their names, in order.

    Example:
        >>> class Counted:
        ...     def estimate(self, architecture):
        ...         return {"params": 10.0 * architecture["width"], "latency_ms": 1.0}
        >>> offered_by(Counted(), ["val/acc", "params", "latency_ms"])["known_costs"]({"width": 8})
        {1: 80.0}
        >>> offered_by(lambda architecture: {"acc": 0.9}, ["acc"])
        {}
    """
    offered: dict[str, Any] = {}
    if callable(getattr(evaluate, "estimate", None)):
        offered["known_costs"] = partial(_known_costs, evaluate.estimate, tuple(objectives))
    if getattr(evaluate, "proxies", None):
        offered["known_proxies"] = evaluate.proxies
    if getattr(evaluate, "inherits", False):
        offered["train_on"] = _TRAIN_ON
    return offered


def _known_costs(
    estimate: Callable[[Architecture], Mapping[str, float]], objectives: Sequence[str], architecture: Architecture
) -> dict[int, float] | None:
    try:
        costs = estimate(dict(architecture))
    except Exception as error:
        log.debug("no estimate of %s: %s", architecture, error)
        # What cannot be built is the last that is worth a training; a great number would set the scale of the rest.
        return None
    return {i: costs[name] for i, name in enumerate(objectives) if name in COSTS and name in costs}
