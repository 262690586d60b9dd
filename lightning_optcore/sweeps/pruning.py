"""Early stopping of bad trials: what a trial reports on its way is compared with what the others reported.

Sources: the median rule is that of Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017,
section 3.1.1; successive halving without waiting is ASHA of Li et al., "A System for Massively Parallel Hyperparameter
Tuning", MLSys 2020, algorithm 2.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_optcore.search.nni_tuner import nni_algorithm
from lightning_optcore.search.searcher import SearchError
from lightning_optcore.sweeps.journal import open_journal
from lightning_optcore.sweeps.nni_assessor import ASSESSORS, nni_rule
from lightning_optcore.sweeps.task import TRIAL_VARIABLE, TrialPrunedError

log = logging.getLogger(__name__)

Mode = Literal["min", "max"]
Method = Literal["median", "halving", "nni_medianstop", "nni_curvefitting"]
# Value by step.
Reports = Mapping[int, float]


def median_rule(own: Reports, others: Sequence[Reports], *, mode: Mode = "min", min_trials: int = 4) -> str | None:
    """Return why a trial should end, or ``None``: its best so far is worse than the median of the others' best by then.

    Args:
        own: What the trial reported.
        others: What the others reported.
        mode: Which way is better.
        min_trials: How many others must have come as far.

    Example:
        >>> median_rule({1: 0.9}, [{1: 0.5}, {1: 0.4}, {1: 0.6}], min_trials=3)
        '0.9 is worse than 0.5, the median of 3 trials'
    """
    step, sign = max(own), _sign(mode)
    costs = [[sign * value for at, value in one.items() if at <= step] for one in others if one and max(one) >= step]
    rivals = [min(values) for values in costs if values]
    if len(rivals) < min_trials:
        return None
    middle, best = median(rivals), min(sign * value for value in own.values())
    if best <= middle:
        return None
    return f"{sign * best:.4g} is worse than {sign * middle:.4g}, the median of {len(rivals)} trials"


def halving_rule(
    own: Reports, others: Sequence[Reports], *, mode: Mode = "min", min_steps: int = 1, reduction_factor: int = 3
) -> str | None:
    """Return why a trial should end, or ``None``: at a rung it is not among the best ``1 / reduction_factor``.

    Args:
        own: What the trial reported.
        others: What the others reported.
        mode: Which way is better.
        min_steps: The first rung; the next ones are ``reduction_factor`` times as far each.
        reduction_factor: One in so many goes on. Fewer trials than that at a rung all go on.

    Example:
        >>> halving_rule({1: 0.9}, [{1: 0.5}, {1: 0.4}])
        '0.9 is not among the best 1 of 3 trials at step 1'
    """
    step, sign = max(own), _sign(mode)
    if not _is_rung(step, min_steps, reduction_factor):
        return None
    there = sorted(sign * value for value in [own[step], *(one[step] for one in others if step in one)])
    kept = len(there) // reduction_factor
    if kept == 0 or sign * own[step] <= there[kept - 1]:
        return None
    return f"{own[step]:.4g} is not among the best {kept} of {len(there)} trials at step {step}"


class TrialPruning(Callback):
    """Ends trials of a sweep that do worse than the others, after any of their validations.

    It works with every launcher and across processes: what trials report is in the sweep's store. A pruned trial
    counts as one that failed for the searcher, but not for ``hydra.sweeper.max_failures``. Outside a sweep it does
    nothing.

    Args:
        monitor: The logged metric that is compared.
        mode: ``"min"`` or ``"max"``: which way is better.
        method: ``"median"``, ``"halving"`` for asynchronous successive halving, or an assessor of NNI:
            ``"nni_medianstop"`` or ``"nni_curvefitting"``; these need the extra ``nas``.
        min_epochs: No trial ends before so many epochs; the first rung of halving.
        min_trials: How many others must have come as far, for the median, or to their end, for NNI.
        reduction_factor: One in so many goes on at every rung, for halving.

    Raises:
        MisconfigurationException: If an argument is out of range, ``monitor`` was never logged, or NNI is asked for and
            not installed. ``"nni_curvefitting"`` only goes with ``mode="max"`` and a trainer that has ``max_epochs``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrialPruning(monitor="val/acc", mode="max")], logger=False)
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Mode = "min",
        method: Method = "median",
        min_epochs: int = 1,
        min_trials: int = 4,
        reduction_factor: int = 3,
    ) -> None:
        super().__init__()
        for name, value, known in (("mode", mode, get_args(Mode)), ("method", method, get_args(Method))):
            if value not in known:
                raise MisconfigurationException(f"{name}={value!r}: expected {' or '.join(known)}")
        for name, number, least in (
            ("min_epochs", min_epochs, 1),
            ("min_trials", min_trials, 1),
            ("reduction_factor", reduction_factor, 2),
        ):
            if number < least:
                raise MisconfigurationException(f"{name}={number}: expected at least {least}")
        self._assessor = method.removeprefix("nni_") if method.startswith("nni_") else None
        if self._assessor is not None:
            try:
                nni_algorithm(*ASSESSORS[self._assessor])
            except SearchError as error:
                raise MisconfigurationException(f"method={method!r}: {error}") from error
        if self._assessor == "curvefitting" and mode != "max":
            raise MisconfigurationException(f"method={method!r}, mode={mode!r}: expected mode='max', e.g. an accuracy")
        self.monitor = monitor
        self.mode = mode
        self.method = method
        self.min_epochs = min_epochs
        self.min_trials = min_trials
        self.reduction_factor = reduction_factor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the last epoch is known, if it is to be predicted."""
        if self._assessor == "curvefitting" and stage == "fit" and (trainer.max_epochs or -1) < 0:
            raise MisconfigurationException(
                f"method={self.method!r} predicts the last epoch: expected trainer.max_epochs, got {trainer.max_epochs}"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric, and end the trial if it is to end."""
        named = os.environ.get(TRIAL_VARIABLE)
        if named is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise MisconfigurationException(f"monitor={self.monitor!r} was never logged: expected one of {known}")
        epoch = trainer.current_epoch + 1
        reason = self._reported(named, epoch, trainer) if trainer.is_global_zero else None
        reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            raise TrialPrunedError(f"after epoch {epoch}: {self.monitor} {reason}")

    def _reported(self, named: str, epoch: int, trainer: Trainer) -> str | None:
        """Write this trial's value and return why it should end."""
        sweep_id, number, path = named.split(" ", 2)
        value = float(trainer.callback_metrics[self.monitor])
        journal = open_journal(path)
        journal.report(int(sweep_id), int(number), epoch, value)
        reports = journal.intermediate_values(int(sweep_id))
        if not math.isfinite(value):
            return f"is {value}"
        # A trial that was killed and launched again has reports of its first life beyond this epoch.
        own = {step: known for step, known in reports.pop(int(number)).items() if step <= epoch}
        others = list(reports.values())
        if epoch < self.min_epochs:
            return None
        if self._assessor is not None:
            done = {trial.number for trial in journal.trials(int(sweep_id)) if trial.status == "done"}
            completed = [values for other, values in reports.items() if other in done]
            return nni_rule(
                own,
                completed,
                assessor=self._assessor,
                mode=self.mode,
                min_trials=self.min_trials,
                max_steps=trainer.max_epochs,
            )
        if self.method == "median":
            return median_rule(own, others, mode=self.mode, min_trials=self.min_trials)
        return halving_rule(
            own, others, mode=self.mode, min_steps=self.min_epochs, reduction_factor=self.reduction_factor
        )


def _sign(mode: Mode) -> float:
    return 1.0 if mode == "min" else -1.0


def _is_rung(step: int, first: int, factor: int) -> bool:
    rung = first
    while rung < step:
        rung *= factor
    return rung == step
