"""Where the trials of a batch run: in this process, in processes of its own, or as jobs of an executor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning_optcore.executor import Executor, JobError
from lightning_optcore.sweeps.hydra_job import in_directory

log = logging.getLogger(__name__)

# Evaluates a trial, and writes its result to the journal.
Task = Callable[[], None]


class TrialWorkers:
    """Runs the trials of a search, batch by batch.

    Args:
        n_jobs: How many at once; one runs in this process.
        executor: Where they run instead; it stays open.
        resources: What each needs of a node of the executor.
    """

    def __init__(
        self, n_jobs: int, executor: Executor | None = None, resources: Mapping[str, Any] | None = None
    ) -> None:
        self._n_jobs, self._executor, self._resources = n_jobs, executor, resources
        self._pool: Any = None

    def run(self, tasks: Mapping[int, Task], has_ended: Callable[[int], bool]) -> dict[int, str]:
        """Run trials to their end.

        Args:
            tasks: By the number of the trial.
            has_ended: Whether a trial's result is written.

        Returns:
            Of trials that were ended before they had one, what is known of why.
        """
        if not tasks:
            return {}
        if self._executor is not None:
            return self._run_on(self._executor, tasks)
        if self._n_jobs == 1:
            for task in tasks.values():
                task()
            return {}
        # The workers of a pool end with the one that was killed: whoever is lost runs once more, alone.
        for number in self._run_together(tasks):
            if not has_ended(number):
                self._run_together({number: tasks[number]})
        return {}

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)
            self._pool = None

    def _run_on(self, executor: Executor, tasks: Mapping[int, Task]) -> dict[int, str]:
        here = os.getcwd()  # noqa: PTH109
        handles = {
            number: executor.submit(partial(_run_in, here, task), kind="nas trial", resources=self._resources)
            for number, task in tasks.items()
        }
        try:
            executor.wait(handles.values())
        except BaseException:
            for handle in handles.values():
                handle.cancel()
            raise
        failures = {}
        for number, handle in handles.items():
            try:
                handle.result()
            except JobError as error:
                failures[number] = str(error)
        return failures

    def _run_together(self, tasks: Mapping[int, Task]) -> list[int]:
        """Run trials in processes, and return those that were lost with one."""
        from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

        if self._pool is None:
            threads = str(max(1, (os.cpu_count() or 1) // self._n_jobs))
            environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
            self._pool = ProcessPoolExecutor(max_workers=self._n_jobs, env=environment)
        futures = {number: self._pool.submit(task) for number, task in tasks.items()}
        lost = []
        for number, future in futures.items():
            try:
                future.result()
            except BrokenProcessPool as error:
                log.warning("trial %d: %s", number, " ".join(str(error).split())[:200])
                lost.append(number)
        if lost:
            self.close()
        return lost


def _run_in(directory: str, task: Task) -> None:
    with in_directory(directory):
        task()
