"""What a sweep launches: the user's task function, with its trial's result written to the journal from inside the job.

A launcher returns only after a whole batch, and an ended process returns nothing at all; the journal has every
trial as soon as it ended.
"""

from __future__ import annotations

import logging
import os
import pydoc
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_optcore.fingerprints import (
    code_fingerprint,
    config_fingerprint,
    files_fingerprint,
    fingerprint,
    hardware_fingerprint,
)
from lightning_optcore.sweeps.journal import open_journal

log = logging.getLogger(__name__)

# Tells whoever runs within a trial, in whatever process, which one it is: "sweep number store".
TRIAL_VARIABLE = "LIGHTNING_OPTCORE_TRIAL"
# What a trial leaves in its folder where others may continue from it.
MEMBER_CHECKPOINT = "population_member.ckpt"
_LONGEST_FAILURE = 4_000


class TrialTimeoutError(Exception):
    """A trial that took longer than ``hydra.sweeper.timeout_s``."""


class TrialPrunedError(Exception):
    """A trial that was ended because it did worse than the others."""


@dataclass(frozen=True)
class TrialTask:
    """Runs one trial in the place of the task function; it can be pickled if that one can.

    Args:
        task: The user's task function.
        store: The store's path or URL.
        sweep_id: Number of the sweep.
        objectives: How many numbers the task has to return.
        optional: Whether it may return none.
        timeout_s: Seconds after which a trial is ended and counts as failed, or ``None``.
        code: Fingerprint of the task function's code; ``None`` neither asks the cache nor feeds it.
        continued: Whether other trials will continue from its weights, so that it fails if it leaves none.
    """

    task: Callable[[DictConfig], Any]
    store: str
    sweep_id: int
    objectives: int
    optional: bool = False
    timeout_s: float | None = None
    code: str | None = None
    continued: bool = False

    def __call__(self, config: DictConfig) -> Any:
        """Run the trial of this job; a failure is written to the journal and raised."""
        hydra = HydraConfig.get()
        journal = open_journal(self.store)
        mark = self._fingerprint(config)
        folder = str(hydra.runtime.output_dir)
        trial, same = journal.start_trial(self.sweep_id, int(hydra.job.num), folder, mark, self.objectives)
        if trial.status == "done":
            # By an attempt before this one, whose machine was lost after it.
            return _as_returned(trial.objectives)
        if same is not None and same.objectives is not None:
            source = f"trial {same.number} of sweep {same.sweep_id}"
            log.info("trial %d: as %s (same configuration, code, data and machine)", trial.number, source)
            journal.end_trial(trial, same.objectives, cached_from=source)
            return _as_returned(same.objectives)
        try:
            with named_trial(self.sweep_id, trial.number, self.store), _time_limit(self.timeout_s):
                result = _returned(self.task, config)
        except TrialPrunedError as error:
            log.info("trial %d: pruned %s", trial.number, error)
            journal.end_trial(trial, None, failure=f"pruned {error}", status="pruned")
            raise
        except Exception as error:
            journal.end_trial(trial, None, failure=described(error))
            raise
        values, failure = objectives_of(result, self.objectives, optional=self.optional)
        if failure is None and self.continued and not (Path(hydra.runtime.output_dir) / MEMBER_CHECKPOINT).exists():
            values, failure = None, f"the job left no {MEMBER_CHECKPOINT}: add callbacks.population_member"
        journal.end_trial(trial, values, failure=failure)
        return result

    def _fingerprint(self, config: DictConfig) -> str | None:
        """Return what identifies the trial's work, or ``None`` where that cannot be known."""
        if self.code is None:
            return None
        try:
            plain = OmegaConf.to_container(config, resolve=True)
            classes = [pydoc.locate(target) for target in _targets(plain)]
            if None in classes:
                return None
            parts = [config_fingerprint(plain), self.code, code_fingerprint(classes)]
            return fingerprint([*parts, files_fingerprint(plain), hardware_fingerprint()])
        except Exception as error:
            log.debug("no fingerprint, so no cache: %s", error)
            return None


def objectives_of(result: Any, count: int, *, optional: bool = False) -> tuple[list[float] | None, str | None]:
    """Return the numbers that a task returned, or why they are none.

    Args:
        result: A number or a sequence of numbers (anything that ``float`` takes).
        count: How many there have to be.
        optional: Whether ``None`` is no failure.

    Example:
        >>> objectives_of((0.9, 1200), 2)
        ([0.9, 1200.0], None)
        >>> objectives_of(0.9, 2)
        (None, 'the job returned 1 number, hydra.sweeper.directions names 2')
    """
    if result is None:
        if optional:
            return None, None
        return None, "the job returned nothing: return a number, or a tuple; of optcore train, set objective=[val/acc]"
    try:
        one_by_one = result if isinstance(result, (Sequence, Mapping)) and not isinstance(result, str) else [result]
        if isinstance(one_by_one, Mapping):
            one_by_one = list(one_by_one.values())
        values = [float(value) for value in one_by_one]
    except (TypeError, ValueError):
        return None, f"the job returned {result!r:.100}: expected a number, or a tuple of numbers"
    if len(values) != count:
        numbers = "number" if len(values) == 1 else "numbers"
        return None, f"the job returned {len(values)} {numbers}, hydra.sweeper.directions names {count}"
    bad = [f"objective {i} is {value}" for i, value in enumerate(values) if not abs(value) < float("inf")]
    return (None, "; ".join(bad)) if bad else (values, None)


def _as_returned(values: Sequence[float] | None) -> Any:
    """Return stored numbers as a task does."""
    if values is None:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _returned(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    try:
        return task(config)
    except SystemExit as end:
        if end.code in (0, None):
            return None
        if end.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from end
        # The launcher would take this for its own end.
        raise RuntimeError(f"the job ended with exit code {end.code}") from end


@contextmanager
def named_trial(sweep_id: int, number: int, store: str) -> Iterator[None]:
    """Let whoever runs within the block know which trial it is; see :func:`current_trial`."""
    os.environ[TRIAL_VARIABLE] = f"{sweep_id} {number} {store}"
    try:
        yield
    finally:
        del os.environ[TRIAL_VARIABLE]


def current_trial() -> tuple[int, int, str] | None:
    """Return the sweep's number, the trial's number and the store of the trial that runs here, if one does."""
    named = os.environ.get(TRIAL_VARIABLE)
    if named is None:
        return None
    sweep_id, number, store = named.split(" ", 2)
    return int(sweep_id), int(number), store


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        log.warning("hydra.sweeper.timeout_s=%s has no effect: it needs the main thread of a POSIX process", seconds)
        yield
        return

    def end(*_: Any) -> None:
        raise TrialTimeoutError(f"it took longer than hydra.sweeper.timeout_s={seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def described(error: BaseException) -> str:
    """Return the error in its first line, and below it where it came from."""
    lines = " ".join(str(error).split())
    where = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {lines[:500]}\n{where[-_LONGEST_FAILURE:]}"


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        for value in config.values():
            yield from _targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from _targets(value)
