"""A sweep and an architecture search from one command line, on a Ray cluster that loses a node meanwhile."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from clusters import SimulatedCluster, cluster

from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal

pytestmark = pytest.mark.xdist_group("ray")
APP = Path(__file__).parents[1] / "sweeps" / "launched_app.py"
OPTCORE = [sys.executable, "-m", "lightning_optcore.cli"]


@pytest.fixture(scope="module")
def two_nodes():
    with cluster(num_cpus=1) as made:
        yield made


def started(folder, command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "COPIED": "from the sweep"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)


def finished(folder, process):
    """Wait for the end of a program that must end well, and return what it printed."""
    code = process.wait(140)
    printed = (folder / "output.txt").read_text()
    assert code == 0, printed[-5000:]
    return printed


def kill_while_it_runs_a_trial(cluster: SimulatedCluster, node, folder, process):
    """Kill a node as soon as the trial that it was given has begun."""
    end = time.monotonic() + 140
    while not set(jobs_on(node)) & running_trials(folder):
        printed = (folder / "output.txt").read_text()[-5000:]
        assert process.poll() is None and time.monotonic() < end, printed
        time.sleep(0.05)
    cluster.kill(node)


def jobs_on(node):
    """Yield the numbers of the jobs, from 0, that the processes of a node say they run."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = re.match(r"ray::job (\d+):", " ".join(process.cmdline()))
            if title:
                yield int(title[1]) - 1


def trials(folder):
    with Store(folder / "store.db") as store:
        return Journal(store).trials(1)


def running_trials(folder):
    if not (folder / "store.db").exists():
        return set()
    with Store(folder / "store.db") as store:
        journal = Journal(store)
        found = [trial for sweep in journal.sweeps() for trial in journal.trials(sweep.id)]
    return {trial.number for trial in found if trial.status == "running"}


def test_a_job_finds_what_it_would_find_on_the_machine_of_the_sweep(two_nodes, tmp_path):
    words = ["hydra.launcher.executor=ray", f"hydra.launcher.address={two_nodes.address}"]
    command = [sys.executable, APP, "-m", *words, "x=1,2", "hydra.job.chdir=true", "hydra.job.env_copy=[COPIED]"]
    finished(tmp_path, started(tmp_path, command))
    for number in range(2):
        (file,) = tmp_path.glob(f"multirun/*/*/{number}/seen.txt")
        num, id, cwd, _, environment, arguments, program = file.read_text().splitlines()
        assert (num, id) == (str(number), f"launched_app_{number}")
        assert Path(cwd) == file.parent
        expected = {"FROM_HYDRA": f"job {number}", "COPIED": "from the sweep", "LEFT": ""}
        assert ast.literal_eval(environment) == expected
        assert ast.literal_eval(arguments)[0] == f"x={number + 1}"
        assert program == APP.name


def test_a_sweep_survives_the_loss_of_a_node(two_nodes, tmp_path):
    node = two_nodes.add(num_cpus=1)
    command = [
        *OPTCORE, "train", "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=grid", "hydra/launcher=optcore",
        "hydra.launcher.executor=ray", f"hydra.launcher.address={two_nodes.address}", "hydra.sweeper.n_jobs=2",
        "model.width=choice(4,8,16)", "model=mlp", "data=digits", "trainer=cpu", "trainer.max_epochs=15", "test=false",
        "objective=[val/acc]", "measure.rounds=2", "report.enabled=false", "hydra.sweeper.report=false",
        "store.path=store.db",
    ]  # fmt: skip
    process = started(tmp_path, command)
    kill_while_it_runs_a_trial(two_nodes, node, tmp_path, process)
    printed = finished(tmp_path, process)
    assert "waits again" in printed
    found = trials(tmp_path)
    assert [trial.status for trial in found] == ["done"] * 3
    assert found[-1].objectives[0] > 0.5


def test_an_architecture_search_survives_the_loss_of_a_node(two_nodes, tmp_path):
    node = two_nodes.add(num_cpus=1)
    command = [
        *OPTCORE, "nas", "nas.executor=ray", f"nas.address={two_nodes.address}", "nas.n_jobs=2", "nas/space=mlp",
        "nas/strategy=random", "nas.max_trials=3", "objective=[val/acc,size_bytes]", "data=digits", "trainer=cpu",
        "trainer.max_epochs=15", "measure.rounds=2", "report.enabled=false", "store.path=store.db",
    ]  # fmt: skip
    process = started(tmp_path, command)
    kill_while_it_runs_a_trial(two_nodes, node, tmp_path, process)
    printed = finished(tmp_path, process)
    assert "waits again" in printed
    found = trials(tmp_path)
    assert [trial.status for trial in found] == ["done"] * 3
    assert [trial.job_num for trial in found] == [0, 1, 2]
    # Each run says on which machine it was measured.
    with Store(tmp_path / "store.db") as store:
        assert all(run.hardware_fingerprint for run in store.runs(status="done"))
