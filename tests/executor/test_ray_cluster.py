"""Several nodes: what runs where, and what becomes of it when nodes, drivers and networks fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import work_to_do
from clusters import SimulatedCluster, cluster

from lightning_optcore.executor import Executor, ExecutorError, JobFailedError, JobHandle, JobLostError, RayExecutor
from lightning_optcore.executor.ray_connection import connect

pytestmark = pytest.mark.xdist_group("ray")
WAIT = 120
GIGABYTE = 2**30
HERE = Path(__file__).parent


@pytest.fixture
def nodes() -> Iterator[SimulatedCluster]:
    """A head that holds two small jobs."""
    with cluster(num_cpus=2, memory=2 * GIGABYTE, labels={"node_id": "head", "role": "head"}) as made:
        yield made


@pytest.fixture(scope="module")
def calm() -> Iterator[SimulatedCluster]:
    """One node, to which nothing happens."""
    with cluster(num_cpus=1) as made:
        yield made


def named(executor: Executor, count: int) -> dict[str, dict[str, Any]]:
    """Return the nodes by name, as soon as so many are there."""
    end = time.monotonic() + WAIT
    while len(found := {node["name"]: node for node in executor.nodes()}) != count:
        assert time.monotonic() < end, f"{sorted(found)} are there"
        time.sleep(0.1)
    return found


def alive(executor: Executor, job: JobHandle) -> bool:
    return job.node in {node["name"] for node in executor.nodes()}


def seconds(text: str | None) -> float:
    assert text is not None
    return datetime.fromisoformat(text).timestamp()


def test_sixty_mixed_jobs_on_three_nodes_one_of_which_is_killed_twice(nodes: SimulatedCluster, tmp_path: Path) -> None:
    big = {"num_cpus": 4, "memory": 8 * GIGABYTE, "labels": {"node_id": "big", "role": "trainer"}}
    doomed = nodes.add(**big)
    nodes.add(num_cpus=1, memory=GIGABYTE, labels={"node_id": "small", "role": "helper"})
    with RayExecutor(nodes.address, store=tmp_path / "jobs.db") as executor:
        has = {name: node["has"] for name, node in named(executor, 3).items()}
        assert has["big"]["cpu"] == 4 and has["small"]["labels"]["role"] == "helper"
        kinds: list[dict[str, Any]] = [
            {"cpu": 1},
            {"cpu": 1, "memory_bytes": GIGABYTE // 2},
            {"cpu": 4},
            {"cpu": 2, "memory_bytes": 4 * GIGABYTE},
            {"cpu": 1, "labels": {"role": "trainer"}},
            {"cpu": 0.5, "labels": {"role": "helper"}},
        ]
        jobs = [
            executor.submit(
                partial(work_to_do.note, str(tmp_path), str(i), 0.4), priority=i % 4, resources=kinds[i % len(kinds)]
            )
            for i in range(60)
        ]
        killed = []
        for _ in range(2):
            end = time.monotonic() + WAIT
            while not any(str(job.node).startswith("big") for job in executor.jobs("running") if alive(executor, job)):
                assert time.monotonic() < end
                time.sleep(0.05)
            time.sleep(0.3)
            killed.append(time.time())
            nodes.kill(doomed)
            # The same machine, started again.
            doomed = nodes.add(**big)
        assert executor.wait(jobs, WAIT) == []
        records = [job.record for job in jobs]
        assert Counter(record.status for record in records) == {"done": 60}
        assert [record.result for record in records] == [str(i) for i in range(60)]
        # Recorded once: of all attempts, one of each job is done, and the others went with their node.
        endings = Counter(attempt.status for record in records for attempt in record.attempts)
        assert endings["done"] == 60 and set(endings) == {"done", "lost"}
        lost = [(record, i) for record in records for i, one in enumerate(record.attempts) if one.status == "lost"]
        assert lost
        for record, i in lost:
            assert record.attempts[i].node.startswith("big")
            ended = seconds(record.attempts[i].finished_at)
            since = ended - max(moment for moment in killed if moment < ended)
            assert since < 5.0, (record.attempts, killed)
        check_places(records, has)
        check_order(records, has)


def check_places(records: list[Any], has: dict[str, dict[str, Any]]) -> None:
    """No job was on a node that cannot hold it, nor were several together."""
    attempts = [(one, record) for record in records for one in record.attempts]
    for one, record in attempts:
        node = has[one.node.split("-")[0]]
        needs = record.resources
        assert needs.cpu <= node["cpu"] and needs.memory_bytes <= node["memory_bytes"]
        assert needs.labels.items() <= node["labels"].items()
    for moment, _ in attempts:
        at = seconds(moment.started_at)
        together = [
            record.resources
            for one, record in attempts
            if one.node == moment.node and seconds(one.started_at) <= at < seconds(one.finished_at)
        ]
        node = has[moment.node.split("-")[0]]
        assert sum(one.cpu for one in together) <= node["cpu"] + 1e-6
        assert sum(one.memory_bytes for one in together) <= node["memory_bytes"]


def check_order(records: list[Any], has: dict[str, dict[str, Any]]) -> None:
    """Of jobs that need alike, none started while one of a higher priority waited."""
    for one in records:
        for other in records:
            if one.resources != other.resources or one.priority <= other.priority:
                continue
            if len(one.attempts) == len(other.attempts) == 1 and seconds(one.submitted_at) + 0.5 < seconds(
                other.attempts[0].started_at
            ):
                assert seconds(one.attempts[0].started_at) <= seconds(other.attempts[0].started_at)


def test_a_node_that_stands_still_is_given_up_and_its_late_result_is_not_taken(
    nodes: SimulatedCluster, tmp_path: Path
) -> None:
    silent = nodes.add(num_cpus=1, labels={"node_id": "silent"})
    with RayExecutor(nodes.address, store=tmp_path / "jobs.db") as executor:
        named(executor, 2)
        hold = executor.submit(partial(time.sleep, 30), resources={"cpu": 2})
        job = executor.submit(partial(work_to_do.note, str(tmp_path), "a", 4.0), resources={"cpu": 1})
        while job.node != "silent" or not work_to_do.notes(tmp_path):
            time.sleep(0.05)
        raylet = psutil.Process(silent.all_processes["raylet"][0].process.pid)
        stopped = [raylet, *raylet.children(recursive=True)]
        for process in stopped:
            process.suspend()
        stopped_at = time.time()
        try:
            while job.record.attempts[0].status is None:
                time.sleep(0.05)
            assert job.record.attempts[0].status == "lost"
            assert seconds(job.record.attempts[0].finished_at) - stopped_at < 5.0
            hold.cancel()
            assert job.result(WAIT) == "a"
            assert job.node == "head"
        finally:
            for process in stopped:
                process.resume()
        # What was written after the result, and the node, which is used again.
        named(executor, 2)
        here = {"labels": {"node_id": "silent"}}
        assert executor.submit(partial(pow, 2, 2), resources=here).result(WAIT) == 4
        assert [one.status for one in job.record.attempts] == ["lost", "done"]


def test_a_job_whose_nodes_are_lost_again_and_again_ends_as_lost(nodes: SimulatedCluster, tmp_path: Path) -> None:
    with RayExecutor(nodes.address, store=tmp_path / "jobs.db") as executor:
        doomed = nodes.add(num_cpus=1, labels={"node_id": "doomed"})
        named(executor, 2)
        needs = {"labels": {"node_id": "doomed"}}
        job = executor.submit(partial(time.sleep, 60), resources=needs, max_retries=1)
        for attempt in (1, 2):
            while not (job.attempts == attempt and job.status == "running"):
                time.sleep(0.05)
            time.sleep(0.5)
            nodes.kill(doomed)
            if attempt == 1:
                doomed = nodes.add(num_cpus=1, labels={"node_id": "doomed"})
        with pytest.raises(JobLostError, match=r"lost on doomed.* \(attempt 2\)"):
            job.result(WAIT)


def test_a_full_disk_is_the_fault_of_its_node(nodes: SimulatedCluster, tmp_path: Path) -> None:
    nodes.add(num_cpus=1, labels={"node_id": "other"})
    with RayExecutor(nodes.address, store=tmp_path / "jobs.db") as executor:
        named(executor, 2)
        # Only the head is free for it at first.
        hold = executor.submit(partial(time.sleep, 1.5), resources={"labels": {"node_id": "other"}})
        job = executor.submit(partial(work_to_do.no_space, "head"))
        assert job.result(WAIT) == "other"
        assert [(one.node, one.status) for one in job.record.attempts] == [("head", "failed"), ("other", "done")]
        hold.result(WAIT)
        here = {"labels": {"node_id": "head"}}
        nowhere_else = executor.submit(partial(work_to_do.no_space, "head"), resources=here)
        with pytest.raises(JobFailedError, match="No space left on device"):
            nowhere_else.result(WAIT)
        assert nowhere_else.attempts == 1


DRIVER = """
import sys, time
from functools import partial
from pathlib import Path
import work_to_do
from lightning_optcore.executor import RayExecutor
address, folder = sys.argv[1:]
with RayExecutor(address, store=f"{folder}/jobs.db") as executor:
    jobs = [
        executor.submit(partial(work_to_do.note, folder, str(i), 3.0 if i < 4 else 0.5), key=str(i)) for i in range(20)
    ]
    Path(folder, "submitted").touch()
    print([job.result(100) for job in jobs], flush=True)
