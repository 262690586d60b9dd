"""Averages of gradients as matrices of low rank.

Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019.

All left factors travel in one collective, and all right ones in a second, issued by the thread that computes them: no
collective is waited for in another one's callback, which takes gloo's threads and never ends where there are several
buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optcore.distributed.collectives import Collectives


class PowerSGD:
    """Averages gradients over ranks by one power iteration a step, with error feedback and warm factors.

    Args:
        rank: Of the matrices that are sent. What is smaller whole is sent whole, vectors among it.
        seed: Of the first right factors, the same on every rank.

    Attributes:
        residuals: By parameter, what this rank did not say of its gradients.
        right_factors: By parameter, (columns, rank), the same on every rank.
    """

    def __init__(self, rank: int = 4, seed: int = 0) -> None:
        self.rank = rank
        self.seed = seed
        self.residuals: dict[str, Tensor] = {}
        self.right_factors: dict[str, Tensor] = {}

    def average(self, names: Sequence[str], gradients: Sequence[Tensor], collectives: Collectives) -> None:
        """Replace gradients by their means over the ranks, as these matrices tell them.

        Args:
            names: Of the parameters, in the same order on every rank.
            gradients: Theirs, of any shape.
            collectives: Whose ranks take part.
        """
        by_name = dict(zip(names, gradients, strict=True))
        # Copies: the gradients of a module in channels_last are no matrices in memory.
        factored = {
            name: gradient.reshape(len(gradient), -1).clone()
            for name, gradient in by_name.items()
            if self._is_factored(gradient)
        }
        whole = [gradient for name, gradient in by_name.items() if name not in factored]
        for name, matrix in factored.items():
            # A gradient of another shape is that of a parameter that was cut: what was kept of it is void.
            if name in self.residuals and self.residuals[name].shape == matrix.shape:
                matrix.add_(self.residuals[name])
            if name not in self.right_factors or len(self.right_factors[name]) != matrix.shape[1]:
                self.right_factors[name] = self._first_factor(matrix)

        lefts = [matrix @ self.right_factors[name] for name, matrix in factored.items()]
        _average_together([*lefts, *whole], collectives)
        lefts = [torch.linalg.qr(left.float()).Q.to(left.dtype) for left in lefts]
        rights = [matrix.t() @ left for matrix, left in zip(factored.values(), lefts, strict=True)]
        _average_together(rights, collectives)

        for (name, matrix), left, right in zip(factored.items(), lefts, rights, strict=True):
            self.right_factors[name] = right
            told = left @ right.t()
            self.residuals[name] = (matrix - told).nan_to_num_(0.0, 0.0, 0.0)
            by_name[name].copy_(told.view_as(by_name[name]))

    def _is_factored(self, gradient: Tensor) -> bool:
        if gradient.ndim < 2:
            return False
        rows, columns = len(gradient), gradient[0].numel()
        return self.rank * (rows + columns) < rows * columns and self.rank <= min(rows, columns)

    def _first_factor(self, matrix: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(matrix.shape[1], self.rank, generator=generator).to(matrix)


def _average_together(tensors: Sequence[Tensor], collectives: Collectives) -> None:
    """Average tensors in place, by one collective."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) / collectives.world_size
    collectives.all_reduce(flat).wait()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
