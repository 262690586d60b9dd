"""A sequence of tasks through one Trainer, evaluated after each, that can be killed and continued."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_optcore.files import replacing, write_atomically
from lightning_optcore.measurement.directions import direction_of
from lightning_optcore.measurement.inputs import tensors_in
from lightning_optcore.meta.continual.accuracy_matrix import AccuracyMatrix
from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.stepping import Call, calls_recorded, logits_of, loss_aside

log = logging.getLogger(__name__)

VERSION = 1
STATE_FILE = "continual.json"
STAGES = ("validate", "test")
# Batches of each later task that the model is tried on before anything is learned.
_REHEARSED = 10


class ContinualPlan:
    """Fits one model to one task after the other with one Trainer, and evaluates all tasks after each.

    Every task is a fit of its own: epochs are counted anew, optimizers and schedulers are made anew, callbacks begin
    anew but for the continual ones, which remember. A task begins with the seed and its number, so that its batches do
    not depend on what was done in the tasks before.

    With a folder, what is needed to go on is written there after each task; a plan that was killed begins the broken
    task once more and comes to the same matrix.

    Args:
        tasks: Data modules; ``name``, where one has it, is in the tables.
        metric: What the model logs in its evaluation.
        stage: ``"validate"`` or ``"test"``: which of the loaders the tasks are evaluated with.
        seed: The first task's.
        folder: Of the state; ``None`` keeps none.
        direction: ``"maximize"`` or ``"minimize"``; guessed from the metric's name by default.
        on_task_end: Called with the matrix after each task.

    Raises:
        MisconfigurationException: If an option makes no sense, the metric is not logged, or a task does not fit the
            model: its labels are more than the outputs, or it cannot be evaluated.

    Example:
        >>> from lightning_optcore.data import Digits
        >>> from lightning_optcore.meta.continual import ExperienceReplay, permuted_tasks
        >>> from lightning_optcore.models import MLP
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[ExperienceReplay(size=50)], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> plan = ContinualPlan(permuted_tasks(Digits(), num_tasks=2), metric="val/acc")
        >>> len(plan.run(trainer, MLP(width=16, depth=1)).rows)
        2
    """

    def __init__(
        self,
        tasks: Sequence[LightningDataModule],
        metric: str = "val/acc",
        stage: str = "validate",
        seed: int = 0,
        folder: str | Path | None = None,
        direction: str | None = None,
        on_task_end: Callable[[AccuracyMatrix], None] | None = None,
    ) -> None:
        if not tasks:
            raise MisconfigurationException("plan.tasks: there is none; give a list of data modules")
        for number, task in enumerate(tasks):
            if not isinstance(task, LightningDataModule):
                raise MisconfigurationException(
                    f"plan.tasks[{number}]: a {type(task).__name__}; expected a LightningDataModule"
                )
        if stage not in STAGES:
            raise MisconfigurationException(f"plan.stage={stage!r}: expected one of {', '.join(STAGES)}")
        if direction not in (None, "maximize", "minimize"):
            raise MisconfigurationException(f"plan.direction={direction!r}: expected maximize, minimize, or null")
        self.tasks = list(tasks)
        self.metric = metric
        self.stage = stage
        self.seed = seed
        self.folder = None if folder is None else Path(folder)
        self.direction = direction
        self.on_task_end = on_task_end
        names = [str(getattr(task, "name", None) or f"task {number + 1}") for number, task in enumerate(self.tasks)]
        self.matrix = AccuracyMatrix(names, metric, direction or direction_of(metric))  # type: ignore[arg-type]

    def run(self, trainer: Trainer, model: LightningModule) -> AccuracyMatrix:
        """Learn the tasks that are left; return the matrix.

        Args:
            trainer: Its callbacks say what is done against forgetting. One that has not fitted anything.
            model: Any module that can be fitted to each of the tasks.

        Raises:
            MisconfigurationException: If the Trainer has fitted before, or the folder's plan is another one.
        """
        if trainer.global_step:
            raise MisconfigurationException(
                f"plan.run: the Trainer has made {trainer.global_step} steps before, and would make none of the plan's"
                "; give it a new one"
            )
        fresh = _Fresh(trainer)
        if not self._continued(trainer, model):
            self.matrix.before, self.matrix.rows = self._before(trainer, model), []
            self._write(trainer, model)
        start = len(self.matrix.rows)
        if start == len(self.tasks):
            rank_zero_info(f"{self.folder}: the plan is complete, and nothing is run; another folder begins anew")
        for number in range(start, len(self.tasks)):
            log.info("task %d of %d: %s", number + 1, len(self.tasks), self.matrix.tasks[number])
            fresh.restore(trainer)
            seed_everything(self.seed + number, workers=True, verbose=False)
            self._fit(trainer, model, number, first=number == start)
            self.matrix.rows.append([self._evaluated(trainer, model, i) for i in range(len(self.tasks))])
            self._write(trainer, model)
            if self.on_task_end is not None:
                self.on_task_end(self.matrix)
        return self.matrix

    def _evaluated(self, trainer: Trainer, model: LightningModule, number: int) -> float:
        evaluate = trainer.validate if self.stage == "validate" else trainer.test
        evaluate(model, datamodule=self.tasks[number], verbose=False)
        if self.metric not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise MisconfigurationException(f"plan.metric={self.metric}: the model's {self.stage} step logs {logged}")
        return float(trainer.callback_metrics[self.metric])

    def _before(self, trainer: Trainer, model: LightningModule) -> list[float]:
        """Evaluate every task before the first one."""
        values = []
        for number in range(len(self.tasks)):
            try:
                values.append(self._evaluated(trainer, model, number))
            except MisconfigurationException:
                raise
            except (IndexError, RuntimeError, ValueError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split())[:300]
                raise MisconfigurationException(
                    f"{self._key(number)}: the model cannot be evaluated on it: {reason}"
                ) from error
        return values

    def _key(self, number: int) -> str:
        return f"plan.tasks[{number}] ({self.matrix.tasks[number]})"

    def _fit(self, trainer: Any, model: LightningModule, number: int, *, first: bool) -> None:
        later = {self._key(i): self.tasks[i] for i in range(number + 1, len(self.tasks))} if first else {}
        rehearsal = _Rehearsal(later)
        trainer.callbacks.append(rehearsal)
        try:
            trainer.fit(model, datamodule=self.tasks[number])
        finally:
            trainer.callbacks.remove(rehearsal)
        if trainer.interrupted:
            raise KeyboardInterrupt

    def _write(self, trainer: Trainer, model: LightningModule) -> None:
        """Write the checkpoint, then the state that names it, then drop the checkpoint before."""
        if self.folder is None or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self.matrix.rows)
        checkpoint = self.folder / f"task_{number}.ckpt"
        content = {"model": model.state_dict(), "callbacks": {c.state_key: c.state_dict() for c in _continual(trainer)}}
        with replacing(checkpoint) as temporary:
            torch.save(content, temporary)
        options = _options(trainer, model)
        state = {
            "version": VERSION,
            "seed": self.seed,
            "checkpoint": checkpoint.name,
            "options": options,
            **self.matrix.to_dict(),
        }
        write_atomically(self.folder / STATE_FILE, json.dumps(state, indent=2))
        for other in self.folder.glob("task_*.ckpt"):
            if other != checkpoint:
                other.unlink(missing_ok=True)

    def _continued(self, trainer: Trainer, model: LightningModule) -> bool:
        """Take up the state in the folder; return whether there is one."""
        if self.folder is None or not (self.folder / STATE_FILE).is_file():
            return False
        path = self.folder / STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            matrix = AccuracyMatrix.from_dict(state)
            ours = {"version": VERSION, "seed": self.seed, **self._identity(self.matrix)}
            theirs = {"version": state["version"], "seed": state["seed"], **self._identity(matrix)}
        except (ValueError, KeyError, TypeError) as error:
            raise MisconfigurationException(f"{path}: no state of a plan ({error}); name another folder") from error
        for key, value in ours.items():
            if theirs[key] != value:
                raise MisconfigurationException(
                    f"{path}: is of another plan ({key} {theirs[key]!r}, not {value!r}); name another folder"
                )
        _refuse_others(path, state.get("options", {}), _options(trainer, model))
        checkpoint = self.folder / state["checkpoint"]
        try:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MisconfigurationException(f"{checkpoint}: cannot be read ({reason}); name another folder") from error
        try:
            model.load_state_dict(content["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise MisconfigurationException(f"{path}: the model is another one: {reason}") from error
        known = {callback.state_key: callback for callback in _continual(trainer)}
        if set(known) != set(content["callbacks"]):
            raise MisconfigurationException(
                f"{path}: was made with the callbacks {sorted(content['callbacks'])}, here are {sorted(known)}"
            )
        for key, callback in known.items():
            callback.load_state_dict(content["callbacks"][key])
        self.matrix = matrix
        if matrix.rows:
            self._compare(trainer, model, path)
        return True

    def _compare(self, trainer: Trainer, model: LightningModule, path: Path) -> None:
        """Warn if the tasks are no longer what they were: an evaluation would give what it gave."""
        now = [self._evaluated(trainer, model, number) for number in range(len(self.tasks))]
        known = self.matrix.rows[-1]
        for number, (value, before) in enumerate(zip(now, known, strict=True)):
            if not math.isclose(value, before, rel_tol=1e-3, abs_tol=1e-3):
                rank_zero_warn(
                    f"{path}: {self._key(number)} was evaluated with {self.metric}={before:.4g}, and the same model "
                    f"has {value:.4g} on it now: data or evaluation are others; another folder begins anew"
                )

    @staticmethod
    def _identity(matrix: AccuracyMatrix) -> dict[str, Any]:
        return {"tasks": matrix.tasks, "metric": matrix.metric, "direction": matrix.direction}


def _options(trainer: Any, model: LightningModule) -> dict[str, Any]:
    """Return what decides how tasks are learned, as far as it is written down: Trainer, model, continual callbacks."""

    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        kinds = (bool, int, float, str, type(None))
        return {
            key: value for key, value in values.items() if isinstance(value, kinds) and not str(key).startswith("_")
        }

    found = {
        "trainer": {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps},
        "model": plain(model.hparams),
    }
    for callback in _continual(trainer):
        learned = callback.state_dict().keys()
        found[callback.state_key] = plain({key: value for key, value in vars(callback).items() if key not in learned})
    return {f"{owner}.{key}": value for owner, values in found.items() for key, value in values.items()}


def _refuse_others(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in sorted(theirs.keys() & ours.keys()):
        if theirs[key] != ours[key]:
            raise MisconfigurationException(
                f"{path}: was begun with {key}={theirs[key]!r}, not {ours[key]!r}; name another folder, or take that"
            )


def _continual(trainer: Any) -> list[TaskCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, TaskCallback)]


class _Fresh:
    """The loops and callbacks of a Trainer as they were before its first fit."""

    def __init__(self, trainer: Any) -> None:
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
        states = [(c, c.state_dict()) for c in trainer.callbacks if not isinstance(c, TaskCallback)]
        self._callbacks = [(callback, copy.deepcopy(state)) for callback, state in states if state]

    def restore(self, trainer: Any) -> None:
        """Let the next fit begin anew; loggers go on counting their steps."""
        epoch_loop = trainer.fit_loop.epoch_loop
        logged = epoch_loop._batches_that_stepped
        trainer.fit_loop.load_state_dict(copy.deepcopy(self._loops))
        trainer.fit_loop.restarting = False
        epoch_loop._batches_that_stepped = logged
        for callback, state in self._callbacks:
            callback.load_state_dict(copy.deepcopy(state))


class _Rehearsal(Callback):
    """Runs the training step aside on some batches of the tasks to come, before the first of them is learned."""

    def __init__(self, tasks: Mapping[str, LightningDataModule]) -> None:
        super().__init__()
        self._tasks = tasks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for key, task in self._tasks.items():
            with isolate_rng(), torch.no_grad():
                task.prepare_data()
                task.setup("fit")
                loader = CombinedLoader(task.train_dataloader(), "max_size_cycle")
                for batch, _, _ in itertools.islice(iter(loader), _REHEARSED):
                    self._try(trainer, pl_module, key, trainer.strategy.batch_to_device(batch, pl_module.device))

    def _try(self, trainer: Any, pl_module: Any, key: str, batch: Any) -> None:
        with calls_recorded(pl_module) as calls:
            try:
                loss_aside(pl_module, batch)
            except (IndexError, RuntimeError, ValueError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split())[:300]
                raise MisconfigurationException(
                    f"{key}: the model cannot be trained on it: {reason}{_about_heads(calls, batch)}"
                ) from error


def _about_heads(calls: list[Call], batch: Any) -> str:
    """Say so if a batch has labels that the last module called has no outputs for."""
    logits = logits_of(calls[-1].output) if calls else None
    if logits is None:
        return ""
    labels = [t for t in tensors_in(batch) if t.dim() and t.numel() and not t.is_floating_point()]
    highest = min((int(t.max()) for t in labels), default=-1)
    if highest < logits.shape[1]:
        return ""
    return (
        f"; its labels go up to {highest}, but {calls[-1].name or 'the model'} has {logits.shape[1]} outputs: give the "
        "model a head for the classes of all tasks, or the task labels that fit"
    )
