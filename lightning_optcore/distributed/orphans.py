"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>; torchft is for Linux only
_POLL_SECONDS = 1.0


def end_with_parent() -> None:
    """End this process when the one that started it has ended."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def take_forks_along() -> None:
    """Have those that the calling thread forks killed at once when this process dies.

    They inherit its connections, as the workers of a DataLoader do: as long as they live, whoever is at the other end
    waits for an answer. Those that another thread forks live on, as Linux would kill them when that thread ends.
    """
    forked = partial(_die_with, [os.getpid()], threading.get_ident(), ctypes.CDLL(None).prctl)
    os.register_at_fork(after_in_child=forked)


def _die_with(forking: list[int], thread: int, prctl: Callable[[int, int], int]) -> None:
    parent, forking[0] = forking[0], os.getpid()  # It may fork, too.
    # A fork keeps the number of the thread.
    if threading.get_ident() == thread:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
