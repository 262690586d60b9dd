"""One fit in which profilers take turns every few steps: what each costs a step, to some microseconds.

Whole fits differ by more than a profiler costs, on a machine with neighbours; a dozen steps and the next dozen do not.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler
from plain_training import Network, Samples, loader_of

from lightning_optcore.callbacks import PerformanceProfiler

NO_PROFILER, OURS, EMPTY = "no profiler", "PerformanceProfiler", "an empty Callback"
# Steps of a turn; the first of them pay for what the turn before left in the caches, the last one for the change.
TURN, SETTLING = 12, 2


class Empty(Callback):
    """Does nothing."""


@dataclass(frozen=True)
class Cost:
    """What an alternative costs.

    Args:
        microseconds: Median of a step.
        more: Median of its turns' differences to the turn of no profiler in the same round, in microseconds a step.
        error: Standard error of it.
    """

    microseconds: float
    more: float
    error: float


class Turns(Callback):
    """Changes the Trainer's profiler and callbacks while it trains, and takes the time of each alternative.

    Args:
        ours: The profiler that is in the Trainer's callbacks.
        names: Who takes turns.
        folder: Where the profilers of Lightning may write.
    """

    def __init__(self, ours: PerformanceProfiler, names: list[str], folder: str) -> None:
        self.ours = ours
        self.names = names
        none = PassThroughProfiler()
        self.profilers: dict[str, Profiler] = {
            NO_PROFILER: none,
            EMPTY: none,
            "SimpleProfiler": SimpleProfiler(folder, "simple"),
            "AdvancedProfiler": AdvancedProfiler(folder, "advanced"),
        }
        self.empty = Empty()
        self.rng = random.Random(0)
        self.rounds: list[dict[str, float]] = []
        self.waiting: list[str] = []
        self.current = ""
        self.step = self.left = 0
        self.began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the profiler that was put in, and all that was put around methods."""
        assert self.ours._run is not None
        self.profilers[OURS] = self.ours._run.probes.collector
        self.wrapped = list(self.ours._run.probes._replaced)
        self.left = time.perf_counter_ns()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End a turn where it is over."""
        place, self.step = self.step % TURN, self.step + 1
        if place == SETTLING:
            self.began = time.perf_counter()
        elif place == TURN - 1:
            if self.current:
                self.rounds[-1][self.current] = (time.perf_counter() - self.began) / (TURN - 1 - SETTLING) * 1e6
            self._change(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the profiler as it found it."""
        self._put_in(trainer, OURS)

    def _change(self, trainer: Trainer) -> None:
        if not self.waiting:
            self.waiting = self.rng.sample(self.names, len(self.names))
            self.rounds.append({})
        if self.current == OURS:
            self.left = time.perf_counter_ns()
        self.current = self.waiting.pop()
        self._put_in(trainer, self.current)
        if self.current == OURS:
            # It sees how long steps are, and must not count those of the others.
            self.profilers[OURS]._looked_at += time.perf_counter_ns() - self.left  # type: ignore[attr-defined]

    def _put_in(self, trainer: Trainer, name: str) -> None:
        assert self.ours._run is not None
        probes = self.ours._run.probes
        if len(probes._replaced) > len(self.wrapped):
            self.wrapped = list(probes._replaced)
        for owner, attribute, previous, wrapper in self.wrapped:
            if name == OURS:
                vars(owner)[attribute] = wrapper
            elif callable(previous):
                vars(owner)[attribute] = previous
            else:
                vars(owner).pop(attribute, None)
        beside = {OURS: [self.ours], EMPTY: [self.empty]}.get(name, [])
        trainer.callbacks = [self, *beside]  # type: ignore[attr-defined]
        trainer.profiler = self.profilers[name]  # type: ignore[attr-defined]


def costs(names: list[str], steps: int, width: int = 64, batch: int = 16) -> dict[str, Cost]:
    """Fit an MLP and return what each alternative costs, the one named ``no profiler`` among them.

    Args:
        names: Alternatives.
        steps: Length of the fit.
        width: Of the network.
        batch: Samples a step.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = PerformanceProfiler(live=False, output_dir=folder)
        turns = Turns(ours, names, folder)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            callbacks=[turns, ours],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Network(width, 3), loader_of(Samples(64 * 700), batch))
    rounds = [one for one in turns.rounds if len(one) == len(names)]
    found = {}
    for name in names:
        differences = [one[name] - one[NO_PROFILER] for one in rounds]
        middle = statistics.median(differences)
        # Of a median, by the median deviation: a hiccup of the machine must not count.
        deviation = 1.4826 * statistics.median(abs(one - middle) for one in differences)
        found[name] = Cost(
            statistics.median(one[name] for one in rounds), middle, 1.2533 * deviation / len(rounds) ** 0.5
        )
    return found
