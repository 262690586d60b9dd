"""Launches the jobs of a multirun on an executor: one for the whole sweep, however many batches that has."""

from __future__ import annotations

import atexit
import logging
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from lightning_optcore.executor import Executor, JobError, JobHandle, LocalExecutor, RayExecutor
from lightning_optcore.option_values import is_whole
from lightning_optcore.store_database import without_passwords
from lightning_optcore.sweeps.hydra_job import HydraJob, Program, job_return, returned_of

log = logging.getLogger(__name__)


class LauncherError(ValueError):
    """An option of a launcher that cannot be; the message names the key, the value and what would be right."""


@dataclass(frozen=True)
class LauncherOptions:
    """What ``hydra.launcher`` says; ``hydra_plugins.lightning_optcore.launcher`` describes it."""

    executor: str = "local"
    address: str | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    max_retries: int = 3
    timeout_s: float | None = None
    n_workers: int | None = None
    scheduling: Mapping[str, Any] = field(default_factory=dict)


def executor_of(
    executor: str,
    *,
    address: str | None = None,
    n_workers: int | None = None,
    resources: Mapping[str, Any] | None = None,
    scheduling: Mapping[str, Any] | None = None,
    key: str = "",
) -> Executor:
    """Return an executor whose jobs are of one program alone and end with it.

    Args:
        executor: ``"local"`` or ``"ray"``.
        address: Of a Ray cluster.
        n_workers: So many jobs at once, of a local one.
        resources: Of each job.
        scheduling: Options of :class:`~lightning_optcore.executor.Scheduling`.
        key: Where these options are in the configuration, for messages: ``"hydra.launcher."``.

    Raises:
        LauncherError: If an option is unknown or out of range.
        ExecutorError: If the cluster cannot be used.
    """
    if executor not in ("local", "ray"):
        raise LauncherError(f"{key}executor={executor!r}: expected local or ray")
    if executor == "local" and address is not None:
        raise LauncherError(f"{key}address={address!r}: executor=local has none; expected executor=ray, or null")
    if executor == "ray" and n_workers is not None:
        raise LauncherError(f"{key}n_workers={n_workers!r}: the nodes of a cluster say how many; expected null")
    if n_workers is not None and not is_whole(n_workers, least=1):
        raise LauncherError(f"{key}n_workers={n_workers!r}: expected a positive whole number, or null")
    queue = f"sweep-{uuid.uuid4().hex}"
    try:
        if executor == "ray":
            return RayExecutor(address, queue=queue, scheduling=scheduling)
        together = {} if n_workers is None else {"cpu": n_workers * float((resources or {}).get("cpu") or 1)}
        return LocalExecutor(together, queue=queue, scheduling=scheduling)
    except (TypeError, ValueError) as error:
        raise LauncherError(f"{key}{error}") from error


def asked(resources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resources that are asked for; an amount of ``None`` is left to be estimated."""
    return {name: amount for name, amount in resources.items() if amount is not None}


class JobLauncher:
    """Launches the jobs of one sweep.

    Args:
        options: What ``hydra.launcher`` says.
        context: Hydra's.
        task_function: The user's.
        config: The sweep's configuration.
    """

    def __init__(
        self,
        options: LauncherOptions,
        context: HydraContext,
        task_function: Callable[[DictConfig], Any],
        config: DictConfig,
    ) -> None:
        self._options, self._context = options, context
        self._task_function, self._config = task_function, config
        self._executor: Executor | None = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run jobs, and return how they ended, in their order.

        A job that was lost, ran too long or took too much memory is one that failed: the others go on.

        Raises:
            ResourcesError: If no node has what a job needs.
        """
        setup_globals()
        hydra = self._config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        folder = Path(str(hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        if hydra.sweep.get("mode") is not None:
            folder.chmod(int(str(hydra.sweep.mode), 8))
        configs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            log.info("\t#%d : %s", number, without_passwords(" ".join(filter_overrides(overrides))))
            configs.append(self._composed(number, overrides))
        executor = self._opened()
        try:
            handles = self._submitted(executor, configs)
            executor.wait(handles)
        except BaseException:
            # Of an interrupt, too: what runs ends with the sweep.
            self.close()
            raise
        found = [_returned(handle, config) for handle, config in zip(handles, configs, strict=True)]
        for handle in handles:
            executor.forget(handle)
        return found

    def close(self) -> None:
        """End what runs; a later call of :meth:`launch` begins anew."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return config

    def _opened(self) -> Executor:
        if self._executor is None:
            options = self._options
            self._executor = executor_of(
                options.executor,
                address=options.address,
                n_workers=options.n_workers,
                resources=options.resources,
                scheduling=options.scheduling,
                key="hydra.launcher.",
            )
            # Hydra tells no launcher that its sweep has ended. At the end of the program before Ray's own ending:
            # what is registered last comes first.
            atexit.register(self._executor.close)
            weakref.finalize(self, _close_soon, self._executor).atexit = False
        return self._executor

    def _submitted(self, executor: Executor, configs: Sequence[DictConfig]) -> list[JobHandle]:
        options, program, singletons = self._options, Program.this(), Singleton.get_state()
        return [
            executor.submit(
                HydraJob(self._context, self._task_function, config, singletons, program),
                kind=str(config.hydra.job.name),
                priority=options.priority,
                resources=asked(options.resources),
                timeout_s=options.timeout_s,
                max_retries=options.max_retries,
            )
            for config in configs
        ]


def _close_soon(executor: Executor) -> None:
    # From whatever thread frees the launcher, maybe one that the executor itself waits for.
    threading.Thread(target=executor.close, name="optcore-closing").start()


def _returned(handle: JobHandle, config: DictConfig) -> JobReturn:
    try:
        return returned_of(handle.result())
    except JobError as error:
        log.warning("%s", str(error).splitlines()[0])
        return job_return(config, JobStatus.FAILED, error)
    except Exception as error:
        # Something of the task's that exists in its process only.
        reason = f"what the job returned cannot be read here: {type(error).__name__}: {error}"
        return job_return(config, JobStatus.FAILED, RuntimeError(reason))