"""


def test_a_driver_that_was_killed_is_started_again_and_every_job_ends_once(
    nodes: SimulatedCluster, tmp_path: Path
) -> None:
    nodes.add(num_cpus=2)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, nodes.address, str(tmp_path)]
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )

    first = start()
    work_to_do.wait_for(str(tmp_path / "submitted"), WAIT)
    while sum(words[0] == "begin" for words in work_to_do.notes(tmp_path)) < 4:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # What ran goes on without a driver; of what waited, nothing begins.
    second = start()
    printed, _ = second.communicate(timeout=WAIT)
    assert second.returncode == 0 and printed.strip().endswith(str([str(i) for i in range(20)]))
    lines = work_to_do.notes(tmp_path)
    begun, ended = (Counter(words[1] for words in lines if words[0] == word) for word in ("begin", "end"))
    assert begun == ended == {str(i): 1 for i in range(20)}
    from lightning_optcore.executor.queue import JobQueue
    from lightning_optcore.store import Store

    with Store(tmp_path / "jobs.db") as store:
        records = JobQueue(store, "default").jobs()
    assert [[one.status for one in record.attempts] for record in records] == [["done"]] * 20


def run_without_a_token(address: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["HOME"] = "/nonexistent"
    return subprocess.run(
        [sys.executable, "-c", code, address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


FOREIGN = """
import sys, pathlib
import ray
from ray._private import services
services.resolve_ip_for_localhost = lambda host: host
ray.init(sys.argv[1], _node_ip_address="127.0.0.1")
print("a job ran:", ray.get(ray.remote(pow).remote(2, 3)))
"""


def test_without_the_token_no_job_runs(calm: SimulatedCluster) -> None:
    foreign = run_without_a_token(calm.address, FOREIGN)
    assert foreign.returncode != 0 and "a job ran" not in foreign.stdout
    ours = "import sys; from lightning_optcore.executor import RayExecutor; RayExecutor(sys.argv[1])"
    refused = run_without_a_token(calm.address, ours)
    assert "the cluster wants its token: set RAY_AUTH_TOKEN" in refused.stderr
    assert os.environ["RAY_AUTH_TOKEN"] not in refused.stderr + refused.stdout


def test_it_listens_on_loopback_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code = "from lightning_optcore.executor import RayExecutor\nimport psutil, ray\n"
    code += "executor = RayExecutor(); assert executor.submit(lambda: 1).result(60) == 1\n"
    code += "mine = [p for p in psutil.Process().children(recursive=True)] + [psutil.Process()]\n"
    code += "listen = {c.laddr.ip for p in mine for c in p.net_connections() if c.status == 'LISTEN'}\n"
    code += "print('listen at', sorted(ip.removeprefix('::ffff:') for ip in listen))\n"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=False)
    assert "listen at ['127.0.0.1'" in found.stdout, found.stdout + found.stderr
    assert set(found.stdout.split("listen at ")[1].strip("[]\n").split(", ")) == {"'127.0.0.1'"}
    # It has a token of its own, that is in no file, and ends without a word.
    assert not (Path.home() / ".ray" / "auth_token").exists() and "Ray has not been started" not in found.stderr


def test_a_cluster_of_another_version_is_named(calm: SimulatedCluster) -> None:
    from ray._common.usage import usage_constants
    from ray._private import ray_constants
    from ray._raylet import GcsClient

    place = {"namespace": ray_constants.KV_NAMESPACE_CLUSTER}
    client = GcsClient(address=calm.address)
    told = json.loads(client.internal_kv_get(usage_constants.CLUSTER_METADATA_KEY, **place))
    other = json.dumps({**told, "ray_version": "2.54.0"}).encode()
    client.internal_kv_put(usage_constants.CLUSTER_METADATA_KEY, other, True, **place)
    try:
        with pytest.raises(
            ExecutorError, match=r"runs another version of Ray .*\(Ray 2\..*started with: Ray: 2\.54\.0"
        ):
            RayExecutor(calm.address)
    finally:
        client.internal_kv_put(usage_constants.CLUSTER_METADATA_KEY, json.dumps(told).encode(), True, **place)


def test_nobody_is_there_or_ray_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=r"executor\.address=127\.0\.0\.1:1: nobody listens there"):
        RayExecutor("127.0.0.1:1")
    assert time.monotonic() - began < 5
    with pytest.raises(ExecutorError, match=r"executor\.address='here': expected host:port, or auto"):
        RayExecutor("here")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match=r"needs Ray: pip install 'lightning-optcore\[cluster\]'"):
        connect("127.0.0.1:1")
    with pytest.raises(ExecutorError, match=r"needs Ray: pip install 'lightning-optcore\[cluster\]'"):
        RayExecutor()


def test_health_checks_out_of_range() -> None:
    with pytest.raises(ExecutorError, match="health_check_period_s=3"):
        RayExecutor("127.0.0.1:1", health_check_period_s=3, health_check_timeout_s=2)
