"""One job of a Hydra multirun in a worker process, where it finds what it would find in the program itself."""

from __future__ import annotations

import importlib.machinery
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, read_write

from lightning_optcore.distributed.arguments import arguments_of_one_job
from lightning_optcore.executor.work import pickled


class JobTraceback(Exception):
    """Where an error came from, in the worker process in which it was raised."""

    def __init__(self, text: str) -> None:
        super().__init__(f"\n{text}")


@dataclass(frozen=True)
class Program:
    """How the program was started that runs the multirun.

    Args:
        directory: Its working folder.
        file: What was run, ``sys.argv[0]``.
        arguments: What came after it.
        module: Of ``python -m MODULE`` the module.
    """

    directory: str
    file: str
    arguments: tuple[str, ...]
    module: str | None

    @classmethod
    def this(cls) -> Program:
        """Return how this one was."""
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = os.path.abspath(sys.argv[0])  # noqa: PTH100 - as it was called, links and all
        return cls(os.getcwd(), file, tuple(sys.argv[1:]), None if spec is None else spec.name)  # noqa: PTH109


@dataclass(frozen=True)
class HydraJob:
    """Runs one job of a multirun.

    Args:
        context: Hydra's.
        task_function: The user's.
        config: Of the job, as it was composed.
        singletons: Hydra's global state and the resolvers of configurations.
        program: The one that runs the multirun.
    """

    context: HydraContext
    task_function: Callable[[DictConfig], Any]
    config: DictConfig
    singletons: Any
    program: Program

    def __call__(self) -> bytes:
        """Return what :func:`returned_of` reads: how it ended."""
        setup_globals()
        Singleton.set_state(self.singletons)
        HydraConfig.instance().set_config(self.config)
        self._place()
        argv = [self.program.file, *arguments_of_one_job(self.config.hydra, self.program.arguments)]
        with in_place_of(self.program, argv):
            return _sendable(self._run())

    def _place(self) -> None:
        """Say where a process runs that Lightning starts beside this one, by ``hydra.run.dir``: in the same folder."""
        parts = [str(OmegaConf.select(self.config, f"hydra.sweep.{key}")) for key in ("dir", "subdir")]
        with read_write(self.config.hydra):
            self.config.hydra.run.dir = os.path.join(self.program.directory, *parts)  # noqa: PTH118

    def _run(self) -> JobReturn:
        try:
            return run_job(
                hydra_context=self.context,
                task_function=self.task_function,
                config=self.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except SystemExit as end:
            # It would end the whole sweep where jobs run in the program itself.
            if end.code in (0, None):
                return job_return(self.config, JobStatus.COMPLETED, None)
            return job_return(self.config, JobStatus.FAILED, RuntimeError(f"the job ended with exit code {end.code}"))


def job_return(config: DictConfig, status: JobStatus, value: Any) -> JobReturn:
    """Return what Hydra's ``run_job`` would have, of a job that did not come to its end.

    Args:
        config: Of the job.
        status: How it ended.
        value: What it returned, or the error.
    """
    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    hydra = OmegaConf.masked_copy(config, ["hydra"])
    overrides = list(config.hydra.overrides.task)
    name = str(config.hydra.job.name)
    return JobReturn(overrides, task, hydra, None, name, status, value)


def returned_of(sent: bytes) -> JobReturn:
    """Return what a job's process sent: how it ended."""
    returned, where = pickle.loads(sent)
    if where is not None:
        returned._return_value.__cause__ = JobTraceback(where)
    assert isinstance(returned, JobReturn)
    return returned


@contextmanager
def in_directory(directory: str) -> Iterator[None]:
    """Work in a folder within the block.

    Raises:
        FileNotFoundError: If it is not on this machine.
    """
    before = os.getcwd()  # noqa: PTH109
    try:
        os.chdir(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory}: the folder in which the jobs were started is not on this machine; start them in one that "
            "all machines share"
        ) from error
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def in_place_of(program: Program, argv: Sequence[str]) -> Iterator[None]:
    """Let a job find the working folder and the command line of a program, and leave nothing to the next job.

    Args:
        program: The one that runs the multirun.
        argv: The command that would run this job alone: Lightning starts further ranks by it.
    """
    main: Any = sys.modules["__main__"]
    before = list(sys.argv), getattr(main, "__spec__", None), dict(os.environ)
    sys.argv[:] = argv
    main.__spec__ = None if program.module is None else importlib.machinery.ModuleSpec(program.module, None)
    try:
        with in_directory(program.directory):
            yield
    finally:
        sys.argv[:], main.__spec__ = before[0], before[1]
        # A rank is told its number in the environment, and would pass it on to a job that has ranks of its own.
        os.environ.clear()
        os.environ.update(before[2])
        _leave_process_group()


def _leave_process_group() -> None:
    """Forget the ranks of the job that ended."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _sendable(returned: JobReturn) -> bytes:
    """Return how a job ended as bytes, with where its error came from."""
    error = returned._return_value if returned.status == JobStatus.FAILED else None
    where = None if error is None else "".join(traceback.format_exception(error))
    try:
        sent = pickled((returned, where))
        if error is not None:
            # Some errors cannot be made again from what they hold.
            pickle.loads(sent)
        return sent
    except Exception as reason:
        told = f"{type(error).__name__}: {error}" if error is not None else f"what the job returned: {reason}"
        returned.status, returned.return_value = JobStatus.FAILED, RuntimeError(told)
        return pickled((returned, where))
