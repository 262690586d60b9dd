from __future__ import annotations

import math
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from lightning_optcore import Recipe, Store
from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store import StoreError
from lightning_optcore.sweeps.journal import Journal

WRITER = Path(__file__).parent / "store_writer.py"
RECIPE = Recipe().then("post_training_quantization", scheme="static").to_dict()


@pytest.fixture
def store(store_target):
    with Store(store_target) as opened:
        yield opened


def test_a_run_round_trips(store, make_measurement):
    parent = store.start("train")
    run_id = store.start(
        "train",
        overrides=["model.width=8"],
        config={"model": {"width": 8}},
        model_fingerprint="m",
        hardware_fingerprint="h",
        seed=3,
        parent=parent,
        directory="outputs/1",
    )
    store.update(run_id, data_fingerprint="d", recipe=RECIPE)
    store.add_measurement(run_id, "before", make_measurement(params=11))
    store.add_measurement(run_id, "after", make_measurement())
    store.finish(run_id)
    run = store.run(run_id)
    assert (run.status, run.seed, run.parent, run.pid) == ("done", 3, parent, os.getpid())
    assert (run.model_fingerprint, run.data_fingerprint, run.hardware_fingerprint) == ("m", "d", "h")
    assert run.overrides == ["model.width=8"]
    assert run.config == {"model": {"width": 8}}
    assert run.recipe == RECIPE
    assert run.measurements == {"before": make_measurement(params=11), "after": make_measurement()}
    assert run.objectives["params"] == 10
    assert run.finished_at >= run.created_at


def test_a_measurement_of_the_same_role_is_replaced(store, make_measurement):
    run_id = store.start("train")
    store.add_measurement(run_id, "after", make_measurement(quality={"old": 1.0}))
    store.add_measurement(run_id, "after", make_measurement(params=5))
    assert store.run(run_id).objectives["params"] == 5
    assert store.history("old") == []


def test_curves_keep_nan_and_infinity(store):
    run_id = store.start("train")
    for step, value in enumerate([1.5, math.nan, math.inf, -math.inf]):
        store.log_curve(run_id, step, 0, {"val/loss": value})
    values = [value for _, value in store.curves(run_id)["val/loss"]]
    assert values[0] == 1.5
    assert math.isnan(values[1])
    assert values[2:] == [math.inf, -math.inf]


def test_failures_and_interruptions_are_kept(store):
    failed, broken_off, running = (store.start("train") for _ in range(3))
    store.finish(failed, "failed", error="ValueError: lr")
    store.finish(broken_off, "interrupted")
    assert store.run(failed).error == "ValueError: lr"
    assert [run.id for run in store.runs(status="interrupted")] == [broken_off]
    assert [run.id for run in store.runs(status="running")] == [running]


def test_queries(store, make_measurement):
    ids = []
    for width, job in ((8, "train"), (16, "train"), (8, "measure")):
        run_id = store.start(job, model_fingerprint=f"m{width}", data_fingerprint="d")
        store.add_measurement(run_id, "after", make_measurement(params=width))
        if width == 16:
            store.update(run_id, recipe=RECIPE)
        store.finish(run_id)
        ids.append(run_id)
    assert [run.id for run in store.by_fingerprint(model="m8")] == [ids[2], ids[0]]
    assert store.by_fingerprint(model="m8", data="other") == []
    reordered = dict(reversed(RECIPE.items()))
    assert [run.id for run in store.by_recipe(reordered)] == [ids[1]]
    assert [(run.id, value) for run, value in store.history("params", job="train")] == [
        (ids[0], 8.0),
        (ids[1], 16.0),
    ]
    assert [run.id for run in store.runs(limit=1)] == [ids[2]]


def test_the_pareto_front_equals_brute_force(store, make_measurement):
    rng = random.Random(0)
    points = {}
    for _ in range(40):
        acc, params = rng.randrange(12) / 12, rng.randrange(12)
        run_id = store.start("train")
        store.add_measurement(run_id, "after", make_measurement(params=params, quality={"val/acc": acc}))
        store.finish(run_id)
        points[run_id] = (-acc, params)
    expected = {
        run_id
        for run_id, p in points.items()
        if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.values())
    }
    front = store.pareto_front(["val/acc", "params"])
    assert {run.id for run in front} == expected
    explicit = store.pareto_front({"val/acc": "maximize", "params": "minimize"})
    assert [run.id for run in explicit] == [run.id for run in front]


def test_a_diverged_run_is_not_on_the_front(store, make_measurement):
    run_id = store.start("train")
    store.add_measurement(run_id, "after", make_measurement(quality={"val/loss": math.nan}))
    store.finish(run_id)
    assert store.pareto_front(["val/loss", "params"]) == []
    assert store.history("val/loss") == []


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda store: store.run(7), "run 7 is not in"),
        (lambda store: store.start("train", parent=7), "run 7 is not in"),
        (lambda store: store.finish(7), "run 7 is not in"),
        (lambda store: store.finish(store.start("train"), "finished"), "status='finished': expected one of"),
    ],
)
def test_wrong_use_is_named(store, act, message):
    with pytest.raises(StoreError, match=message):
        act(store)


def test_a_newer_schema_is_refused(store_target):
    with Store(store_target) as store, store.writing() as connection:
        connection.execute(sa.text("UPDATE schema_version SET version = 99"))
    with pytest.raises(StoreError, match=r"version 99.*upgrade lightning-optcore"):
        Store(store_target)


