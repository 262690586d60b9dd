"""What a job costs beside its work, how several nodes share the work, and how soon a lost node is noticed.

python benchmarks/executor.py overhead      # of a job that does nothing, beside Ray's own tasks and joblib
python benchmarks/executor.py scaling       # four simulated nodes against one, jobs that sleep
python benchmarks/executor.py loss          # from the kill of a node until its job is started again
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())

import joblib
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from lightning_optcore.executor import Executor, LocalExecutor, RayExecutor
from lightning_optcore.executor.ray_connection import connect

ON_LOOPBACK = {"node_ip_address": "127.0.0.1"}


@contextmanager
def cluster(nodes: int, cpus: int = 1, **head: Any) -> Iterator[Cluster]:
    """Give a cluster of simulated nodes of so many processors; the head, if it has none, only leads."""
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **ON_LOOPBACK, **head}
    )
    for i in range(nodes):
        made.add_node(num_cpus=cpus, labels={"node_id": f"n{i}"}, **ON_LOOPBACK)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@contextmanager
def on_cluster(nodes: int) -> Iterator[tuple[Cluster, RayExecutor]]:
    """Give a cluster and an executor on it, when the agents of its nodes have answered."""
    with (
        cluster(nodes) as made,
        tempfile.TemporaryDirectory() as folder,
        RayExecutor(made.address, store=Path(folder) / "jobs.db") as executor,
    ):
        wait_for_nodes(executor, nodes)
        yield made, executor


def wait_for_nodes(executor: Executor, count: int) -> None:
    """Wait until the agents of so many nodes with processors have answered."""
    while sum(node["has"]["cpu"] > 0 and bool(node["usage"]) for node in executor.nodes()) < count:
        time.sleep(0.1)


def through(executor: Executor, work: Callable[[], Any], count: int) -> float:
    """Return the seconds from the first submission to the last result."""
    began = time.perf_counter()
    jobs = [executor.submit(work) for _ in range(count)]
    for job in jobs:
        job.result(600)
    return time.perf_counter() - began


def overhead(jobs: int, rounds: int) -> None:
    """Print the milliseconds of a job that does nothing, two at once."""
    nothing = partial(pow, 2, 2)

    @ray.remote(num_cpus=1)
    def task() -> int:
        return 4

    with cluster(0, num_cpus=2) as made, tempfile.TemporaryDirectory() as folder:
        connect(made.address)
        path = Path(folder)
        with (
            LocalExecutor({"cpu": 2}, store=path / "local.db") as local,
            RayExecutor(made.address, store=path / "ray.db") as on_ray,
            joblib.Parallel(n_jobs=2) as parallel,
        ):
            ways: dict[str, Callable[[], float]] = {
                "LocalExecutor": lambda: through(local, nothing, jobs),
                "RayExecutor": lambda: through(on_ray, nothing, jobs),
                "Ray's own tasks": lambda: timed(lambda: ray.get([task.remote() for _ in range(jobs)])),
                "joblib (loky)": lambda: timed(lambda: parallel(joblib.delayed(pow)(2, 2) for _ in range(jobs))),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for way in ways.values():
                way()  # Processes are started.
            for _ in range(rounds):
                for name, way in ways.items():
                    seconds[name].append(way())
    table = Table("", "ms a job", "least", "most", title=f"{jobs} jobs that do nothing, {rounds} rounds in turns")
    for name, taken in seconds.items():
        each = [1000 * one / jobs for one in taken]
        table.add_row(name, f"{statistics.median(each):.2f}", f"{min(each):.2f}", f"{max(each):.2f}")
    show(table)


def scaling(jobs: int, sleep: float, rounds: int) -> None:
    """Print how much sooner sleeping jobs are done on four nodes than on one."""
    work = partial(time.sleep, sleep)
    seconds: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(rounds):
        for count, taken in seconds.items():
            with on_cluster(count) as (_, executor):
                through(executor, partial(pow, 2, 2), 3 * count)  # Processes are started.
                taken.append(through(executor, work, jobs))
    table = Table("nodes", "s", "against one", title=f"{jobs} jobs of {sleep:g} s, {rounds} rounds in turns")
    one = statistics.median(seconds[1])
    for count, taken in seconds.items():
        table.add_row(str(count), f"{statistics.median(taken):.2f}", f"{one / statistics.median(taken):.2f}")
    show(table)


def loss(rounds: int) -> None:
    """Print the seconds from the loss of a node until its job begins on another one."""
    ours: dict[str, list[float]] = {"killed": [], "stopped": []}
    for way, taken in ours.items():
        for _ in range(rounds):
            with on_cluster(2) as (made, executor):
                taken.append(until_again(executor, made, way))
    table = Table("the node's processes", "s, median", "most", title="from the loss to the next start")
    for way, taken in ours.items():
        table.add_row(way, f"{statistics.median(taken):.1f}", f"{max(taken):.1f}")
    show(table)


def until_again(executor: Executor, made: Cluster, way: str) -> float:
    """Lose the node of a job that runs, and return how long it takes until the job runs again."""
    job = executor.submit(partial(time.sleep, 30))
    while job.status != "running":
        time.sleep(0.02)
    time.sleep(1.5)
    ids = {one["Labels"].get("node_id"): one["NodeID"] for one in ray.nodes() if one["Alive"]}
    (node,) = [one for one in made.worker_nodes if one.node_id == ids[job.node]]
    began = lose(made, node, way)
    while job.attempts < 2:
        time.sleep(0.02)
    passed = time.time() - began
    job.cancel()
    executor.wait([job])
    return passed


def lose(made: Cluster, node: Any, way: str) -> float:
    """Kill a node, or stop its processes as a machine does whose network is cut."""
    import psutil

    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    processes = [raylet, *raylet.children(recursive=True)]
    began = time.time()
    if way == "stopped":
        for process in processes:
            process.suspend()
    else:
        made.remove_node(node, allow_graceful=False)
    return began


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(table: Table) -> None:
    """Print a table and the versions."""
    console = Console(width=100)
    console.print(table)
    console.print(f"ray {ray.__version__}, joblib {joblib.__version__}, {os.cpu_count()} processors", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "scaling", "loss"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--sleep", type=float, default=0.5)
    given = parser.parse_args()
    logging.getLogger("lightning_optcore").setLevel(logging.ERROR)
    if given.what == "overhead":
        overhead(given.jobs, given.rounds)
    elif given.what == "scaling":
        scaling(given.jobs, given.sleep, given.rounds)
    else:
        loss(given.rounds)


if __name__ == "__main__":
    main()
