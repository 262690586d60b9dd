"""Peak memory of a piece of work: allocator statistics on CUDA, the resident high-water mark on Linux."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that ``work`` held at its peak beyond what was held before.

    On the CPU this is resident memory, read from the kernel's high-water mark, after the allocator
    gave its free pages back: pages that ``work`` finds resident already are not counted, so call it
    before the same work ran many times. ``None`` where the platform has no resettable mark (macOS, Windows).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if not _reset_high_water_mark():
        work()
        return None
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _reset_high_water_mark() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # 5 resets the peak resident set size of the process (proc(5), since Linux 4.0).
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
