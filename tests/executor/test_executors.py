"""What every executor does alike: one suite for processes of this machine and for a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import work_to_do
from clusters import with_token

from lightning_optcore.executor import (
    Executor,
    ExecutorError,
    JobCancelledError,
    JobFailedError,
    JobHandle,
    JobOutOfMemoryError,
    JobTimeoutError,
    LocalExecutor,
    RayExecutor,
    Resources,
    ResourcesError,
    WorkError,
)
from lightning_optcore.executor.work import Work
from lightning_optcore.store import Store, StoreError

pytestmark = pytest.mark.xdist_group("ray")
WAIT = 90
MakeExecutor = Callable[..., Executor]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One Ray of two processors for all tests of this file: executors find it started."""
    with_token()
    import ray

    from lightning_optcore.executor import ray_connection

    ray_connection.connect(None)
    yield
    ray.shutdown()


@pytest.fixture(params=["local", "ray"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeExecutor]:
    if request.param == "ray":
        request.getfixturevalue("ray_here")
    made: list[Executor] = []

    def executor(**options: Any) -> Executor:
        options = {"store": tmp_path / "jobs.db", **options}
        if request.param == "local":
            made.append(LocalExecutor({"cpu": 2, "labels": {"role": "trainer"}}, **options))
        else:
            # "auto" leaves the Ray of this file running when the executor is closed.
            made.append(RayExecutor("auto", **options))
        return made[-1]

    yield executor
    for one in made:
        one.close()


def test_results_come_back_as_they_were(make: MakeExecutor) -> None:
    executor = make()
    jobs = [executor.submit(partial(pow, 2, power)) for power in range(20)]
    assert [job.result(WAIT) for job in jobs] == [2**power for power in range(20)]
    # JSON has no word for these, and no name leads to the function.
    assert executor.submit(lambda: (1, {2: Path("a")})).result(WAIT) == (1, {2: Path("a")})
    first = jobs[0]
    assert (first.status, first.attempts) == ("done", 1) and first.node
    assert executor.wait(jobs) == []


def test_an_error_names_job_and_node_and_where_it_was_raised(make: MakeExecutor) -> None:
    job = make().submit(work_to_do.fail)
    with pytest.raises(
        JobFailedError, match=r"(?s)job 1 \(work_to_do:fail\) failed on .*ValueError: no good.*def|raise"
    ):
        job.result(WAIT)
    assert job.attempts == 1


def test_the_more_urgent_ones_first_and_equal_ones_in_order(make: MakeExecutor, tmp_path: Path) -> None:
    executor = make()
    gate = str(tmp_path / "gate")
    executor.submit(partial(work_to_do.wait_for, gate), resources={"cpu": 2})
    priorities = [0, 3, 1, 3, 2]
    jobs = [
        executor.submit(partial(work_to_do.note, str(tmp_path), str(i)), priority=priority, resources={"cpu": 2})
        for i, priority in enumerate(priorities)
    ]
    Path(gate).touch()
    executor.wait(jobs, WAIT)
    begun = [words[1] for words in work_to_do.notes(tmp_path) if words[0] == "begin"]
    assert begun == ["1", "3", "4", "2", "0"]


def test_what_fits_does_not_wait_for_what_does_not(make: MakeExecutor, tmp_path: Path) -> None:
    executor = make()
    gate = str(tmp_path / "gate")
    holds = executor.submit(partial(work_to_do.wait_for, gate))
    while holds.status != "running":
        time.sleep(0.05)
    large = executor.submit(partial(work_to_do.note, str(tmp_path), "large"), priority=5, resources={"cpu": 2})
    small = executor.submit(partial(work_to_do.note, str(tmp_path), "small"))
    assert small.result(WAIT) == "small" and large.status == "queued"
    Path(gate).touch()
    assert large.result(WAIT) == "large"


def test_a_node_is_kept_for_the_one_that_waits_long(make: MakeExecutor, tmp_path: Path) -> None:
    executor = make(scheduling={"reserve_after_s": 0.3})
    gate = str(tmp_path / "gate")
    holds = executor.submit(partial(work_to_do.wait_for, gate))
    while holds.status != "running":
        time.sleep(0.05)
    large = executor.submit(partial(work_to_do.note, str(tmp_path), "large"), resources={"cpu": 2})
    time.sleep(1.0)
    small = executor.submit(partial(work_to_do.note, str(tmp_path), "small"), priority=-1)
    time.sleep(0.5)
    assert small.status == "queued"
    Path(gate).touch()
    executor.wait([large, small], WAIT)
    assert [words[1] for words in work_to_do.notes(tmp_path) if words[0] == "begin"] == ["large", "small"]


def test_a_running_job_is_cancelled_with_its_children(make: MakeExecutor, tmp_path: Path) -> None:
    executor = make()
    begun = tmp_path / "begun"
    job = executor.submit(partial(work_to_do.hold, str(begun), str(tmp_path / "never")))
    work_to_do.wait_for(str(begun), WAIT)
    time.sleep(0.1)
    processes = [psutil.Process(int(pid)) for pid in begun.read_text().split()]
    job.cancel()
    with pytest.raises(JobCancelledError, match=r"cancelled on .*: it was cancelled"):
        job.result(WAIT)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)
    job.cancel()
    assert job.status == "cancelled"
    # Its place is free again.
    assert executor.submit(partial(pow, 2, 2), resources={"cpu": 2}).result(WAIT) == 4


