"""A command of ``optcore`` as a job: a process of its own, that ends with the worker that started it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

_LAST_LINES = 40
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class CommandError(RuntimeError):
    """A command that ended with an exit code other than 0."""


def run_command(words: Sequence[str], directory: str) -> dict[str, Any]:
    """Run ``optcore`` in a folder; what it prints, this process prints.

    Args:
        words: The job and its overrides.
        directory: Where it runs.

    Returns:
        ``{"exit_code": 0, "host": ..., "pid": ...}``; by host and process its runs are found in the store.

    Raises:
        CommandError: If it fails, with the last lines that it printed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_optcore.cli", *words],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=end_with_this_process(),  # noqa: PLW1509 - one call of the kernel, looked up before
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    assert process.stdout is not None
    for line in process.stdout:
        last.append(line)
        print(line, end="", flush=True)
    code = process.wait()
    if code == -signal.SIGKILL or any("MemoryError" in line for line in list(last)[-3:]):
        # What the kernel does to a process when memory runs out, and Python before that.
        raise MemoryError(f"the command {_how(code)}:\n{''.join(last)}")
    if code:
        raise CommandError(f"the command {_how(code)}{_said(words[0], last)}:\n{''.join(last)}")
    return {"exit_code": 0, "host": platform.node(), "pid": process.pid}


def _said(job: str, last: Sequence[str]) -> str:
    """Return the one line in which a command says what is wrong, if it does."""
    lines = [line.strip() for line in last if line.startswith(f"optcore {job}: ")]
    return f" ({lines[-1]})" if lines else ""


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def end_with_this_process() -> Callable[[], None] | None:
    """Return what a child calls before it begins, to end when this process does; ``None`` where no kernel does that."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up before the fork: after it, nothing is safe but the call itself.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tell_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return tell_the_kernel
