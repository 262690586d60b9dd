"""What the jobs of these tests do: found by name, in whatever process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def note(folder: str, name: str, seconds: float = 0.0) -> str:
    """Leave a line that this began, and one that it ended."""
    place = os.environ.get("RAY_NODE_ID", "") or "here"
    _add(folder, f"begin {name} {time.time():.3f} {os.getpid()} {place}")
    time.sleep(seconds)
    _add(folder, f"end {name} {time.time():.3f} {os.getpid()} {place}")
    return name


def notes(folder: Path) -> list[list[str]]:
    """Return the lines, as words."""
    path = folder / "notes"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def _add(folder: str, line: str) -> None:
    # Short enough to be written at once, whoever else writes.
    with (Path(folder) / "notes").open("a") as file:
        file.write(line + "\n")


def wait_for(path: str, seconds: float = 60.0) -> str:
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)
    return path


def hold(begun: str, until: str) -> int:
    """Say that this has begun, and wait; its children go with it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    Path(begun).write_text(f"{os.getpid()} {child.pid}")
    wait_for(until, 120)
    child.kill()
    return os.getpid()


def fail() -> None:
    raise ValueError("no good")


def fill(megabytes: int, seconds: float = 5.0) -> int:
    block = bytearray(megabytes * 2**20)
    time.sleep(seconds)
    return len(block)


def end_process(code: int) -> None:
    os._exit(code)


def no_space(where: str) -> str:
    """Find the disk full on one node, by its label."""
    import ray

    here = ray.get_runtime_context().get_node_labels().get("node_id")
    if here == where:
        raise OSError(errno.ENOSPC, "No space left on device")
    return str(here)


def threads() -> list[Any]:
    return [os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES")]
