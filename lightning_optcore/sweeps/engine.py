"""A sweep from its first candidate to its results: ask, write down, launch, read, tell."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_optcore.fingerprints import code_fingerprint
from lightning_optcore.measurement.directions import Direction, direction_of
from lightning_optcore.search.grammar import override_text
from lightning_optcore.search.sampling import Grid
from lightning_optcore.search.searcher import Searcher
from lightning_optcore.search.space import Choice, Parameter, Space
from lightning_optcore.store_database import warn_of_passwords, without_passwords
from lightning_optcore.sweeps.continuation import continuation_of, relaunched, told_of
from lightning_optcore.sweeps.display import LiveTable
from lightning_optcore.sweeps.journal import SweepError, SweepRecord, TrialRecord, held_journal
from lightning_optcore.sweeps.results import write_results
from lightning_optcore.sweeps.task import TrialTask, described
from lightning_optcore.sweeps.template import read_template
from lightning_optcore.sweeps.warm_start import log_warm_points, warm_points

log = logging.getLogger(__name__)

# A sweep whose first trials all fail has something wrong that further trials will not mend.
_HOPELESS = 10
_NOTHING_TO_SWEEP: dict[str, Parameter] = {"": Choice((None,))}


@dataclass(frozen=True)
class SweepOptions:
    """What ``hydra.sweeper`` says, beside the searcher; ``hydra_plugins.lightning_optcore.sweeper`` describes it."""

    params: Mapping[str, Any] = field(default_factory=dict)
    constraints: Sequence[str] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    initial: Sequence[Mapping[str, Any]] = ()
    warm_start: int = 0
    directions: Sequence[Direction] | None = None
    n_trials: int | None = None
    n_jobs: int = 1
    seed: int = 0
    store: str | None = None
    resume: int | None = None
    max_failures: int | None = None
    timeout_s: float | None = None
    cache: bool = True
    report: bool = True

    def __post_init__(self) -> None:
        for name in ("n_trials", "n_jobs", "max_failures", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SweepError(f"hydra.sweeper.{name}={value}: expected a positive number")
        if self.warm_start < 0:
            raise SweepError(f"hydra.sweeper.warm_start={self.warm_start}: expected a number of points, or 0 for none")


def directions_of(config: DictConfig, given: Sequence[Direction] | None) -> list[Direction]:
    """Return the directions: as given, else those of ``objective`` in the configuration, else minimize."""
    if given:
        return list(given)
    objective = OmegaConf.select(config, "objective", default=None)
    if OmegaConf.is_config(objective):
        objective = OmegaConf.to_container(objective, resolve=True)
    if isinstance(objective, str):
        return [direction_of(objective)]
    if isinstance(objective, Mapping):
        return list(objective.values())
    return [direction_of(str(name)) for name in objective] if objective else ["minimize"]


def objective_names(config: DictConfig, count: int) -> list[str]:
    """Return the names that the configuration gives the objectives, else ``objective 0`` and so on."""
    objective = OmegaConf.select(config, "objective", default=None)
    names = [objective] if isinstance(objective, str) else [str(name) for name in objective or ()]
    return names if len(names) == count else [f"objective {i}" for i in range(count)]


class Sweep:
    """One sweep of one process.

    Args:
        options: What ``hydra.sweeper`` says.
        build_searcher: Makes the searcher from a space, directions, ``seed`` and ``initial``.
        hydra_context: Hydra's.
        task_function: The user's.
        config: The sweep's configuration.
        arguments: The command line's overrides of the task.
        write_report: Writes a page about a sweep at its end, from the store's path, the sweep's number and its status;
            where it fails, the sweep does not.
    """

    def __init__(
        self,
        options: SweepOptions,
        build_searcher: Callable[..., Searcher],
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
        arguments: Sequence[str],
        write_report: Callable[[str, int, str], object] | None = None,
    ) -> None:
        self._options = options
        self._write_report = write_report
        self._config = config
        self._context = hydra_context
        self._task_function = task_function
        self._template = read_template(options.params, arguments, hydra_context.config_loader)
        space = Space(
            self._template.space or _NOTHING_TO_SWEEP,
            constraints=list(options.constraints),
            conditions=dict(options.conditions),
        )
        self._directions = directions_of(config, options.directions)
        self._build_searcher = partial(build_searcher, space, self._directions, seed=options.seed)
        self._searcher = self._build_searcher(initial=[dict(one) for one in options.initial])
        endless = not isinstance(self._searcher, Grid) and not hasattr(self._searcher, "generations")
        if options.n_trials is None and space.size == float("inf") and endless:
            raise SweepError(
                f"hydra.sweeper.n_trials=null: a {type(self._searcher).__name__} in this space never ends by itself; "
                "give a number"
            )
        if space.size == 1:
            log.info("nothing to search: the space has one point, which is run once")
        self._batch = 0
        self._next_job_num = 0
        self._failed: list[TrialRecord] = []
        self._lost: str | None = None
        self._errors: dict[int, str] = {}
        self._returns: list[list[JobReturn]] = []

    def run(self) -> list[list[JobReturn]]:
        """Run, or continue, the sweep and return what the launcher did, batch by batch.

        Raises:
            SweepError: If it cannot be resumed, too many trials failed, or none succeeded.
        """
        path = str(self._store_path())
        hydra = self._config.hydra
        warn_of_passwords([*_texts(hydra.overrides.task), *_texts(hydra.overrides.hydra)])
        with held_journal(path) as self._journal:
            resumed = self._resumed()
            record = resumed or self._begun()
            # A sweep that has asked for points keeps those it began with in its searcher's state.
            if self._options.warm_start and record.state is None and not self._plain_run:
                self._start_warm()
            self._sweep_id = record.id
            self._directory = Path(record.directory)
            # A search goes on counting where one was before it in its folder; a plain run is numbered as Hydra does.
            fresh = self._plain_run and record.state is None
            self._next_job_num = 0 if fresh else self._journal.next_job_num(record.directory)
            fresh_directory = Path(self._config.hydra.sweep.dir)
            self._pin_directory()
            if resumed and fresh_directory.resolve() != self._directory:
                _remove_if_empty(fresh_directory)
            unfinished = self._restore(record)
            self._save_config()
            launcher = self._launcher(path)
            try:
                read = partial(self._journal.trials, record.id)
                with LiveTable(read, self._directions, self._objective_names(), self._options.n_trials):
                    self._loop(launcher, unfinished)
                    self._check_some_succeeded()
            except BaseException as error:
                interrupted = not isinstance(error, Exception)
                # A sweep that was interrupted stays open, so that the same command continues it.
                if not interrupted:
                    self._journal.finish(record.id, "failed", f"{type(error).__name__}: {error}")
                self._write_results()
                if not interrupted:
                    self._report(path, "failed")
                raise
            # Last of all it is done: killed while it writes, it continues and writes again.
            self._write_results()
            self._report(path, "done")
            self._journal.finish(record.id, "done")
        return self._returns

    def _start_warm(self) -> None:
        """Begin with what did best in earlier sweeps, after the points that were given."""
        count = self._options.warm_start
        space, fixed = self._searcher.space, list(self._template.fixed.values())
        points = warm_points(self._journal, self._command(), space, self._directions, self._composed, fixed, count)
        log_warm_points(points, count)
        given = [dict(one) for one in self._options.initial]
        self._searcher = self._build_searcher(initial=[*given, *(point.params for point in points)])

    def _composed(self, overrides: Sequence[str]) -> dict[str, Any] | None:
        """Return the configuration of a job; ``None`` where that of an earlier one does not exist any more."""
        try:
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            log.debug("no configuration of %s: %s", overrides, error)
            return None
        with read_write(config), open_dict(config):
            config.pop("hydra", None)
        plain: Any = OmegaConf.to_container(config, resolve=False)
        return dict(plain)

    def _loop(self, launcher: Any, unfinished: list[TrialRecord]) -> None:
        batch = unfinished
        while True:
            if batch:
                if not self._returns:
                    self._validate([trial.overrides for trial in batch])
                self._launch(launcher, batch)
            for trial in self._ended():
                self._tell(trial)
            self._check_failures()
            batch = self._asked()
            if not batch:
                return

    def _asked(self) -> list[TrialRecord]:
        """Return the next batch, which is in the journal by now; an empty one at the end."""
        count = self._options.n_jobs
        if self._options.n_trials is not None:
            count = min(count, self._options.n_trials - len(self._searcher.trials))
        if count < 1 or self._searcher.done:
            return []
        candidates = self._searcher.ask(count)
        if not candidates:
            return []
        self._batch += 1
        asked = [(candidate, self._template.overrides(candidate.params)) for candidate in candidates]
        state = self._searcher.state_dict(trials=False)
        return self._journal.add_batch(self._sweep_id, self._batch, self._take_job_nums(len(asked)), asked, state)

    def _take_job_nums(self, count: int) -> int:
        """Return the first of some job numbers that nothing else uses."""
        first = self._next_job_num
        self._next_job_num += count
        return first

    def _launch(self, launcher: Any, batch: list[TrialRecord]) -> None:
        assert batch[0].job_num is not None
        try:
            returned = launcher.launch([trial.overrides for trial in batch], initial_job_idx=batch[0].job_num)
            self._returns.append(list(returned))
            # Of a job that ended outside of its task, e.g. with its machine, the launcher alone knows why.
            self._errors = {
                trial.number: described(one._return_value)
                for trial, one in zip(batch, returned, strict=False)
                if one.status == JobStatus.FAILED
            }
        except HydraException:
            raise
        except Exception as error:
            # The launcher lost its jobs, e.g. a worker was killed: what has a result keeps it.
            self._lost = f"the launcher ended with {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            log.warning(self._lost)

    def _ended(self) -> list[TrialRecord]:
        """Return the newest batch; what its launcher left without a result has failed."""
        batch = self._journal.trials(self._sweep_id, batch=self._batch)
        unfinished = [trial for trial in batch if not trial.ended]
        for trial in unfinished:
            failure = self._lost or self._errors.get(trial.number, "the job ended without a result")
            self._journal.end_trial(trial, None, failure=failure)
        self._lost, self._errors = None, {}
        return self._journal.trials(self._sweep_id, batch=self._batch) if unfinished else batch

    def _tell(self, record: TrialRecord) -> None:
        if not any(one.id == record.candidate.id for one in self._searcher.pending):
            return
        told = told_of(record, len(self._directions))
        self._searcher.tell(told.candidate, told.objectives, failure=told.failure)
        if record.status == "failed":
            self._failed.append(record)
            log.warning("trial %d failed: %s", record.number, record.reason)

    def _check_failures(self) -> None:
        limit, failed = self._options.max_failures, self._failed
        if limit is not None and len(failed) >= limit:
            raise SweepError(f"hydra.sweeper.max_failures={limit}: {len(failed)} trials failed; {_last_reason(failed)}")
        if len(failed) == len(self._searcher.trials) >= _HOPELESS:
            raise SweepError(f"the first {len(failed)} trials all failed; {_last_reason(failed)}")

    def _check_some_succeeded(self) -> None:
        count = len(self._searcher.trials)
        if count and len(self._failed) == count and not self._plain_run:
            raise SweepError(f"{count} of {count} trials failed; {_last_reason(self._failed)}")

    @property
    def _plain_run(self) -> bool:
        """Whether nothing is searched, so that no objective is needed."""
        return self._searcher.space.size == 1 and not self._options.directions

    def _objective_names(self) -> list[str]:
        return objective_names(self._config, len(self._directions))

    def _store_path(self) -> str:
        path = self._options.store or OmegaConf.select(self._config, "store.path", default=None) or "outputs/optcore.db"
        return path if "://" in path else str(Path(path).resolve())

    def _command(self) -> str:
        """Return what identifies the command line, but for the request to resume."""
        hydra = self._config.hydra
        overrides = [*_texts(hydra.overrides.task), *_texts(hydra.overrides.hydra)]
        kept = [one for one in overrides if not one.startswith("hydra.sweeper.resume")]
        return json.dumps([hydra.job.name, hydra.job.config_name, kept])

    def _resumed(self) -> SweepRecord | None:
        wanted = self._options.resume
        if wanted is None:
            found = self._journal.unfinished(self._command())
            if found is None:
                return None
            wanted = found.id
        record = self._journal.sweep(wanted)
        differences = self._searcher.space.differences(record.space)
        if record.directions != self._directions:
            differences.append(f"directions: were {record.directions}, are {self._directions}")
        if differences:
            raise SweepError(
                f"sweep {wanted} cannot be continued, its space has changed: {'; '.join(differences)}; restore it, "
                "or begin a new sweep by a changed command, e.g. with another hydra.sweeper.seed"
            )
        return self._journal.take_over(wanted)

    def _begun(self) -> SweepRecord:
        directory = str(Path(self._config.hydra.sweep.dir).resolve())
        sweep_id = self._journal.begin(self._command(), directory, self._searcher.space.to_dict(), self._directions)
        return self._journal.sweep(sweep_id)

    def _pin_directory(self) -> None:
        """Let every job of this process and of workers find its folder below the sweep's own."""
        pinned = f"hydra.sweep.dir={self._directory}"
        with read_write(self._config), open_dict(self._config):
            given = _texts(self._config.hydra.overrides.hydra)
            others = [one for one in given if not one.startswith("hydra.sweep.dir=")]
            self._config.hydra.overrides.hydra = [*others, override_text(*pinned.split("=", 1))]
            self._config.hydra.sweep.dir = str(self._directory)

    def _restore(self, record: SweepRecord) -> list[TrialRecord]:
        """Bring the searcher to where it was, and return what is to be launched again."""
        found = continuation_of(self._journal, record)
        if found is None:
            return []
        self._batch = found.batch
        self._failed = [one for one in found.told if one.status == "failed"]
        self._searcher.load_state_dict(found.state)
        again = found.unfinished
        log.info("sweep %d continues: %d trials have a result, %d run again", record.id, len(found.ended), len(again))
        trials = relaunched(self._journal, record, again, self._take_job_nums(len(again)))
        return [replace(trial, overrides=self._with_passwords(trial)) for trial in trials]

    def _with_passwords(self, trial: TrialRecord) -> list[str]:
        """Return a trial's overrides with the passwords of this command, which the journal does not keep."""
        given = {without_passwords(one): one for one in self._template.overrides(trial.candidate.params)}
        return [given.get(one, one) for one in trial.overrides]

    def _save_config(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        plain = without_passwords(OmegaConf.to_container(self._config, resolve=False, enum_to_str=True))
        OmegaConf.save(OmegaConf.create(plain), self._directory / "multirun.yaml")

    def _launcher(self, store: str) -> Any:
        code = None
        # What was measured before left no weights to continue from, and equal parameters may continue others' weights.
        if self._options.cache and not self._searcher.continues:
            try:
                code = code_fingerprint([self._task_function])
            except (OSError, TypeError) as error:
                log.debug("no fingerprint of the task function, so no cache: %s", error)
        task = TrialTask(
            self._task_function,
            store=store,
            sweep_id=self._sweep_id,
            objectives=len(self._directions),
            optional=self._plain_run,
            timeout_s=self._options.timeout_s,
            code=code,
            continued=self._searcher.continues,
        )
        return Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=task, config=self._config
        )

    def _validate(self, batch: Sequence[list[str]]) -> None:
        """Compose the first batch's configurations here: a parameter that does not exist ends the sweep at once."""
        for overrides in batch:
            self._context.config_loader.load_sweep_config(self._config, overrides)

    def _write_results(self) -> None:
        write_results(
            self._directory,
            self._sweep_id,
            self._searcher,
            self._objective_names(),
            self._journal.trials(self._sweep_id),
        )

    def _report(self, store: str, status: str) -> None:
        if self._write_report is None or self._plain_run or not self._searcher.trials:
            return
        try:
            self._write_report(store, self._sweep_id, status)
        except Exception as error:
            # What was found is written already, and the page can be made later.
            reason = f"{type(error).__name__}: {error}"
            log.warning("no report of the sweep: %s; make it by: %s", reason, self._report_command(store))

    def _report_command(self, store: str) -> str:
        return shlex.join(
            ["optcore", "report", f"sweep={self._sweep_id}", override_text("store.path", without_passwords(store))]
        )


def _remove_if_empty(folder: Path) -> None:
    # Hydra makes a folder for every start.
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _texts(overrides: Any) -> list[str]:
    """Return overrides as they were written: an interpolation in one may only be resolved within a job."""
    plain: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(plain)


def _last_reason(failed: Sequence[TrialRecord]) -> str:
    return f"the last one: {failed[-1].reason}"
