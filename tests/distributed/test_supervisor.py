"""Replicas that are small programs: who is started again, and with what code the job ends."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.distributed import supervisor
from lightning_optcore.distributed.supervisor import STORE, SupervisorLauncher, active_key, supervise

# Without Lightning, which takes long to import.
BEGIN = f"""
import os, sys, time
from pathlib import Path
rank, marks = os.environ["LOCAL_RANK"], Path(sys.argv[1])
def active():
    from torch.distributed import TCPStore
    host, port = os.environ["{STORE}"].rsplit(":", 1)
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    store.set("{active_key(0)[:-1]}" + str(os.getpid()), "1")
def mark(name): (marks / f"{{name}}{{rank}}").touch()
def wait_for(pattern, times=1):
    while len(list(marks.glob(pattern))) < times: time.sleep(0.01)
def mark_pid(): mark(f"{{os.getpid()}}-pid")
def reaped(rank):
    "Its process stays in the table until the supervisor has asked for its code."
    wait_for(f"*-pid{{rank}}")
    pid, = marks.glob(f"*-pid{{rank}}")
    while Path("/proc", pid.name.split("-")[0]).exists(): time.sleep(0.01)
"""


def run(tmp_path: Path, *programs: str, max_restarts: int = 1) -> int:
    commands = [[sys.executable, "-c", BEGIN + textwrap.dedent(program), str(tmp_path)] for program in programs]
    return supervise(commands, max_restarts=max_restarts, timeout=30, heartbeat_timeout=1)


DIES_ONCE = """
    if not (marks / "died1").exists():
        active(); wait_for("there0"); mark("died"); os.kill(os.getpid(), 9)
    mark("again")
"""


def test_one_that_dies_is_started_again(tmp_path):
    assert run(tmp_path, "active(); mark('there'); wait_for('again1')", DIES_ONCE) == 0


def test_restarts_end_and_the_others_go_on(tmp_path):
    dies = "wait_for('there0'); mark(f'died{os.getpid()}-'); sys.exit(3)"
    stays = "active(); mark('there'); wait_for('died*-1', times=2); time.sleep(1); mark('end')"
    assert run(tmp_path, stays, dies, max_restarts=1) == 0
    assert len(list(tmp_path.glob("died*-1"))) == 2
    assert (tmp_path / "end0").exists()


@pytest.mark.parametrize(
    ("programs", "code"),
    [
        pytest.param(["wait_for('never')", "sys.exit(5)"], 5, id="nobody had begun"),
        pytest.param(["wait_for('never')", "active(); os.kill(os.getpid(), 9)"], 137, id="the only one that knew"),
        pytest.param(
            ["active(); mark('there'); reaped(1); sys.exit(4)", "mark_pid(); active(); wait_for('there0')"],
            4,
            id="failed after the end",
        ),
        pytest.param(["wait_for('never')", "active(); time.sleep(0.5)"], 0, id="came too late"),
    ],
)
def test_the_code_of_the_job(tmp_path, programs, code):
    assert run(tmp_path, *programs) == code


def test_a_multirun_is_refused(monkeypatch):
    monkeypatch.setattr(supervisor, "_is_multirun", lambda: True)
    with pytest.raises(MisconfigurationException, match="expected a run for each job"):
        SupervisorLauncher(2, run=lambda *_, **__: 0).launch(lambda: None)


def test_the_supervisor_ends_with_the_code_of_its_replicas(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1"])
    started = []
    with pytest.raises(SystemExit, match="7"):
        SupervisorLauncher(2, run=lambda commands, cwd: started.extend(commands) or 7).launch(lambda: None)
    assert [command[-2:] for command in started] == [["--lr", "0.1"]] * 2
