"""Averages of a vector over ranks that send less than the vector: casts, quantized values, the greatest values.

Every exchange begins with what a rank says of its vector, and ends with the mean of what all said. Between the two a
caller may compute; what was not said is kept for the next exchange by :class:`ErrorFeedback` (Seide et al., "1-bit
stochastic gradient descent", 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optcore.distributed.collectives import Collectives

# So many values share a scale. Its 4 bytes add .4% to values of 8 bits, and 3% to those of 4.
_BLOCK = {8: 1024, 4: 256}


@dataclass
class Exchange:
    """An exchange that has begun.

    Args:
        said: (n,) what the other ranks get to know of this rank's vector.
        finish: Waits for the others, and returns the mean of what all said, (n,), which is the same on every rank.
    """

    said: Tensor
    finish: Callable[[], Tensor]


# Begins to average a vector (n,) over the ranks.
Begin = Callable[[Tensor, Collectives], Exchange]


def begin_cast(values: Tensor, collectives: Collectives, *, dtype: torch.dtype = torch.float32) -> Exchange:
    """Average values that are cast to another type, in which they are summed.

    Args:
        values: (n,)
        collectives: Whose ranks take part.
        dtype: Of what is sent.
    """
    said = values.to(dtype)
    # Divided before they are summed: the sum of float16 may overflow where their mean does not.
    total = said / collectives.world_size
    work = collectives.all_reduce(total)

    def finish() -> Tensor:
        work.wait()
        return total.to(values.dtype)

    return Exchange(said.to(values.dtype), finish)


def begin_quantized(values: Tensor, collectives: Collectives, *, bits: int = 8) -> Exchange:
    """Average values that are rounded to so many bits.

    Two ranks send each other all they have. More of them send each other the parts that each averages, and then the
    rounded means: (w - 1) / w of the bytes twice, however many ranks there are.

    Args:
        values: (n,)
        collectives: Whose ranks take part.
        bits: 8 or 4.
    """
    n, world_size = values.numel(), collectives.world_size
    if world_size <= 2:
        payload = quantize(values, bits)
        gathered, work = collectives.all_gather(payload)
        own = dequantize(payload, n, bits)

        def finish() -> Tensor:
            work.wait()
            others = (row for rank, row in enumerate(gathered) if rank != collectives.rank)
            # Of two numbers the sum is the same in either order, so that both ranks have the same mean.
            total = sum((dequantize(row, n, bits) for row in others), own)
            return (total / world_size).to(values.dtype)

        return Exchange(own.to(values.dtype), finish)

    part = -(-n // world_size)
    rows = torch.nn.functional.pad(values, (0, part * world_size - n)).view(world_size, part)
    payloads = torch.stack([quantize(row, bits) for row in rows])
    received, first_work = collectives.all_to_all(payloads)

    def finish_in_two() -> Tensor:
        first_work.wait()
        mean = torch.stack([dequantize(row, part, bits) for row in received]).mean(0)
        means, work = collectives.all_gather(quantize(mean, bits))
        work.wait()
        return torch.cat([dequantize(row, part, bits) for row in means])[:n].to(values.dtype)

    said = torch.cat([dequantize(row, part, bits) for row in payloads])[:n]
    return Exchange(said.to(values.dtype), finish_in_two)


def begin_topk(values: Tensor, collectives: Collectives, *, ratio: float = 0.01) -> Exchange:
    """Average the values that are greatest in magnitude on each rank; the others are taken to be 0.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017.

    Args:
        values: (n,)
        collectives: Whose ranks take part.
        ratio: The share of the values that a rank sends, each with its place of 4 bytes.
    """
    count = min(values.numel(), max(1, round(ratio * values.numel())))
    places = values.abs().topk(count, sorted=False).indices
    chosen = values[places].float()
    payload = torch.cat([chosen.view(torch.uint8), places.to(torch.int32).view(torch.uint8)])
    gathered, work = collectives.all_gather(payload)

    def finish() -> Tensor:
        work.wait()
        total = torch.zeros_like(values)
        for row in gathered:
            theirs, at = row[: 4 * count].view(torch.float32), row[4 * count :].view(torch.int32)
            # A rank says a value once, so that no two additions meet.
            total[at.long()] += theirs.to(values.dtype)
        return total / collectives.world_size

    said = torch.zeros_like(values)
    said[places] = chosen.to(values.dtype)
    return Exchange(said, finish)


def quantize(values: Tensor, bits: int) -> Tensor:
    """Round values to so many bits, to nearest, with a scale for every block of them.

    Args:
        values: (n,)
        bits: 8 or 4.

    Returns:
        (m,) bytes: the scales and the rounded values.

    Example:
        >>> values = torch.tensor([-1.0, 0.5, 0.26])
        >>> payload = quantize(values, 8)
        >>> payload.dtype, (dequantize(payload, 3, 8) - values).abs().max().item() < 1 / 254
        (torch.uint8, True)
    """
    block, greatest = _BLOCK[bits], 2 ** (bits - 1) - 1
    blocks = torch.nn.functional.pad(values.float(), (0, -values.numel() % block)).view(-1, block)
    low, high = blocks.aminmax(dim=1)
    scales = torch.maximum(high, -low).div_(greatest)
    # A value that is not finite makes its whole block so, by the scale.
    steps = (blocks * scales.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()[:, None]).round_()
    codes = steps.to(torch.int8).view(-1)[: values.numel() + values.numel() % 2]
    if bits == 4:
        codes = codes.view(-1, 2)
        codes = (codes[:, 0] & 0xF) | (codes[:, 1] << 4)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])


def dequantize(payload: Tensor, n: int, bits: int) -> Tensor:
    """Return the n values of :func:`quantize`, as float32."""
    block = _BLOCK[bits]
    blocks = -(-n // block)
    scales, codes = payload[: 4 * blocks].clone().view(torch.float32), payload[4 * blocks :].view(torch.int8)
    if bits == 4:
        # Shifted to the left and back again, so that the sign of the lower four bits is kept.
        codes = torch.stack([(codes << 4) >> 4, codes >> 4], 1).view(-1)
    values = torch.nn.functional.pad(codes.float(), (0, blocks * block - codes.numel())).view(blocks, block)
    return values.mul_(scales[:, None]).view(-1)[:n]


class ErrorFeedback:
    """Begins exchanges of a vector and what was not said of it before.

    Args:
        begin: How vectors are averaged.
    """

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.residual: Tensor | None = None

    def __call__(self, values: Tensor, collectives: Collectives) -> Exchange:
        """Begin an exchange of values (n,), which are as many as before."""
        if self.residual is not None:
            values = values + self.residual
        exchange = self.begin(values, collectives)
        # What is not finite is seen by all in the mean, once.
        self.residual = (values - exchange.said).nan_to_num_(0.0, 0.0, 0.0)
        return exchange
