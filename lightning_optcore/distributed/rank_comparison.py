"""Ranks compare where their time goes, and say once what keeps them waiting."""

from __future__ import annotations

import socket
from statistics import fmean

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_optcore.distributed.rank_times import RankTimes, StepClock, straggler_of


class RankComparison:
    """The clock of this rank, and the times of all of them at the last comparison."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.times: list[RankTimes] = []
        self._hosts: list[str] = []
        self._told: set[tuple[int | None, str]] = set()

    def begin(self) -> None:
        """Begin a training, in which everything is said anew."""
        self.clock = StepClock()
        self._told.clear()

    @property
    def imbalance(self) -> float:
        """The slowest rank's own time over the mean."""
        own = [one.own_ms for one in self.times]
        return max(own) / max(fmean(own), 1e-9)

    def compare(self, world_size: int, device: torch.device, wrapped: nn.Module | None = None) -> None:
        """Gather the times of all ranks, each of which must call it.

        Args:
            world_size: How many ranks there are.
            device: Where the collective runs.
            wrapped: A DistributedDataParallel that knows better than the clock what this rank computed.
        """
        data, compute, step = self.clock.means()
        if wrapped is not None:
            compute = _compute_ms(wrapped)
        own = torch.tensor([data, compute, step], device=device)
        everyone = [torch.empty_like(own) for _ in range(world_size)]
        # Ranks that learn by themselves wait here for the slowest.
        self.clock.leave_out(lambda: torch.distributed.all_gather(everyone, own))
        if not self._hosts:
            self._hosts = [""] * world_size
            torch.distributed.all_gather_object(self._hosts, socket.gethostname())
        self.times = [
            RankTimes(rank, host, *times.tolist())
            for rank, (host, times) in enumerate(zip(self._hosts, everyone, strict=True))
        ]
        found = straggler_of(self.times)
        if found is not None and (found.rank, found.cause) not in self._told:
            self._told.add((found.rank, found.cause))
            rank_zero_warn(found.message)


def time_often(model: nn.Module | None) -> None:
    """Let DistributedDataParallel time every tenth step, instead of every hundredth."""
    if isinstance(model, DistributedDataParallel):
        model._set_ddp_runtime_logging_sample_rate(10)


def _compute_ms(model: nn.Module) -> float:
    """Return what DistributedDataParallel measured of this rank's forward and backward passes."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    found = model._get_ddp_logging_data()
    return (found.get("avg_forward_compute_time", 0) + found.get("avg_backward_compute_time", 0)) / 1e6
