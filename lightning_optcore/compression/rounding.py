"""The numbers that integers can hold, as ONNX Runtime rounds them, with gradients that pass the rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Weights and activations of 4-bit linear layers share a scale in blocks of so many inputs.
BLOCK = 32
# A smaller table of embeddings is not worth a scale per block.
FEWEST_EMBEDDINGS = 256
EMBEDDING_BLOCKS = (64, 32, 16)
# The best scale of a block is seldom the one that its largest value asks for.
SCALE_FACTORS = tuple(0.6 + 0.025 * step for step in range(19))


class _Rounding(torch.autograd.Function):
    """Takes the rounded numbers forward and the gradient back as it is."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(exact.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _passed(exact: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = _Rounding.apply(exact, rounded)
    return result


def rounded_channels(weight: Tensor, axis: int, *, reduce_range: bool = True) -> Tensor:
    """Round a weight to 8-bit integers with one scale for each index of ``axis``, symmetric about zero.

    Args:
        weight: Weight of a layer.
        axis: The axis of the scales.
        reduce_range: Use 7 of the 8 bits.

    Example:
        >>> rounded_channels(torch.tensor([[1.0, 0.501], [64.0, 0.4]]), 0)
        tensor([[ 1.0000,  0.5000],
                [64.0000,  0.0000]])
    """
    most = 64 if reduce_range else 127
    exact = weight.detach().float()
    others = [i for i in range(exact.dim()) if i != axis]
    scale = _scale(exact.abs().amax(dim=others, keepdim=True), most)
    return _passed(weight, torch.round(exact / scale).clamp(-most, most) * scale)


def rounded_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round to the 256 steps of a range that holds zero; what is beyond it is cut off and gets no gradient.

    Args:
        x: Activations.
        low: Smallest value, a scalar.
        high: Largest value, a scalar.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = _scale(high - low, 255)
    zero_point = torch.round(-low / scale).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, 0, 255).to(x.dtype)


def rounded_rows(rows: Tensor) -> Tensor:
    """Round to 8-bit integers with one scale for each row (last axis): embeddings."""
    exact = rows.detach().float()
    scale = _scale(exact.abs().amax(dim=-1, keepdim=True), 127)
    return _passed(rows, torch.round(exact / scale) * scale)


def rounded_weight_blocks(weight: Tensor) -> Tensor:
    """Round the weight of a linear layer (outputs, inputs) to whole numbers from -8 to 7 times a scale per block.

    The scale brings the largest value of a block of inputs to -8, which reaches one step further than 7.
    """
    exact = weight.detach().float()
    blocks = _blocks(exact)
    high, low = blocks.amax(dim=-1, keepdim=True), blocks.amin(dim=-1, keepdim=True)
    scale = torch.where(high.abs() > low.abs(), high, low) / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    numbers = torch.floor(blocks * inverse + 8.5).clamp(0, 15) - 8
    return _passed(weight, (numbers * scale).flatten(-2)[..., : exact.shape[-1]])


def rounded_activation_blocks(x: Tensor) -> Tensor:
    """Round to 8-bit integers with one scale for each block of the last axis, taken from the values themselves."""
    exact = x.detach().float()
    blocks = _blocks(exact)
    scale = _scale(blocks.abs().amax(dim=-1, keepdim=True), 127)
    return _passed(x, (torch.round(blocks / scale) * scale).flatten(-2)[..., : exact.shape[-1]])


def embedding_block(rows: int, columns: int) -> int | None:
    """Return the length of the blocks in which a table of embeddings is rounded to 4 bits; ``None`` if it is not."""
    if rows < FEWEST_EMBEDDINGS:
        return None
    return next((block for block in EMBEDDING_BLOCKS if columns % block == 0), None)


def rounded_embeddings(looked_up: Tensor, block: int) -> Tensor:
    """Round embeddings to whole numbers from -8 to 7 times the scale of least squared error of each block.

    Args:
        looked_up: Rows of a table, (..., columns).
        block: What :func:`embedding_block` returned for the table.
    """
    exact = looked_up.detach().float()
    blocks = exact.unflatten(-1, (-1, block))
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    best, least = torch.zeros_like(blocks), torch.full_like(largest, float("inf"))
    for factor in SCALE_FACTORS:
        scale = (-largest.double() / 8 * factor).float()
        scale = torch.where(scale == 0, 1, scale)
        rounded = torch.round(blocks / scale).clamp(-8, 7) * scale
        error = (rounded - blocks).square().sum(dim=-1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return _passed(looked_up, best.flatten(-2))


def _scale(width: Tensor, steps: int) -> Tensor:
    scale = width / steps
    return torch.where(scale > 0, scale, 1)


def _blocks(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % BLOCK
    return torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, BLOCK))