def test_a_waiting_job_is_cancelled(make: MakeExecutor, tmp_path: Path) -> None:
    executor = make()
    gate = str(tmp_path / "gate")
    executor.submit(partial(work_to_do.wait_for, gate), resources={"cpu": 2})
    waits = executor.submit(partial(work_to_do.note, str(tmp_path), "never"), resources={"cpu": 2})
    waits.cancel()
    with pytest.raises(JobCancelledError):
        waits.result(WAIT)
    Path(gate).touch()
    assert executor.submit(partial(pow, 2, 2), resources={"cpu": 2}).result(WAIT) == 4
    assert waits.attempts == 0 and not work_to_do.notes(tmp_path)


def test_time_and_memory_that_run_out_are_told_apart(make: MakeExecutor) -> None:
    executor = make()
    slow = executor.submit(partial(time.sleep, 60), timeout_s=1.0)
    large = executor.submit(partial(work_to_do.fill, 900), resources={"memory_bytes": 400 * 2**20})
    too_large = executor.submit(partial(bytearray, 10**15))
    with pytest.raises(JobTimeoutError, match=r"timed out on .*timeout_s=1"):
        slow.result(WAIT)
    with pytest.raises(JobOutOfMemoryError, match=r"resources.memory_bytes=419430400"):
        large.result(WAIT)
    with pytest.raises(JobOutOfMemoryError, match=r"MemoryError"):
        too_large.result(WAIT)
    assert [job.attempts for job in (slow, large, too_large)] == [1, 1, 1]


def test_a_process_that_dies_is_no_result_and_no_lost_node(make: MakeExecutor) -> None:
    job = make().submit(partial(work_to_do.end_process, 3))
    with pytest.raises(JobFailedError, match=r"its process"):
        job.result(WAIT)
    assert job.attempts == 1


def test_more_than_any_node_has_is_said_at_once(make: MakeExecutor) -> None:
    executor = make()
    for resources, missing in (
        ({"cpu": 300}, r"no node has cpu=300; the nearest of 1, .*, has cpu=2"),
        ({"memory_bytes": 10**15}, r"no node has memory_bytes=1e\+15"),
        ({"gpu": 1}, r"no node has gpu=1"),
        ({"labels": {"role": "poet"}}, r"no node has labels\.role=poet"),
        ({"disk": 1}, r"resources\.disk=1: unknown; expected cpu, memory_bytes, gpu or labels"),
        ({"cpu": -1}, r"resources\.cpu=-1: expected a number, 0 or more"),
    ):
        with pytest.raises(ResourcesError, match=missing):
            executor.submit(partial(pow, 2, 2), resources=resources)
    assert executor.jobs() == []


