"""The machines of a Ray cluster as a configuration describes them, and the command that makes a machine one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import ip_address
from typing import Any

from lightning_optcore.option_values import is_number, is_whole

# In the guide's configuration the head is called the master.
_HEAD_ROLES = ("head", "master")
_GIB = 1024**3
# Of labels, as Ray checks them.
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class NodesError(ValueError):
    """Nodes that make no cluster; the message names the key, the value and what would be right."""


@dataclass(frozen=True)
class NodeSpec:
    """One machine of a cluster.

    Args:
        node_id: Its name; jobs ask for it by the label ``node_id``.
        role: What it is for; jobs ask for it by the label ``role``. The head (also ``"master"``) holds the cluster
            together, and runs jobs too.
        ip_address: At which the others reach it.
        port: At which it listens: the head for the others, by default 6379; any other node for the head's orders, by
            default at any free port.
        gpu_count: How many GPUs jobs may use; ``None`` for all there are.
        memory_gb: How much memory jobs may use, in GiB; ``None`` for what is available at its start.
        cpu_cores: How many processor cores jobs may use; ``None`` for all there are.

    Raises:
        NodesError: If a value is out of range.

    Example:
        >>> NodeSpec("worker-1", role="trainer", ip_address="10.0.0.2", cpu_cores=16).is_head
        False
    """

    node_id: str
    role: str = "worker"
    ip_address: str = "127.0.0.1"
    port: int | None = None
    gpu_count: int | None = None
    memory_gb: float | None = None
    cpu_cores: int | None = None

    def __post_init__(self) -> None:
        for name in ("node_id", "role"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _LABEL.fullmatch(value):
                raise NodesError(f"nodes.{name}={value!r}: expected letters, digits, '-', '_' or '.', at most 63")
        try:
            ip_address(self.ip_address)
        except ValueError:
            raise NodesError(f"nodes.ip_address={self.ip_address!r} ({self.node_id}): expected an address") from None
        for name, least, most in (("port", 1, 65535), ("gpu_count", 0, None), ("cpu_cores", 1, None)):
            value = getattr(self, name)
            if value is not None and not (is_whole(value, least) and (most is None or value <= most)):
                upto = f" to {most}" if most is not None else " or more"
                raise NodesError(f"nodes.{name}={value!r} ({self.node_id}): expected a whole number, {least}{upto}")
        if self.memory_gb is not None and not (is_number(self.memory_gb) and self.memory_gb > 0):
            raise NodesError(f"nodes.memory_gb={self.memory_gb!r} ({self.node_id}): expected a number above 0")

    @property
    def is_head(self) -> bool:
        """Whether it holds the cluster together."""
        return self.role in _HEAD_ROLES

    @property
    def address(self) -> str:
        """Where a head listens."""
        host = f"[{self.ip_address}]" if ":" in self.ip_address else self.ip_address
        return f"{host}:{self.port or 6379}"


def nodes_of(given: Sequence[Mapping[str, Any]]) -> list[NodeSpec]:
    """Return the nodes of a configuration.

    Raises:
        NodesError: If there is an unknown key, a name twice, or not exactly one head.
    """
    known = [field.name for field in fields(NodeSpec)]
    nodes = []
    for one in given:
        unknown = sorted(set(one) - set(known))
        if unknown or "node_id" not in one:
            what = f"nodes.{unknown[0]}: unknown" if unknown else "nodes: one has no node_id"
            raise NodesError(f"{what}; expected {', '.join(known)}")
        nodes.append(NodeSpec(**one))
    heads = [node.node_id for node in nodes if node.is_head]
    if len(heads) != 1:
        raise NodesError(f"nodes: expected exactly one with role: head, found {', '.join(heads) or 'none'}")
    names = [node.node_id for node in nodes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise NodesError(f"nodes.node_id={twice[0]}: there are two of it")
    return nodes


def ray_start_command(node: NodeSpec, head: NodeSpec) -> list[str]:
    """Return the command of Ray that makes this machine a node until it is interrupted.

    Args:
        node: This machine.
        head: The cluster's head; the node itself where it is that.

    Example:
        >>> head = NodeSpec("head", role="head", port=6400)
        >>> " ".join(ray_start_command(head, head)[:4])
        'ray start --block --head'
        >>> ray_start_command(NodeSpec("w", ip_address="127.0.0.1", cpu_cores=2), head)[3:6]
        ['--address=127.0.0.1:6400', '--node-ip-address=127.0.0.1', '--num-cpus=2']
    """
    words = ["ray", "start", "--block"]
    if node.is_head:
        # The dashboard would be one more way in.
        words += ["--head", f"--port={node.port or 6379}", "--include-dashboard=false"]
    else:
        words += [f"--address={head.address}"]
        if node.port is not None:
            words += [f"--node-manager-port={node.port}"]
    words += [f"--node-ip-address={node.ip_address}"]
    if node.cpu_cores is not None:
        words += [f"--num-cpus={node.cpu_cores}"]
    if node.gpu_count is not None:
        words += [f"--num-gpus={node.gpu_count}"]
    if node.memory_gb is not None:
        words += [f"--memory={int(node.memory_gb * _GIB)}"]
    return [*words, f"--labels=node_id={node.node_id},role={node.role}", "--disable-usage-stats"]
