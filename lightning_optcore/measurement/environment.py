"""On what a measurement was taken."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from lightning_optcore.measurement.hardware import cpu_name

_DISTRIBUTIONS = ("torch", "lightning", "onnxruntime", "lightning-optcore")


def hardware_name(device: torch.device) -> str:
    """Return the processor with its logical cores, and the accelerator where one is used."""
    name = f"{cpu_name()}, {os.cpu_count()} logical cores"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    return name


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that take part in a measurement."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
