"""What ranks tell each other through the store of their process group: small, plain data, with any backend."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch

# A store keeps what was set: each exchange has keys of its own. All ranks take part in all of them, in one order, since
# their group has started.
_exchanges: Counter[str] = Counter()


def begin_anew() -> None:
    """Count exchanges from the start of a process group; every rank must call it."""
    _exchanges.clear()


def gather(store: torch.distributed.Store, topic: str, rank: int, world_size: int, value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of ranks; every rank must call it.

    Args:
        store: The store of the process group.
        topic: What it is about.
        rank: This rank.
        world_size: Number of ranks.
        value: This rank's, of JSON's types.

    Raises:
        torch.distributed.DistStoreError: If a rank does not come within the store's timeout.

    Example:
        >>> gather(torch.distributed.HashStore(), "greeting", 0, 1, {"hello": 1})
        [{'hello': 1}]
    """
    prefix = f"lightning_optcore/{topic}/{_exchanges[topic]}"
    _exchanges[topic] += 1
    store.set(f"{prefix}/{rank}", json.dumps(value))
    keys = [f"{prefix}/{i}" for i in range(world_size)]
    return [json.loads(value) for value in store.multi_get(keys)]
