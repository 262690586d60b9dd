"""What a machine uses, and how fast it computes."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil


def machine_usage() -> dict[str, float]:
    """Return what is used on this machine: percent of processors, memory and GPUs, and bytes free for files."""
    usage = {
        # Since the call before; the first one says 0.
        "cpu_percent": psutil.cpu_percent(),
        "memory_percent": float(psutil.virtual_memory().percent),
        "disk_free_bytes": float(psutil.disk_usage(tempfile.gettempdir()).free),
    }
    with _nvml() as nvml:
        if nvml is not None:
            # Not every GPU tells how busy it is.
            with contextlib.suppress(nvml.NVMLError):
                handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
                busy = [float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in handles]
                if busy:
                    usage["gpu_percent"] = sum(busy) / len(busy)
    return usage


def gpu_names() -> list[str]:
    """Return the numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    with _nvml() as nvml:
        return [] if nvml is None else [str(i) for i in range(nvml.nvmlDeviceGetCount())]


def benchmark(seconds: float = 0.05) -> float:
    """Return how many million products of matrices of 64 x 64 one core computes in a second."""
    square = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        square @ square
        count += 1
    return count / (time.perf_counter() - began) / 1e6


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Give NVML, or ``None`` where there is no driver of NVIDIA's."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
