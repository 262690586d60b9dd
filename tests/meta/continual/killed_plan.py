"""A plan that kills itself, as hard as can be, in a step of one of its tasks; run by a test."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from strangers import Plain

from lightning_optcore.callbacks import (
    AveragedGEM,
    ElasticWeightConsolidation,
    ExperienceReplay,
    LearningWithoutForgetting,
    SynapticIntelligence,
)
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import AccuracyMatrix, ContinualPlan, permuted_tasks


class Kill(Callback):
    """Ends the process in a step of a fit."""

    def __init__(self, fit: int) -> None:
        self.fit, self.fits = fit, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.fits += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.fits == self.fit and trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, fit: int) -> AccuracyMatrix:
    """Run the plan, or what is left of it; it dies in the fit of that number."""
    callbacks = [
        ElasticWeightConsolidation(fisher_samples=200),
        SynapticIntelligence(),
        ExperienceReplay(size=50),
        AveragedGEM(size=50),
        LearningWithoutForgetting(),
        Kill(fit),
    ]
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, enable_model_summary=False, **quiet)
    return ContinualPlan(permuted_tasks(Digits(), num_tasks=3), folder=folder).run(trainer, Plain("adam", 1e-2))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(Path(sys.argv[1]), int(sys.argv[2]))
