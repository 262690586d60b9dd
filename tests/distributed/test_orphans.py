"""Processes that are killed, and what they had forked."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

# Each forked process tells its name and its number, and waits.
BEGIN = """
import os, threading, time
from lightning_optcore.distributed.orphans import end_with_parent, take_forks_along
def fork(name, then=lambda: None):
    if os.fork() == 0:
        then()
        os.write(1, b"%s %d\\n" % (name.encode(), os.getpid()))
        time.sleep(100)
"""


def started(program: str, forks: int) -> tuple[subprocess.Popen[bytes], dict[str, psutil.Process]]:
    parent = subprocess.Popen([sys.executable, "-c", BEGIN + program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    told = [parent.stdout.readline().decode().split() for _ in range(forks)]
    return parent, {name: psutil.Process(int(pid)) for name, pid in told}


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # Whoever takes orphans over may reap them late.
    except psutil.NoSuchProcess:
        return False


def left(parent: subprocess.Popen[bytes], forks: dict[str, psutil.Process], seconds: float) -> list[str]:
    """Kill a process, and return which of those that it forked are alive after a while."""
    parent.kill()
    parent.wait()
    psutil.wait_procs(list(forks.values()), timeout=seconds)
    names = [name for name, process in forks.items() if lives(process)]
    for name in names:
        forks[name].kill()
    return names


def test_forks_and_their_forks_die_with_a_process():
    parent, forks = started("take_forks_along(); fork('child', lambda: fork('grandchild')); time.sleep(100)", 2)
    assert sorted(forks) == ["child", "grandchild"]
    assert left(parent, forks, 5) == []


def test_what_a_thread_forks_outlives_that_thread():
    program = "t = threading.Thread(target=fork, args=['threads']); t.start(); t.join(); fork('main'); time.sleep(100)"
    parent, forks = started(f"take_forks_along(); {program}", 2)
    assert left(parent, forks, 1) == ["threads"]


@pytest.mark.parametrize(("then", "alive"), [("end_with_parent", []), ("int", ["child"])])
def test_a_process_ends_with_its_parent(then, alive):
    parent, forks = started(f"fork('child', {then}); time.sleep(100)", 1)
    assert left(parent, forks, 3) == alive
