"""Where the kernel says what this process's cgroup may use, and what it uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroup_files() -> dict[str, str]:
    """Return the files of this process's cgroup, version 2 or 1: memory limit and use, CPU throttling."""
    found: dict[str, str] = {}
    for name, base in _cgroups():
        for key, version_2, version_1 in (
            ("memory_limit", "memory.max", "memory.limit_in_bytes"),
            ("memory_now", "memory.current", "memory.usage_in_bytes"),
            ("memory_stat", "memory.stat", "memory.stat"),
            ("cpu_stat", "cpu.stat", "cpu.stat"),
        ):
            if name and not key.startswith(name):
                continue
            for file in (version_2, version_1):
                if key not in found and (base / file).exists():
                    found[key] = str(base / file)
    return found


def _cgroups() -> Iterator[tuple[str, Path]]:
    """Yield (controller, folder): of version 2 the controller is empty, since one folder has them all."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in ("", "memory", "cpu"):
                # Inside a container the path is that of the host, and the folder is the root itself.
                for folder in (root / controller / path.lstrip("/"), root / controller):
                    if folder.is_dir():
                        yield controller, folder
                        break
