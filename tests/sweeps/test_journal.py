"""The journal in a file and on a server: what is written comes back, also where several processes write at once."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
import warm
from omegaconf import OmegaConf

from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store import Store, StoreError
from lightning_optcore.store_database import without_passwords
from lightning_optcore.sweeps.journal import Journal, SweepError, held_journal, open_journal

APP = Path(__file__).with_name("sweep_app.py")


@pytest.fixture
def journal(store_target):
    with Store(store_target) as store:
        yield Journal(store)


def begun(journal, trials=2):
    """Begin a sweep of one batch and return its number and trials."""
    sweep_id = journal.begin("python", "/sweep", {"x": [1, 2]}, ["minimize"])
    asked = [(Candidate(number, {"x": number}), [f"x={number}"]) for number in range(trials)]
    return sweep_id, journal.add_batch(sweep_id, 1, 0, asked, {"pending": []})


def at_once(code, *arguments, count=4):
    """Run a program several times at once, and return what each printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, printed
    return printed


def test_a_sweep_and_its_trials_round_trip(journal):
    sweep_id, records = begun(journal)
    sweep = journal.sweep(sweep_id)
    assert (sweep.command, sweep.directory, sweep.status) == ("python", "/sweep", "running")
    assert (sweep.space, sweep.directions, sweep.state) == ({"x": [1, 2]}, ["minimize"], {"pending": []})
    assert (sweep.pid, sweep.owner_is_alive) == (os.getpid(), True)
    assert journal.trials(sweep_id) == journal.trials(sweep_id, batch=1) == records
    assert journal.trials(sweep_id, first=1) == records[1:]
    journal.finish(sweep_id, "failed", "SweepError: all failed")
    assert journal.sweep(sweep_id).error == "SweepError: all failed"
    assert [one.id for one in journal.sweeps(limit=1)] == [sweep_id]


def test_results_come_back_to_the_last_bit(journal):
    sweep_id, (first, second) = begun(journal)
    values = [0.1 + 0.2, 1e-300]
    journal.end_trial(first, values, "over", status="done", violation=1 / 3)
    journal.end_trial(second, None, failure="ValueError: \u2028 \\ ' \"")
    first, second = journal.trials(sweep_id)
    assert (first.objectives, first.violation, first.feasible) == (values, 1 / 3, False)
    assert (second.status, second.failure, second.objectives) == ("failed", "ValueError: \u2028 \\ ' \"", None)


def test_what_was_measured_is_found_by_its_fingerprint(journal):
    sweep_id, (first, _) = begun(journal)
    trial, same = journal.start_trial(sweep_id, 0, "/sweep/0", "mark")
    assert (trial.status, trial.directory, same) == ("running", "/sweep/0", None)
    journal.end_trial(first, [1.0])
    _, same = journal.start_trial(sweep_id, 1, "/sweep/1", "mark")
    assert same.objectives == [1.0]
    assert journal.start_trial(sweep_id, 1, "/sweep/1", "mark", objectives=2)[1] is None
    with pytest.raises(StoreError, match=f"job 7 of sweep {sweep_id} is not in the journal"):
        journal.start_trial(sweep_id, 7, "/sweep/7")


def test_a_trial_that_is_launched_again_drops_what_its_first_life_reports(journal):
    sweep_id, records = begun(journal)
    assert journal.next_job_num("/sweep") == 2
    journal.renumber(sweep_id, [0, 1], 2)
    journal.end_trial(records[0], [1.0])
    assert [(trial.status, trial.job_num) for trial in journal.trials(sweep_id)] == [("asked", 2), ("asked", 3)]
    assert journal.next_job_num("/sweep") == 4 and journal.next_job_num("/other") == 0


def test_the_newest_value_of_a_step_counts(journal):
    sweep_id, _ = begun(journal)
    for step, value in ((1, 0.5), (1, 0.25), (2, float("nan")), (3, float("inf")), (4, 1e300)):
        journal.report(sweep_id, 0, step, value)
    assert journal.intermediate_values(sweep_id) == {0: {1: 0.25, 4: 1e300}}


