"""Nodes of a configuration, and a head that is started as one describes it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from lightning_optcore.executor import ExecutorError
from lightning_optcore.executor.nodes import NodesError, NodeSpec, nodes_of, ray_start_command
from lightning_optcore.executor.ray_connection import has_token
from lightning_optcore.jobs import node as node_job

HEAD = {"node_id": "master", "role": "head", "ip_address": "10.0.0.1", "port": 6380}
WORKER = {"node_id": "worker-1", "role": "trainer", "ip_address": "10.0.0.2", "port": 7000, "gpu_count": 1,
          "memory_gb": 64, "cpu_cores": 16}  # fmt: skip
TOKEN = "0123456789abcdef0123456789abcdef"
# One job on the cluster, as a user's program hands it in.
ONE_JOB = """
import sys
from functools import partial
from lightning_optcore.executor import RayExecutor
with RayExecutor(sys.argv[1]) as executor:
    job = executor.submit(partial(pow, 2, 5), resources={"labels": {"node_id": "head", "role": "head"}})
    print(job.result(60), job.node)
"""


def test_the_command_of_a_head_and_of_a_worker():
    head, worker = nodes_of([HEAD, WORKER])
    assert ray_start_command(head, head) == [
        "ray", "start", "--block", "--head", "--port=6380", "--include-dashboard=false",
        "--node-ip-address=10.0.0.1", "--labels=node_id=master,role=head",
        "--disable-usage-stats",
    ]  # fmt: skip
    assert ray_start_command(worker, head) == [
        "ray", "start", "--block", "--address=10.0.0.1:6380", "--node-manager-port=7000",
        "--node-ip-address=10.0.0.2", "--num-cpus=16", "--num-gpus=1", "--memory=68719476736",
        "--labels=node_id=worker-1,role=trainer", "--disable-usage-stats",
    ]  # fmt: skip


def test_a_node_listens_on_loopback_unless_told():
    (head,) = nodes_of([{"node_id": "head", "role": "master"}])
    assert "--node-ip-address=127.0.0.1" in ray_start_command(head, head)
    assert head.address == "127.0.0.1:6379"
    assert NodeSpec("six", role="head", ip_address="::1").address == "[::1]:6379"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([WORKER], "exactly one with role: head, found none"),
        ([HEAD, {**HEAD, "node_id": "other"}], "exactly one with role: head, found master, other"),
        ([HEAD, {**WORKER, "node_id": "master"}], "nodes.node_id=master: there are two"),
        ([{**HEAD, "gpus": 1}], "nodes.gpus: unknown; expected node_id, role, ip_address"),
        ([{"role": "head"}], "one has no node_id"),
        ([{**HEAD, "ip_address": "somewhere"}], "nodes.ip_address='somewhere' .master.: expected an address"),
        ([{**HEAD, "port": 70000}], "nodes.port=70000 .master.: expected a whole number, 1 to 65535"),
        ([{**HEAD, "cpu_cores": 0}], "nodes.cpu_cores=0 .master.: expected a whole number, 1 or more"),
        ([{**HEAD, "memory_gb": -1}], "nodes.memory_gb=-1"),
        ([{**HEAD, "role": "a,b=c"}], "nodes.role='a,b=c'"),
    ],
)
def test_nodes_that_make_no_cluster_are_refused(nodes, message):
    with pytest.raises(NodesError, match=message):
        nodes_of(nodes)


def test_a_token_is_looked_for_where_ray_does(tmp_path):
    assert not has_token({"HOME": str(tmp_path)})
    assert has_token({"HOME": str(tmp_path), "RAY_AUTH_TOKEN": TOKEN})
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("\n")
    assert not has_token({"HOME": str(tmp_path)})
    file.write_text(TOKEN)
    assert has_token({"HOME": str(tmp_path)})
    assert has_token({"HOME": "/nowhere", "RAY_AUTH_TOKEN_PATH": str(file)})


def test_the_command_shows_what_it_would_run_and_asks_for_a_token(optcore, tmp_path):
    shown = optcore("node", "dry_run=true", "nodes.0.cpu_cores=3")
    assert shown.stdout.startswith("ray start --block --head --port=6379")
    assert "--num-cpus=3" in shown.stdout
    without = optcore("node", HOME=str(tmp_path), RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH="")
    assert without.returncode == 1
    assert "ray get-auth-token --generate" in without.stderr


def test_a_node_that_cannot_be_started_says_why(tmp_path, monkeypatch):
    head = {"node_id": "head", "role": "head"}
    config = OmegaConf.create({"nodes": [head], "node_id": None, "dry_run": False, "stop": False})
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(node_job.HydraConfig, "get", lambda: OmegaConf.create({"runtime": {"output_dir": "."}}))
    monkeypatch.chdir(tmp_path)
    for changes, message in (
        ({"node_id": "tail"}, "node_id=tail: expected one of head"),
        ({"stop": True}, "node head does not run here"),
        ({"nodes.0.ip_address": "203.0.113.7"}, "203.0.113.7 .head.: not an address of this machine, which has 127"),
    ):
        changed = config.copy()
        for key, value in changes.items():
            OmegaConf.update(changed, key, value)
        with pytest.raises((NodesError, ExecutorError), match=message):
            node_job.run(changed)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ExecutorError, match="RAY_AUTH_MODE=disabled: expected token"):
        node_job.run(config)


@pytest.mark.xdist_group("ray")
def test_a_job_runs_on_a_head_on_loopback(optcore, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-m", "lightning_optcore.cli", "node", f"nodes.0.port={port}", "nodes.0.cpu_cores=1"]
    with (tmp_path / "printed").open("w") as printed:
        node = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
    started = []
    try:
        _wait_until_it_listens(node, port, tmp_path / "printed")
        started = psutil.Process(node.pid).children(recursive=True)
        listening = [
            (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port)
            for process in started
            for one in process.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN
        ]
        assert {address for address, _ in listening} == {"127.0.0.1"}, "nothing outside of this machine reaches it"
        assert 10001 not in {number for _, number in listening}, "the server for Ray's client is off"
        assert not any(TOKEN in word for process in started for word in process.cmdline())
        done = subprocess.run(
            [sys.executable, "-c", ONE_JOB, f"127.0.0.1:{port}"],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1:] == ["32 head"], done.stderr[-2000:]
        again = optcore("node", f"nodes.0.port={port}", RAY_AUTH_TOKEN=TOKEN, RAY_AUTH_MODE="token")
        assert "node head runs here already" in again.stderr
        assert optcore("node", "stop=true").stdout == "node head has ended\n"
        assert node.wait(60) == 0
        _, left = psutil.wait_procs(started, timeout=20)
        assert not left
        assert TOKEN not in (tmp_path / "printed").read_text()
    finally:
        for process in started:
            if process.is_running():
                process.kill()
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def _wait_until_it_listens(node: subprocess.Popen, port: int, printed: Path) -> None:
    for _ in range(600):
        assert node.poll() is None, printed.read_text()[-2000:]
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("it never listens")
