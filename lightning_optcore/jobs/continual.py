"""``optcore continual``: the story of a sequence of tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_optcore.files import write_atomically
from lightning_optcore.fingerprints import model_fingerprint
from lightning_optcore.jobs.building import instantiate_all, trainer_of
from lightning_optcore.jobs.checks import check, instance_of
from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.logs import quieten_lightning
from lightning_optcore.jobs.objective import objective_values, parse_objective
from lightning_optcore.jobs.own_classes import with_own_defaults
from lightning_optcore.jobs.recording import Recording, recorded_run
from lightning_optcore.jobs.reporting import report_of
from lightning_optcore.measurement.fitted import measured_fit
from lightning_optcore.meta.continual import AccuracyMatrix, ContinualPlan
from lightning_optcore.meta.continual.plan import STATE_FILE
from lightning_optcore.store_database import without_passwords


def run(config: DictConfig) -> float | tuple[float, ...] | None:
    """Learn the tasks in turn; measure; record; report. Returns what ``objective`` names."""
    quieten_lightning()
    config = with_own_defaults(config, HydraConfig.get().overrides.task)
    check(config)
    objective = parse_objective(config.objective)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    folder = _folder(config, output_dir)
    with recorded_run(config, output_dir) as recording:
        seed_everything(config.seed, workers=True, verbose=False)
        tasks = _tasks(config)
        model = instance_of(LightningModule, "model", instantiate(config.model))
        recording.update(model_fingerprint=model_fingerprint(model, OmegaConf.to_container(config.model, resolve=True)))
        callbacks = instantiate_all(config.callbacks)
        checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        trainer = trainer_of(config, callbacks, enable_checkpointing=checkpoints)

        plan = ContinualPlan(
            tasks,
            metric=config.metric,
            stage=config.stage,
            seed=config.seed or 0,
            folder=folder,
            on_task_end=lambda matrix: _record(recording, matrix),
        )
        matrix = plan.run(trainer, model)

        quality = {config.metric: matrix.average, **{f"continual/{k}": v for k, v in matrix.summary().items()}}
        options: Any = OmegaConf.to_container(config.measure, resolve=True)
        measurements = measured_fit(model, tasks[-1], callbacks, quality, **options)
        for role, measurement in measurements.items():
            recording.measurement(role, measurement)
        values = objective_values(objective, quality)
        recording.finish("done")
    if trainer.is_global_zero:
        content = matrix.to_dict()
        if folder != output_dir:
            write_atomically(output_dir / STATE_FILE, (folder / STATE_FILE).read_text(encoding="utf-8"))
        report = report_of(config, recording, output_dir, matrix=content)
        _summarise(config, matrix, output_dir, report)
    return values


def _folder(config: DictConfig, output_dir: Path) -> Path:
    """Return where the state of the plan is."""
    if config.resume is None:
        return output_dir
    folder = Path(config.resume)
    if not (folder / STATE_FILE).is_file():
        raise ConfigurationError(f"resume={folder}: has no {STATE_FILE}; name the folder of a run of optcore continual")
    return folder


def _tasks(config: DictConfig) -> list[LightningDataModule]:
    """Return the tasks: what a function makes of the data, or the data modules of a group."""
    if "_target_" not in config.tasks:
        return [
            instance_of(LightningDataModule, f"tasks.{name}", instantiate(node)) for name, node in config.tasks.items()
        ]
    made = instantiate(config.tasks)
    if callable(made):
        made = made(instance_of(LightningDataModule, "data", instantiate(config.data)))
    if not isinstance(made, (list, tuple)):
        raise ConfigurationError(f"tasks._target_: made a {type(made).__name__}; expected a list of data modules")
    return list(made)


def _record(recording: Recording, matrix: AccuracyMatrix) -> None:
    """Write the last row as one point of every task's curve, over the tasks."""
    number = len(matrix.rows)
    values = dict(zip(matrix.tasks, matrix.rows[-1], strict=True))
    recording.curve(number, number, {f"{matrix.metric}, {name}": value for name, value in values.items()})


def _summarise(config: DictConfig, matrix: AccuracyMatrix, output_dir: Path, report: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(caption=", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in matrix.summary().items()))
    table.add_column(f"{escape(matrix.metric)} of")
    for number in range(len(matrix.rows)):
        table.add_column(f"after {number + 1}", justify="right")
    for number, name in enumerate(matrix.tasks):
        table.add_row(f"{number + 1}: {escape(name)}", *(f"{row[number]:.4f}" for row in matrix.rows))
    console.print(table)
    places = {"run": output_dir, "report": report, "store": without_passwords(config.store.path)}
    for name, place in places.items():
        if place is not None:
            console.print(f"{name:>9}  {place}", soft_wrap=True, highlight=False, markup=False)
