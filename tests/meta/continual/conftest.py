"""Fits in turn, for the tests of continual learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from strangers import Plain

from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import AccuracyMatrix, ContinualPlan, permuted_tasks

_UNTREATED: dict[Any, AccuracyMatrix] = {}


@pytest.fixture
def learn(make_trainer: Callable[..., Any]) -> Callable[..., AccuracyMatrix]:
    """Learn permuted digits (or other tasks) in turn, from the same weights and with the same batches."""

    def run(
        *callbacks: Callback,
        make: Callable[[], LightningModule] | None = None,
        tasks: Sequence[LightningDataModule] | None = None,
        max_epochs: int = 4,
        **options: Any,
    ) -> AccuracyMatrix:
        seed_everything(0, verbose=False)
        made = (make or Plain)()
        # Nothing is done in many a test: it comes to the same each time.
        done = (make, tasks and tasks[0].data.__class__, max_epochs, *sorted(options.items()))
        if not callbacks and done in _UNTREATED:
            return _UNTREATED[done]
        plan = ContinualPlan(tasks or permuted_tasks(Digits(batch_size=32), num_tasks=2), metric="val/acc")
        matrix = plan.run(make_trainer(*callbacks, max_epochs=max_epochs, **options), made)
        if not callbacks:
            _UNTREATED[done] = matrix
        return matrix

    return run
