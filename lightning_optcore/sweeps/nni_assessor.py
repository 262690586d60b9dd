"""NNI's assessors as rules over the reports of trials, in this process and without NNI's server.

Sources: NNI, Microsoft, https://github.com/microsoft/nni (3.0); Medianstop: Golovin et al., "Google Vizier: A Service
for Black-Box Optimization", KDD 2017, section 3.1.1; Curvefitting: Domhan et al., "Speeding up Automatic Hyperparameter
Optimization of Deep Neural Networks by Extrapolation of Learning Curves", IJCAI 2015.
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from lightning_optcore.search.nni_tuner import nni_algorithm

ASSESSORS: dict[str, tuple[str, str]] = {
    "medianstop": ("medianstop_assessor", "MedianstopAssessor"),
    "curvefitting": ("curvefitting_assessor", "CurvefittingAssessor"),
}
# The largest of Curvefitting's curves has four parameters: with fewer points it cannot be fitted.
_FEWEST_POINTS = 4


def nni_rule(
    own: Mapping[int, float],
    completed: Sequence[Mapping[int, float]],
    *,
    assessor: str = "medianstop",
    mode: Literal["min", "max"] = "min",
    min_trials: int = 4,
    max_steps: int | None = None,
) -> str | None:
    """Return why a trial should end, or ``None``: an assessor of NNI 3 calls it bad. Needs the extra ``nas``.

    ``"medianstop"`` compares its best so far with the median of the running averages of the completed trials.
    ``"curvefitting"`` fits twelve curves, and ends it if their mixture stays below 95% of the best final value. It is
    made for accuracies: greater is better, and above 0. It judges from four reports on, and every judgement fits anew
    in pure Python, whose time grows with the square of the reports: it pays where an epoch takes minutes.

    Args:
        own: What the trial reported: value by step.
        completed: What those reported that trained to their end.
        assessor: ``"medianstop"`` or ``"curvefitting"``.
        mode: Which way is better; only ``"max"`` for ``"curvefitting"``.
        min_trials: How many must have been completed. NNI is content with one.
        max_steps: The step of a trial's last report; ``"curvefitting"`` predicts the value there.

    Raises:
        SearchError: If NNI 3 is not installed.
        ValueError: If the assessor is unknown, or ``"curvefitting"`` is asked to minimise or has no ``max_steps``.

    Example:
        >>> nni_rule({1: 0.9}, [{1: 0.5}, {1: 0.4}, {1: 0.6}], min_trials=3)  # doctest: +SKIP
        "0.9 is bad for NNI's MedianstopAssessor, next to 3 completed trials"
    """
    if assessor not in ASSESSORS:
        raise ValueError(f"assessor={assessor!r}: expected {' or '.join(ASSESSORS)}")
    if assessor == "curvefitting" and (mode != "max" or max_steps is None):
        raise ValueError(
            f"assessor='curvefitting', mode={mode!r}, max_steps={max_steps}: expected mode='max' and a step"
        )
    nni, found = nni_algorithm(*ASSESSORS[assessor])
    histories = [[one[step] for step in sorted(one)] for one in completed if one]
    if len(histories) < min_trials:
        return None
    history = [own[step] for step in sorted(own)]
    if assessor == "medianstop":
        judge = found(optimize_mode=f"{mode}imize")
    else:
        # Its x counts reports, of which there need not be one a step.
        judge = found(epoch_num=round((max_steps or 0) * len(own) / max(own)), start_step=_FEWEST_POINTS)
        # It asks of a completed trial the last value only; the whole history would be fitted first.
        histories = [one[-1:] for one in histories]
    with _apart():
        for number, one in enumerate(histories):
            judge.assess_trial(str(number), one)
            judge.trial_end(str(number), True)
        verdict = judge.assess_trial("own", history)
    if verdict is not nni.assessor.AssessResult.Bad:
        return None
    return f"{history[-1]:.4g} is bad for NNI's {found.__name__}, next to {len(histories)} completed trials"


@contextmanager
def _apart() -> Iterator[None]:
    """Undo what Curvefitting does to the process: it draws from NumPy's generator, and keeps its fits in a module."""
    curves: Any = importlib.import_module("nni.algorithms.hpo.curvefitting_assessor.curvefunctions")
    parameters, outside = copy.deepcopy(curves.model_para), np.random.get_state()
    loggers = [logging.getLogger(f"{name}_Assessor") for name in ASSESSORS]
    levels = [logger.level for logger in loggers]
    np.random.seed(0)
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        # Most of its curves do not fit, and say so.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        curves.model_para.update(parameters)
        np.random.set_state(outside)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
