"""Gradients and buffers of a module as few flat tensors, which replicas sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return by_dtype


def flat_sums(parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], *, leads: bool) -> list[Tensor]:
    """Return what is summed over the replicas.

    By dtype of parameters the gradients, then 1 or 0 for each that has one, then 1 for this replica; by dtype of
    buffers those of the one who leads, and zeros of all others.
    """
    flat = []
    for dtype, some in _by_dtype(parameters).items():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        if any(gradient.is_sparse for gradient in gradients):
            raise MisconfigurationException("sparse gradients: expected dense ones, as of Embedding(sparse=False)")
        flags = [*(float(p.grad is not None) for p in some), 1.0]
        parts = [*(gradient.flatten() for gradient in gradients), torch.tensor(flags).to(some[0])]
        flat.append(torch.cat(parts).to(device="cpu", dtype=dtype))
    for dtype, some in _by_dtype(buffers).items():
        joined = torch.cat([buffer.detach().flatten() for buffer in some]).cpu()
        joined = joined.to(torch.uint8) if dtype == torch.bool else joined
        flat.append(joined if leads else torch.zeros_like(joined))
    return flat


@torch.no_grad()
def put_back(summed: Sequence[Tensor], parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> None:
    """Set the gradients to their means, and the buffers to those of the one who leads."""
    rest = list(summed)
    for some in _by_dtype(parameters).values():
        flat = rest.pop(0)
        *gradients, flags = flat.split([*(p.numel() for p in some), len(some) + 1])
        for parameter, gradient, has_one in zip(some, gradients, flags[:-1].tolist(), strict=True):
            if has_one:
                mean = (gradient / flags[-1]).view_as(parameter).to(parameter.device)
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)
    for some in _by_dtype(buffers).values():
        flat = rest.pop(0)
        for buffer, values in zip(some, flat.split([buffer.numel() for buffer in some]), strict=True):
            buffer.copy_(values.view_as(buffer))
