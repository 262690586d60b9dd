"""How a worker runs one attempt of a job, whichever executor it belongs to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lightning_optcore.executor.work import NotHereError, Work, pickled, same_in_json

# What a job can end as, beside being done.
ENDINGS = ("failed", "cancelled", "timed_out", "out_of_memory", "lost")
_WATCH_SECONDS = 0.25
_LONGEST_TRACEBACK = 4_000
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Order:
    """One attempt of a job, as a worker gets it.

    Args:
        job: Number of the job.
        attempt: Number of the attempt, from 1.
        work: What is run.
        threads: How many it may use.
        memory_limit_bytes: What it may take in working memory, or ``None``.
        search_path: Where the driver finds modules.
    """

    job: int
    attempt: int
    work: Work
    threads: int = 1
    memory_limit_bytes: int | None = None
    search_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Args:
        status: ``"done"``, one of ``ENDINGS``, or ``"interrupted"`` where its driver ended before it.
        stored: What it returned, in JSON; ``None`` where JSON has no word for it.
        value: What it returned, pickled, where JSON would change it.
        error: Why it is not done: a line, and below it where it came from.
        seconds: How long it ran.
        peak_memory_bytes: The most working memory that it had, with its child processes.
        elsewhere: Whether the node is at fault, and another one may do better.
    """

    status: str
    stored: str | None = None
    value: bytes | None = None
    error: str | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    elsewhere: bool = False


def run_order(order: Order, over_the_limit: Callable[[Outcome], Any]) -> Outcome:
    """Run an attempt.

    Args:
        order: What to run.
        over_the_limit: Is told, from another thread, when it takes more memory than it may; it ends this process.
    """
    began = time.monotonic()
    # Appended: the worker's own packages come first.
    sys.path.extend(path for path in order.search_path if path not in sys.path)
    _limit_threads(order.threads)
    with _watched(order.memory_limit_bytes, began, over_the_limit) as watch:
        outcome = _attempted(order.work)
    return Outcome(
        outcome.status,
        outcome.stored,
        outcome.value,
        outcome.error,
        seconds=time.monotonic() - began,
        peak_memory_bytes=watch.peak(),
        elsewhere=outcome.elsewhere,
    )


def _attempted(work: Work) -> Outcome:
    try:
        run = work.load()
    except NotHereError as error:
        return Outcome("failed", error=f"its code cannot be imported here: {error}", elsewhere=True)
    except Exception as error:
        return Outcome("failed", error=f"its code cannot be loaded here: {described(error)}", elsewhere=True)
    try:
        value = run()
        if same_in_json(value):
            return Outcome("done", json.dumps(value))
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            return Outcome("done", json.dumps(value, allow_nan=False), pickled(value))
        return Outcome("done", None, pickled(value))
    except MemoryError as error:
        return Outcome("out_of_memory", error=described(error))
    except OSError as error:
        # Another node has another disk.
        return Outcome("failed", error=described(error), elsewhere=error.errno == errno.ENOSPC)
    except SystemExit as end:
        if end.code in (0, None):
            return Outcome("done", "null")
        return Outcome("failed", error=f"SystemExit: {end.code}")
    except KeyboardInterrupt:
        return Outcome("cancelled", error="KeyboardInterrupt")
    except Exception as error:
        no_memory = "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)
        return Outcome("out_of_memory" if no_memory else "failed", error=described(error))


def described(error: BaseException) -> str:
    """Return an error in its first line, and below it where it came from."""
    where = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}\n{where[-_LONGEST_TRACEBACK:]}"


def _limit_threads(count: int) -> None:
    for name in _THREADS:
        os.environ[name] = str(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


class _Watch:
    """Knows the most memory that this process and its children had since it was made."""

    def __init__(self) -> None:
        self._sampled = 0
        self._here = psutil.Process()
        with contextlib.suppress(OSError):
            # From now on the kernel's own high-water mark counts anew (proc(5), Linux).
            Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        """Return what they have."""
        taken = 0
        for process in [self._here, *self._here.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                taken += process.memory_info().rss
        self._sampled = max(self._sampled, taken)
        return taken

    def peak(self) -> int:
        """Return the most that they had."""
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            mark = next(line for line in lines if line.startswith("VmHWM"))
            return max(self._sampled, int(mark.split()[1]) * 1024)
        return max(self._sampled, self._here.memory_info().rss)


@contextmanager
def _watched(limit: int | None, began: float, over_the_limit: Callable[[Outcome], Any]) -> Iterator[_Watch]:
    watch, ended = _Watch(), threading.Event()

    def look() -> None:
        while not ended.wait(_WATCH_SECONDS):
            taken = watch.now()
            if limit is not None and taken > limit and not ended.is_set():
                error = f"it had {taken} bytes of memory, resources.memory_bytes={limit}"
                over_the_limit(
                    Outcome("out_of_memory", error=error, seconds=time.monotonic() - began, peak_memory_bytes=taken)
                )

    thread = threading.Thread(target=look, name="optcore-memory", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
