"""A plan that kills itself, as hard as can be, in a step of its second task; run by a test."""

from __future__ import annotations

import os
import signal
import sys
import warnings
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
from lightning_optcore.meta.continual import ContinualPlan, permuted_tasks


class Kill(Callback):
    """Ends the process in a step of a fit."""

    def __init__(self, fit: int) -> None:
        self.fit, self.fits = fit, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.fits += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.fits == self.fit and trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, fit: int) -> None:
    """Run the plan, or what is left of it, and print the matrix."""
    warnings.simplefilter("ignore")
    callbacks = [
        ElasticWeightConsolidation(),
        SynapticIntelligence(),
        ExperienceReplay(size=50),
        AveragedGEM(size=50),
        LearningWithoutForgetting(),
        Kill(fit),
    ]
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=callbacks, enable_model_summary=False, **quiet)
    plan = ContinualPlan(permuted_tasks(Digits(), num_tasks=3), folder=folder)
    print(plan.run(trainer, Plain("adam", 1e-2)).rows)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
