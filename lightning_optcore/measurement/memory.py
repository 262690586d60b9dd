"""Peak memory of a piece of work: what the allocator handed out (torch), or the resident high-water mark (Linux)."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_allocated(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that torch allocated for ``work`` at its peak, beyond what it held before.

    On the CPU every allocation is recorded, so that the figure is the same each time. ``None`` while another
    profiler runs.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    # Kineto writes notes to stderr unless it is told not to before its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
    except RuntimeError:
        return None
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def peak_resident(work: Callable[[], object]) -> int | None:
    """Return the bytes by which ``work`` raised the process's resident memory at its peak.

    It is read from the kernel's high-water mark after the C allocator gave its free pages back, and good to some
    ten kilobytes. ``None`` where the platform has no resettable mark (macOS, Windows).
    """
    # Libraries, thread pools and arenas are set up once, by whoever comes first: not part of the figure.
    work()
    if not _reset_high_water_mark():
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
