"""The state of random numbers, so that what is resumed draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


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
