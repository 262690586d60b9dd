"""Clusters of several simulated nodes, at 127.0.0.1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = "0123456789abcdef0123456789abcdef"


def with_token() -> None:
    """Give this process the token of the test's clusters; Ray reads it when it is imported."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = TOKEN


class SimulatedCluster:
    """Nodes that are processes of this machine.

    Args:
        head: What the first node has: ``num_cpus``, ``memory``, ``labels`` and so on.
    """

    def __init__(self, **head: Any) -> None:
        with_token()
        from ray.cluster_utils import Cluster

        options = {"node_ip_address": "127.0.0.1", "include_dashboard": False, **head}
        self._cluster = Cluster(initialize_head=True, head_node_args=options)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, **node: Any) -> Any:
        """Add a node, and return what kills it."""
        return self._cluster.add_node(node_ip_address="127.0.0.1", **node)

    def kill(self, node: Any) -> None:
        """Kill the processes of a node, as a power cut does."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def cluster(**head: Any) -> Iterator[SimulatedCluster]:
    """Give a cluster."""
    made = SimulatedCluster(**head)
    try:
        yield made
    finally:
        made.close()
