"""``hydra/launcher=optcore`` on processes of this machine: what a job finds, how it ends, and what is refused."""

from __future__ import annotations

import ast
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lightning_optcore.executor import JobLostError
from lightning_optcore.store import Store
from lightning_optcore.sweeps.hydra_job import Program, in_place_of, job_return
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.launching import LauncherError, asked, executor_of

APP = Path(__file__).with_name("launched_app.py")


def run(folder, *overrides, **environment):
    command = [sys.executable, str(APP), "-m", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def seen(folder, number):
    (file,) = folder.glob(f"multirun/*/*/{number}/seen.txt")
    num, id, cwd, pid, environment, arguments, program = file.read_text().splitlines()
    return SimpleNamespace(
        num=int(num),
        id=id,
        cwd=Path(cwd),
        pid=int(pid),
        environment=ast.literal_eval(environment),
        arguments=ast.literal_eval(arguments),
        program=program,
        folder=file.parent,
    )


@pytest.mark.parametrize("chdir", [False, True])
def test_a_job_finds_what_it_would_find_alone(tmp_path, chdir):
    words = ["hydra.launcher.n_workers=1", f"hydra.job.chdir={chdir}", "hydra.job.env_copy=[COPIED]"]
    done = run(tmp_path, "x=1,2,3", *words, COPIED="from the sweep")
    assert done.returncode == 0, done.stderr
    jobs = [seen(tmp_path, number) for number in range(3)]
    # One process runs them all, and none of them finds what another one left.
    assert len({job.pid for job in jobs}) == 1
    for number, job in enumerate(jobs):
        assert (job.num, job.id) == (number, f"launched_app_{number}")
        assert job.cwd == (job.folder if chdir else tmp_path)
        expected = {"FROM_HYDRA": f"job {number}", "COPIED": "from the sweep", "LEFT": ""}
        assert job.environment == expected
        assert job.arguments[0] == f"x={number + 1}" and job.arguments[-1] == "hydra.mode=RUN"
        assert job.program == APP.name
        assert OmegaConf.load(job.folder / ".hydra" / "config.yaml").x == number + 1


def test_an_error_comes_back_with_where_it_was_raised(tmp_path):
    done = run(tmp_path, "how=raises", "x=1,2", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "ValueError: x=1 is bad" in done.stderr
    # Of the worker process, not of the sweep's.
    assert "JobTraceback" in done.stderr and "in raises" in done.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("picky", "RuntimeError: Picky: it is picky"),
        ("exits", "RuntimeError: the job ended with exit code 3"),
        ("killed", "JobFailedError: job 1 (launched_app) failed on local: its process ended with exit code 5"),
        ("unsendable", "RuntimeError: what the job returned:"),
    ],
)
def test_every_way_to_fail_is_told(tmp_path, how, message):
    done = run(tmp_path, f"how={how}")
    assert done.returncode == 1
    assert message in done.stderr


def test_what_the_executor_ends_is_a_failed_trial_and_the_sweep_goes_on(tmp_path):
    done = run(
        tmp_path,
        "how=choice(slow,killed,memory,well)",
        "hydra/sweeper=optcore",
        "hydra/sweeper/searcher=grid",
        "hydra.sweeper.n_jobs=4",
        "hydra.sweeper.store=store.db",
        "hydra.sweeper.report=false",
        "hydra.launcher.n_workers=4",
        "hydra.launcher.timeout_s=6",
        "hydra.launcher.resources.memory_bytes=400000000",
    )
    assert done.returncode == 0, done.stderr
    with Store(tmp_path / "store.db") as store:
        trials = {trial.candidate.params["how"]: trial for trial in Journal(store).trials(1)}
    assert {how: trial.status for how, trial in trials.items()} == {
        "slow": "failed",
        "killed": "failed",
        "memory": "failed",
        "well": "done",
    }
    assert "it ran longer than timeout_s=6" in trials["slow"].reason
    assert "exit code 5" in trials["killed"].reason
    assert "resources.memory_bytes=400000000" in trials["memory"].reason


