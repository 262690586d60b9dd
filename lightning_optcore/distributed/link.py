"""What a link and a step take, and which way to communicate they call for."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_optcore.distributed.collectives import Collectives

_PROBES = 3
_SMALL, _LARGE = 8, 262_144
# Exchanges of local updates take at most this share of the steps between them; and are at least, and at most, so far
# apart.
_EXCHANGE_SHARE = 0.05
_SHORTEST_PERIOD, _LONGEST_PERIOD = 8, 128
_OVERLAP = 8


@dataclass(frozen=True)
class Link:
    """What an all-reduce takes: a delay, and the bytes that a rank sends over the rate.

    Args:
        delay: Seconds that an all-reduce of next to nothing takes.
        bytes_per_second: That a rank sends in a long one.
    """

    delay: float
    bytes_per_second: float

    def seconds(self, sent: float) -> float:
        """Return what a collective takes in which a rank sends so many bytes."""
        return self.delay + sent / self.bytes_per_second


@dataclass(frozen=True)
class Decision:
    """A way to communicate, and why.

    Args:
        communication: Its name.
        options: Its options that are not the defaults.
        reason: The measurements, in words.
    """

    communication: str
    options: Mapping[str, Any]
    reason: str


def measure_link(collectives: Collectives, device: torch.device) -> Link:
    """Measure the link between the ranks, by all-reduces of 32 bytes and of 1 MB; all ranks must call it.

    All ranks return the same, the slowest one's.
    """
    small = _fastest_all_reduce(collectives, torch.zeros(_SMALL, device=device))
    large = _fastest_all_reduce(collectives, torch.zeros(_LARGE, device=device))
    slowest = torch.tensor([small, large], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=collectives.group)
    small, large = slowest.tolist()
    world_size = collectives.world_size
    sent = 2 * 4 * _LARGE * (world_size - 1) / world_size
    return Link(small, sent / max(large - small, 1e-9))


def _fastest_all_reduce(collectives: Collectives, tensor: torch.Tensor) -> float:
    seconds = []
    for _ in range(_PROBES):
        dist.barrier(collectives.group)
        start = time.perf_counter()
        collectives.all_reduce(tensor).wait()
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def decide(num_values: int, step_seconds: float, link: Link, world_size: int, max_share: float) -> Decision:
    """Choose how ranks communicate: whole gradients where the link carries them, less where it does not.

    Args:
        num_values: How many parameters are learned.
        step_seconds: That a step takes without communication.
        link: Between the ranks.
        world_size: How many ranks there are.
        max_share: Of the time of a step, the most that communication may take.

    Example:
        >>> decide(1_600_000, 0.1, Link(0.0005, 1e9), world_size=2, max_share=0.1).communication
        'none'
        >>> slow = decide(1_600_000, 0.1, Link(0.001, 10e6), world_size=2, max_share=0.1)
        >>> slow.communication, dict(slow.options)
        ('diloco', {'period': 17, 'overlap': 8})
    """
    ring = 2 * (world_size - 1) / world_size
    whole = link.seconds(4 * num_values * ring)
    half = link.seconds(2 * num_values * ring)
    measured = (
        f"a step computes {1e3 * step_seconds:.3g} ms; whole gradients take {1e3 * whole:.3g} ms over this link "
        f"({link.bytes_per_second / 1e6:.3g} MB/s, {1e3 * link.delay:.2g} ms), and bf16 {1e3 * half:.3g} ms"
    )
    if whole <= max_share * step_seconds:
        return Decision("none", {}, measured)
    if half <= max_share * step_seconds:
        return Decision("bf16", {}, measured)
    # Of half a byte each, by default.
    exchange = link.seconds(num_values / 2 * (world_size - 1 if world_size <= 2 else ring))
    period = min(max(math.ceil(exchange / (_EXCHANGE_SHARE * step_seconds)), _SHORTEST_PERIOD), _LONGEST_PERIOD)
    options = {"period": period, "overlap": min(_OVERLAP, period // 2)}
    return Decision("diloco", options, f"{measured}; an exchange of local updates takes {1e3 * exchange:.3g} ms")