def test_opening_again_keeps_what_is_there(store_target):
    with Store(store_target) as store:
        run_id = store.start("train")
    url = store_target if "://" in store_target else f"sqlite:///{store_target}"
    with Store(url) as store:
        assert store.run(run_id).job == "train"


def test_a_store_of_an_older_schema_is_brought_forward_with_what_it_holds(store_target, tmp_path):
    with Store(store_target) as store:
        journal = Journal(store)
        sweep_id = journal.begin("python", str(tmp_path), {}, ["minimize"])
        journal.add_batch(sweep_id, 1, 0, [(Candidate(0, {"x": 1}), []), (Candidate(1, {"x": 2}), [])], {})
    with Store(store_target) as store, store.writing() as connection:
        for table in ("job_attempts", "jobs", "job_queues"):
            connection.execute(sa.text(f"DROP TABLE {table}"))
        connection.execute(sa.text("ALTER TABLE trials DROP COLUMN violation"))
        connection.execute(sa.text("UPDATE schema_version SET version = 4"))
    with Store(store_target) as store:
        journal = Journal(store)
        first, second = journal.trials(sweep_id)
        journal.end_trial(first, [1.0], "flops 3 over its limit 2", status="done", violation=0.5)
        journal.end_trial(second, [1.0])
        first, second = journal.trials(sweep_id)
        assert (first.violation, first.feasible, second.violation, second.feasible) == (0.5, False, 0.0, True)


# Of SQLite alone: folders, damaged files, full disks and open files are a server's own affair.


def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(StoreError, match=r"store.path=/dev/null/optcore.db: .*store.path=null"):
        Store("/dev/null/optcore.db")


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "optcore.db"
    path.write_text("notes of mine, long enough to be no empty file" * 30)
    with pytest.raises(StoreError, match="no SQLite file or was damaged"):
        Store(path)
    assert path.read_text().startswith("notes of mine")


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    path = tmp_path / "optcore.db"
    with Store(path) as store:
        kept = store.start("train")
        limit = sa.event.listens_for(store._database._engine, "connect")
        limit(lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
        with pytest.raises(StoreError, match=r"full; make room on the disk"):
            store.start("train", config={"text": "x" * 1_000_000})
    with Store(path) as store:
        assert [run.id for run in store.runs()] == [kept]


def test_eight_processes_open_a_new_store_at_once(store_target):
    code = "import sys; from lightning_optcore.store import Store; Store(sys.argv[1]).start('train')"
    command = [sys.executable, "-c", code, store_target]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(8)]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    with Store(store_target) as store:
        assert len(store.runs()) == 8


def test_the_store_loads_no_torch():
    code = "import sys, lightning_optcore.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_killed_writers_lose_nothing_that_was_committed(store_target, tmp_path):
    """Eight writers; every 0.2 s one that has written is killed with SIGKILL and replaced, until 60 were killed and
    more than 200 rows committed (which takes some 20 s, and on a slow machine several times as long).

    A server has no file that a killed client could damage: 8 kills of 4 writers show that their locks go with them.
    """
    Store(store_target).close()
    logs = []
    count, enough = (4, 8) if "://" in store_target else (8, 60)

    def commits() -> list[tuple[int, ...]]:
        return [tuple(map(int, line.split())) for log in logs if log.exists() for line in whole_lines(log)]

    def spawn() -> subprocess.Popen[bytes]:
        log = tmp_path / f"{len(logs)}.log"
        logs.append(log)
        return subprocess.Popen([sys.executable, str(WRITER), store_target, str(log)])

    writers = [(spawn(), logs[-1]) for _ in range(count)]
    kills = 0
    end = time.monotonic() + 240
    # To start may take seconds on a busy machine, and who has not begun to write has nothing to lose.
    try:
        while (kills < enough or len(commits()) <= 200) and time.monotonic() < end:
            time.sleep(0.2)
            writing = next((one for one in writers if one[1].exists() and one[1].stat().st_size), None)
            if writing is None:
                continue
            writers.remove(writing)
            assert writing[0].poll() is None, "a writer ended by itself"
            writing[0].kill()
            writing[0].wait()
            kills += 1
            writers.append((spawn(), logs[-1]))
    finally:
        for writer, _ in writers:
            writer.kill()
            writer.wait()

    committed = commits()
    assert kills >= enough
    assert len(committed) > 200
    if "://" not in store_target:
        with sqlite3.connect(store_target) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with Store(store_target) as store, store.reading() as connection:
        rows = connection.execute(sa.text("SELECT id, pid, overrides FROM runs")).all()
    stored = {(run_id, pid, overrides) for run_id, pid, overrides in rows}
    lost = [c for c in committed if (c[0], c[1], f'["number={c[2]}"]') not in stored]
    assert lost == []


def whole_lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_a_store_that_is_held_open_is_closed_in_a_forked_process(tmp_path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lightning_optcore.store import Store\n"
        "def opened(): return [one for one in Path('/proc/self/fd').iterdir() if 'a.db' in os.path.realpath(one)]\n"
        "with Store('a.db') as store, store.held_open():\n"
        "    store.start('train')\n"
        "    assert opened()\n"
        "    if os.fork() == 0:\n"
        "        assert not opened()\n"
        "        Store('a.db').start('train')\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0\n"
        "    store.start('train')\n"
        "    assert opened() and len(store.runs()) == 3\n"
        "assert not opened()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
