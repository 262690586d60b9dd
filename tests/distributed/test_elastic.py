"""Replicas die and come back: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

from lightning_optcore.distributed import elastic
from lightning_optcore.distributed.elastic import ElasticDDPStrategy
from lightning_optcore.store import Store

APP = Path(__file__).parent / "elastic_app.py"


class Job:
    def __init__(self, folder: Path, *options: object) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.output = folder / "output"
        environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
        self.process = subprocess.Popen(
            [sys.executable, APP, folder, *map(str, options)],
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    def pages(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"{rank}.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )

    def wait_until(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.output.read_text()[-3000:]
            time.sleep(0.05)

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> int:
        pid = self.pages(rank)[-1]["pid"]
        os.kill(pid, signum)
        return pid

    def finish(self, seconds: float = 150) -> dict[int, dict[str, Any]]:
        assert self.process.wait(seconds) == 0, self.output.read_text()[-3000:]
        return {int(path.stem): torch.load(path, weights_only=True) for path in self.folder.glob("*.pt")}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*options: object) -> Job:
        jobs.append(Job(tmp_path / str(len(jobs)), *options))
        return jobs[-1]

    yield start
    for one in jobs:
        # The supervisor ends its replicas.
        one.process.terminate()
        one.process.wait(60)


def together(pages: list[dict[str, Any]], pid: int, steps: int) -> bool:
    """Whether another process than `pid` did so many steps with all."""
    return sum(page["pid"] != pid and page["ranks"] == [0, 1] for page in pages) >= steps


@pytest.mark.parametrize(
    ("rank", "workers", "batches"), [(0, 0, 20), (1, 1, 20), pytest.param(1, 1, 1, id="joins at the first batch")]
)
def test_a_killed_replica_comes_back_and_the_other_one_loses_nothing(job, rank, workers, batches):
    run = job("--norm", "--workers", workers, "--batches", batches)
    run.wait_until(lambda: all(len(run.pages(r)) >= 25 for r in (0, 1)))
    killed = run.kill(rank)
    run.wait_until(lambda: together(run.pages(rank), killed, 45))
    (run.folder / "stop").touch()
    finals = run.finish()
    assert sorted(finals) == [0, 1]
    for key, value in finals[0]["weights"].items():
        assert torch.equal(value, finals[1]["weights"][key]), key
    survivor, other = run.pages(1 - rank), run.pages(rank)
    assert [page["step"] for page in survivor] == list(range(1, len(survivor) + 1))
    assert any(page["ranks"] == [1 - rank] for page in survivor)
    # Each is given what an undisturbed run would give it, before and after.
    for pages, number in ((survivor, 1 - rank), (other, rank)):
        for page in pages:
            sampler = DistributedSampler(range(batches * 32), num_replicas=2, rank=number, seed=0)
            sampler.set_epoch(page["epoch"])
            assert page["samples"] == list(sampler)[page["batch"] * 16 : (page["batch"] + 1) * 16]
    by_step = {page["step"]: page for page in survivor}
    for page in other:
        assert {**page, "pid": 0, "samples": 0} == {**by_step[page["step"]], "pid": 0, "samples": 0}
    assert finals[0]["metrics"]["val/acc"] == finals[1]["metrics"]["val/acc"] > 0.3


def test_the_last_one_validates_and_writes_the_checkpoints(job):
    run = job("--max-restarts", 0)
    run.wait_until(lambda: all(len(run.pages(rank)) >= 3 for rank in (0, 1)))
    run.kill(0)
    run.wait_until(lambda: len(run.pages(1)) > 50)
    (run.folder / "stop").touch()
    (rank, final), *others = run.finish().items()
    assert rank == 1 and not others
    assert "restarts are used up" in run.output.read_text()
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 20
    assert Path(final["best"]).is_file()


def test_a_job_without_replicas_fails(job):
    run = job()
    run.wait_until(lambda: all(len(run.pages(rank)) >= 3 for rank in (0, 1)))
    pids = [run.pages(rank)[-1]["pid"] for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert run.process.wait(60) == 128 + signal.SIGKILL
    assert "no other one is left" in run.output.read_text()


def test_an_error_before_the_training_ends_the_job_at_once(job):
    run = job("--fails")
    assert run.process.wait(150) == 1
    told = run.output.read_text()
    assert "ZeroDivisionError" in told and "started again" not in told


def test_one_that_stood_still_is_left_behind_and_begins_again(job):
    run = job("--timeout", 2)
    run.wait_until(lambda: all(len(run.pages(rank)) >= 5 for rank in (0, 1)))
    stopped = run.kill(1, signal.SIGSTOP)
    run.wait_until(lambda: run.pages(0)[-1]["ranks"] == [0])
    alone = len(run.pages(0))
    run.wait_until(lambda: len(run.pages(0)) > alone + 5)
    os.kill(stopped, signal.SIGCONT)
    run.wait_until(lambda: together(run.pages(1), stopped, 5))
    (run.folder / "stop").touch()
    finals = run.finish()
    assert torch.equal(finals[0]["weights"]["head.weight"], finals[1]["weights"]["head.weight"])
    assert "went on without this replica" in run.output.read_text()


def test_replicas_end_with_their_supervisor(job):
    run = job()
    run.wait_until(lambda: all(len(run.pages(rank)) >= 3 for rank in (0, 1)))
    pids = [run.pages(rank)[-1]["pid"] for rank in (0, 1)]
    run.process.kill()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not alive


def test_a_job_records_the_run_once(tmp_path):
    """The supervisor, which runs the command first, leaves no row of its own."""
    command = [sys.executable, "-m", "lightning_optcore.cli", "train", "strategy=optcore_elastic", "trainer=cpu"]
    command += ["trainer.devices=2", "trainer.max_epochs=1", "model.width=8", "model.depth=1", "report.enabled=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [f"paths.output_root={tmp_path}", "measure.rounds=3"]
    subprocess.run([*command, *options], env=environment, timeout=200, check=True, cwd=tmp_path)
    with Store(tmp_path / "optcore.db") as store:
        assert [run.status for run in store.runs()] == ["done"]
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1


@pytest.mark.parametrize("options", [("--accumulate", 2), ("--manual",)], ids=["accumulation", "manual"])
def test_undisturbed_it_trains_as_ddp_does(job, options):
    runs = [job("--strategy", strategy, "--max-steps", 12, "--pause", 0, *options) for strategy in ("elastic", "ddp")]
    ours, theirs = (run.finish(200) for run in runs)
    assert sorted(ours) == sorted(theirs) == [0, 1]
    for rank in (0, 1):
        assert ours[rank]["step"] == theirs[rank]["step"] == 12
        for key, value in theirs[rank]["weights"].items():
            torch.testing.assert_close(ours[rank]["weights"][key], value)
        assert ours[rank]["metrics"] == pytest.approx(theirs[rank]["metrics"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_restarts": -1}, "max_restarts=-1: expected a whole number"),
        ({"heartbeat_timeout": 0.1}, "heartbeat_timeout=0.1: expected 0.5 s or more"),
        ({"timeout": 1.0}, "timeout=1.0: expected seconds above heartbeat_timeout=1.0"),
    ],
)
def test_wrong_options_are_told_at_once(options, told):
    with pytest.raises(MisconfigurationException, match=told):
        ElasticDDPStrategy(**options)


def test_what_starts_processes_otherwise_is_told(monkeypatch):
    with pytest.raises(MisconfigurationException, match="num_nodes=2: the supervisor starts replicas on one machine"):
        Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=ElasticDDPStrategy())
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MisconfigurationException, match="without torchrun"):
        Trainer(accelerator="cpu", devices=2, strategy=ElasticDDPStrategy())


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(elastic, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"pip install 'lightning_optcore\[elastic\]'"):
        Trainer(accelerator="cpu", devices=2, strategy=ElasticDDPStrategy())
