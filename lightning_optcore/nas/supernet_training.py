"""The training of a supernet within a search: once, and continued where it was killed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, Timer

from lightning_optcore.fingerprints import fingerprint
from lightning_optcore.nas.differentiable_search import DifferentiableSearch
from lightning_optcore.nas.evaluator import (
    EvaluationError,
    LightningEvaluator,
    changes_networks,
    check_losses,
    floats,
    interruptible,
)
from lightning_optcore.nas.supernet import Kind, supernet
from lightning_optcore.nas.supernet_file import (
    SUPERNET_FILE,
    TrainedSupernet,
    differences,
    load_supernet,
    save_supernet,
)
from lightning_optcore.search.searcher import SearchError
from lightning_optcore.sweeps.pruning import TrialPruning

log = logging.getLogger(__name__)

# Of the training, within that of the search.
_FOLDER = "supernet"


def train_supernet(
    evaluator: LightningEvaluator,
    kind: Kind,
    callback: Callback,
    directory: Path,
    *,
    options: dict[str, Any],
    max_epochs: int | None = None,
    accumulate: int = 1,
) -> TrainedSupernet:
    """Train the supernet of a search by the evaluator's own module, data, Trainer and callbacks.

    One that was trained already is loaded, and a training that was killed continues from its last epoch. Callbacks
    that prune or quantize, and those that compare trials, are for the networks of architectures alone.

    Args:
        evaluator: What trains the candidates of a search.
        kind: Of the supernet.
        callback: What trains it: ``SampledTraining`` or ``DifferentiableSearch``.
        directory: Folder of the search.
        options: What the training follows from, as plain data.
        max_epochs: Of this training; ``None``: the Trainer's own.
        accumulate: How many batches a step of the weights has, times the Trainer's own.

    Raises:
        SearchError: If what is there was trained as something else, or a loss is no finite number.
    """
    seed_everything(evaluator.seed, workers=True, verbose=False)
    data = evaluator.data()
    model = evaluator.module(evaluator.space.complete(supernet(evaluator.space.new_model_space(), kind)))
    trained_as = {"kind": kind, "seed": evaluator.seed, "max_epochs": max_epochs, **options, "weights": _shapes(model)}
    path, folder = directory / SUPERNET_FILE, directory / _FOLDER
    if path.exists():
        trained = load_supernet(path)
        _check(path, trained.trained_as, trained_as)
        log.info("the supernet is trained already: %s", path)
        return trained
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    begun = _begun(last, trained_as)
    theirs = [one for one in evaluator.callbacks() if not (isinstance(one, TrialPruning) or changes_networks(one))]
    trainer = evaluator.trainer(callbacks=[*theirs, callback], default_root_dir=str(folder))
    # After the Trainer was made, for it to serve where it keeps no checkpoints itself.
    clock = _Clock()
    trainer.callbacks += [clock, _LastEpoch(last, trained_as)]  # type: ignore[attr-defined]
    trainer.accumulate_grad_batches *= accumulate
    if max_epochs is not None:
        trainer.fit_loop.max_epochs = max_epochs
    log.info("the supernet's training %s: %s epochs", "continues" if begun else "begins", trainer.max_epochs)
    with interruptible(trainer):
        trainer.fit(model, datamodule=data, ckpt_path=str(last) if begun else None)
    try:
        check_losses(floats(trainer.callback_metrics))
    except EvaluationError as error:
        raise SearchError(f"the supernet's training diverged: {error}") from error
    trained = TrainedSupernet(
        kind,
        trained_as,
        {name: weights.cpu() for name, weights in model.state_dict().items()},
        clock.time_elapsed("train"),
        callback.architecture if isinstance(callback, DifferentiableSearch) else None,
    )
    save_supernet(path, trained)
    last.unlink(missing_ok=True)
    log.info("the supernet was trained in %.1f s", trained.seconds)
    return load_supernet(path)


class _Clock(Timer):
    """How long the training took, those parts included that were killed."""


class _LastEpoch(Checkpoint):
    """Keeps a training as it was after its last epoch, whole or not at all, readable with ``weights_only=True``."""

    def __init__(self, path: Path, trained_as: dict[str, Any]) -> None:
        self._path = path
        self._trained_as = trained_as
        self._saving = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        temporary = self._path.with_name(f".{self._path.name}")
        self._saving = True
        trainer.save_checkpoint(temporary, weights_only=False)
        self._saving = False
        temporary.replace(self._path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what it is the training of; leave out arguments of the module, among which the network may be."""
        if not self._saving:
            return
        checkpoint["trained_as"] = self._trained_as
        for one in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
            for name in ("CHECKPOINT_HYPER_PARAMS_KEY", "CHECKPOINT_HYPER_PARAMS_NAME", "CHECKPOINT_HYPER_PARAMS_TYPE"):
                checkpoint.pop(getattr(one, name, ""), None)


def _begun(last: Path, trained_as: dict[str, Any]) -> bool:
    """Whether there is a training to continue."""
    if not last.exists():
        return False
    try:
        before = torch.load(last, map_location="cpu", weights_only=True)["trained_as"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        log.warning("%s: does not load with weights_only=True (%s); the training begins anew", last, reason)
        return False
    _check(last, before, trained_as)
    return True


def _check(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = differences(before, now)
    if changed:
        raise SearchError(
            f"{path} was trained as another supernet: {'; '.join(changed)}; restore it, or begin a new search, e.g. "
            "with another seed"
        )


def _shapes(model: LightningModule) -> str:
    """Return what identifies the module's weights, but for their values."""
    shapes = [(name, list(weights.shape)) for name, weights in model.state_dict().items()]
    return fingerprint([type(model).__qualname__, shapes])
