"""What a training holds beside the weights, cut together with them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_optcore.compression.channel_groups import Cut, taken


def cut_optimizer(optimizer: Any, module: nn.Module, cut: Cut) -> list[str]:
    """Cut an optimizer's state as its parameters are about to be cut. Call it before :func:`apply_cut`.

    Tensors of the parameter's shape (Adam's ``exp_avg``, momentum) lose the same elements; numbers such as
    ``step`` stay. State of another shape (factored moments) cannot be cut and is dropped for that parameter.

    Returns:
        Names of the parameters whose state was dropped.
    """
    dropped = []
    for name, parameter in module.named_parameters():
        source, state = cut.sources.get(name), optimizer.state.get(parameter)
        if source is None or not state:
            continue
        cut_state = {key: taken(value, source) if _is_like(value, parameter) else value for key, value in state.items()}
        if any(isinstance(v, Tensor) and v.dim() > 0 and v.shape != source.shape for v in cut_state.values()):
            dropped.append(name)
            optimizer.state.pop(parameter)
        else:
            state.update(cut_state)
    return dropped


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def replace_parameter(optimizer: Any, old: Tensor, new: Sequence[Tensor]) -> None:
    """Let an optimizer update some parameters in the place of another one; its state of them begins anew."""
    for group in optimizer.param_groups:
        at = next((i for i, parameter in enumerate(group["params"]) if parameter is old), None)
        if at is not None:
            group["params"][at : at + 1] = list(new)
    optimizer.state.pop(old, None)


def wrap_again(strategy: Any) -> None:
    """Let DistributedDataParallel take notice of parameters that changed their shape."""
    if hasattr(strategy, "configure_ddp") and strategy.model is not strategy.lightning_module:
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def random_state() -> dict[str, Any]:
    """Return the state of the random number generators, as a checkpoint can hold it."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(r) for r in rest)],
    }


def random_states() -> list[dict[str, Any]]:
    """Return the random states of all ranks; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [random_state()]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, random_state())
    return states


def restore_random_states(states: Sequence[Mapping[str, Any]]) -> None:
    """Set this rank's generators to its own of :func:`random_states`, if there were as many ranks then."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if known else (0, 1)
    if len(states) == world:
        restore_random_state(states[rank])


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the random number generators to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def is_plain(value: Any) -> bool:
    """Tell whether a checkpoint that is read with ``weights_only=True`` can hold a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (Tensor, bool, int, float, str)
