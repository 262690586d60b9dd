"""``optcore node``: make this machine a node of a Ray cluster, as the configuration describes it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_optcore.executor.command import end_with_this_process
from lightning_optcore.executor.executor import ExecutorError
from lightning_optcore.executor.nodes import NodesError, NodeSpec, nodes_of, ray_start_command
from lightning_optcore.executor.ray_connection import has_token
from lightning_optcore.files import write_atomically

_STOP_S = 30.0


def run(config: DictConfig) -> None:
    """Start Ray and wait for its end, or end the one that was started before."""
    nodes = nodes_of(OmegaConf.to_container(config.nodes, resolve=True))  # type: ignore[arg-type]
    node = _chosen(nodes, config.node_id)
    head = next(one for one in nodes if one.is_head)
    file = Path(HydraConfig.get().runtime.output_dir) / f"node-{node.node_id}.json"
    words = ray_start_command(node, head)
    if config.dry_run:
        print(shlex.join(words))
        return
    if config.stop:
        _stop(node, file)
        return
    _check(node, file)
    code = _run(words, file)
    if code:
        raise ExecutorError(f"node {node.node_id}: Ray ended with exit code {code}; it says why above")


def _chosen(nodes: list[NodeSpec], node_id: str | None) -> NodeSpec:
    if node_id is None and len(nodes) == 1:
        return nodes[0]
    found = [node for node in nodes if node.node_id == str(node_id)]
    if not found:
        raise NodesError(f"node_id={node_id}: expected one of {', '.join(node.node_id for node in nodes)}")
    return found[0]


def _check(node: NodeSpec, file: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ExecutorError("optcore node needs Ray: pip install 'lightning-optcore[cluster]'")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise ExecutorError(f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: expected token, or nothing")
    if not has_token(os.environ):
        raise ExecutorError(
            "without a token, whoever reaches the cluster runs code on it: make one with `ray get-auth-token "
            "--generate`, and copy ~/.ray/auth_token to every machine, readable for you alone (or set "
            "RAY_AUTH_TOKEN_PATH)"
        )
    here = {one.address.partition("%")[0] for several in psutil.net_if_addrs().values() for one in several}
    if node.ip_address not in here:
        addresses = sorted(one for one in here if one.count(".") == 3)
        raise NodesError(
            f"nodes.ip_address={node.ip_address} ({node.node_id}): not an address of this machine, which has "
            f"{', '.join(addresses)}"
        )
    if _running(file) is not None:
        raise ExecutorError(f"node {node.node_id} runs here already; `optcore node node_id={node.node_id} stop=true`")


def _run(words: list[str], file: Path) -> int:
    """Run Ray until it ends or this process is told to; return its exit code, 0 where it was told to."""
    # Ray of this environment, whatever is on the PATH.
    program = [sys.executable, "-m", "lightning_optcore.executor.ray_start", *words[1:]]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    ray = subprocess.Popen(
        program, env=environment, stdin=subprocess.DEVNULL, preexec_fn=end_with_this_process(),  # noqa: PLW1509 - as there
    )  # fmt: skip
    with _ended_by_signals() as told, ray:
        this = psutil.Process()
        write_atomically(file, json.dumps({"pid": this.pid, "started": this.create_time()}))
        try:
            while ray.poll() is None and not told:
                time.sleep(0.2)
            if told:
                # It ends the processes that it has started, no other one's.
                ray.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ray.wait(_STOP_S)
                ray.kill()
        finally:
            file.unlink(missing_ok=True)
    return 0 if told else int(ray.returncode)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Give a list that gets the signals to end, instead of their ending this process."""
    told: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        told.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(node: NodeSpec, file: Path) -> None:
    process = _running(file)
    if process is None:
        raise ExecutorError(f"node {node.node_id} does not run here: it was not started from this folder, or has ended")
    process.terminate()
    end = time.monotonic() + 2 * _STOP_S
    while _running(file) is not None:
        if time.monotonic() > end:
            raise ExecutorError(f"node {node.node_id}: process {process.pid} does not end")
        time.sleep(0.1)
    print(f"node {node.node_id} has ended")


def _running(file: Path) -> psutil.Process | None:
    try:
        noted = json.loads(file.read_text())
        process = psutil.Process(noted["pid"])
        there = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - noted["started"]) < 1.0
        return process if there else None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
