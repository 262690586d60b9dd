"""The loop of an architecture search: ask, write down, check the limits, evaluate, tell.

The trials are in the journal of sweeps, so that a search which was killed continues, ``TrialPruning`` ends bad trials
early, and the report of sweeps shows them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_optcore.executor import Executor
from lightning_optcore.measurement.directions import Direction, direction_of
from lightning_optcore.nas.limits import Constraints, Limits, described_excess, violation_of
from lightning_optcore.nas.offers import offered_by
from lightning_optcore.nas.one_shot import OneShot, Prepare, one_shot_of, planned
from lightning_optcore.nas.result import ArchitectureTrial, SearchResult
from lightning_optcore.nas.space import Architecture, architecture_space
from lightning_optcore.nas.strategies import Strategy, searcher_of
from lightning_optcore.nas.trial import UNREPORTED, Evaluate, run_trial
from lightning_optcore.nas.trial_workers import TrialWorkers
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.search.searcher import Candidate, SearchError
from lightning_optcore.store import Store
from lightning_optcore.store_database import without_passwords
from lightning_optcore.sweeps.continuation import continuation_of, relaunched, told_of
from lightning_optcore.sweeps.display import LiveTable
from lightning_optcore.sweeps.journal import Journal, SweepError, SweepRecord, TrialRecord, held_journal

log = logging.getLogger(__name__)

# A search whose first trials all fail, or as many all fail alike, has something wrong that more will not mend.
_HOPELESS = 10
_HOPELESS_ALIKE = 5
# So many architectures in a row over a limit end a search.
_REJECTED = 300


def search(
    space: Any,
    evaluate: Evaluate,
    *,
    objectives: Mapping[str, Direction] | Sequence[str] | str,
    strategy: Strategy | OneShot,
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
    executor: Executor | None = None,
    resources: Mapping[str, Any] | None = None,
    **offered: Any,
) -> SearchResult:
    """Search a space of architectures.

    A search in a store that was killed or interrupted is continued by the same call: every architecture that has a
    result keeps it. An architecture that raises, reports no finite number or whose process is killed is a failed trial.

    Args:
        space: A ``ModelSpace`` of NNI, an :class:`~lightning_optcore.nas.ArchitectureSpace`, a
            :class:`~lightning_optcore.search.Space`, or a mapping of labels to their values.
        evaluate: Returns numbers by name for an architecture; see :class:`~lightning_optcore.nas.LightningEvaluator`.
            What its method ``estimate(architecture)`` returns, if it has one, is known before it is paid for;
            :func:`~lightning_optcore.nas.offers.offered_by` says what of it strategies are told.
        objectives: What is searched for: ``{"acc": "maximize"}``, or names, whose directions are the yardstick's own.
        strategy: A name of :data:`lightning_optcore.nas.strategies.STRATEGIES`, or a searcher's class. Or a name of
            :data:`lightning_optcore.nas.strategies.ONE_SHOT`, or a :class:`~lightning_optcore.nas.OneShot`: it trains
            a supernet first, whose weights are ``supernet.ckpt`` in the search's folder.
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
        executor: Where trials run instead of processes of its own, ``n_jobs`` at once; it stays open. A trial whose
            node is lost is tried again. Store and folder must be in reach of all nodes.
        resources: What a trial needs of a node of the executor, e.g. ``{"cpu": 2}``.
        offered: What is handed to a strategy that has an argument of that name, beside what ``evaluate`` offers.

    Raises:
        ArchitectureError: If the space contradicts itself.
        SearchError: If an argument is out of range, nobody reports an objective, every trial failed, or no
            architecture was found that meets the constraints.
        SupernetError: If there is no supernet of the space as a one-shot strategy needs it.
        SweepError: If the search cannot be continued, e.g. as its space has changed.

    Example:
        >>> table = {8: 0.90, 16: 0.95, 32: 0.94}
        >>> found = search({"width": [8, 16, 32]}, lambda one: {"acc": table[one["width"]], "flops": one["width"]},
        ...                objectives=["acc", "flops"], strategy="grid", max_trials=3, show=False)
        >>> found.best("acc").architecture, [trial.architecture["width"] for trial in found.front]
        ({'width': 16}, [16, 8])
    """
    for name, value in (("max_trials", max_trials), ("n_jobs", n_jobs)):
        if not is_whole(value, least=1):
            raise SearchError(f"{name}={value!r}: expected a positive whole number")
    if max_seconds is not None and not (is_number(max_seconds) and max_seconds > 0):
        raise SearchError(f"max_seconds={max_seconds!r}: expected a number above 0")
    deadline = None if max_seconds is None else clock() + max_seconds
    directions = _directions(objectives)
    where = architecture_space(space)
    if command is None:
        command = _identity(evaluate, one_shot_of(strategy) or strategy, directions, seed)
    strategy, evaluate, prepare = planned(strategy, evaluate)
    offered = {**offered_by(evaluate, list(directions)), **offered}
    searcher = searcher_of(strategy, where.choices, list(directions.values()), seed=seed, initial=initial, **offered)
    if searcher.continues and not getattr(evaluate, "inherits", False):
        raise SearchError(
            f"strategy: {type(searcher).__name__} trains architectures on from the weights of earlier trials, which "
            "the evaluation does not inherit; use LightningEvaluator(..., inherit=True), in Hydra nas.inherit=true, or "
            "leave out train_on"
        )
    with ExitStack() as stack:
        target = _store_of(store, stack)
        journal = stack.enter_context(held_journal(target))
        workers = TrialWorkers(n_jobs, executor, resources)
        run = _Search(
            searcher,
            where.key,
            evaluate,
            directions,
            constraints,
            max_trials,
            n_jobs,
            journal,
            target,
            describe,
            workers,
        )
        if deadline is not None:
            run.late = lambda: clock() >= deadline
        run.begin(command, resume, directory)
        if on_begin is not None:
            on_begin(run.sweep_id, run.directory)
        return run.run(Console().is_terminal if show is None else show, prepare)


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
        workers: TrialWorkers,
    ) -> None:
        self._searcher = searcher
        self._key = key
        self._evaluate = evaluate
        self._directions = directions
        self._limits = Limits(constraints, getattr(evaluate, "estimate", None))
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
        self._workers = workers
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

    def run(self, show: bool, prepare: Prepare | None = None) -> SearchResult:
        """Search to the end, after what the strategy does before the first trial."""
        read = partial(self._journal.trials, self.sweep_id)
        table = LiveTable(read, list(self._directions.values()), list(self._directions), None)
        try:
            if prepare is not None:
                prepare(self.directory, self._searcher)
            with table if show else nullcontext():
                self._loop(self._restored())
            self._check_some_succeeded()
        except BaseException as error:
            # A search that was interrupted stays open, so that the same call continues it.
            if isinstance(error, Exception):
                self._journal.finish(self.sweep_id, "failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._workers.close()
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
            if key in paid or (key in self._known and record.candidate.parent is None):
                continue
            excess = self._limits.excess(record.candidate.params)
            if excess:
                failure, violation = described_excess(excess), violation_of(excess)
                self._journal.end_trial(record, None, failure, status="pruned", violation=violation)
                continue
            paid[key] = record
        tasks = {record.number: self._task(record) for record in paid.values()}
        failures = self._workers.run(tasks, lambda number: self._journal.trial(self.sweep_id, number).ended)
        for record in self._journal.trials(self.sweep_id, batch=self._batch) if batch else []:
            if record.ended:
                self._known.setdefault(self._key(record.candidate.params), record)
                continue
            known = self._known.get(self._key(record.candidate.params))
            if known is None or record.number in tasks:
                failure = failures.get(record.number, "the process ended without a result")
                self._journal.end_trial(record, None, failure=failure)
                continue
            source = f"trial {known.number} of sweep {self.sweep_id}"
            self._journal.end_trial(
                record, known.objectives, known.failure, source, known.status, violation=known.violation
            )

    def _task(self, record: TrialRecord) -> Callable[[], None]:
        place = str(self.directory / str(record.job_num))
        return partial(
            run_trial, self._evaluate, record, self._target, list(self._directions), self._limits.by_name, place
        )

    def _tell(self, record: TrialRecord) -> None:
        if not any(one.id == record.number for one in self._searcher.pending):
            return
        told = told_of(record, len(self._directions))
        self._searcher.tell(told.candidate, told.objectives, failure=told.failure, violation=told.violation)
        self._count(record)

    def _count(self, record: TrialRecord) -> None:
        """Keep count of a trial that the searcher was told."""
        rejected = _was_rejected(record)
        self._evaluated += not rejected and record.cached_from is None
        self._succeeded += record.feasible
        self._rejected_in_a_row = 0 if record.feasible else self._rejected_in_a_row + rejected
        self._known.setdefault(self._key(record.candidate.params), record)
        if record.status == "failed":
            self._failed.append(record)
            log.warning("trial %d failed: %s", record.number, record.reason)

    def _check_failures(self) -> None:
        failed = self._failed
        if not failed or len(failed) < self._evaluated:
            return
        reasons = [record.reason for record in failed]
        if UNREPORTED in reasons[0]:
            raise SearchError(reasons[0])
        # But for the sizes of what did not fit.
        alike = len(failed) >= _HOPELESS_ALIKE and len({re.sub(r"\d+", "#", reason) for reason in reasons}) == 1
        if alike or len(failed) >= _HOPELESS:
            raise SearchError(f"the first {len(failed)} trials all failed; the last one: {reasons[-1]}")

    def _check_some_succeeded(self) -> None:
        if self._succeeded:
            return
        unmet = self._limits.unmet(self._rejected_in_a_row)
        if unmet and self._rejected_in_a_row:
            raise SearchError(unmet)
        if self._failed:
            count = len(self._failed)
            raise SearchError(f"{count} of {count} trials failed; the last one: {self._failed[-1].reason}")
        over = [record for record in self._journal.trials(self.sweep_id) if record.failure]
        if over:
            raise SearchError(f"no architecture kept the limits; the last one: {over[-1].reason}")
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
        command = without_passwords(command)
        mine = (one for one in self._journal.sweeps(_REJECTED) if one.command == command and one.status == "running")
        return next((one for one in mine if one.pid == os.getpid()), None)

    def _restored(self) -> list[TrialRecord]:
        """Bring the searcher to where it was, and return what is to be evaluated again."""
        found = continuation_of(self._journal, self._record)
        if found is None:
            return []
        self._batch = found.batch
        self._next_job_num = max(trial.job_num or 0 for trial in [*found.ended, *found.unfinished]) + 1
        self._searcher.load_state_dict(found.state)
        for trial in found.told:
            self._count(trial)
        for trial in found.ended:
            self._known.setdefault(self._key(trial.candidate.params), trial)
        again = found.unfinished
        log.info(
            "search %d continues: %d trials have a result, %d run again", self.sweep_id, len(found.ended), len(again)
        )
        first = self._next_job_num
        self._next_job_num += len(again)
        return relaunched(self._journal, self._record, again, first)

    def _result(self) -> SearchResult:
        history = [self._trial(record) for record in self._journal.trials(self.sweep_id)]
        by_number = {trial.number: trial for trial in history}
        front = [by_number[trial.candidate.id] for trial in self._searcher.pareto_front()]
        return SearchResult(history, front, dict(self._directions), self.sweep_id, str(self.directory))

    def _trial(self, record: TrialRecord) -> ArchitectureTrial:
        return ArchitectureTrial(
            number=record.number,
            architecture=record.candidate.params,
            objectives=dict(zip(self._directions, record.objectives or (), strict=False)),
            failure=None if record.feasible else record.reason,
            origin=record.candidate.origin,
            evaluated=record.cached_from is None and not _was_rejected(record),
            exceeds=record.violation > 0,
            directory=record.directory,
        )


def _was_rejected(record: TrialRecord) -> bool:
    """Whether a trial was over a limit before it was evaluated."""
    return record.objectives is None and record.violation > 0


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
    if isinstance(thing, OneShot):
        values = {key: _name(one) if callable(one) else repr(one) for key, one in vars(thing).items()}
        return f"OneShot({', '.join(f'{key}={text}' for key, text in values.items())})"
    if isinstance(thing, partial):
        return f"{_name(thing.func)}({', '.join(f'{key}={value!r}' for key, value in sorted(thing.keywords.items()))})"
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
