from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faulty_fit import run
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("faulty_fit.py")


def start(folder: Path, *options: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the fit as a user would; all its processes are to have ended when it has."""
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    if torchrun:
        elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        command = [sys.executable, *elastic, *command[1:]]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=100)
        assert not left(process.pid), "processes are left"
    finally:
        for one in left(process.pid, wait=0):
            one.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def left(session: int, wait: float = 10.0) -> list[psutil.Process]:
    """Return the processes of a session that have not ended."""
    until = time.monotonic() + wait
    while True:
        found = []
        for one in psutil.process_iter(["status"]):
            try:
                if os.getsid(one.pid) == session and one.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(one)
            except ProcessLookupError:
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def log(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"log-{rank}.jsonl").read_text().splitlines()]


def done(folder: Path) -> list[tuple[Any, ...]]:
    names = ("what", "epoch", "batch", "total_batch", "step", "logged_step")
    # What was done twice, as batches whose gradients were accumulated only, counts once if it was the same.
    return list(dict.fromkeys(tuple(line[name] for name in names) for line in log(folder)))


def equal_weights(*folders: Path) -> None:
    one, other = (torch.load(folder / "final.pt", weights_only=True) for folder in folders)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_without_torchrun_the_failure_is_named_and_the_state_is_kept(tmp_path, rank):
    ended = start(tmp_path, "--fail=die", f"--fail-rank={rank}")
    assert ended.returncode != 0
    named = rf"RankFailure: rank {rank} \([^,]+, pid \d+\) died after step \d in \w+\. Resume with ckpt_path='(.+)'"
    found = re.search(named, ended.stderr)
    assert found, ended.stderr
    checkpoint = torch.load(found[1], weights_only=True)
    assert checkpoint["global_step"] == 7
    assert len(checkpoint["optimizer_states"]) == 1


def test_torchrun_goes_on_by_itself(tmp_path):
    ended = start(tmp_path, "--fail=die", torchrun=True)
    assert ended.returncode == 0, ended.stderr
    steps = [(line["restart"], line["step"]) for line in log(tmp_path) if line["what"] == "batch"]
    assert steps == [(0, step) for step in range(1, 8)] + [(1, step) for step in range(8, 21)]
    assert not (tmp_path / "rescues").exists()


@pytest.mark.parametrize("how", ["stop", "hang"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stalls_is_named_and_ended_and_the_state_is_kept(tmp_path, how, rank):
    ranks = run_ranks(partial(run, restart=0), str(tmp_path), f"--fail={how}", f"--fail-rank={rank}", dying=[rank])
    assert ranks[rank] == -signal.SIGKILL
    known = ranks[1 - rank]
    assert re.match(rf"rank {rank} \([^,]+, pid \d+\) stalled after step 7 in training_step: ", known)
    assert f"step=7-rank={1 - rank}.ckpt" in known


def test_an_error_of_one_rank_is_named_by_the_other(tmp_path):
    known, said = run_ranks(partial(run, restart=0), str(tmp_path), "--fail=raise", "--fail-rank=1")
    assert said == "no such label"
    assert re.match(r"rank 1 .+ failed after step 7 in training_step: ValueError: no such label. Resume with", known)


CASES = {
    "within an epoch": ["--fail-step=7"],
    "at the beginning of an epoch": ["--fail-step=10"],
    "at the beginning of an epoch, of a fit that ends by steps": [
        "--fail-step=10",
        "--max-epochs=-1",
        "--max-steps=16",
    ],
    "within accumulated batches": ["--fail-step=7", "--accumulate=2", "--max-epochs=3", "--fail-batch=15"],
    "in a validation": ["--fail-step=10", "--fail-in=validation_step"],
    "in a validation within an epoch": ["--fail-step=14", "--fail-in=validation_step", "--validate-every=4"],
}


@pytest.mark.parametrize(("case", "rank"), [(case, i % 2) for i, case in enumerate(CASES)])
def test_a_restart_does_what_was_not_done_and_ends_as_if_nothing_had_happened(tmp_path, case, rank):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    options = CASES[case]
    run_ranks(run, str(whole), *options)
    run_ranks(partial(run, restart=0), str(broken), "--fail=die", f"--fail-rank={rank}", *options, dying=[rank])
    run_ranks(partial(run, restart=1), str(broken), *options)
    assert done(broken) == done(whole)
    equal_weights(whole, broken)
    assert not (broken / "rescues").exists()


@pytest.mark.parametrize("communication", ["int8", "powersgd", "diloco"])
def test_what_a_way_to_communicate_remembers_is_rescued(tmp_path, communication):
    options = [str(tmp_path), f"--communication={communication}"]
    said = run_ranks(partial(run, restart=0), *options, "--fail=die", dying=[1])[0]
    assert "Resume with ckpt_path=" in said
    run_ranks(partial(run, restart=1), *options)
    # Of ranks that learn by themselves the other one goes on until it would exchange what it learned.
    rescued = int(said.split("step=")[1].split("-rank")[0])
    assert rescued >= 7
    steps = [(line["restart"], line["step"]) for line in log(tmp_path) if line["what"] == "batch"]
    assert steps == [(0, step) for step in range(1, rescued + 1)] + [(1, step) for step in range(rescued + 1, 21)]


def test_if_nobody_is_left_the_newest_checkpoint_of_the_user_is_resumed(tmp_path):
    options = [str(tmp_path), "--save-every=3", "--fail=die", "--fail-step=8", "--fail-rank=-1"]
    run_ranks(partial(run, restart=0), *options, dying=[0, 1])
    run_ranks(partial(run, restart=1), *options)
    steps = [(line["restart"], line["step"]) for line in log(tmp_path) if line["what"] == "batch"]
    assert steps == [(0, step) for step in range(1, 9)] + [(1, step) for step in range(7, 21)]


def test_a_run_of_the_same_name_does_not_resume_an_earlier_one(tmp_path):
    options = [str(tmp_path), "--fail=die", "--fail-rank=1"]
    run_ranks(partial(run, restart=0), *options, dying=[1])
    assert list(tmp_path.rglob("step=7-rank=0.ckpt"))
    run_ranks(partial(run, restart=0), *options, "--fail-step=0", dying=[1])
    run_ranks(partial(run, restart=1), *options)
    last = [line["step"] for line in log(tmp_path) if line["what"] == "batch" and line["restart"] == 1]
    assert last == list(range(1, 21))