def test_a_sweep_whose_owner_lives_is_not_taken_over(journal):
    sweep_id, _ = begun(journal)
    assert journal.take_over(sweep_id).id == sweep_id
    _given_to(journal, sweep_id, os.getppid())
    with pytest.raises(SweepError, match=f"resume={sweep_id}: process {os.getppid()} on .* still runs it"):
        journal.take_over(sweep_id)
    with pytest.raises(SweepError, match="resume=99: no sweep of that number"):
        journal.take_over(99)


def _given_to(journal, sweep_id, pid):
    started = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 0.0
    with journal._store.writing() as connection:
        query = sa.text("UPDATE sweeps SET pid = :pid, pid_started = :started WHERE id = :id")
        connection.execute(query, {"pid": pid, "started": started, "id": sweep_id})


# Lets the processes of a round begin it together, and end only after it: an owner that ended is no owner.
_TOGETHER = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from lightning_optcore.sweeps.journal import SweepError, open_journal\n"
    "journal, folder = open_journal(sys.argv[1]), Path(sys.argv[2])\n"
    "def together(name):\n"
    "    (folder / f'{name}-{os.getpid()}').touch()\n"
    "    while len(list(folder.glob(f'{name}-*'))) < 4: time.sleep(0.005)\n"
)


def test_one_of_several_processes_takes_over_what_a_dead_one_left(journal, store_target, tmp_path):
    for _ in range(5):
        sweep_id, _ = begun(journal)
        _given_to(journal, sweep_id, 2**22 + 1)
        assert journal.unfinished("python").id == sweep_id and journal.unfinished("other") is None
    code = _TOGETHER + (
        "for sweep_id in range(1, 6):\n"
        "    together(sweep_id)\n"
        "    try:\n"
        "        journal.take_over(sweep_id)\n"
        "        print(sweep_id)\n"
        "    except SweepError as error:\n"
        "        assert 'still runs it' in str(error), error\n"
        "together('end')\n"
    )
    taken = [int(number) for printed in at_once(code, store_target, tmp_path) for number in printed.split()]
    assert sorted(taken) == list(range(1, 6)), "a sweep has two owners, or none"


def test_sweeps_that_begin_at_once_in_one_folder_get_folders_of_their_own(store_target, tmp_path):
    code = _TOGETHER + (
        "for number in range(5):\n"
        "    together(number)\n"
        "    print(journal.sweep(journal.begin('python', f'/sweeps/{number}', {}, ['minimize'])).directory)\n"
        "together('end')\n"
    )
    folders = [folder for printed in at_once(code, store_target, tmp_path) for folder in printed.split()]
    assert len(set(folders)) == 20
    assert {folder for folder in folders if "_" not in folder} == {f"/sweeps/{number}" for number in range(5)}


def test_jobs_of_four_processes_write_to_one_sweep_at_once(journal, store_target):
    sweep_id, _ = begun(journal, trials=80)
    code = (
        "import sys\n"
        "from lightning_optcore.sweeps.journal import open_journal\n"
        "journal, sweep_id = open_journal(sys.argv[1]), int(sys.argv[2])\n"
        "for job in range(80):\n"
        "    # Each takes the trials that nobody took yet, as jobs of a launcher do not.\n"
        "    with journal._store.writing() as connection:\n"
        "        taken = connection.exec_driver_sql(\n"
        '            f"SELECT status FROM trials WHERE sweep_id = {sweep_id} AND job_num = {job}").scalar()\n'
        "        if taken != 'asked': continue\n"
        "        connection.exec_driver_sql(\n"
        "            f\"UPDATE trials SET status = 'running' WHERE sweep_id = {sweep_id} AND job_num = {job}\")\n"
        "    trial, _ = journal.start_trial(sweep_id, job, f'/sweep/{job}', f'mark {job}')\n"
        "    for step in range(3): journal.report(sweep_id, job, step, job + step / 10)\n"
        "    journal.end_trial(trial, [job / 7])\n"
        "    print(job)\n"
    )
    printed = at_once(code, store_target, sweep_id)
    ran = sorted(int(job) for text in printed for job in text.split())
    assert ran == list(range(80)), "a trial ran twice, or never"
    assert [trial.objectives for trial in journal.trials(sweep_id)] == [[job / 7] for job in range(80)]
    steps = {job: {step: job + step / 10 for step in range(3)} for job in range(80)}
    assert journal.intermediate_values(sweep_id) == steps


