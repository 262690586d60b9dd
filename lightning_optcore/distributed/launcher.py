"""Starts the other ranks of a job, and of that job alone, where Hydra runs many; all run under a guard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, subprocess_script
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lightning_optcore.distributed.arguments import arguments_of_one_job
from lightning_optcore.distributed.guard import RankGuard

_GRACE = 30.0  # seconds in which a process ends that knows of another one's failure
# What Lightning leaves in the environment of the process that launched the others.
_LEFT = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The job of a multirun whose ranks were started last by this process.
_last_job: list[int] = []


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of processes that run the script again, or of the one that torchrun started.

    Lightning starts ranks with the arguments of this process. Those of a multirun would have each rank run the whole
    sweep again; what the first job left in the environment would have the second one wait for ranks that are gone.
    """

    guard: RankGuard

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the ranks, and call a function on each."""
        if _is_multirun():
            _forget_the_last_job()
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            _PatientObserver(self.guard, self.procs).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs) if trainer is None else self.guard.run(trainer, function, *args, **kwargs)

    def _call_children_scripts(self) -> None:
        if not _is_multirun():
            super()._call_children_scripts()
            return
        stock = subprocess_script._hydra_subprocess_cmd
        subprocess_script._hydra_subprocess_cmd = command_of_one_job
        try:
            super()._call_children_scripts()
        finally:
            subprocess_script._hydra_subprocess_cmd = stock


class GuardedProcesses(_MultiProcessingLauncher):
    """Lightning's launcher by ``multiprocessing``."""

    guard: RankGuard

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the ranks, and call a function on each."""
        guarded = function if trainer is None else partial(self.guard.run, trainer, function)
        return super().launch(guarded, *args, trainer=trainer, **kwargs)


class _PatientObserver(_ChildProcessObserver):
    """Kills this process after another one has died, as Lightning's does, but not while it saves and ends itself."""

    def __init__(self, guard: RankGuard, child_processes: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(main_pid=os.getpid(), child_processes=child_processes)
        self._guard = guard

    def _terminate_all(self) -> None:
        if self._guard.training:
            time.sleep(self._guard.timeout + _GRACE)
        while self._guard.saving:
            time.sleep(1.0)
        super()._terminate_all()


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _forget_the_last_job() -> None:
    number = int(HydraConfig.get().job.num)
    if _last_job and _last_job[0] != number:
        for name in _LEFT:
            os.environ.pop(name, None)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    _last_job[:] = [number]


def command_of_one_job(local_rank: int) -> tuple[Sequence[str], str]:
    """Return the command of a rank that runs the current job of a multirun, and the folder to run it in."""
    import __main__

    config = HydraConfig.get()
    if __main__.__spec__ is None:
        command = [sys.executable, os.path.abspath(sys.argv[0])]  # noqa: PTH100 - as it was called, links and all
    else:
        command = [sys.executable, "-m", __main__.__spec__.name]
    command += arguments_of_one_job(config, sys.argv[1:])
    command += [
        f'hydra.run.dir="{config.runtime.output_dir}"',
        f"hydra.job.name={config.job.name}_rank{local_rank}",
        "hydra.output_subdir=null",
    ]
    return command, config.runtime.cwd
