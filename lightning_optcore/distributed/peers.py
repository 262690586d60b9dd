"""Whether all ranks run the same: versions, and the names, shapes and types of a model's tensors."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_optcore.distributed.gathering import gather
from lightning_optcore.fingerprints import fingerprint


def check_peers(
    module: nn.Module,
    store: torch.distributed.Store,
    rank: int,
    world_size: int,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> None:
    """Compare this rank with the others; every rank must call it.

    Ranks send a hash, and what they have only if the hashes differ.

    Args:
        module: The model, before it is wrapped.
        store: The store of the process group.
        rank: This rank.
        world_size: Number of ranks.
        optimizers: Their classes are compared as well.

    Raises:
        MisconfigurationException: On all ranks, if they differ from rank 0; names the ranks and what differs first.

    Example:
        >>> check_peers(nn.Linear(2, 2), torch.distributed.HashStore(), 0, 1)
    """
    mine = describe(module, optimizers)
    hashes = gather(store, "peers/hash", rank, world_size, fingerprint(mine))
    if len(set(hashes)) == 1:
        return
    described = gather(store, "peers/description", rank, world_size, mine)
    unlike = [i for i in range(1, world_size) if described[i] != described[0]]
    raise MisconfigurationException(
        "the ranks do not run the same: "
        + "; ".join(f"rank {i} {difference(described[0], described[i])}" for i in unlike)
    )


def describe(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Return what must be the same on all ranks, as plain data in the order of the model."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": importlib.metadata.version("lightning"),
            "lightning_optcore": importlib.metadata.version("lightning-optcore"),
        },
        "tensors": [[name, _shape(tensor), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors],
        "optimizers": [f"{type(one).__module__}.{type(one).__qualname__}" for one in optimizers],
    }


def difference(zero: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what differs first between two descriptions.

    Example:
        >>> zero, other = describe(nn.Linear(128, 10)), describe(nn.Linear(64, 10))
        >>> difference(zero, other)
        'has weight (10, 64) float32 where rank 0 has (10, 128) float32'
    """
    for name, version in zero["versions"].items():
        if other["versions"].get(name) != version:
            return f"has {name} {other['versions'].get(name)} where rank 0 has {version}"
    theirs = {name: rest for name, *rest in other["tensors"]}
    ours = {name: rest for name, *rest in zero["tensors"]}
    for name, rest in ours.items():
        if name not in theirs:
            return f"has no {name}, which rank 0 has"
        if theirs[name] != rest:
            return f"has {name} {' '.join(theirs[name])} where rank 0 has {' '.join(rest)}"
    for name in theirs:
        if name not in ours:
            return f"has {name}, which rank 0 has not"
    if zero["optimizers"] != other["optimizers"]:
        return f"has optimizers {other['optimizers']} where rank 0 has {zero['optimizers']}"
    return "has its parameters in another order than rank 0"


def _shape(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return "(uninitialized)"
    return f"({', '.join(map(str, tensor.shape))})"