def test_a_process_opens_a_journal_once(store_target):
    with held_journal(store_target) as held:
        assert open_journal(store_target) is held
    assert open_journal(store_target) is open_journal(store_target) is not held
    open_journal(store_target)._store.close()


def _texts(server, database):
    """Return everything that a database holds."""
    names = server.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database)
    return "\n".join(str(server.execute(f"SELECT * FROM {name}", database)) for (name,) in names)


def test_a_sweep_with_its_store_on_a_server_is_killed_and_continues(postgresql, postgresql_server, tmp_path):
    words = [sys.executable, APP, "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=grid", "hydra.sweep.dir=sweep"]
    words += [f"hydra.sweeper.store={postgresql}", "hydra.sweeper.n_jobs=3", "n=1,2,3,4,5,6", "sleep=0.3"]
    words += [f"+mine={postgresql}"]
    first = warm.Running(words, cwd=tmp_path, env=os.environ, start_new_session=True)
    end = time.monotonic() + 100
    with Store(postgresql) as store:
        journal = Journal(store)
        while not (journal.sweeps() and any(trial.ended for trial in journal.trials(1))) and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        ended = sum(trial.ended for trial in journal.trials(1))
        assert 0 < ended < 6
        again = warm.run(words, cwd=tmp_path, env=os.environ)
        assert again.returncode == 0, again.stderr
        assert f"sweep 1 continues: {ended} trials have a result" in again.stdout
        assert "the store's URL holds a password, which Hydra writes into the folder of every job" in again.stdout
        trials = journal.trials(1)
    assert [trial.status for trial in trials] == ["done"] * 6
    # Each job had its password, and the journal has it not.
    for trial in trials:
        given = OmegaConf.load(Path(trial.directory) / ".hydra" / "config.yaml")
        assert given.mine == postgresql
        # Hydra writes a backslash before every colon.
        kept = [one.replace("\\", "") for one in trial.overrides]
        assert f"+mine={without_passwords(postgresql)}" in kept
    assert postgresql_server.password not in _texts(postgresql_server, sa.make_url(postgresql).database)
    for name in ("multirun.yaml", "optimization_results.yaml", "trials.csv", "sweep_report.html"):
        assert postgresql_server.password not in (tmp_path / "sweep" / name).read_text()


def test_optcore_sweeps_resumes_and_reports_with_its_store_on_a_server(
    postgresql, postgresql_server, tmp_path, optcore, monkeypatch
):
    monkeypatch.setenv("PGPASSWORD", postgresql_server.password)
    url = postgresql.replace(f":{postgresql_server.password}@", "@")
    words = ["train", "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=grid", "model=mlp", "model.width=8,4"]
    words += ["trainer.max_epochs=1", "measure.rounds=3", "report.enabled=false", "test=false", f"store.path={url}"]
    words += ["objective=[val/acc,params]", "hydra.sweep.dir=sweep"]
    done = optcore(*words)
    assert done.returncode == 0, done.stderr
    with Store(url) as store:
        journal = Journal(store)
        # As if it had been killed during the second trial.
        (second,) = journal.trials(1, first=1)
        with store.writing() as connection:
            connection.execute(sa.text("UPDATE sweeps SET status = 'running'"))
            unended = "UPDATE trials SET status = 'running', objectives = NULL, finished_at = NULL WHERE number = 1"
            connection.execute(sa.text(unended))
        again = optcore(*words)
        assert again.returncode == 0, again.stderr
        assert "sweep 1 continues: 1 trials have a result, 1 run again" in again.stdout
        trials = journal.trials(1)
        assert [trial.status for trial in trials] == ["done", "done"] and trials[1].job_num == 2
        assert trials[1].objectives == second.objectives
        assert [run.status for run in store.runs()] == ["done"] * 3
    report = optcore("report", f"store.path={url}", "sweep=1")
    assert report.returncode == 0, report.stderr
    # The smaller one is on the front, whatever its accuracy.
    assert shlex.join(trials[1].overrides) in report.stdout
    overview = optcore("report", f"store.path={url}", "objective=[params,val/acc]")
    assert overview.returncode == 0, overview.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if postgresql_server.password.encode() in path.read_bytes()]
    assert "holds a password" not in done.stdout
