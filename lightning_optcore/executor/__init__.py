"""Where many runs run: processes of this machine, or a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

if TYPE_CHECKING:
    from lightning_optcore.executor.executor import (
        Executor,
        ExecutorError,
        JobCancelledError,
        JobError,
        JobFailedError,
        JobHandle,
        JobLostError,
        JobOutOfMemoryError,
        JobTimeoutError,
    )
    from lightning_optcore.executor.local import LocalExecutor
    from lightning_optcore.executor.resources import Resources, ResourcesError
    from lightning_optcore.executor.scheduling import Scheduling
    from lightning_optcore.executor.work import WorkError

_HOME_OF = {
    "Executor": "executor",
    "ExecutorError": "executor",
    "JobCancelledError": "executor",
    "JobError": "executor",
    "JobFailedError": "executor",
    "JobHandle": "executor",
    "JobLostError": "executor",
    "JobOutOfMemoryError": "executor",
    "JobTimeoutError": "executor",
    "LocalExecutor": "local",
    "RayExecutor": "ray_cluster",
    "Resources": "resources",
    "ResourcesError": "resources",
    "Scheduling": "scheduling",
    "WorkError": "work",
}

__all__ = [
    "Executor",
    "ExecutorError",
    "JobCancelledError",
    "JobError",
    "JobFailedError",
    "JobHandle",
    "JobLostError",
    "JobOutOfMemoryError",
    "JobTimeoutError",
    "LocalExecutor",
    "RayExecutor",
    "Resources",
    "ResourcesError",
    "Scheduling",
    "WorkError",
]

__getattr__ = lazily(__name__, _HOME_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
