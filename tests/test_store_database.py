"""The databases behind the store: that writers wait for each other, what a server's absence does, and passwords."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy as sa

from lightning_optcore import store_database
from lightning_optcore.store import Store, StoreError
from lightning_optcore.store_database import Database, without_passwords


def python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, **options)


def waited_for(processes):
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), ends
    return ends


def test_what_was_read_is_still_true_when_it_is_written(store_target):
    database = Database(store_target)
    with database.writing() as connection:
        connection.execute(sa.text("CREATE TABLE counter (value INTEGER)"))
        connection.execute(sa.text("INSERT INTO counter VALUES (0)"))
    code = (
        "import sys, sqlalchemy as sa\n"
        "from lightning_optcore.store_database import Database\n"
        "database = Database(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with database.writing() as connection:\n"
        "        value = connection.execute(sa.text('SELECT value FROM counter')).scalar_one()\n"
        "        connection.execute(sa.text('UPDATE counter SET value = :next'), {'next': value + 1})\n"
    )
    waited_for([python(code, store_target) for _ in range(4)])
    with database.reading() as connection:
        assert connection.execute(sa.text("SELECT value FROM counter")).scalar_one() == 200
    database.close()


def test_four_processes_write_runs_at_once_and_nothing_is_lost_or_doubled(store_target, make_measurement, tmp_path):
    (tmp_path / "measured.json").write_text(make_measurement(quality={"val/acc": 0.5, "val/loss": math.nan}).to_json())
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lightning_optcore.measurement.measurement import Measurement\n"
        "from lightning_optcore.store import Store\n"
        "measured = Measurement.from_json(Path(sys.argv[2]).read_text())\n"
        "with Store(sys.argv[1]) as store, store.held_open():\n"
        "    for number in range(50):\n"
        "        run = store.start('train', overrides=[f'writer={sys.argv[3]}', f'number={number}'], seed=number)\n"
        "        for step in range(3):\n"
        "            store.log_curve(run, step, 0, {'loss': number + step / 10})\n"
        "        store.add_measurement(run, 'before', measured)\n"
        "        store.add_measurement(run, 'after', measured)\n"
        "        store.finish(run)\n"
    )
    waited_for([python(code, store_target, tmp_path / "measured.json", writer) for writer in range(4)])
    with Store(store_target) as store:
        runs = store.runs(status="done")
        wanted = {(f"writer={writer}", f"number={number}") for writer in range(4) for number in range(50)}
        assert len(runs) == 200 and {tuple(run.overrides) for run in runs} == wanted
        for run in runs:
            assert set(run.measurements) == {"before", "after"}
            assert store.curves(run.id)["loss"] == [(step, run.seed + step / 10) for step in range(3)]


def test_large_seeds_and_texts_that_a_server_cannot_hold_are_written(postgresql):
    with Store(postgresql) as store:
        run_id = store.start("train", seed=2**32 - 1, config={"text": "a\0b"}, directory="/data/caf\udce9")
        store.finish(run_id, "failed", error="ValueError: \0 and \ud800")
        run = store.run(run_id)
    assert run.seed == 2**32 - 1
    # JSON writes such characters in its own way.
    assert run.config == {"text": "a\0b"}
    assert (run.directory, run.error) == (r"/data/caf\udce9", r"ValueError: \x00 and \ud800")


def test_a_process_that_is_forked_has_no_connection_of_its_parent(postgresql):
    code = (
        "import os, sys, psutil\n"
        "from lightning_optcore.store import Store\n"
        "port = int(sys.argv[2])\n"
        "def connected():\n"
        "    return [one for one in psutil.Process().net_connections() if one.raddr and one.raddr.port == port]\n"
        "with Store(sys.argv[1]) as store:\n"
        "    store.start('train')\n"
        "    assert connected()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        assert not connected()\n"
        "    for _ in range(20):\n"
        "        store.start('train')\n"
        "    if child == 0:\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0\n"
        "    assert len(store.runs()) == 41\n"
    )
    waited_for([python(code, postgresql, sa.make_url(postgresql).port, stderr=subprocess.PIPE)])


def test_a_server_that_restarts_is_waited_for(postgresql, postgresql_server):
    with Store(postgresql) as store:
        first = store.start("train")
        # It is away between two transactions, and comes back while the next one waits.
        postgresql_server.stop()
        back = threading.Timer(0.5, postgresql_server.start)
        back.start()
        try:
            second = store.start("train")
        finally:
            back.join()
        assert {run.id for run in store.runs()} == {first, second}


def test_a_server_that_stays_away_is_named(postgresql, postgresql_server, monkeypatch):
    monkeypatch.setattr(store_database, "_PATIENCE_S", 0.3)
    with Store(postgresql) as store:
        postgresql_server.stop()
        try:
            with pytest.raises(StoreError, match=r"store.path=postgresql:.*refused.*whether the server") as caught:
                store.start("train")
        finally:
            postgresql_server.start()
        assert postgresql_server.password not in str(caught.value)
        store.start("train")


def test_a_connection_that_is_lost_in_the_middle_takes_the_transaction_back(postgresql, postgresql_server):
    with Store(postgresql) as store:
        kept = store.start("train")
        with pytest.raises(StoreError, match="terminating connection"), store.writing() as connection:
            connection.execute(sa.text("UPDATE runs SET status = 'done'"))
            pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            postgresql_server.execute(f"SELECT pg_terminate_backend({pid})")
            connection.execute(sa.text("SELECT 1"))
        assert store.run(kept).status == "running"


def test_a_writer_that_stands_still_is_left_behind(postgresql):
    code = (
        "import sys, time\n"
        "from lightning_optcore import store_database\n"
        "store_database._IDLE_TIMEOUT_S = 1\n"
        "with store_database.Database(sys.argv[1]).writing():\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with Store(postgresql) as store:
        still = python(code, postgresql, stdout=subprocess.PIPE)
        try:
            assert still.stdout.readline() == "writing\n"
            store.start("train")
            assert still.poll() is None
        finally:
            still.kill()
            still.communicate()


def test_a_writer_that_takes_too_long_is_named(postgresql, monkeypatch):
    monkeypatch.setattr(store_database, "_BUSY_TIMEOUT_S", 1)
    with Store(postgresql) as store, Store(postgresql) as other, other.writing():
        with pytest.raises(StoreError, match="lock timeout; another process holds it for long"):
            store.start("train")
        assert store.runs() == []


def test_a_server_without_a_free_connection_is_waited_for(postgresql, postgresql_server):
    database = sa.make_url(postgresql).database
    postgresql_server.execute(f"ALTER DATABASE {database} CONNECTION LIMIT 1")
    first = Store(postgresql)
    first.start("train")
    threading.Timer(0.5, first.close).start()
    with Store(postgresql) as store:
        assert len(store.runs()) == 1


def test_a_server_is_only_connected_to_once_by_a_process(postgresql, postgresql_server):
    database = sa.make_url(postgresql).database
    with Store(postgresql) as store:
        for _ in range(5):
            store.start("train")
            store.runs()
        query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'"
        assert postgresql_server.execute(query) == [(1,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "wrong"}, r"authentication failed.*; give the password as PGPASSWORD or in ~/.pgpass"),
        ({"database": "none"}, r'database "none" does not exist.*; create it: createdb none'),
        ({"port": 1}, r"refused.*; look whether the server runs and can be reached from here"),
    ],
)
def test_why_a_server_cannot_be_used_is_said_at_once_and_without_the_password(postgresql, change, message, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    url = sa.make_url(postgresql).set(**change)
    with pytest.raises(StoreError, match=message) as caught:
        Store(url.render_as_string(hide_password=False))
    assert "optcore:***@127.0.0.1" in str(caught.value)
    assert str(url.password) not in str(caught.value)


def test_a_user_who_may_not_make_tables_is_named(postgresql, postgresql_server):
    database = sa.make_url(postgresql).database
    postgresql_server.execute(f"ALTER DATABASE {database} OWNER TO administrator")
    postgresql_server.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", database)
    with pytest.raises(StoreError, match=r"permission denied.*; the user must own the database"):
        Store(postgresql)


def test_the_password_may_come_from_the_environment_or_a_file(postgresql, postgresql_server, tmp_path, monkeypatch):
    bare = postgresql.replace(f":{postgresql_server.password}@", "@")
    with pytest.raises(StoreError, match="no password supplied; give the password as PGPASSWORD"):
        Store(bare)
    monkeypatch.setenv("PGPASSWORD", postgresql_server.password)
    Store(bare).close()
    monkeypatch.delenv("PGPASSWORD")
    (tmp_path / "pgpass").write_text(f"127.0.0.1:*:*:*:{postgresql_server.password}\n")
    (tmp_path / "pgpass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    Store(bare).close()


def test_a_missing_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install 'lightning-optcore\[postgresql\]'"):
        Store("postgresql://me@127.0.0.1/runs")


@pytest.mark.parametrize("url", ["mysql://me:secret@host/runs", "://", "none://x", "postgresql://me@host:x/runs"])
def test_other_databases_and_what_is_no_url_are_refused(url):
    with pytest.raises(StoreError, match=r"expected a path, or a URL such as postgresql://") as caught:
        Store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:se/c:r@t@host:5432/runs", "postgresql://me:***@host:5432/runs"),
        ("postgresql+psycopg://:secret@host/runs", "postgresql+psycopg://:***@host/runs"),
        ("postgres://host/runs?user=me&password=secret&x=1", "postgres://host/runs?user=me&password=***&x=1"),
        (r"postgresql\://me\:secret@host\:5432/runs", r"postgresql\://me\:***@host\:5432/runs"),
        (r"postgresql\\://me@host/runs?password\\=secret", r"postgresql\\://me@host/runs?password\\=***"),
        ('["postgresql://me:secret@host/runs", "a=b@c"]', '["postgresql://me:***@host/runs", "a=b@c"]'),
        ('["postgresql://host:5432/runs", "a=b@c"]', '["postgresql://host:5432/runs", "a=b@c"]'),
        ("https://me:secret@host is no database", "https://me:secret@host is no database"),
    ],
)
def test_passwords_are_not_shown(text, shown):
    assert without_passwords(text) == shown
    assert without_passwords({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


def test_the_store_does_not_keep_its_own_password(postgresql, postgresql_server):
    with Store(postgresql) as store:
        run_id = store.start("train", overrides=[f"store.path={postgresql}"], config={"store": {"path": postgresql}})
        run = store.run(run_id)
    assert run.overrides == [f"store.path={without_passwords(postgresql)}"]
    assert run.config == {"store": {"path": without_passwords(postgresql)}}
    assert postgresql_server.password not in str(run)