def test_the_batches_of_a_sweep_share_their_processes(tmp_path):
    done = run(
        tmp_path, "x=range(0,6)", "hydra/sweeper=optcore", "hydra/sweeper/searcher=grid", "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.store=store.db", "hydra.sweeper.report=false", "hydra.launcher.n_workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len({seen(tmp_path, number).pid for number in range(6)}) <= 2


def test_ranks_of_lightning_run_their_job_alone(tmp_path):
    command = [
        sys.executable, "-m", "lightning_optcore.cli", "train", "-m", "hydra/launcher=optcore", "strategy=ddp",
        "hydra.launcher.n_workers=1", "trainer=cpu", "trainer.devices=2", "trainer.max_epochs=1", "model=mlp",
        "model.width=4,8", "data=digits", "test=false", "measure.rounds=2", "report.enabled=false",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        runs = sorted(store.runs(), key=lambda run: run.id)
    assert [(run.status, run.config["model"]["width"]) for run in runs] == [("done", 4), ("done", 8)]
    # A rank that ran the whole sweep would have begun a folder of its own.
    (sweep,) = (tmp_path / "outputs" / "train").iterdir()
    assert sorted(folder.name for folder in sweep.iterdir() if folder.is_dir()) == ["0", "1"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_ends_early_leaves_no_job(tmp_path, sent):
    command = [sys.executable, str(APP), "-m", "how=slow", "x=1,2", "hydra.launcher.n_workers=2"]
    began = tmp_path / "began.txt"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True) as sweep:
        wait_for(lambda: began.exists() and len(began.read_text().splitlines()) == 2, sweep)
        workers = [psutil.Process(int(line.split()[1])) for line in began.read_text().splitlines()]
        sweep.send_signal(sent)
        sweep.communicate(timeout=30)
    assert sweep.returncode == -sent
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.launcher.executor=slurm", "hydra.launcher.executor='slurm': expected local or ray"),
        ("hydra.launcher.address=10.0.0.1:6379", "hydra.launcher.address='10.0.0.1:6379': executor=local has none"),
        ("hydra.launcher.n_workers=0", "hydra.launcher.n_workers=0: expected a positive whole number"),
        ("+hydra.launcher.scheduling.ageing_s=0", "hydra.launcher.scheduling.ageing_s=0: expected seconds above 0"),
        ("hydra.launcher.resources.cpu=4096", "hydra.launcher.resources: no node has cpu=4096"),
        ("+hydra.launcher.resources.ram=1", "hydra.launcher.resources.ram=1: unknown"),
        ("hydra.launcher.timeout_s=0", "timeout_s=0.0: expected a number above 0"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, override, message):
    done = run(tmp_path, override)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_cluster_says_itself_how_many():
    with pytest.raises(LauncherError, match="n_workers=2: the nodes of a cluster say how many"):
        executor_of("ray", n_workers=2)


def test_an_amount_of_null_is_left_to_be_estimated():
    assert asked({"cpu": 1, "memory_bytes": None, "labels": {}}) == {"cpu": 1, "labels": {}}


def test_a_job_that_was_lost_is_returned_as_hydra_returns_one_that_failed():
    config = OmegaConf.create({"x": 1, "hydra": {"job": {"name": "app"}, "overrides": {"task": ["x=1"]}}})
    lost = job_return(config, JobStatus.FAILED, JobLostError("its node was lost"))
    assert isinstance(lost, JobReturn) and lost.cfg == {"x": 1} and lost.overrides == ["x=1"]
    with pytest.raises(JobLostError, match="its node was lost"):
        _ = lost.return_value


def test_a_folder_that_is_not_on_the_machine_is_named(tmp_path):
    program = pickle.loads(pickle.dumps(Program(str(tmp_path / "elsewhere"), "app.py", (), None)))
    before = list(sys.argv)
    told = "elsewhere: the folder in which the jobs were started is not on"
    with pytest.raises(FileNotFoundError, match=told), in_place_of(program, ["app.py"]):
        pass
    assert sys.argv == before
