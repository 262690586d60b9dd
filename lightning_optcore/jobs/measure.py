"""``optcore measure``: put an artifact, a checkpoint or a fresh model on the yardstick."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_optcore.compression.artifact import Artifact, load_artifact
from lightning_optcore.jobs.checks import check, instance_of
from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.logs import quieten_lightning
from lightning_optcore.jobs.own_classes import with_own_defaults
from lightning_optcore.jobs.recording import recorded_run
from lightning_optcore.measurement.comparison import summary_table
from lightning_optcore.measurement.forward_calls import ForwardRecorder, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.quality import validate
from lightning_optcore.measurement.yardstick import measure


def run(config: DictConfig) -> None:
    """Load, measure, record, print."""
    quieten_lightning()
    config = with_own_defaults(config, HydraConfig.get().overrides.task)
    check(config)
    _check_what_is_named(config)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    with recorded_run(config, output_dir) as recording:
        seed_everything(config.seed, verbose=False)
        artifact = load_artifact(config.artifact) if config.artifact is not None else None
        model = data = None
        if config.get("model"):
            model = instance_of(LightningModule, "model", instantiate(config.model))
        if config.get("data"):
            data = instance_of(LightningDataModule, "data", instantiate(config.data))
        if model is not None and config.ckpt_path is not None:
            _load_weights(model, config.ckpt_path)
        name, inputs = _called(model, data)
        quality = _quality(artifact, model, data, name)
        options: Any = OmegaConf.to_container(config.measure, resolve=True)
        if artifact is not None:
            taken = measure(artifact, inputs or artifact.example_inputs(), quality=quality, **options)
            recording.recipe(artifact.recipe)
            recording.measurement("after", taken)
        elif model is not None and inputs is not None:
            taken = measure(submodule(model, name or ""), inputs, quality=quality, **options)
            recording.measurement("before", taken)
        else:
            raise ConfigurationError("model: its validation_step calls no module with parameters")
    Console(width=None if sys.stdout.isatty() else 100).print(summary_table(taken))


def _check_what_is_named(config: DictConfig) -> None:
    if config.artifact is None and (not config.get("model") or not config.get("data")):
        raise ConfigurationError(
            "artifact=null: give artifact=<folder>, or model=<option> data=<option> ckpt_path=<file>"
        )
    if config.get("model") and not config.get("data"):
        raise ConfigurationError("data=null: a model needs data to validate on, e.g. data=digits")


def _load_weights(model: LightningModule, path: str) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"ckpt_path={path}: does not fit the model ({reason})") from error


def _called(model: LightningModule | None, data: LightningDataModule | None) -> tuple[str | None, Inputs | None]:
    """Return the module that validation calls, and a batch of its inputs."""
    if model is None or data is None:
        return None, None
    with ForwardRecorder(model) as recorder:
        validate(model, datamodule=data, limit_batches=1)
    name = recorder.target()
    return (name, recorder.inputs[name][0]) if name is not None else (None, None)


def _quality(
    artifact: Artifact | None,
    model: LightningModule | None,
    data: LightningDataModule | None,
    name: str | None,
) -> dict[str, float]:
    if model is None or data is None:
        return {}
    if artifact is None or name is None:
        return validate(model, datamodule=data).metrics
    return validate(model, datamodule=data, replace=name, replacement=artifact).metrics
