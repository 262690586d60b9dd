"""Collectives that count the bytes they send."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


@dataclass
class Collectives:
    """The collectives of a process group, which count what this rank sends.

    The counts are those of ring algorithms, by which gloo and NCCL send large tensors: an all-reduce of n bytes among w
    ranks sends 2 n (w - 1) / w of each, an all-gather of n bytes of each rank n (w - 1) (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009). What the network adds, such as TCP's headers, is
    not counted.

    Args:
        group: Whose ranks take part; ``None`` for all.

    Attributes:
        bytes_sent: By this rank so far.
        calls: How many collectives there were so far.
    """

    group: ProcessGroup | None = None
    bytes_sent: int = field(default=0, init=False)
    calls: int = field(default=0, init=False)

    @property
    def world_size(self) -> int:
        """How many ranks take part."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this rank in the group."""
        return dist.get_rank(self.group)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Start to sum a tensor over the ranks, in place."""
        self.count_all_reduce(tensor.nbytes)
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def all_gather(self, tensor: Tensor) -> tuple[Tensor, Work]:
        """Start to gather what every rank has.

        Args:
            tensor: (n,), as long on all ranks.

        Returns:
            (ranks, n), to be read when the second has been waited for.
        """
        gathered = tensor.new_empty(self.world_size, tensor.numel())
        self._count(tensor.nbytes * (self.world_size - 1))
        return gathered, dist.all_gather(list(gathered), tensor.contiguous(), group=self.group, async_op=True)

    def all_to_all(self, tensor: Tensor) -> tuple[Tensor, Work]:
        """Start to give every rank a row of this rank's tensor.

        Args:
            tensor: (ranks, n), row i for rank i.

        Returns:
            (ranks, n), row i from rank i, to be read when the second has been waited for.
        """
        received = torch.empty_like(tensor)
        self._count(tensor.nbytes * (self.world_size - 1) // self.world_size)
        return received, dist.all_to_all_single(received, tensor.contiguous(), group=self.group, async_op=True)

    def count_all_reduce(self, num_bytes: int) -> None:
        """Count an all-reduce that somebody else does."""
        self._count(2 * num_bytes * (self.world_size - 1) // self.world_size)

    def count_broadcast(self, num_bytes: int) -> None:
        """Count a broadcast from rank 0 that somebody else does; others that pass it on are not counted."""
        self._count(num_bytes if self.rank == 0 and self.world_size > 1 else 0)

    def _count(self, sent: int) -> None:
        self.bytes_sent += sent
        self.calls += 1
