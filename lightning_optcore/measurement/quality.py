"""Quality of a model: the metrics of the user's own validation, with any module replaced."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_optcore.measurement.forward_calls import counted_replacement


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one validation.

    Args:
        metrics: What the module logged, by name.
        replacement_calls: How often the replacement was called; 0 without one.
    """

    metrics: dict[str, float]
    replacement_calls: int = 0


def validate(
    module: Any,
    dataloaders: Any = None,
    *,
    datamodule: Any = None,
    trainer_class: type | None = None,
    limit_batches: int | float | None = None,
    precision: Any = None,
    replace: str | None = None,
    replacement: Callable[..., Any] | None = None,
) -> Evaluation:
    """Run the module's own ``validation_step`` on the CPU and return what it logged.

    The module is left as it was: its Trainer, its training flags and the states of its metrics.

    Args:
        module: A LightningModule.
        dataloaders: What ``Trainer.validate`` takes.
        datamodule: Alternative to ``dataloaders``.
        trainer_class: The Trainer to use; Lightning's by default (``pytorch_lightning``'s own works as well).
        limit_batches: ``limit_val_batches`` of the Trainer.
        precision: ``precision`` of the Trainer.
        replace: Name of the submodule that ``replacement`` stands in for; ``""`` is the module itself.
        replacement: Called in place of that submodule's ``forward``.
    """
    if trainer_class is None:
        from lightning.pytorch import Trainer

        trainer_class = Trainer
    with quiet_lightning(), _preserved(module):
        trainer = trainer_class(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1.0 if limit_batches is None else limit_batches,
            inference_mode=False,
            precision=precision,
        )
        if replacement is None or replace is None:
            trainer.validate(module, dataloaders, datamodule=datamodule, verbose=False)
            return Evaluation(_floats(trainer.callback_metrics))
        with counted_replacement(module, replace, replacement) as counter:
            trainer.validate(module, dataloaders, datamodule=datamodule, verbose=False)
        return Evaluation(_floats(trainer.callback_metrics), counter.calls)


def _floats(metrics: Any) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if not isinstance(value, torch.Tensor) or value.numel() == 1
    }


@contextmanager
def _preserved(module: Any) -> Iterator[None]:
    """Put the module's Trainer, training flags, device and metrics back afterwards."""
    trainer = module._trainer
    training = {child: child.training for child in module.modules()}
    device = next((p.device for p in module.parameters()), None)
    metrics = [child for child in module.modules() if hasattr(child, "distributed_available_fn")]
    kept = [(metric, metric.distributed_available_fn, _metric_state(metric)) for metric in metrics]
    for metric in metrics:
        # Only this process validates: waiting for other ranks would hang.
        metric.distributed_available_fn = _never
    try:
        yield
    finally:
        for metric, available, state in kept:
            metric.distributed_available_fn = available
            metric.__dict__.update(state)
        if device is not None:
            module.to(device)
        for child, was_training in training.items():
            child.training = was_training
        module._trainer = trainer


def _never() -> bool:
    return False


def _metric_state(metric: nn.Module) -> dict[str, Any]:
    """Return copies of a torchmetrics metric's state, so that e.g. a running best stays the training's."""
    names = [*getattr(metric, "_defaults", {}), "_update_count", "_computed"]
    state: dict[str, Any] = {}
    for name in names:
        value = metric.__dict__.get(name)
        if isinstance(value, torch.Tensor):
            state[name] = value.detach().clone()
        elif isinstance(value, list):
            state[name] = list(value)
        else:
            state[name] = value
    return state


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep what Lightning told the user about the fit already (devices, workers, tips) from coming twice."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
