"""Runs Python in processes that are forked from one which has torch and Lightning loaded: seconds less for each.

What a process loads, and when, is tested in processes of their own (test_packaging.py, test_cli.py).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["lightning.pytorch", "lightning_optcore.callbacks", "lightning_optcore.strategies", "lightning_optcore.jobs.train"]
)


class Running:
    """A program that runs: the part of ``subprocess.Popen`` that tests use.

    Args:
        command: ``sys.executable``, and then ``-m MODULE``, ``-c CODE`` or a script, and its arguments.
        cwd: The folder that it runs in.
        env: Its whole environment.
        stdout: Where its output goes; thrown away by default.
        stderr: The same of its errors.
        start_new_session: Whether it leads a process group of its own.
    """

    def __init__(
        self,
        command: Sequence[Any],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Path | None = None,
        stderr: Path | None = None,
        start_new_session: bool = False,
    ) -> None:
        words = [str(word) for word in command]
        assert words[0] == sys.executable
        files = [str(file or os.devnull) for file in (stdout, stderr)]
        place = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        self._process = PROCESSES.Process(target=_program, args=(words[1:], *place, files, start_new_session))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()

    def poll(self) -> int | None:
        """Return the exit code, or ``None`` while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout or 0)
        return self._process.exitcode


def run(
    command: Sequence[Any],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 250,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program, and return what ``subprocess.run(..., capture_output=True, text=True)`` would."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        running = Running(command, cwd=cwd, env=env, stdout=files[0], stderr=files[1])
        try:
            code = running.wait(timeout)
        except subprocess.TimeoutExpired:
            running.kill()
            raise
        done = subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))
    if check:
        done.check_returncode()
    return done


def _program(
    arguments: list[str], cwd: str, env: dict[str, str], files: Sequence[str], start_new_session: bool
) -> None:
    if start_new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if arguments[0] == "-m":
            sys.path.insert(0, cwd)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        # multiprocessing leaves without them.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
