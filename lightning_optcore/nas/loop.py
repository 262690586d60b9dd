"""The loop of an architecture search: ask, write down, check the limits, evaluate, tell.

The trials are in the journal of sweeps, so that a search which was killed continues, ``TrialPruning`` ends bad trials
early, and the report of sweeps shows them.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_optcore.measurement.directions import Direction, direction_of
from lightning_optcore.nas.result import ArchitectureTrial, SearchResult
from lightning_optcore.nas.space import Architecture, architecture_space
from lightning_optcore.nas.strategies import Strategy, searcher_of
from lightning_optcore.search.searcher import Candidate, SearchError, trial_dict
from lightning_optcore.search.searcher import Trial as SearcherTrial
from lightning_optcore.store import Store
from lightning_optcore.sweeps.display import LiveTable
from lightning_optcore.sweeps.journal import Journal, SweepError, SweepRecord, TrialRecord, held_journal, open_journal
from lightning_optcore.sweeps.task import TrialPrunedError, described, named_trial

log = logging.getLogger(__name__)

Evaluate = Callable[[Architecture], Mapping[str, float]]
# What an architecture exceeds: by name, its value and the limit.
Excess = Mapping[str, tuple[float, float]]
Constraints = Mapping[str, float] | Callable[[Architecture], Excess]

# A search whose first trials all fail, or as many all fail alike, has something wrong that more will not mend.
_HOPELESS = 10
_HOPELESS_ALIKE = 5
# So many architectures in a row over a limit end a search.
_REJECTED = 300
_UNREPORTED = "was never reported: expected one of"


def search(
    space: Any,
    evaluate: Evaluate,
    *,
    objectives: Mapping[str, Direction] | Sequence[str] | str,
    strategy: Strategy,
    max_trials: int,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    constraints: Constraints | None = None,
    seed: int = 0,
    store: str | Path | Store | None = None,
    n_jobs: int = 1,
    resume: int | None = None,
    initial: Sequence[Architecture] = (),
    directory: str | Path | None = None,
    command: str | None = None,
    describe: Callable[[Path, Candidate], list[str]] | None = None,
    on_begin: Callable[[int, Path], None] | None = None,
    show: bool | None = None,
    **offered: Any,
) -> SearchResult:
    """Search a space of architectures.

    A search in a store that was killed or interrupted is continued by the same call: every architecture that has a
    result keeps it. An architecture that raises, reports no finite number or whose process is killed is a failed trial.

    Args:
        space: A ``ModelSpace`` of NNI, an :class:`~lightning_optcore.nas.ArchitectureSpace`, a
            :class:`~lightning_optcore.search.Space`, or a mapping of labels to their values.
        evaluate: Returns numbers by name for an architecture; see :class:`~lightning_optcore.nas.LightningEvaluator`.
            What its method ``estimate(architecture)`` returns, if it has one, is known before it is paid for.
        objectives: What is searched for: ``{"acc": "maximize"}``, or names, whose directions are the yardstick's own.
        strategy: A name of :data:`lightning_optcore.nas.strategies.STRATEGIES`, or a searcher's class.
        max_trials: How many architectures are evaluated. Those that are not (see ``constraints``) are not counted.
        max_seconds: No architecture is begun that many seconds after the call; whichever runs by then ends. What
            strategy and estimates take counts. A search that is continued has them anew.
        clock: Tells the seconds: ``time.process_time`` counts those of the processor instead, of this process alone.
        constraints: Limits, ``{"latency_ms": 2.0}``: at most so much, at least so much where more is better. One of
            what ``estimate`` returns is checked before, and a candidate over it is never evaluated; any other is
            checked with what ``evaluate`` returned. Or a function of an architecture that returns what it exceeds
            before it is evaluated, ``{"latency_ms": (value, limit)}``.
        seed: Makes the candidates repeatable.
        store: Path or URL of the store; ``None`` keeps nothing.
        n_jobs: How many architectures are evaluated at once, each in a process of its own if more than one.
        resume: Number of the search to continue, also one that ended and is to have more trials.
        initial: Architectures to try first.
        directory: Folder of the search; each trial has one in it. By default one beside the store.
        command: What identifies the search when it is begun again; by default what is evaluated, strategy, objectives
            and seed.
        describe: Returns the overrides by which a candidate is made again, from the folder and the candidate.
        on_begin: Called with the search's number and folder before the first trial.
        show: Whether a table of the trials is printed as they come; by default on a terminal.
        offered: What is handed to a strategy that has an argument of that name.

    Raises:
        ArchitectureError: If the space contradicts itself.
        SearchError: If an argument is out of range, nobody reports an objective, every trial failed, or no
            architecture was found that meets the constraints.
        SweepError: If the search cannot be continued, e.g. as its space has changed.

    Example:
        >>> table = {8: 0.90, 16: 0.95, 32: 0.94}
        >>> found = search({"width": [8, 16, 32]}, lambda one: {"acc": table[one["width"]], "flops": one["width"]},
        ...                objectives=["acc", "flops"], strategy="grid", max_trials=3, show=False)
        >>> found.best("acc").architecture, [trial.architecture["width"] for trial in found.front]
        ({'width': 16}, [16, 8])
    """
    for name, value in (("max_trials", max_trials), ("n_jobs", n_jobs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SearchError(f"{name}={value!r}: expected a positive whole number")
    if max_seconds is not None and not max_seconds > 0:
        raise SearchError(f"max_seconds={max_seconds!r}: expected a number above 0")
    deadline = None if max_seconds is None else clock() + max_seconds
    directions = _directions(objectives)
    where = architecture_space(space)
    searcher = searcher_of(strategy, where.choices, list(directions.values()), seed=seed, initial=initial, **offered)
    with ExitStack() as stack:
        target = _store_of(store, stack)
        if command is None:
            command = _identity(evaluate, strategy, directions, seed)
        journal = stack.enter_context(held_journal(target))
        run = _Search(
            searcher, where.key, evaluate, directions, constraints, max_trials, n_jobs, journal, target, describe
        )
        if deadline is not None:
            run.late = lambda: clock() >= deadline
        run.begin(command, resume, directory)
        if on_begin is not None:
            on_begin(run.sweep_id, run.directory)
        return run.run(Console().is_terminal if show is None else show)


class _Search:
    """One search of one process."""

    def __init__(
        self,
        searcher: Any,
        key: Callable[[Architecture], str],
        evaluate: Evaluate,
        directions: dict[str, Direction],
        constraints: Constraints | None,
        max_trials: int,
        n_jobs: int,
        journal: Journal,
        target: str,
        describe: Callable[[Path, Candidate], list[str]] | None,
    ) -> None:
        self._searcher = searcher
        self._key = key
        self._evaluate = evaluate
        self._directions = directions
        self._constraints = constraints
        self._max_trials = max_trials
        self._n_jobs = n_jobs
        self._target = target
        self._describe = describe
        self._journal = journal
        self._batch = 0
        self._next_job_num = 0
        # The first trial of every architecture that has a result, by the key of its network.
        self._known: dict[str, TrialRecord] = {}
        self._failed: list[TrialRecord] = []
        self._evaluated = 0
        self._succeeded = 0
        self._rejected_in_a_row = 0
        self._smallest: dict[str, tuple[float, float, Architecture]] = {}
        self._workers: Any = None
        self.late: Callable[[], bool] = lambda: False

    def begin(self, command: str, resume: int | None, directory: str | Path | None) -> None:
        """Open a search in the store, or take over one that is to be continued."""
        record = self._resumed(command, resume)
        if record is None:
            place = str(Path(directory).resolve()) if directory is not None else _beside(self._target)
            described_space = {**self._searcher.space.to_dict(), "objectives": list(self._directions)}
            sweep_id = self._journal.begin(command, place, described_space, list(self._directions.values()))
            record = self._journal.sweep(sweep_id)
        self._record = record
        self.sweep_id = record.id
        self.directory = Path(record.directory)

    def run(self, show: bool) -> SearchResult:
        """Search to the end."""
        read = partial(self._journal.trials, self.sweep_id)
        table = LiveTable(read, list(self._directions.values()), list(self._directions), None)
        try:
            with table if show else nullcontext():
                self._loop(self._restored())
            self._check_some_succeeded()
        except BaseException as error:
            # A search that was interrupted stays open, so that the same call continues it.
            if isinstance(error, Exception):
                self._journal.finish(self.sweep_id, "failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._end_workers()
        result = self._result()
        self._journal.finish(self.sweep_id, "done")
        return result

    def _loop(self, batch: list[TrialRecord]) -> None:
        while True:
            self._settle(batch)
            if self._batch:
                for record in self._journal.trials(self.sweep_id, batch=self._batch):
                    self._tell(record)
            self._check_failures()
            batch = self._asked()
            if not batch:
                return

    def _asked(self) -> list[TrialRecord]:
        """Return the next batch, which is in the journal by now; an empty one at the end."""
        count = min(self._n_jobs, self._max_trials - self._evaluated)
        if count < 1 or self.late() or self._searcher.done or self._rejected_in_a_row >= _REJECTED:
            return []
        candidates = self._searcher.ask(count)
        if not candidates:
            return []
        self._batch += 1
        asked = [
            (candidate, self._describe(self.directory, candidate) if self._describe is not None else [])
            for candidate in candidates
        ]
        state = self._searcher.state_dict(trials=False)
        first = self._next_job_num
        self._next_job_num += len(asked)
        return self._journal.add_batch(self.sweep_id, self._batch, first, asked, state)

    def _settle(self, batch: Sequence[TrialRecord]) -> None:
        """Give every trial of a batch its result."""
        paid: dict[str, TrialRecord] = {}
        for record in batch:
            key = self._key(record.candidate.params)
            if key in self._known or key in paid:
                continue
            excess = self._excess_before(record.candidate.params)
            if excess:
                self._journal.end_trial(record, None, failure=_over(excess), status="pruned")
                continue
            paid[key] = record
        self._launch(list(paid.values()))
        for record in self._journal.trials(self.sweep_id, batch=self._batch) if batch else []:
            if record.ended:
                self._known.setdefault(self._key(record.candidate.params), record)
                continue
            known = self._known.get(self._key(record.candidate.params))
            if known is None:
                self._journal.end_trial(record, None, failure="the process ended without a result")
                continue
            source = f"trial {known.number} of sweep {self.sweep_id}"
            self._journal.end_trial(record, known.objectives, known.failure, source, known.status)

    def _launch(self, records: Sequence[TrialRecord]) -> None:
        if not records:
            return
        if self._n_jobs == 1:
            for record in records:
                self._task(record)()
            return
        lost = self._launch_together(records)
        # The workers of a pool end with the one that was killed: whoever is lost runs once more, alone.
        for record in lost:
            self._launch_together([record])

    def _launch_together(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Evaluate trials in processes, and return those whose process ended without a result."""
        from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

        if self._workers is None:
            threads = str(max(1, (os.cpu_count() or 1) // self._n_jobs))
            environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
            self._workers = ProcessPoolExecutor(max_workers=self._n_jobs, env=environment)
        futures = [(record, self._workers.submit(self._task(record))) for record in records]
        lost = []
        for record, future in futures:
            try:
                future.result()
            except BrokenProcessPool as error:
                log.warning("trial %d: %s", record.number, " ".join(str(error).split())[:200])
                lost.append(record)
        if lost:
            self._end_workers()
        ended = {one.number for one in self._journal.trials(self.sweep_id, batch=self._batch) if one.ended}
        return [record for record in lost if record.number not in ended]

    def _task(self, record: TrialRecord) -> Callable[[], None]:
        limits = dict(self._constraints) if isinstance(self._constraints, Mapping) else {}
        place = str(self.directory / str(record.job_num))
        return partial(_run_trial, self._evaluate, record, self._target, list(self._directions), limits, place)

    def _end_workers(self) -> None:
        if self._workers is not None:
            self._workers.shutdown(kill_workers=True)
            self._workers = None

    def _excess_before(self, architecture: Architecture) -> Excess:
        """Return which limits an architecture exceeds, as far as that is known before it is evaluated."""
        if self._constraints is None:
            return {}
        if callable(self._constraints):
            excess = self._constraints(dict(architecture))
            for name, (value, limit) in excess.items():
                self._note(name, value, limit, architecture)
            return excess
        estimate = getattr(self._evaluate, "estimate", None)
        if estimate is None:
            return {}
        try:
            known = estimate(dict(architecture))
        except Exception as error:
            # A network that cannot be built fails where every failure is recorded.
            log.debug("no estimate of %s: %s", architecture, error)
            return {}
        for name, limit in self._constraints.items():
            if name in known:
                self._note(name, known[name], limit, architecture)
        return excess_of(known, self._constraints)

    def _note(self, name: str, value: float, limit: float, architecture: Architecture) -> None:
        sign = 1.0 if direction_of(name) == "minimize" else -1.0
        if name not in self._smallest or sign * value < sign * self._smallest[name][0]:
            self._smallest[name] = (value, limit, architecture)

    def _tell(self, record: TrialRecord) -> None:
        if not any(one.id == record.number for one in self._searcher.pending):
            return
        told = _told(record, len(self._directions))
        self._searcher.tell(told.candidate, told.objectives, failure=told.failure, violation=told.violation)
        self._count(record)

    def _count(self, record: TrialRecord) -> None:
        """Keep count of a trial that the searcher was told."""
        rejected = _was_rejected(record)
        self._evaluated += not rejected and record.cached_from is None
        feasible = record.objectives is not None and not record.failure
        self._succeeded += feasible
        self._rejected_in_a_row = 0 if feasible else self._rejected_in_a_row + rejected
        self._known.setdefault(self._key(record.candidate.params), record)
        if record.status == "failed":
            self._failed.append(record)
            log.warning("trial %d failed: %s", record.number, _reason(record))

    def _check_failures(self) -> None:
        failed = self._failed
        if not failed or len(failed) < self._evaluated:
            return
        reasons = [_reason(record) for record in failed]
        if _UNREPORTED in reasons[0]:
            raise SearchError(reasons[0])
        # But for the sizes of what did not fit.
        alike = len(failed) >= _HOPELESS_ALIKE and len({re.sub(r"\d+", "#", reason) for reason in reasons}) == 1
        if alike or len(failed) >= _HOPELESS:
            raise SearchError(f"the first {len(failed)} trials all failed; the last one: {reasons[-1]}")

    def _check_some_succeeded(self) -> None:
        if self._succeeded:
            return
        if self._smallest and self._rejected_in_a_row:
            found = "; ".join(
                f"constraints.{name}={limit:g}: met by none of {self._rejected_in_a_row} architectures, "
                f"the {_least(name)} found is {value:g} ({architecture})"
                for name, (value, limit, architecture) in self._smallest.items()
            )
            raise SearchError(found)
        if self._failed:
            count = len(self._failed)
            raise SearchError(f"{count} of {count} trials failed; the last one: {_reason(self._failed[-1])}")
        over = [record for record in self._journal.trials(self.sweep_id) if record.failure]
        if over:
            raise SearchError(f"no architecture kept the limits; the last one: {_reason(over[-1])}")
        raise SearchError("no architecture was evaluated: the strategy proposed none")

    def _resumed(self, command: str, resume: int | None) -> SweepRecord | None:
        wanted = resume
        if wanted is None:
            found = self._unfinished(command)
            if found is None:
                return None
            wanted = found.id
        try:
            record = self._journal.sweep(wanted)
        except SweepError as error:
            raise SweepError(str(error).replace("hydra.sweeper.", "")) from None
        differences = self._searcher.space.differences(record.space)
        mine = dict(self._directions)
        theirs = dict(zip(record.space.get("objectives", []), record.directions, strict=False))
        if mine != theirs:
            differences.append(f"objectives: were {theirs or record.directions}, are {mine}")
        if differences:
            raise SweepError(
                f"search {wanted} cannot be continued, its space has changed: {'; '.join(differences)}; restore it, or "
                "begin a new search, e.g. with another seed"
            )
        try:
            return self._journal.take_over(wanted)
        except SweepError as error:
            raise SweepError(str(error).replace("hydra.sweeper.", "")) from None

    def _unfinished(self, command: str) -> SweepRecord | None:
        """Return the newest search of a command whose process is dead, or which was interrupted in this one."""
        found = self._journal.unfinished(command)
        if found is not None:
            return found
        mine = (one for one in self._journal.sweeps(_REJECTED) if one.command == command and one.status == "running")
        return next((one for one in mine if one.pid == os.getpid()), None)

    def _restored(self) -> list[TrialRecord]:
        """Bring the searcher to where it was, and return what is to be evaluated again."""
        record = self._record
        if record.state is None:
            return []
        trials = self._journal.trials(record.id)
        self._batch = max(trial.batch for trial in trials)
        self._next_job_num = max(trial.job_num or 0 for trial in trials) + 1
        waiting = {one["id"] for one in record.state["pending"]}
        told = [trial for trial in trials if trial.number not in waiting]
        directions = len(self._directions)
        state = {**record.state, "trials": [trial_dict(_told(trial, directions)) for trial in told]}
        self._searcher.load_state_dict(state)
        for trial in told:
            self._count(trial)
        for trial in trials:
            if trial.ended:
                self._known.setdefault(self._key(trial.candidate.params), trial)
        unfinished = [trial.number for trial in trials if not trial.ended]
        ended = len(trials) - len(unfinished)
        log.info("search %d continues: %d trials have a result, %d run again", record.id, ended, len(unfinished))
        self._journal.renumber(record.id, unfinished, self._next_job_num)
        self._next_job_num += len(unfinished)
        return [trial for trial in self._journal.trials(record.id) if trial.number in unfinished]

    def _result(self) -> SearchResult:
        history = [self._trial(record) for record in self._journal.trials(self.sweep_id)]
        by_number = {trial.number: trial for trial in history}
        front = [by_number[trial.candidate.id] for trial in self._searcher.pareto_front()]
        return SearchResult(history, front, dict(self._directions), self.sweep_id, str(self.directory))

    def _trial(self, record: TrialRecord) -> ArchitectureTrial:
        exceeds = _violation(record) > 0
        return ArchitectureTrial(
            number=record.number,
            architecture=record.candidate.params,
            objectives=dict(zip(self._directions, record.objectives or (), strict=False)),
            failure=_reason(record) if record.failure or record.objectives is None else None,
            origin=record.candidate.origin,
            evaluated=record.cached_from is None and not _was_rejected(record),
            exceeds=exceeds,
        )


def excess_of(values: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return which limits are exceeded, with value and limit; what is not among the values is left out.

    Args:
        values: By name.
        limits: By name: at most so much, or at least so much of what is better the more of it there is.

    Example:
        >>> excess_of({"latency_ms": 3.0, "val/acc": 0.9}, {"latency_ms": 2.0, "val/acc": 0.8})
        {'latency_ms': (3.0, 2.0)}
    """
    found = {}
    for name, limit in limits.items():
        if name in values:
            sign = 1.0 if direction_of(name) == "minimize" else -1.0
            # A number that is none keeps no limit.
            if not sign * values[name] <= sign * limit:
                found[name] = (values[name], limit)
    return found


def _run_trial(
    evaluate: Evaluate,
    record: TrialRecord,
    store: str,
    objectives: Sequence[str],
    limits: Mapping[str, float],
    directory: str,
) -> None:
    """Evaluate one architecture, in whatever process, and write its result to the journal."""
    journal = open_journal(store)
    assert record.job_num is not None
    journal.start_trial(record.sweep_id, record.job_num, directory, None)
    try:
        with named_trial(record.sweep_id, record.number, store):
            metrics = dict(_evaluated(evaluate, dict(record.candidate.params)))
    except TrialPrunedError as error:
        journal.end_trial(record, None, failure=f"pruned {error}", status="pruned")
        return
    except Exception as error:
        journal.end_trial(record, None, failure=described(error))
        return
    values, failure = _objectives(metrics, objectives)
    missing = [name for name in limits if name not in metrics and not hasattr(evaluate, "estimate")]
    if failure is None and missing:
        failure = f"constraints.{missing[0]} {_UNREPORTED} {', '.join(sorted(metrics))}"
    if failure is not None:
        journal.end_trial(record, None, failure=failure)
        return
    excess = excess_of(metrics, limits)
    journal.end_trial(record, values, failure=_over(excess) if excess else None, status="done")


def _evaluated(evaluate: Evaluate, architecture: Architecture) -> Mapping[str, float]:
    try:
        metrics = evaluate(architecture)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from end
        raise RuntimeError(f"the evaluation ended with exit code {end.code}") from end
    if not isinstance(metrics, Mapping):
        raise TypeError(f"evaluate returned {metrics!r:.100}: expected numbers by name, e.g. {{'acc': 0.9}}")
    return metrics


def _objectives(metrics: Mapping[str, Any], names: Sequence[str]) -> tuple[list[float], str | None]:
    """Return the objectives, or why there are none."""
    for name in names:
        if name not in metrics:
            return [], f"objective {name!r} {_UNREPORTED} {', '.join(sorted(map(str, metrics))) or 'nothing'}"
    try:
        values = [float(metrics[name]) for name in names]
    except (TypeError, ValueError) as error:
        return [], f"objectives {list(names)}: {error}"
    bad = [f"{name} is {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    return values, "; ".join(bad) or None


def _over(excess: Excess) -> str:
    """Return what is exceeded, and in a second line by how much in all, for whoever continues the search."""
    texts = [f"{name} {value:.6g} over its limit {limit:.6g}" for name, (value, limit) in excess.items()]
    by_how_much = sum(_share(value, limit) for value, limit in excess.values())
    return f"{', '.join(texts)}\nviolation={by_how_much!r}"


def _share(value: float, limit: float) -> float:
    share = abs(value - limit) / max(abs(limit), 1e-12)
    return float(min(share, 1e6)) if math.isfinite(share) else 1e6


def _violation(record: TrialRecord) -> float:
    _, mark, number = (record.failure or "").partition("\nviolation=")
    return float(number) if mark else 0.0


def _was_rejected(record: TrialRecord) -> bool:
    """Whether a trial was over a limit before it was evaluated."""
    return record.objectives is None and _violation(record) > 0


def _told(record: TrialRecord, count: int) -> SearcherTrial:
    """Return a trial as its searcher is told it."""
    violation = _violation(record)
    if record.objectives is None and not violation:
        return SearcherTrial(record.candidate, failure=_reason(record))
    # What was never evaluated has no objectives; by how much it exceeds its limits ranks it behind all others.
    return SearcherTrial(record.candidate, tuple(record.objectives or [0.0] * count), violation=violation)


def _least(name: str) -> str:
    return "smallest" if direction_of(name) == "minimize" else "largest"


def _reason(record: TrialRecord) -> str:
    return (record.failure or "it has no result").splitlines()[0]


def _directions(objectives: Mapping[str, Direction] | Sequence[str] | str) -> dict[str, Direction]:
    if isinstance(objectives, str):
        objectives = [objectives]
    if not isinstance(objectives, Mapping):
        objectives = {name: direction_of(name) for name in objectives}
    for name, direction in objectives.items():
        if direction not in ("minimize", "maximize"):
            raise SearchError(f"objectives.{name}={direction!r}: expected minimize or maximize")
    if not objectives:
        raise SearchError("objectives: none; name what is searched for, e.g. ['val/acc', 'latency_ms']")
    return dict(objectives)


def _store_of(store: str | Path | Store | None, stack: ExitStack) -> str:
    if store is None:
        return str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optcore_nas_"))) / "optcore.db")
    target = store.target if isinstance(store, Store) else str(store)
    return target if "://" in target else str(Path(target).resolve())


def _beside(target: str) -> str:
    """Return a new folder for a search whose store is at a place."""
    parent = Path("outputs") if "://" in target else Path(target).parent
    return str((parent / "nas" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")).resolve())


def _identity(evaluate: Any, strategy: Any, directions: Mapping[str, Direction], seed: int) -> str:
    what = [f"evaluate={_name(evaluate)}", f"strategy={_name(strategy)}", f"seed={seed}"]
    return json.dumps(["python", "lightning_optcore.nas.search", [*what, f"objectives={json.dumps(dict(directions))}"]])


def _name(thing: Any) -> str:
    if isinstance(thing, str):
        return thing
    if isinstance(thing, functools.partial):
        return f"{_name(thing.func)}({', '.join(f'{key}={value!r}' for key, value in sorted(thing.keywords.items()))})"
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
