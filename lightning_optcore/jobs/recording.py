"""One row of the store for one run, whatever happens to the run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_optcore.distributed.elastic import ElasticDDPStrategy
from lightning_optcore.distributed.supervisor import LIGHTHOUSE
from lightning_optcore.fingerprints import data_fingerprint, hardware_fingerprint
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.recipe import Recipe
from lightning_optcore.store import Run, Store
from lightning_optcore.store_database import warn_of_passwords
from lightning_optcore.sweeps.task import current_trial


@dataclass(frozen=True)
class Stored:
    """What the store has of one run: the row, curves and profiles; and those of the same runs before it."""

    run: Run
    curves: dict[str, list[tuple[int, float]]]
    profiles: dict[str, dict[str, Any]]
    history: list[tuple[int, dict[str, Any]]]


class Recording:
    """Writes one run to the store; without a store, or on a further rank, or in a supervisor, it writes nothing."""

    def __init__(self, store: Store | None, run_id: int = 0) -> None:
        self._store = store
        self.run_id = run_id

    def update(self, **fields: Any) -> None:
        """Write what became known late."""
        if self._store is not None:
            self._store.update(self.run_id, **fields)

    def measurement(self, role: str, measurement: Measurement) -> None:
        """Write a measurement as ``"before"`` or ``"after"``."""
        if self._store is not None:
            self._store.add_measurement(self.run_id, role, measurement)

    def recipe(self, recipe: Recipe) -> None:
        """Write what was done."""
        self.update(recipe=recipe.to_dict())

    def curve(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write one point of the learning curves."""
        if self._store is not None:
            self._store.log_curve(self.run_id, step, epoch, values)

    def profile(self, report: ProfileReport) -> None:
        """Write what the profiler said."""
        if self._store is not None:
            self._store.add_profile(self.run_id, report.stage, json.loads(report.to_json()))

    def finish(self, status: str, error: str | None = None) -> None:
        """Close the row."""
        if self._store is not None:
            self._store.finish(self.run_id, status, error=error)

    def read_back(self) -> Stored | None:
        """Return the run, its curves and profiles as stored."""
        if self._store is None:
            return None
        run = self._store.run(self.run_id)
        profiles = self._store.profiles(self.run_id)
        history = self._history(run) if "fit" in profiles else []
        return Stored(run, self._store.curves(self.run_id), profiles, history)

    def _history(self, run: Run) -> list[tuple[int, dict[str, Any]]]:
        """Return the fits' profiles of the same configuration, oldest first."""
        assert self._store is not None
        runs = [one for one in self._store.runs(job=run.job) if one.overrides == run.overrides]
        found = [(one.id, self._store.profiles(one.id).get("fit")) for one in reversed(runs[:50])]
        return [(run_id, profile) for run_id, profile in found if profile is not None]


@contextmanager
def recorded_run(config: DictConfig, output_dir: Path) -> Iterator[Recording]:
    """Open a row; mark it failed or interrupted, with the error, if the body does not come to its end."""
    path = OmegaConf.select(config, "store.path")
    if path is None or _rank() != 0 or _only_supervises(config):
        yield Recording(None)
        return
    if current_trial() is None:
        warn_of_passwords(list(HydraConfig.get().overrides.task))
    with Store(path) as store:
        run_id = store.start(
            config.job,
            overrides=list(HydraConfig.get().overrides.task),
            config=dict(OmegaConf.to_container(config, resolve=True)),  # type: ignore[arg-type]
            hardware_fingerprint=hardware_fingerprint(),
            seed=config.get("seed"),
            directory=str(output_dir),
        )
        recording = Recording(store, run_id)
        try:
            yield recording
        except (KeyboardInterrupt, SystemExit):
            recording.finish("interrupted")
            print(f"optcore: interrupted; what was done is in {output_dir}", file=sys.stderr)
            sys.exit(130)
        except BaseException as error:
            recording.finish("failed", f"{type(error).__name__}: {error}")
            raise
        if store.run(run_id).status == "running":
            recording.finish("done")


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))


def _only_supervises(config: DictConfig) -> bool:
    """Whether this process starts others that run the job."""
    target = str(OmegaConf.select(config, "strategy._target_"))
    elastic = target.endswith(f".{ElasticDDPStrategy.__name__}")
    named = OmegaConf.select(config, "strategy.name") == ElasticDDPStrategy.strategy_name
    return (elastic or named) and LIGHTHOUSE not in os.environ


class RunRecorder(Callback):
    """Writes learning curves and the data's fingerprint; keeps a checkpoint if the fit breaks off."""

    def __init__(self, recording: Recording, output_dir: Path, data_config: Any) -> None:
        super().__init__()
        self._recording = recording
        self._checkpoint = output_dir / "interrupted.ckpt"
        self._data_config = data_config

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the fingerprint of the data, which is known now."""
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
        self._recording.update(data_fingerprint=data_fingerprint(loaders, self._data_config))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write one point of every curve (validation has run by now)."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._recording.curve(trainer.global_step, trainer.current_epoch, values)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep the weights and the state of training."""
        # Also where a validation within the fit is interrupted.
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0:
            trainer.save_checkpoint(self._checkpoint)
