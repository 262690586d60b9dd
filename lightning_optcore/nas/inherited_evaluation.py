"""The evaluation that trains nothing: each architecture with its share of a supernet's weights, on the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_optcore.measurement.steps import call_step
from lightning_optcore.nas._lightning_compat import on_device
from lightning_optcore.nas.evaluator import LightningEvaluator, interruptible
from lightning_optcore.nas.once_for_all import recalibrate_batch_norm
from lightning_optcore.nas.space import Architecture
from lightning_optcore.nas.supernet_callbacks import unobserved
from lightning_optcore.nas.supernet_file import inheriting_modules, load_supernet

Modules = Callable[[Architecture], LightningModule]

# The last supernet that this process loaded, by its file and when that was written: one file is of one search, whose
# evaluator comes anew with every trial that is sent to a process.
_LOADED: dict[tuple[str, int], Modules] = {}


class InheritedEvaluation:
    """Validates sub-networks of a trained supernet, and measures them.

    Batch norm is recalibrated on batches of the training set, by the module's own training step. A process loads the
    supernet when it judges its first architecture.

    Args:
        evaluator: Whose module, data, Trainer and yardstick are used.
        calibration_batches: For batch norm; none are read where there is none.
        path: File of the supernet; may be set later.
    """

    def __init__(self, evaluator: LightningEvaluator, calibration_batches: int, path: Path | None = None) -> None:
        self.evaluator = evaluator
        self.calibration_batches = calibration_batches
        self.path = path

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Validate and measure.

        Raises:
            EvaluationError: If a loss is no finite number.
            SupernetError: If the supernet's file does not fit the evaluator.
        """
        # Loaded before random numbers are seeded: the first of a process draws what all others do.
        modules = self._modules()
        return self.evaluator.evaluated(
            architecture,
            lambda: modules(architecture),
            lambda trainer, model, data: trainer.validate(model, datamodule=data, verbose=False),
            [_Recalibration(self.calibration_batches)],
        )

    def module(self, architecture: Architecture) -> LightningModule:
        """Return the module of an architecture as it was judged: inherited, and its batch norm recalibrated."""
        modules = self._modules()
        seed_everything(self.evaluator.seed, workers=True, verbose=False)
        data, model = self.evaluator.data(), modules(architecture)
        trainer = self.evaluator.trainer(callbacks=[_Recalibration(self.calibration_batches)])
        with interruptible(trainer):
            trainer.validate(model, datamodule=data, verbose=False)
        return model

    def estimate(self, architecture: Architecture) -> dict[str, float]:
        """Return what is known of a network before it is judged."""
        return self.evaluator.estimate(architecture)

    def _modules(self) -> Modules:
        assert self.path is not None
        key = str(self.path), self.path.stat().st_mtime_ns
        if key not in _LOADED:
            _LOADED.clear()
            trained = load_supernet(self.path)
            _LOADED[key] = inheriting_modules(trained, self.evaluator.space, self.evaluator.module)
        return _LOADED[key]


class _Recalibration(Callback):
    """Computes the statistics of batch norm anew before a validation, on batches of the datamodule's training set."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_batches = num_batches

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let batch norm, and nothing else, see them as in training."""
        if trainer.state.fn != "validate":
            return
        with unobserved(pl_module), trainer.precision_plugin.val_step_context():
            recalibrate_batch_norm(pl_module, self._batches(trainer), _step)

    def _batches(self, trainer: Trainer) -> Iterator[Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("fit")
        # A module may train on several loaders at once.
        loaders = CombinedLoader(data.train_dataloader(), "max_size_cycle")
        for batch, *_ in islice(iter(loaders), self.num_batches):
            yield on_device(trainer, batch)


def _step(pl_module: Any, batch: Any) -> None:
    # A training step that steps its optimizers itself can only be trained with.
    if pl_module.automatic_optimization:
        call_step(pl_module.training_step, batch, 0)
    else:
        pl_module.validation_step(batch, 0)
