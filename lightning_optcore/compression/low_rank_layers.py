"""Layers as products of thin layers: a linear one as two, a convolution as three (Tucker-2), an embedding as two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FACTORABLE = (nn.Linear, *CONVOLUTIONS, nn.Embedding)


class LowRank(nn.Sequential):
    """Thin layers in the place of a thick one. It is made by :func:`factored` and :func:`unfilled`."""

    @property
    def weight(self) -> Tensor:
        """The weight that the thin layers come to, for code that reads it; computed at each call."""
        layers: list[Any] = list(self)
        if isinstance(layers[0], nn.Embedding):
            return layers[0].weight @ layers[1].weight.T
        product: Tensor = layers[0].weight
        for layer in layers[1:]:
            # The kernel is where the core is; the other convolutions are 1x1.
            product = torch.einsum("or...,ri...->oi...", layer.weight, product)
        return product

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last layer."""
        last: Any = self[-1]
        bias: Tensor | None = last.bias
        return bias


@dataclass(frozen=True)
class Basis:
    """The directions of a layer that are kept.

    Args:
        expand: From the kept directions to the output channels (out, rank).
        reduce: From the output channels to the kept directions (rank, out).
        inputs: For a convolution with a kernel the same of its input channels: (rank, in) and (in, rank).
        mean: Mean of the input channels, whose lost part the bias takes over; ``None`` without data.
    """

    expand: Tensor
    reduce: Tensor
    inputs: tuple[Tensor, Tensor] | None = None
    mean: Tensor | None = None


def factored(layer: Any, basis: Basis) -> LowRank:
    """Return a layer in factors; its bias stays the same parameter, so that an optimizer still knows it."""
    ranks = [basis.reduce.shape[0]] if basis.inputs is None else [basis.inputs[0].shape[0], basis.reduce.shape[0]]
    product = unfilled(layer, ranks)
    weight = layer.weight.detach().double()
    expand, reduce = (t.to(weight) for t in (basis.expand, basis.reduce))
    if isinstance(layer, nn.Embedding):
        factors = [reduce @ weight.T, expand]
    elif basis.inputs is None:
        factors = [torch.einsum("ro,o...->r...", reduce, weight), expand]
    else:
        narrow, widen = (t.to(weight) for t in basis.inputs)
        core = torch.einsum("ro,oi...,is->rs...", reduce, weight, widen)
        narrow, core = _balanced(narrow, core.transpose(0, 1))
        factors = [narrow, core.transpose(0, 1), expand]
    before, last = _balanced(factors[-2], expand.T)
    factors[-2:] = [before.T if isinstance(layer, nn.Embedding) else before, last.T]
    with torch.no_grad():
        thin: Any
        for thin, factor in zip(product, factors, strict=True):
            thin.weight.copy_(factor.reshape(thin.weight.shape))
        bias = None if isinstance(layer, nn.Embedding) else layer.bias
        if bias is not None:
            thin.bias = bias
            if basis.mean is not None:
                lost = weight - product.weight.double()
                lost = lost.flatten(2).sum(2) if lost.dim() > 2 else lost
                bias += (lost @ basis.mean.to(weight)).to(bias.dtype)
    return product


def _balanced(first: Tensor, second: Tensor) -> list[Tensor]:
    """Give each direction (axis 0 of both) the same norm on both sides: optimizers step alike in both."""
    norms = [factor.flatten(1).norm(dim=1).clamp_min(1e-30) for factor in (first, second)]
    scale = (norms[1] / norms[0]).sqrt()
    return [factor * by.reshape(-1, *(1,) * (factor.dim() - 1)) for factor, by in ((first, scale), (second, 1 / scale))]


def unfilled(layer: Any, ranks: Sequence[int]) -> LowRank:
    """Return the thin layers for a layer, with weights of no meaning.

    Args:
        layer: A linear layer, a convolution without groups, or an embedding.
        ranks: One rank; two (of input and output) for a Tucker core.
    """
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Embedding):
        (rank,) = ranks
        table = nn.Embedding(layer.num_embeddings, rank, layer.padding_idx, **place)
        made: list[Any] = [table, nn.Linear(rank, layer.embedding_dim, bias=False, **place)]
    elif isinstance(layer, nn.Linear):
        (rank,) = ranks
        last = nn.Linear(rank, layer.out_features, layer.bias is not None, **place)
        made = [nn.Linear(layer.in_features, rank, bias=False, **place), last]
    else:
        kind, ones = type(layer), (1,) * len(layer.kernel_size)
        moved: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }
        if len(ranks) == 1:
            made = [kind(layer.in_channels, ranks[0], layer.kernel_size, **moved, bias=False, **place)]
        else:
            narrow = kind(layer.in_channels, ranks[0], ones, bias=False, **place)
            made = [narrow, kind(ranks[0], ranks[1], layer.kernel_size, **moved, bias=False, **place)]
        made.append(kind(ranks[-1], layer.out_channels, ones, bias=layer.bias is not None, **place))
    for thin in made:
        thin.weight.requires_grad_(layer.weight.requires_grad)
    if getattr(layer, "bias", None) is not None:
        made[-1].bias.requires_grad_(layer.bias.requires_grad)
    return LowRank(*made).train(layer.training)


def put_in_place(module: nn.Module, name: str, product: LowRank) -> None:
    """Replace the layer ``name`` of a module."""
    module.set_submodule(name, product)
    above = name
    while above:
        above = above.rpartition(".")[0]
        parent = module.get_submodule(above)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused kernel would take the whole weights; it is not used where there are hooks.
            product.register_forward_pre_hook(_of_its_own)
        if isinstance(parent, nn.TransformerEncoder):
            # Only the fused kernel takes nested tensors.
            parent.use_nested_tensor = False


def _of_its_own(module: nn.Module, args: Any) -> None:
    """Change nothing."""
