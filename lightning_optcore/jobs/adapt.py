"""``optcore adapt``: a meta-learned start becomes a model of one task; a run of one callback."""

from __future__ import annotations

from omegaconf import DictConfig

from lightning_optcore.jobs import train
from lightning_optcore.jobs.errors import ConfigurationError


def run(config: DictConfig) -> float | tuple[float, ...] | None:
    """Adapt, validate, export, measure, record, report."""
    if config.checkpoint is None:
        raise ConfigurationError("checkpoint=null: name the checkpoint of a training with callbacks=meta_learning")
    if config.ckpt_path is not None:
        raise ConfigurationError(
            f"ckpt_path={config.ckpt_path}: an adaptation is not resumed; did you mean checkpoint=?"
        )
    return train.run(config)
