"""Sweeps through Hydra's command line: results, failures, resuming, cache, and what is refused."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal

APP = Path(__file__).with_name("sweep_app.py")
# 20 of them, in a sweep of 40 trials, take some minutes.
KILLS = int(os.environ.get("SWEEP_KILLS", "4"))
TRIALS = 2 * KILLS
SPACE = ("x=interval(0.0,1.0)", "n=range(1,9)")


def command(*overrides):
    return [sys.executable, str(APP), "-m", "hydra/sweeper=optcore", "hydra.sweeper.store=store.db", *overrides]


def environment():
    # The tests' own folder must not be importable: jobs run as a user's would.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def sweep(folder, *overrides, check=True):
    done = subprocess.run(
        command(*overrides), cwd=folder, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def trials(folder, sweep_id=1):
    with Store(folder / "store.db") as store:
        return Journal(store).trials(sweep_id)


def results(folder):
    (file,) = folder.glob("multirun/*/*/optimization_results.yaml")
    return yaml.safe_load(file.read_text())


def test_a_sweep_leaves_its_trials_and_the_best_overrides(tmp_path):
    done = sweep(tmp_path, *SPACE, "hydra.sweeper.n_trials=7", "hydra.sweeper.n_jobs=3", "sleep=0.01")
    found = trials(tmp_path)
    assert [trial.number for trial in found] == [trial.job_num for trial in found] == list(range(7))
    assert all(trial.status == "done" for trial in found)
    best = min(found, key=lambda trial: trial.objectives)
    written = results(tmp_path)
    assert written["best_value"] == best.objectives[0]
    assert written["best_overrides"].split() == best.overrides
    assert best.overrides[2] == "sleep=0.01"
    with next(tmp_path.glob("multirun/*/*/trials.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["objective 0"]) for row in rows] == [trial.objectives[0] for trial in found]
    assert "7 of 7 trials ended, 0 failed" in done.stdout


def test_two_objectives_give_a_front(tmp_path):
    sweep(
        tmp_path,
        *SPACE,
        "objectives=2",
        "hydra/sweeper/searcher=random",
        "hydra.sweeper.n_trials=8",
        "hydra.sweeper.directions=[minimize,maximize]",
    )
    values = [trial.objectives for trial in trials(tmp_path)]
    front = [one["values"] for one in results(tmp_path)["solutions"]]
    assert front
    for one in front:
        assert not any(a <= one[0] and b >= one[1] and [a, b] != one for a, b in values)


def test_params_constraints_conditions_and_initial_points_of_the_configuration(tmp_path):
    sweep(
        tmp_path,
        "n=choice(1,2,3,4)",
        "hydra/sweeper/searcher=grid",
        "+hydra.sweeper.params={x: 'choice(0.1,0.2)'}",
        "hydra.sweeper.constraints=['n >= 2']",
        "+hydra.sweeper.conditions={x: 'n != 4'}",
        "hydra.sweeper.initial=[{x: 0.2, n: 3}]",
    )
    found = trials(tmp_path)
    assert found[0].overrides == ["x=0.2", "n=3"]
    assert sorted(trial.overrides for trial in found) == [
        ["n=4"],
        ["x=0.1", "n=2"],
        ["x=0.1", "n=3"],
        ["x=0.2", "n=2"],
        ["x=0.2", "n=3"],
    ]


def test_failed_nan_and_slow_trials_are_recorded_and_the_sweep_goes_on(tmp_path):
    sweep(
        tmp_path,
        "n=1,2,3,4",
        "bad=1",
        "nan=2",
        "slow=3",
        "hydra/sweeper/searcher=grid",
        "hydra.sweeper.timeout_s=1",
    )
    bad, nan, slow, good = trials(tmp_path)
    assert bad.failure.startswith("ValueError: n=1 is bad second line\n") and "sweep_app.py" in bad.failure
    assert nan.failure == "objective 0 is nan"
    assert slow.failure.startswith("TrialTimeoutError: it took longer than hydra.sweeper.timeout_s=1")
    assert good.status == "done"
    assert results(tmp_path)["failed"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["n=1,2", "objectives=0"], "the job returned nothing: return a number"),
        (["n=1,2", "objectives=2"], "the job returned 2 numbers, hydra.sweeper.directions names 1"),
        (["n=range(1,9)", "bad=${n}"], "8 of 8 trials failed; the last one: ValueError: n=8 is bad"),
        (["x=interval(0.0,1.0)", "bad=2", "hydra/sweeper/searcher=random"], "n_trials=null: a Random in this space"),
        (["n=range(1,40)", "bad=${n}"], "the first 10 trials all failed"),
        (["n=1,2,3", "bad=1", "hydra.sweeper.max_failures=1"], "hydra.sweeper.max_failures=1: 1 trials failed"),
        (["n=1,2", "nothing=3"], "Could not override 'nothing'"),
        (["n=1,2", "hydra.sweeper.constraints=['n > 5']"], "are met by no point of the space"),
        (["n=1,2", "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0: expected a positive number"),
        (["n=1,2", "hydra.sweeper.resume=7"], "hydra.sweeper.resume=7: no sweep of that number in the store"),
        (["n=1,2", "hydra.sweeper.directions=[up]"], "expected a list of minimize or maximize"),
    ],
)
def test_what_cannot_be_ends_with_a_message(tmp_path, overrides, message):
    done = sweep(tmp_path, "hydra/sweeper/searcher=grid", *overrides, check=False)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_one_point_is_run_once_and_needs_no_objective(tmp_path):
    sweep(tmp_path, "n=2", "objectives=0")
    (only,) = trials(tmp_path)
    assert only.status == "done" and only.overrides == ["n=2", "objectives=0"]


def test_a_measured_configuration_is_answered_from_the_store(tmp_path):
    log = tmp_path / "log.txt"
    sweep(tmp_path, "n=1,2,3", "hydra/sweeper/searcher=grid")
    again = sweep(tmp_path, "n=2,3,4", "hydra/sweeper/searcher=grid")
    assert "trial 0: as trial 1 of sweep 1 (same configuration, code, data and machine)" in again.stdout
    assert [trial.cached_from for trial in trials(tmp_path, 2)] == ["trial 1 of sweep 1", "trial 2 of sweep 1", None]
    assert trials(tmp_path, 2)[0].objectives == trials(tmp_path, 1)[1].objectives
    assert log.read_text().count("began") == 4
    sweep(tmp_path, "n=2,3,4,5", "hydra/sweeper/searcher=grid", "hydra.sweeper.cache=false")
    assert log.read_text().count("began") == 8


def test_a_changed_line_of_the_code_misses_the_cache(tmp_path):
    (tmp_path / "mine.py").write_text("class Net:\n    width = 1\n")
    app = (
        "import hydra\n"
        "from hydra.utils import get_class\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='mine')\n"
        "def main(config):\n    return get_class(config.net._target_).width * config.n\n"
        "main()\n"
    )
    (tmp_path / "app.py").write_text(app)
    (tmp_path / "mine.yaml").write_text("n: 1\nnet:\n  _target_: mine.Net\n")

    def cached(sweep_id):
        words = [sys.executable, "app.py", *command("n=1,2", "hydra/sweeper/searcher=grid")[2:]]
        environ = {**environment(), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(words, cwd=tmp_path, env=environ, check=True, capture_output=True, timeout=100)
        return [trial.cached_from is not None for trial in trials(tmp_path, sweep_id)]

    assert cached(1) == [False, False]
    assert cached(2) == [True, True]
    (tmp_path / "mine.py").write_text("class Net:\n    width = 2\n")
    assert cached(3) == [False, False]
    assert trials(tmp_path, 3)[1].objectives == [4.0]


def finish_with_kills(folder, kills, *overrides):
    """Kill a sweep at random moments and start it again, until it ended; return how often it was killed.

    Three in four moments are within half a second of a launch's first job, the others before it: how long a process
    takes to start depends on the machine.
    """
    moments = random.Random(0)
    log = folder / "log.txt"
    startup = 2.0
    for count in range(kills):
        began = time.monotonic()
        known = log.stat().st_size if log.exists() else 0
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                command(*overrides),
                cwd=folder,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if moments.random() < 0.25:
            wait_until(lambda process=process: process.poll() is not None, moments.random() * startup)
        else:
            wait_until(lambda known=known, process=process: grew(log, known) or process.poll() is not None, 120)
            startup = time.monotonic() - began
            wait_until(lambda process=process: process.poll() is not None, moments.random() * 0.5)
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "output.txt").read_text()[-3000:]
            return count
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    sweep(folder, *overrides)
    return kills


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)


def grew(file, size):
    return file.exists() and file.stat().st_size > size


def check_nothing_ran_twice(folder, count):
    found = trials(folder)
    assert len(found) == count and all(trial.status == "done" for trial in found)
    assert len({tuple(trial.overrides) for trial in found}) == count
    # Every folder belongs to one launch: a job in a used folder would have failed.
    assert len({trial.directory for trial in found}) == count
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    began = [line[1] for line in lines if line[0] == "began"]
    assert len(began) == len(set(began)), "a job number was used twice"
    recorded = {str(trial.job_num) for trial in found}
    for trial in found:
        same = [line for line in lines if line[0] == "began" and line[2:] == _values(trial)]
        # What ran again had no result: of its launches the recorded one is the last.
        assert same[-1][1] == str(trial.job_num)
    assert recorded <= set(began)


def _values(trial):
    return [override.partition("=")[2] for override in trial.overrides[:2]]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_killed_at_random_moments_continues_to_the_same_end(tmp_path, launcher):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    options = [*SPACE, "sleep=0.1", f"hydra.sweeper.n_trials={TRIALS}", "hydra.sweeper.n_jobs=2"]
    if launcher == "joblib":
        options += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    kills = finish_with_kills(tmp_path / "killed", KILLS, *options)
    assert kills == KILLS
    sweep(tmp_path / "whole", *options)
    check_nothing_ran_twice(tmp_path / "killed", TRIALS)
    whole, killed = trials(tmp_path / "whole"), trials(tmp_path / "killed")
    assert [one.overrides for one in killed] == [one.overrides for one in whole]
    assert [one.objectives for one in killed] == [one.objectives for one in whole]
    assert len(list((tmp_path / "killed").glob("multirun/*/*/multirun.yaml"))) == 1


def test_a_sweep_that_runs_is_not_taken_over_and_a_changed_space_is_refused(tmp_path):
    options = [*SPACE, "sleep=0.3", "hydra.sweeper.n_trials=200"]
    process = subprocess.Popen(command(*options), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "log.txt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        refused = sweep(tmp_path, *options, "hydra.sweeper.resume=1", check=False)
        assert f"process {process.pid} on" in refused.stderr and refused.returncode != 0
    finally:
        process.kill()
        process.wait()
    changed = sweep(tmp_path, "x=interval(0.0,2.0)", SPACE[1], "hydra.sweeper.resume=1", check=False)
    assert "x: was interval(0.0,1.0), is interval(0.0,2.0)" in changed.stderr and changed.returncode != 0
    fewer = len(trials(tmp_path)) + 2
    sweep(tmp_path, *SPACE, f"hydra.sweeper.n_trials={fewer}", "hydra.sweeper.resume=1")
    assert [trial.status for trial in trials(tmp_path)] == ["done"] * fewer


def test_two_sweeps_at_once_share_a_store_and_a_folder_without_harm(tmp_path):
    options = [*SPACE, "sleep=0.2", "hydra.sweeper.n_trials=6", "hydra.sweep.dir=both"]
    processes = [
        subprocess.Popen(command(*options), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = [*trials(tmp_path, 1), *trials(tmp_path, 2)]
    assert len(found) == 12 and all(trial.status == "done" for trial in found)
    assert len({trial.directory for trial in found}) == 12


def test_a_journal_of_another_version_is_refused(tmp_path):
    sweep(tmp_path, "n=1,2")
    with Store(tmp_path / "store.db") as store, store.writing() as connection:
        connection.exec_driver_sql("UPDATE sweeps SET journal_version = 99, status = 'failed'")
    refused = sweep(tmp_path, "n=1,2", "hydra.sweeper.resume=1", check=False)
    assert refused.returncode != 0 and "its journal is of version 99, this lightning_optcore writes" in refused.stderr
