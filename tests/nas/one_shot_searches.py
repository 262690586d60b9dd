"""Small one-shot searches on real digits."""

from __future__ import annotations

from functools import partial

from lightning.pytorch import Trainer

from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import LightningEvaluator, search, spaces

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
MEASURE = {"batch_sizes": (1,), "rounds": 2}


def cells():
    """100 networks: two widths, two nodes of five operations."""
    return spaces.cnn_cell(widths=(4, 8), num_stages=1, num_nodes=2)


def edges():
    """Choices of layers alone, behind a convolution for grey images."""
    return spaces.nasbench201(stem_out_channels=4)


def evaluator(space=None, *, epochs=1, module=None, data=Digits, callbacks=tuple, seed=0, latency=None, **trainer):
    return LightningEvaluator(
        space or cells(),
        module or partial(Classifier, lr=0.01),
        data,
        trainer=partial(Trainer, max_epochs=epochs, **{**QUIET, **trainer}),
        callbacks=callbacks,
        seed=seed,
        measure=MEASURE,
        latency=latency,
    )


def searched(evaluate, strategy, **changed):
    options = {"objectives": ["val/acc", "params"], "max_trials": 4, "show": False}
    return search(evaluate.space, evaluate, strategy=strategy, **{**options, **changed})
