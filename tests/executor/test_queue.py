"""The queue in the store: who drives it, and that a job ends once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lightning_optcore import store_schema as tables
from lightning_optcore.executor import LocalExecutor
from lightning_optcore.executor.queue import Ended, JobQueue, queue_names
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Outcome
from lightning_optcore.executor.work import Work, WorkError, same_in_json, work_of
from lightning_optcore.store import Store, StoreError


@pytest.fixture
def queue(store_target: str) -> Iterator[JobQueue]:
    with Store(store_target) as store:
        yield JobQueue(store, "default")


def add(queue: JobQueue, key: str | None = None, **options: Any) -> int:
    values = {
        "priority": 0,
        "resources": Resources(cpu=2, labels={"a": "b"}),
        "memory_limit_bytes": None,
        "max_retries": 3,
        "timeout_s": None,
    }
    return queue.add(work_of(partial(pow, 2, 3)), key=key, **{**values, **options})[0]


def test_a_job_is_read_as_it_was_written(queue):
    number = add(queue, "key", priority=7, memory_limit_bytes=5, timeout_s=1.5)
    found = queue.job(number)
    assert found.work == Work("builtins:pow", {"call": "builtins:pow", "args": [2, 3], "kwargs": {}})
    assert (found.resources, found.memory_limit_bytes) == (Resources(cpu=2, labels={"a": "b"}), 5)
    assert (found.priority, found.timeout_s, found.key, found.status, found.attempts) == (7, 1.5, "key", "queued", ())
    with pytest.raises(StoreError, match="job 9 is not in the queue 'default'"):
        queue.job(9)
    with pytest.raises(StoreError, match="job 1 is not in the queue 'other'"):
        JobQueue(queue.store, "other").job(number)
    assert queue_names(queue.store) == ["default"]


def test_an_attempt_is_closed_once(queue):
    number = add(queue)
    assert queue.start([(number, 1, "a")]) == [number]
    assert queue.start([(number, 1, "a")]) == []
    lost = Ended(number, 1, Outcome("lost", error="node a was lost"), again=True)
    late = Ended(number, 1, Outcome("done", "1"))
    assert queue.end([lost, late]) == [lost]
    assert queue.job(number).status == "queued"
    assert queue.start([(number, 2, "b")]) == [number]
    # What comes from the node that was given up is not taken, nor is the same thing twice.
    second = Ended(number, 2, Outcome("done", "2", seconds=0.5, peak_memory_bytes=7))
    assert queue.end([late, second, second]) == [second]
    found = queue.job(number)
    assert (found.status, found.result, found.node) == ("done", 2, "b")
    assert [(one.status, one.node) for one in found.attempts] == [("lost", "a"), ("done", "b")]
    assert queue.peak_memory_bytes("builtins:pow") == [7] and queue.counts() == {"done": 1}


def test_many_threads_close_an_attempt_once(queue):
    number = add(queue)
    queue.start([(number, 1, "a")])
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda i: queue.end([Ended(number, 1, Outcome("done", str(i)))]), range(8)))
    (winner,) = [one for ones in taken for one in ones]
    assert str(queue.job(number).result) == winner.outcome.stored


def test_many_threads_submit_one_key_once(queue):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: add(queue, "same"), range(8)))) == 1


def test_a_job_that_was_cancelled_does_not_start(queue):
    first, second = add(queue), add(queue)
    queue.request_cancel(first)
    assert queue.start([(first, 1, "a"), (second, 1, "a")]) == [second]
    assert queue.job(first).status == "cancelled" and queue.to_cancel() == []
    queue.request_cancel(second)
    assert queue.to_cancel() == [second] and queue.job(second).status == "running"


def test_one_living_process_drives(queue, store_target):
    assert queue.lead("local") and not queue.lead("local")
    assert queue.seen([{"name": "a"}])
    driver = queue.driver()
    assert driver is not None and driver.is_alive and driver.is_this_process and driver.nodes == [{"name": "a"}]
    queue.leave()
    assert queue.driver() is None
    # A process that drives and is killed leaves its row.
    code = "import sys, os; from lightning_optcore.store import Store\n"
    code += "from lightning_optcore.executor.queue import JobQueue\n"
    code += "assert JobQueue(Store(sys.argv[1]), 'default').lead('local'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, store_target], check=False, timeout=60)
    dead = queue.driver()
    assert dead is not None and not dead.is_alive and dead.pid != os.getpid()
    assert queue.lead("ray") and queue.driver().executor == "ray"


def test_one_of_another_machine_is_dead_when_it_is_silent(queue):
    queue.lead("ray")
    table = tables.job_queues
    for seconds, alive in ((1, True), (60, False)):
        seen = (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()
        with queue.store.writing() as connection:
            connection.execute(sa.update(table).values(host="elsewhere", seen_at=seen))
        assert queue.driver().is_alive is alive
        # Whoever was given up may not go on.
        assert not queue.seen([])
        assert queue.lead("local") is not alive


def test_what_has_a_name_is_told_by_name():
    assert work_of(os.getpid).named == {"call": "posix:getpid", "args": [], "kwargs": {}}
    assert work_of(partial(Path.exists, "x")).kind == "pathlib:Path.exists"
    assert work_of(partial(pow, 2), kind="mine").kind == "mine"
    for nameless in (lambda: 1, partial(pow, (1,)), partial(pow, Path()), Path().exists, partial(pow, {1: 2})):
        work = work_of(nameless)
        assert work.named is None and work.pickled
    assert work_of(lambda: 7).load()() == 7
    with pytest.raises(WorkError, match="cannot be sent to a worker"):
        work_of(partial(pow, __import__("threading").Lock()))
    for refused in (3, [], [1, 2], None):
        with pytest.raises(WorkError, match="expected a function"):
            work_of(refused)  # type: ignore[arg-type]


def test_what_json_would_change():
    for kept in (None, 1, 1.5, "a", [1, [2]], {"a": {"b": []}}):
        assert same_in_json(kept)
    for changed in ((1,), [(1,)], {"a": (1,)}, {1: 2}, float("nan"), Path(), {"a": {1: 1}}):
        assert not same_in_json(changed)


def test_the_kind_of_a_command_is_its_job_and_groups():
    words = ["train", "model=cnn", "data=digits", "model.width=8", "trainer.max_epochs=3", "--config-name=x"]
    assert work_of(words).kind == "train model=cnn data=digits --config-name=x"


def test_several_machines_take_jobs_off_one_server(postgresql, tmp_path):
    """Drivers on a server take turns: what one began, the next one ends, and each job ends once."""
    code = "import sys, time, functools; from lightning_optcore.executor import LocalExecutor\n"
    code += "with LocalExecutor({'cpu': 2}, store=sys.argv[1]) as executor:\n"
    code += "    jobs = [executor.submit(functools.partial(pow, 2, i), key=str(i)) for i in range(30)]\n"
    code += "    assert [job.result(100) for job in jobs] == [2**i for i in range(30)]\n"
    programs = [subprocess.Popen([sys.executable, "-c", code, postgresql]) for _ in range(3)]
    assert [program.wait(120) for program in programs] == [0, 0, 0]
    with Store(postgresql) as store:
        records = JobQueue(store, "default").jobs()
    assert [(one.status, len(one.attempts), one.result) for one in records] == [
        ("done", 1, 2 ** int(one.key)) for one in records
    ]
    assert len(records) == 30


def test_a_password_is_not_kept(tmp_path):
    with LocalExecutor({"cpu": 1}, store=tmp_path / "jobs.db") as executor:
        with pytest.raises(WorkError, match=r"holds a password, .*PGPASSWORD"):
            executor.submit(["train", "store.path=postgresql://me:secret@host/runs"])
        with pytest.raises(WorkError, match=r"holds a password"):
            executor.submit(partial(print, "postgresql://me:secret@host/runs"))
        assert executor.jobs() == []
