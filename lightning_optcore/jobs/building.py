"""From the configuration to the objects of a run."""

from __future__ import annotations

import sys
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig


def trainer_of(config: DictConfig, callbacks: list[Callback], **settings: Any) -> Trainer:
    """Return the Trainer of a configuration, with its loggers and strategy.

    Args:
        config: The composed configuration.
        callbacks: Its callbacks.
        settings: Arguments that go before those of ``config.trainer``.
    """
    if config.trainer.get("enable_progress_bar") is None:
        settings.setdefault("enable_progress_bar", sys.stderr.isatty())
    strategy = instantiate(config.strategy) if "_target_" in config.strategy else config.strategy.name
    loggers = instantiate_all(config.logger)
    return instantiate(config.trainer, callbacks=callbacks, logger=loggers or False, strategy=strategy, **settings)


def instantiate_all(group: DictConfig | None) -> list[Any]:
    """Return what every node of a configuration group builds."""
    return [instantiate(node) for node in (group or {}).values() if node is not None]