def test_wrong_words_are_refused(make: MakeExecutor) -> None:
    executor = make()
    with pytest.raises(WorkError, match=r"expected a function, or the words of a command"):
        executor.submit(7)  # type: ignore[arg-type]
    with pytest.raises(WorkError, match=r"'train': expected a function, or the words of a command"):
        executor.submit("train")
    with pytest.raises(ExecutorError, match=r"max_retries='two': expected a whole number"):
        executor.submit(work_to_do.fail, max_retries="two")  # type: ignore[arg-type]
    with pytest.raises(ExecutorError, match=r"timeout_s=0"):
        executor.submit(work_to_do.fail, timeout_s=0)
    with pytest.raises(ExecutorError, match=r"priority=1.5: expected a whole number"):
        executor.submit(work_to_do.fail, priority=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scheduling.algorithm='magic': expected priority_based or fifo"):
        make(queue="other", scheduling={"algorithm": "magic"})


def test_code_that_is_not_there(make: MakeExecutor) -> None:
    executor = make()
    missing = Work("not_here:work", {"call": "not_here:work", "args": [], "kwargs": {}})
    number, _ = executor.queue.add(
        missing,
        key=None,
        priority=0,
        resources=Resources(),
        memory_limit_bytes=None,
        max_retries=3,
        timeout_s=None,
    )
    with pytest.raises(JobFailedError, match=r"its code cannot be imported here: .*No module named 'not_here'"):
        JobHandle(executor, number).result(WAIT)


def test_a_key_makes_it_the_same_job(make: MakeExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    executor = make()
    again = [executor.submit(partial(work_to_do.note, str(tmp_path), "once"), key="a") for _ in range(3)]
    assert len({job.id for job in again}) == 1
    assert again[2].result(WAIT) == "once"
    assert executor.submit(partial(work_to_do.note, str(tmp_path), "once"), key="a").result(WAIT) == "once"
    assert len(work_to_do.notes(tmp_path)) == 2
    assert "key=" not in caplog.text
    executor.submit(partial(work_to_do.note, str(tmp_path), "other"), key="a")
    assert "key='a' is that of job 1 (work_to_do:note), which runs other work: that one is kept" in caplog.text


def test_what_a_kind_needs_is_learnt(make: MakeExecutor) -> None:
    executor = make()
    executor.submit(partial(work_to_do.fill, 300, 0.0)).result(WAIT)
    job = executor.submit(partial(work_to_do.fill, 10, 0.0))
    # The kind's worst, with room; and no limit, as nobody gave one.
    assert 300 * 2**20 < job.record.resources.memory_bytes < 900 * 2**20
    assert job.record.memory_limit_bytes is None
    assert job.result(WAIT) == 10 * 2**20


def test_threads_are_those_that_were_asked_for(make: MakeExecutor) -> None:
    executor = make()
    counts = [executor.submit(work_to_do.threads, resources={"cpu": cpu}).result(WAIT)[0] for cpu in (1, 2)]
    assert counts == ["1", "2"]


def test_a_command_runs_in_a_process_of_its_own(make: MakeExecutor, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    executor = make()
    words = ["train", "model.width=4", "model.depth=1", "trainer=cpu", "trainer.max_epochs=1", "report.enabled=false"]
    words += ["measure.rounds=3", "store.path=jobs.db"]
    good, bad = executor.submit(words), executor.submit(["train", "model.widht=4"])
    with pytest.raises(JobFailedError, match=r"(?s)exit code 1.*widht"):
        bad.result(WAIT)
    runs = good.result(2 * WAIT)["runs"]
    with Store(tmp_path / "jobs.db") as store:
        assert [store.run(run).status for run in runs] == ["done"]
    assert good.record.attempts[0].peak_memory_bytes > 200 * 2**20


def test_the_next_driver_finds_what_waited_and_what_ran(make: MakeExecutor, tmp_path: Path) -> None:
    gate, begun = str(tmp_path / "gate"), tmp_path / "begun"
    first = make()
    ended = first.submit(partial(pow, 2, 3))
    assert ended.result(WAIT) == 8
    runs = first.submit(partial(work_to_do.hold, str(begun), gate), resources={"cpu": 2})
    waits = first.submit(partial(work_to_do.note, str(tmp_path), "waits"), resources={"cpu": 2})
    nameless = first.submit(lambda: 1, resources={"cpu": 2})
    work_to_do.wait_for(str(begun), WAIT)
    first.close()
    Path(gate).touch()
    second = make()
    found = {job.id: job for job in second.jobs()}
    assert found[waits.id].result(WAIT) == "waits"
    assert isinstance(found[runs.id].result(WAIT), int) and found[runs.id].attempts == 2
    assert (found[ended.id].result(), found[ended.id].attempts) == (8, 1)
    assert found[nameless.id].status == "lost" and "in the memory of" in str(found[nameless.id].record.error)


def test_two_executors_of_one_queue_have_one_driver(make: MakeExecutor, tmp_path: Path) -> None:
    driver, other = make(), make()
    assert driver.driver is not None and other.driver is None
    assert other.submit(partial(pow, 2, 5)).result(WAIT) == 32
    slow = other.submit(partial(time.sleep, 60))
    while slow.status != "running":
        time.sleep(0.05)
    slow.cancel()
    with pytest.raises(JobCancelledError):
        slow.result(WAIT)
    with pytest.raises(ExecutorError, match=r"not driven by this process, and no other one can be handed"):
        other.submit(lambda: 1)


def test_leaving_the_block_waits_and_a_closed_one_takes_nothing(make: MakeExecutor, tmp_path: Path) -> None:
    with make() as executor:
        job = executor.submit(partial(work_to_do.note, str(tmp_path), "a", 0.5))
    assert len(work_to_do.notes(tmp_path)) == 2
    with pytest.raises(ExecutorError, match=r"this executor is closed"):
        executor.submit(work_to_do.fail)
    with make() as again:
        assert {one.id: one.status for one in again.jobs()} == {job.id: "done"}


def test_nodes_tell_what_they_have_and_did(make: MakeExecutor) -> None:
    executor = make()
    executor.wait([executor.submit(partial(pow, 2, 2)) for _ in range(3)], WAIT)
    executor.wait([executor.submit(work_to_do.fail)], WAIT)
    time.sleep(0.8)
    (node,) = executor.nodes()
    assert (node["finished"], node["failed"], node["lost"], node["running"]) == (3, 1, 0, 0)
    assert node["has"]["cpu"] == 2 and 0 < node["usage"]["memory_percent"] < 100 and node["per_minute"] == 3


def test_a_store_that_cannot_be_written_for_a_while_loses_nothing(tmp_path: Path) -> None:
    """Another program holds the file: every write fails until it lets go."""
    with LocalExecutor({"cpu": 1}, store=tmp_path / "jobs.db") as executor:
        job = executor.submit(partial(work_to_do.note, str(tmp_path), "a", 1.0))
        while not work_to_do.notes(tmp_path):
            time.sleep(0.02)
        refuse = executor.store.writing

        @contextmanager
        def refused(**options: Any) -> Iterator[Any]:
            raise StoreError("the disk is full")
            yield

        executor.store.writing = refused  # type: ignore[method-assign]
        time.sleep(2.0)
        executor.store.writing = refuse  # type: ignore[method-assign]
        assert job.result(WAIT) == "a" and job.attempts == 1
        assert executor.submit(partial(pow, 2, 2)).result(WAIT) == 4


def test_what_no_node_can_hold_is_told_by_the_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LocalExecutor(store=tmp_path / "jobs.db", drive=False) as nobody:
        nobody.submit(partial(pow, 2, 2), resources={"cpu": 64})
        nobody._submitted.clear()
    with LocalExecutor({"cpu": 1}, store=tmp_path / "jobs.db") as executor:
        (job,) = executor.jobs()
        assert executor.wait([job], 1.0) == [job]
        assert "job 1 (builtins:pow) waits until there is a node for it: resources: no node has cpu=64" in caplog.text
        job.cancel()
