"""Runs programs in processes that are forked from one which has torch and Lightning loaded: seconds less for each.

What a process loads, and when, is tested in processes of their own (test_packaging.py, test_cli.py).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["lightning.pytorch", "lightning_optcore.callbacks", "lightning_optcore.strategies", "lightning_optcore.jobs.train"]
)


def run_program(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], seconds: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` (``-m module ...`` or ``-c code``), and return what ``subprocess.run`` would."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_program, args=(list(arguments), cwd, dict(env), files))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), seconds)
        return subprocess.CompletedProcess(list(arguments), process.exitcode, *(file.read_text() for file in files))


def _program(arguments: list[str], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    # As Python itself has it: the current folder, or none for a module's.
    sys.path.insert(0, "" if arguments[0] == "-c" else str(cwd))
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            assert arguments[0] == "-c"
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    finally:
        # multiprocessing leaves without them.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
