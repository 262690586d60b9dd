"""``optcore submit`` and ``optcore jobs``, with real commands and real processes."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import warm

from lightning_optcore import cli
from lightning_optcore.executor import LocalExecutor
from lightning_optcore.executor.queue import JobQueue, JobRecord
from lightning_optcore.jobs.submit import SUBMITTED
from lightning_optcore.store import Store

SMALL = "overrides=[model=mlp,trainer.max_epochs=1,report.enabled=false,measure.rounds=3,logger=none]"
# So that nothing is estimated: it takes seconds.
GIVEN = "resources={memory_bytes:3000000000}"


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "outputs" / "optcore.db"


def jobs_of(store: Path) -> list[JobRecord]:
    if not store.exists():
        return []
    with Store(store) as opened:
        return JobQueue(opened, "default").jobs()


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def handed_in(store: Path, *several: partial) -> None:
    """Hand functions in, which nobody drives yet."""
    executor = LocalExecutor(store=store, drive=False)
    for one in several:
        executor.submit(one, resources={"cpu": 1})
    executor.close()


def started(tmp_path: Path, *words: str) -> warm.Running:
    command = [sys.executable, "-m", "lightning_optcore.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return warm.Running(command, cwd=tmp_path, env=environment, stdout=tmp_path / "out", stderr=tmp_path / "err")


def test_a_command_runs_and_its_needs_were_told_before(optcore, store):
    done = optcore("submit", "job=train", SMALL, "priority=5")
    assert done.returncode == 0, done.stderr
    (record,) = jobs_of(store)
    assert record.status == "done"
    assert record.priority == 5
    assert record.result["runs"] == [1], "the runs are in the store of the queue"
    assert "its runs: 1" in done.stdout
    assert record.work.named["command"][-1] == f"store.path={store}"
    measured, told = record.attempts[0].peak_memory_bytes, record.resources.memory_bytes
    assert measured <= told <= 2 * measured
    assert record.memory_limit_bytes is None, "an estimate is no limit"
    shown = optcore("jobs", "show=1").stdout
    assert "train model=mlp" in shown
    assert "attempts" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["overrides=[model.widht=8]"], "overrides: Could not override 'model.widht'"),
        (["overrides=[model=nonesuch]"], "overrides: In 'train': Could not find 'model/nonesuch'"),
        (["overrides=model.widht=8"], "overrides: Could not override 'model.widht'"),
        (["overrides=7"], "overrides=7: expected a list"),
        (["job=trian"], "job=trian: expected one of train, adapt"),
        (["job=submit"], "job=submit: expected one of train, adapt"),
        (["wait=maybe"], "wait='maybe': expected true or false"),
        (["store.path=null"], "store.path=null: jobs are kept in a store"),
        (["executor.store=mine.db"], "give store.path=mine.db"),
        ([GIVEN, "priority=soon"], "priority='soon': expected a whole number"),
        (["resources={cores:2}"], "resources.cores=2: unknown; expected cpu, memory_bytes, gpu or labels"),
        (["resources={cpu:1000,memory_bytes:1}"], "no node has cpu=1000"),
    ],
)
def test_what_is_wrong_is_told_at_submit(optcore, store, words, message):
    done = optcore("submit", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert jobs_of(store) == []


def test_a_job_that_fails_fails_the_command(optcore, store):
    done = optcore("submit", "job=report", "overrides=[limit=many]", GIVEN, "max_retries=0")
    assert done.returncode == 1
    assert "limit" in done.stdout, "what the job printed"
    assert "optcore submit: job 1 (report) failed on local" in done.stderr
    assert jobs_of(store)[0].status == "failed"


def test_handed_in_only_it_waits_and_can_be_cancelled(optcore, store):
    done = optcore("submit", "job=report", "wait=false", GIVEN, "key=mine", "executor.queue=default")
    assert done.returncode == 0, done.stderr
    assert "driven by nobody; start one: `optcore jobs serve=true executor.queue=default`" in done.stdout
    again = optcore("submit", "job=report", "wait=false", GIVEN, "key=mine")
    assert "job 1:" in again.stdout, "the same key is the same job"
    (record,) = jobs_of(store)
    assert record.status == "queued"
    table = optcore("jobs").stdout
    assert "report" in table
    assert "queue default: 1 queued; driven by nobody" in table
    unknown = optcore("jobs", "cancel=[1,7]")
    assert unknown.returncode == 1
    assert unknown.stderr.splitlines()[1] == "optcore jobs: job 7 is not in the queue 'default'"
    assert jobs_of(store)[0].status == "queued", "all are known, or none is cancelled"
    assert optcore("jobs", "cancel=[1]").stdout == "job 1 is cancelled\n"
    assert optcore("jobs", "cancel=1").stdout == "job 1 has ended already: cancelled\n"
    for words, message in (
        (["show=3"], "job 3 is not in the queue"),
        (["show=three"], "show=three: expected the number of a job"),
        (["queue=other"], "queue=other: not in this store; it has default"),
        (["drain=true"], "drain=true: expected with serve=true"),
        (["store.path=elsewhere.db"], "store.path=elsewhere.db: no such file"),
    ):
        assert message in optcore("jobs", *words).stderr


def test_interrupted_while_it_drives_the_job_waits_again(tmp_path, store):
    submitting = started(tmp_path, "submit", "job=train", "overrides=[trainer.max_epochs=1000]", GIVEN)
    until(lambda: [record.status for record in jobs_of(store)] == ["running"])
    submitting.send_signal(signal.SIGINT)
    assert submitting.wait(60) == 130
    (record,) = jobs_of(store)
    assert (record.status, record.attempts[0].status) == ("queued", "interrupted")
    assert "waits again; `optcore jobs serve=true`" in (tmp_path / "out").read_text()


def test_a_driver_that_is_killed_and_started_again_finds_its_jobs(tmp_path, store, optcore):
    handed_in(store, *(partial(time.sleep, 2) for _ in range(3)))
    first = started(tmp_path, "jobs", "serve=true", "executor.resources={cpu: 1}")
    until(lambda: "running" in {record.status for record in jobs_of(store)})
    assert "driven by local" in optcore("jobs").stdout
    second = optcore("jobs", "serve=true")
    assert second.returncode == 1
    assert "queue default is driven by local" in second.stderr
    first.kill()
    first.wait(30)
    done = optcore("jobs", "serve=true", "drain=true", "executor.resources={cpu: 1}")
    assert done.returncode == 0, done.stderr
    assert "queue default: 3 done" in done.stdout
    assert max(len(record.attempts) for record in jobs_of(store)) == 2, "one was interrupted"


def test_a_job_is_handed_to_the_process_that_drives(tmp_path, store, optcore):
    handed_in(store, partial(time.sleep, 0))
    serving = started(tmp_path, "jobs", "serve=true")
    until(lambda: jobs_of(store)[0].status == "done")
    waiting = optcore("submit", "job=report", "wait=false", GIVEN)
    assert "queue default, driven by local on" in waiting.stdout
    assert "start one" not in waiting.stdout
    too_large = optcore("submit", "job=report", "resources={cpu:1000,memory_bytes:1}")
    assert "no node has cpu=1000" in too_large.stderr
    done = optcore("submit", "job=report", GIVEN)
    assert done.returncode == 0, done.stderr
    assert [record.status for record in jobs_of(store)] == ["done"] * 3
    serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 130


def test_a_job_goes_on_here_when_its_driver_dies(tmp_path, store):
    handed_in(store, partial(time.sleep, 30))
    serving = started(tmp_path, "jobs", "serve=true", "executor.resources={cpu: 1}")
    until(lambda: jobs_of(store)[0].status == "running")
    submitting = started(tmp_path, "submit", "job=report", "priority=1", GIVEN, "executor.resources={cpu: 1}")
    until(lambda: len(jobs_of(store)) == 2)
    serving.kill()
    until(lambda: jobs_of(store)[1].status == "done", 90)
    with Store(store) as opened:
        JobQueue(opened, "default").request_cancel(1)
    assert submitting.wait(60) == 0


def test_jobs_of_others_that_run_here_come_to_their_end(store):
    executor = LocalExecutor({"cpu": 1}, store=store)
    first = executor.submit(partial(time.sleep, 1.5))
    until(lambda: first.status == "running")
    second = executor.submit(partial(time.sleep, 0))
    executor.wind_down()
    assert (first.status, second.status) == ("done", "queued")
    executor.close()
    assert [record.status for record in jobs_of(store)] == ["done", "queued"], "it waits for the next driver"


@pytest.mark.parametrize("words", [["resources={cpu:64}"], ["priority=high", GIVEN]])
def test_one_that_is_refused_costs_others_nothing(optcore, store, words):
    handed_in(store, partial(time.sleep, 1.5))
    assert optcore("submit", "job=report", *words).returncode == 1
    (other,) = jobs_of(store)
    # Where it was driven at all, it was not interrupted.
    assert [one.status for one in other.attempts] in ([], ["done"]) and other.status in ("queued", "done")


def test_on_a_terminal_the_tables_are_alone(tmp_path, store):
    handed_in(store, partial(print, "said by the job"), partial(time.sleep, 1))
    command = [sys.executable, "-m", "lightning_optcore.cli", "jobs", "serve=true", "drain=true"]
    # As a terminal shows it.
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(command[0], command, {**os.environ, "COLUMNS": "150", "LINES": "40"})
    seen = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    shown = seen.decode()
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).rstrip().splitlines()[-1].startswith("queue default: 2 done")
    assert "said by the job" not in shown
    assert "said by the job" in (tmp_path / "outputs" / "job_output.log").read_text()


def test_a_password_does_not_go_into_the_store(optcore, tmp_path):
    done = optcore("submit", "job=report", "store.path='sqlite://me:secret@/x'", "wait=false")
    assert done.returncode == 1
    assert "secret" not in done.stderr.splitlines()[-1]


def test_what_can_be_submitted_are_jobs():
    assert set(SUBMITTED) < set(cli.JOBS)
