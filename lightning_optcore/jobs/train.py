"""``optcore train``: the story of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.fingerprints import model_fingerprint
from lightning_optcore.jobs.building import instantiate_all, trainer_of
from lightning_optcore.jobs.checks import check, instance_of
from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.logs import quieten_lightning
from lightning_optcore.jobs.objective import objective_values, parse_objective
from lightning_optcore.jobs.own_classes import with_own_defaults
from lightning_optcore.jobs.recording import RunRecorder, recorded_run
from lightning_optcore.jobs.reporting import report_of
from lightning_optcore.measurement.comparison import compare, summary_table
from lightning_optcore.measurement.fitted import measured_fit
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.store_database import without_passwords


def run(config: DictConfig) -> float | tuple[float, ...] | None:
    """Fit, validate, test; measure; record; report. Returns what ``objective`` names."""
    quieten_lightning()
    config = with_own_defaults(config, HydraConfig.get().overrides.task)
    check(config)
    objective = parse_objective(config.objective)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    with recorded_run(config, output_dir) as recording:
        seed_everything(config.seed, workers=True, verbose=False)
        data = instance_of(LightningDataModule, "data", instantiate(config.data))
        model = instance_of(LightningModule, "model", instantiate(config.model))
        recording.update(model_fingerprint=model_fingerprint(model, _plain(config.model)))
        callbacks = instantiate_all(config.callbacks)
        for callback in callbacks:
            if isinstance(callback, PerformanceProfiler):
                callback.listeners.append(recording.profile)
        recorder = RunRecorder(recording, output_dir, _plain(config.data))
        trainer = trainer_of(config, [*callbacks, recorder])

        trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path)
        _end_if_interrupted(trainer)
        quality = _floats(trainer.callback_metrics)
        if config.test and _has_test(model, data):
            trainer.test(model, datamodule=data, verbose=False)
            quality.update(_floats(trainer.callback_metrics))

        measurements = measured_fit(model, data, callbacks, quality, **_plain(config.measure))
        for role, measurement in measurements.items():
            recording.measurement(role, measurement)
        _check_callbacks(callbacks)
        made = [artifact.recipe for artifact in _artifacts(callbacks)] or [recipe_of(model)]
        if made[-1].steps:
            recording.recipe(made[-1])
        known = {**quality, **next(reversed(measurements.values())).scalars()} if measurements else quality
        values = objective_values(objective, known)
        recording.finish("done")
    if trainer.is_global_zero:
        report = report_of(config, recording, output_dir)
        _summarise(config, measurements, callbacks, output_dir, report)
    return values


def _end_if_interrupted(trainer: Trainer) -> None:
    if trainer.interrupted:
        raise KeyboardInterrupt


def _has_test(model: LightningModule, data: LightningDataModule) -> bool:
    overridden = type(model).test_step is not LightningModule.test_step
    return overridden and type(data).test_dataloader is not LightningDataModule.test_dataloader


def _artifacts(callbacks: list[Callback]) -> list[Any]:
    made = (getattr(callback, "artifact", None) for callback in callbacks)
    return [artifact for artifact in made if artifact is not None]


def _check_callbacks(callbacks: list[Callback]) -> None:
    """Fail the run if a technique that was asked for gave no artifact; the checkpoint is kept."""
    for callback in callbacks:
        error = getattr(callback, "error", None)
        if error is not None:
            raise ConfigurationError(error)


def _summarise(
    config: DictConfig,
    measurements: dict[str, Measurement],
    callbacks: list[Callback],
    output_dir: Path,
    report: Path | None,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100)
    if len(measurements) == 2:
        console.print(compare(measurements["before"], measurements["after"]))
    elif measurements:
        console.print(summary_table(measurements["before"]))
    places = {"run": output_dir, "report": report, "store": without_passwords(config.store.path)}
    for artifact in _artifacts(callbacks):
        places["artifact"] = artifact.path
    for name, place in places.items():
        if place is not None:
            console.print(f"{name:>9}  {place}", soft_wrap=True, highlight=False, markup=False)


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _floats(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
