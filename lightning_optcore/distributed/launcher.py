"""Starts the other ranks of a job, and of that job alone, where Hydra runs many."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

# What Lightning leaves in the environment of the process that launched the others.
_LEFT = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The job of a multirun whose ranks were started last by this process.
_last_job: list[int] = []


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, for every job of a multirun.

    Lightning starts ranks with the arguments of this process. Those of a multirun would have each rank run the whole
    sweep again; what the first job left in the environment would have the second one wait for ranks that are gone.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks, and call a function on each."""
        if _is_multirun():
            _forget_the_last_job()
        return super().launch(function, *args, trainer=trainer, **kwargs)

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
    command += _flags(sys.argv[1:])
    command += [*config.overrides.task]
    command += [one for one in config.overrides.hydra if not one.startswith("hydra.mode=")]
    command += [
        "hydra.mode=RUN",
        f'hydra.run.dir="{config.runtime.output_dir}"',
        f"hydra.job.name={config.job.name}_rank{local_rank}",
        "hydra.output_subdir=null",
    ]
    return command, config.runtime.cwd


def _flags(arguments: Sequence[str]) -> list[str]:
    """Return the flags that say which configuration is meant, with their values."""
    kept, takes = [], ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
    for i, argument in enumerate(arguments):
        if argument.startswith(("--config-", "-cp=", "-cn=", "-cd=")) and "=" in argument:
            kept.append(argument)
        elif argument in takes:
            kept += [argument, *arguments[i + 1 : i + 2]]
    return kept
