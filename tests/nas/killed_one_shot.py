"""A one-shot search that leaves a line for each epoch and sub-network, to be killed and begun again: store, log."""

import sys
import time
from functools import partial
from pathlib import Path

from one_shot_searches import evaluator, searched

from lightning_optcore.models import Classifier
from lightning_optcore.nas import LightningEvaluator, OneShot

STORE, LOG = sys.argv[1], Path(sys.argv[2])


class Slow(Classifier):
    """Leaves lines, and time to be killed."""

    def on_train_epoch_end(self):
        note(f"epoch {self.current_epoch}")


class Noted(LightningEvaluator):
    """Leaves lines, and time to be killed."""

    def evaluated(self, *arguments):
        note("began")
        metrics = super().evaluated(*arguments)
        note("ended")
        return metrics


def note(text):
    with LOG.open("a") as file:
        file.write(f"{text}\n")
    time.sleep(0.2)


if __name__ == "__main__":
    evaluate = evaluator(module=partial(Slow, lr=0.01), limit_train_batches=4, limit_val_batches=1)
    evaluate.__class__ = Noted
    strategy = OneShot("once_for_all", max_epochs=6, calibration_batches=1)
    found = searched(evaluate, strategy, max_trials=6, store=STORE)
    print(len(found.history), sum(trial.evaluated for trial in found.history), found.sweep_id)
