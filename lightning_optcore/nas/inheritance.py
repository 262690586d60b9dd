"""Weights of a parent for a network of another architecture.

What both have is copied, and what is wider begins so that the parent's function is kept where that can be.

Source: Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", 2016, https://arxiv.org/abs/1511.05641.
There new units are copies of old ones; here they begin as they were initialised and are not listened to yet, as in
Wei et al., "Network Morphism", 2016, https://arxiv.org/abs/1603.01670, which needs no knowledge of who reads whom.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Where one of these differs, equal shapes do not mean the same.
_DECIDING = ("stride", "dilation", "groups", "padding_mode", "transposed")


@dataclass(frozen=True)
class Inheritance:
    """A network with weights of its parent.

    Args:
        network: A copy of the network that was given.
        copied: Names of the tensors that were taken over whole.
        partly: Of those that were taken over in part.
        new: Of those that begin anew.
        share: Which part of the network's numbers comes from the parent, 0 to 1.
    """

    network: nn.Module
    copied: tuple[str, ...]
    partly: tuple[str, ...]
    new: tuple[str, ...]
    share: float


def inherit(network: nn.Module, parent: nn.Module) -> Inheritance:
    """Return a copy of a network with what fits of a parent's weights; neither of both is changed.

    Layers are matched by name and type. Of channels and features the first ones are shared, of kernels the middle.
    Where a layer is wider, its new inputs have weight 0: a network of layers one after the other, with channel-wise
    operations between them, that is nowhere narrower than its parent computes what its parent does, and goes on
    learning, as the new units are trained from the second step on.

    Args:
        network: Of the new architecture, initialised.
        parent: Trained; or a supernet's sub-network.

    Example:
        >>> parent = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> wider = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x = torch.randn(4, 2)
        >>> child = inherit(wider, parent)
        >>> torch.allclose(child.network(x), parent(x), atol=1e-6)
        True
        >>> child.copied, child.partly
        (('2.bias',), ('0.weight', '0.bias', '2.weight'))
    """
    child = copy.deepcopy(network)
    layers = dict(parent.named_modules())
    copied: list[str] = []
    partly: list[str] = []
    new: list[str] = []
    total = inherited = 0
    with torch.no_grad():
        for prefix, layer in child.named_modules():
            theirs = layers.get(prefix)
            known = _tensors(theirs) if theirs is not None and _same_kind(layer, theirs) else {}
            for name, tensor in _tensors(layer).items():
                full = f"{prefix}.{name}" if prefix else name
                taken = _take(tensor, known[name], name) if name in known else 0
                (new if taken == 0 else copied if taken == tensor.numel() else partly).append(full)
                total, inherited = total + tensor.numel(), inherited + taken
    return Inheritance(child, tuple(copied), tuple(partly), tuple(new), inherited / total if total else 0.0)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _same_kind(layer: nn.Module, other: nn.Module) -> bool:
    """Return whether weights of one mean the same in the other; a class that NNI made is that which it stands for."""
    if not (isinstance(other, type(layer)) or isinstance(layer, type(other))):
        return False
    return all(getattr(layer, name, None) == getattr(other, name, None) for name in _DECIDING) or _depthwise(
        layer, other
    )


def _depthwise(*layers: nn.Module) -> bool:
    same = [name for name in _DECIDING if name != "groups"]
    return all(getattr(layer, "groups", 0) == getattr(layer, "in_channels", -1) for layer in layers) and all(
        getattr(layers[0], name) == getattr(layers[1], name) for name in same
    )


def _take(tensor: Tensor, theirs: Tensor, name: str) -> int:
    """Copy what both have and return how many numbers that is."""
    if tensor.dim() != theirs.dim() or tensor.dtype != theirs.dtype:
        return 0
    mine, parents = [], []
    for axis, (size, other) in enumerate(zip(tensor.shape, theirs.shape, strict=True)):
        shared = min(size, other)
        # Kernels lie around their middle.
        start, begin = ((size - shared) // 2, (other - shared) // 2) if axis >= 2 else (0, 0)
        mine.append(slice(start, start + shared))
        parents.append(slice(begin, begin + shared))
    wider = name == "weight" and tensor.dim() >= 2 and tensor.shape[1] > theirs.shape[1]
    kernel = name == "weight" and any(a > b for a, b in zip(tensor.shape[2:], theirs.shape[2:], strict=True))
    if wider or kernel:
        # The rows that the parent has listen to what it knows only.
        tensor[: theirs.shape[0]] = 0
    part = theirs[tuple(parents)]
    tensor[tuple(mine)] = part.to(tensor.device)
    return part.numel()
