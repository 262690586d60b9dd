"""The user's own validation as a technique needs it: of the model, of a replacement, of what goes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optcore.measurement.directions import direction_of
from lightning_optcore.measurement.forward_calls import ForwardRecorder
from lightning_optcore.measurement.inputs import Inputs, map_tensors
from lightning_optcore.measurement.quality import Evaluation, validate


class UserValidation:
    """The user's own validation, as far as there is one."""

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self._trainer_class = type(trainer)
        self._module = pl_module
        self._loaders = trainer.val_dataloaders
        self._limit = trainer.limit_val_batches
        # Mixed precision is of the training alone; a module whose weights are not float32 needs its plugin.
        self._precision = trainer.precision if str(trainer.precision).endswith("-true") else None
        self._training_loader = trainer.train_dataloader
        self.exists = bool(
            trainer.enable_validation
            and self._loaders is not None
            and self._limit
            and is_overridden("validation_step", pl_module)
        )

    def target(self) -> str | None:
        """Return the name of the module that ``validation_step`` calls."""
        if not self.exists:
            return None
        with ForwardRecorder(self._module) as recorder:
            self._run(limit_batches=1)
        return recorder.target()

    def of_model(self) -> dict[str, float]:
        """Return the metrics of the model itself."""
        return self._run(self._limit).metrics if self.exists else {}

    def of_replacement(self, name: str, replacement: Callable[..., Any]) -> Evaluation:
        """Return the metrics with ``replacement`` in the place of the submodule ``name``."""
        if not self.exists:
            return Evaluation({})
        dtype = next((p.dtype for p in self._module.parameters() if p.is_floating_point()), torch.float32)

        def in_its_dtype(*args: Any, **kwargs: Any) -> Any:
            output = replacement(*args, **kwargs)
            return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, output)

        return self._run(self._limit, replace=name, replacement=in_its_dtype)

    def training_inputs(self, name: str, samples: int) -> list[Inputs]:
        """Return what ``validation_step`` hands to a submodule on batches of the training loader."""
        with ForwardRecorder(self._module, samples) as recorder:
            self._run(limit_batches=64, dataloaders=self._training_loader)
        return recorder.inputs.get(name, [])

    def _run(self, limit_batches: Any, dataloaders: Any = None, **replacement: Any) -> Evaluation:
        return validate(
            self._module,
            self._loaders if dataloaders is None else dataloaders,
            trainer_class=self._trainer_class,
            limit_batches=limit_batches,
            precision=self._precision,
            **replacement,
        )


def guarded_metric(
    trainer: Any, monitor: str | None, before: Mapping[str, float], after: Mapping[str, float]
) -> str | None:
    """Return the metric whose loss counts; ``None`` if it was not logged.

    It is ``monitor``; without one what the checkpoint callback monitors, else the first logged metric to be maximized,
    else the first.
    """
    known = [name for name in before if name in after]
    if monitor is not None:
        return monitor if monitor in known else None
    monitored = getattr(getattr(trainer, "checkpoint_callback", None), "monitor", None)
    if monitored in known:
        return str(monitored)
    return next((name for name in known if direction_of(name) == "maximize"), known[0] if known else None)


def quality_drop(metric: str, mode: str | None, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return by how much a metric got worse, in its own unit; ``mode`` (min, max) is guessed where it is ``None``."""
    loss = after[metric] - before[metric]
    lower_is_better = mode == "min" if mode is not None else direction_of(metric) == "minimize"
    return loss if lower_is_better else -loss
