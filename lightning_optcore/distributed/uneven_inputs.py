"""Ranks that run out of batches before others do."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.distributed.collectives import Collectives

_END = object()


class EvenBatches:
    """A loader that gives every rank as many batches: one that has no more goes on with its last, which counts nothing.

    The mean over the ranks becomes that over those which have a batch, as of ``torch.distributed.algorithms.Join``,
    without hooks of its own: ranks agree on each batch by an all-reduce of four bytes.

    Args:
        loader: Of this rank.
        collectives: Whose ranks take part.
        device: Of what ranks tell each other.

    Attributes:
        weight: What the loss of the batch counts that is being trained on: the ranks over those which have a batch, or
            0.
    """

    def __init__(self, loader: Any, collectives: Collectives, device: torch.device) -> None:
        self.loader = loader
        self.collectives = collectives
        self.device = device
        self.weight = 1.0
        # Of the batches that were fetched, in their order: the Trainer fetches ahead.
        self._weights: deque[float] = deque()

    def __getattr__(self, name: str) -> Any:
        # Only called for what is not here: samplers, whose epoch the Trainer sets.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def next_step(self) -> None:
        """Take the weight of the next batch for :attr:`weight`."""
        self.weight = self._weights.popleft()

    def __len__(self) -> int:
        """Return how many batches the longest loader has."""
        longest = torch.tensor(len(self.loader), device=self.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.collectives.group)
        return int(longest)

    def __iter__(self) -> Iterator[Any]:
        """Return batches until no rank has one.

        Raises:
            MisconfigurationException: If this rank has none at all, and others do.
        """
        self._weights.clear()
        batches = iter(self.loader)
        last: Any = _END
        while True:
            batch = next(batches, _END)
            having = torch.tensor(float(batch is not _END), device=self.device)
            self.collectives.all_reduce(having).wait()
            if not having:
                return
            if batch is _END and last is _END:
                raise MisconfigurationException(
                    "uneven_inputs=True: this rank has no batch at all; give it at least one"
                )
            self._weights.append(0.0 if batch is _END else self.collectives.world_size / having.item())
            last = last if batch is _END else batch
            yield last
