"""Population-based training in a sweep: a trial continues from its parent's checkpoint with its own hyperparameters.

Source: Jaderberg et al., "Population Based Training of Neural Networks", 2017, https://arxiv.org/abs/1711.09846.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_optcore.random_states import random_state, restore_random_state
from lightning_optcore.search.population_based import PopulationBasedTraining
from lightning_optcore.sweeps._compat import restore_in_this_fit
from lightning_optcore.sweeps.journal import open_journal
from lightning_optcore.sweeps.task import MEMBER_CHECKPOINT, TRIAL_VARIABLE

# What follows from the learning rate, whatever a scheduler was configured with.
_DERIVED = ("_last_lr",)

# Of every optimizer its groups' options, and of every scheduler its state.
Configured = dict[str, list[Any]]


@dataclass(frozen=True)
class Member:
    """A trial of a sweep of population-based training.

    Args:
        sweep_id: Number of the sweep.
        number: Number of the trial.
        parent: Number of the trial that it continues from, or ``None``.
        parent_checkpoint: What that one left.
        checkpoint: What this one has to leave.
        generations: How many generations the sweep has.
    """

    sweep_id: int
    number: int
    parent: int | None
    parent_checkpoint: Path | None
    checkpoint: Path
    generations: int


def current_member() -> Member | None:
    """Return the trial that this process runs, if its sweep is one of population-based training.

    Any job may use it, also one without Lightning: it loads ``parent_checkpoint``, if there is one, and leaves its own
    weights as ``checkpoint``.

    Raises:
        MisconfigurationException: If its parent left no checkpoint.

    Example:
        >>> current_member() is None
        True
    """
    named = os.environ.get(TRIAL_VARIABLE)
    if named is None:
        return None
    sweep_id, number, path = named.split(" ", 2)
    journal = open_journal(path)
    state = journal.sweep(int(sweep_id)).state or {}
    if state.get("searcher") != PopulationBasedTraining.__name__:
        return None
    trial = journal.trial(int(sweep_id), int(number))
    parent = None if trial.candidate.parent is None else journal.trial(int(sweep_id), trial.candidate.parent)
    before = None if parent is None else Path(str(parent.directory)) / MEMBER_CHECKPOINT
    if parent is not None and before is not None and not before.exists():
        raise MisconfigurationException(
            f"trial {number} continues from trial {parent.number}, whose checkpoint {before} is not there; "
            "keep the folders of a sweep until it has ended"
        )
    return Member(
        sweep_id=int(sweep_id),
        number=int(number),
        parent=trial.candidate.parent,
        parent_checkpoint=before,
        checkpoint=Path(str(trial.directory)) / MEMBER_CHECKPOINT,
        generations=int(state["own"]["generations"]),
    )


def configured(optimizers: Sequence[Optimizer], schedulers: Sequence[Any] = ()) -> Configured:
    """Return how optimizers and schedulers are configured, as plain data; to be called before they are used.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> configured([torch.optim.SGD([parameter], lr=0.1)])["optimizers"][0][0]["lr"]
        0.1
    """
    return {
        "optimizers": [
            [{name: _plain(value) for name, value in group.items() if name != "params"} for group in one.param_groups]
            for one in optimizers
        ],
        "schedulers": [_plain(one.state_dict()) for one in schedulers],
    }


def reapply(
    optimizers: Sequence[Optimizer], schedulers: Sequence[Any], before: Configured, wanted: Configured
) -> list[str]:
    """Give restored optimizers and schedulers the hyperparameters that were configured anew.

    A checkpoint brings back the learning rate, momentum and so on that its writer was configured with. Whatever is
    configured differently now is set; whatever training itself changed is kept: a learning rate that a scheduler had
    brought down to a tenth is a tenth of the new one.

    Args:
        optimizers: With the state that was restored.
        schedulers: Likewise.
        before: :func:`configured` of the checkpoint's writer.
        wanted: :func:`configured` of these, before they were restored.

    Returns:
        What was changed, a line each.

    Raises:
        MisconfigurationException: If these are other optimizers than the checkpoint's.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> donor, copy = (torch.optim.SGD([parameter], lr=lr) for lr in (0.1, 0.2))
        >>> before, wanted = configured([donor]), configured([copy])
        >>> copy.load_state_dict(donor.state_dict())
        >>> reapply([copy], [], before, wanted)
        ['lr: 0.1 -> 0.2']
    """
    changes: dict[str, None] = {}
    shape, now = ([[sorted(group) for group in one] for one in state["optimizers"]] for state in (before, wanted))
    if shape != now or len(before["schedulers"]) != len(wanted["schedulers"]):
        raise MisconfigurationException(
            "the optimizers or schedulers are others than the parent's; "
            "population-based training can search their options, not their kind"
        )
    for optimizer, old_groups, new_groups in zip(optimizers, before["optimizers"], wanted["optimizers"], strict=True):
        for group, old, new in zip(optimizer.param_groups, old_groups, new_groups, strict=True):
            for name in (name for name in new if new[name] != old[name]):
                value = _scaled(_plain(group[name]), old, new) if name == "lr" else new[name]
                changes[f"{name}: {_plain(group[name])} -> {value}"] = None
                group[name] = _like(group[name], value)
    for scheduler, old_state, new_state in zip(schedulers, before["schedulers"], wanted["schedulers"], strict=True):
        _reapply_scheduler(scheduler, old_state, new_state)
    return list(changes)


class PopulationMember(Callback):
    """Lets a trial of population-based training continue where its parent ended, and leaves its own checkpoint.

    In a sweep with ``hydra/sweeper/searcher=pbt`` a trial trains for ``epochs``, from its parent's checkpoint if it has
    a parent: weights, optimizers, schedulers, loops, callbacks, and in a single process the random numbers.
    Hyperparameters that differ from the parent's are applied after that. ``trainer.max_epochs`` stays the length of the
    whole training, by which schedulers are made: ``generations * epochs``. Outside such a sweep it does nothing, so
    that the same command with another searcher trains every candidate in one go.

    Args:
        epochs: How many epochs a member trains in a generation.

    Raises:
        MisconfigurationException: If ``epochs`` is not positive, ``trainer.max_epochs`` is too small for all
            generations, the fit has a ``ckpt_path``, or a child's model or optimizer is not its parent's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PopulationMember(epochs=2)], max_epochs=20, logger=False)
    """

    def __init__(self, epochs: int = 1) -> None:
        super().__init__()
        if epochs < 1:
            raise MisconfigurationException(f"epochs={epochs}: expected at least 1")
        self.epochs = epochs
        self._member: Member | None = None
        self._restoring = False
        self._max_epochs: int | None = None
        # How the optimizers are configured here, and what the parent's checkpoint says of it.
        self._configured: Configured | None = None
        self._inherited: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the trial, and let this fit begin at its parent's checkpoint."""
        if stage != "fit":
            return
        self._configured, self._inherited = None, {}
        self._member = current_member()
        if self._member is None:
            return
        needed = self.epochs * self._member.generations
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < needed:
            raise MisconfigurationException(
                f"trainer.max_epochs={trainer.max_epochs}: {self._member.generations} generations of "
                f"{self.epochs} epochs need {needed}"
            )
        if self._member.parent_checkpoint is not None:
            self._restoring = True
            restore_in_this_fit(trainer, self._member.parent_checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep how the optimizers are configured, which the checkpoint will overwrite."""
        if self._member is None:
            return
        if trainer.ckpt_path is not None:
            raise MisconfigurationException(
                f"ckpt_path={trainer.ckpt_path}: expected null, since it would bring its own hyperparameters; "
                "let the model load weights to begin with by itself"
            )
        self._configured = configured(trainer.optimizers, _schedulers(trainer))
        # Before the first batches are drawn, which is earlier than the training starts.
        if self._inherited and trainer.world_size == 1:
            restore_random_state(self._inherited["random"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the hyperparameters that differ from the parent's; end after so many epochs."""
        if self._member is None:
            return
        if self._restoring and self._configured is not None:
            reapply(trainer.optimizers, _schedulers(trainer), self._inherited["configured"], self._configured)
        self._restoring = False
        self._max_epochs = trainer.fit_loop.max_epochs
        trainer.fit_loop.max_epochs = trainer.current_epoch + self.epochs

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the member's checkpoint, whole or not at all."""
        if self._member is None:
            return
        path = self._member.checkpoint
        temporary = path.with_name(f".{path.name}")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            temporary.replace(path)
        trainer.strategy.barrier("PopulationMember")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the Trainer its own limit back."""
        if self._max_epochs is not None:
            trainer.fit_loop.max_epochs = self._max_epochs
            self._max_epochs = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say whose checkpoint did not fit."""
        if self._restoring and self._member is not None and isinstance(exception, (RuntimeError, ValueError, KeyError)):
            exception.args = (
                f"the checkpoint of trial {self._member.parent} does not fit trial {self._member.number}: "
                "population-based training cannot search what changes the model or the kind of its optimizer "
                f"({' '.join(str(exception).split())})",
            )
        self._restoring = False
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what children need beside the Trainer's own state."""
        if self._configured is None:
            return {}
        return {"configured": self._configured, "random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what the parent left."""
        self._inherited = state_dict


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _plain(value: Any) -> Any:
    """Return a copy without tensors, arrays or tuples, so that two of them can be compared."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _scaled(lr: float, old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """Return the learning rate that stands to the new one as the restored one stood to the old one."""
    if lr == old["lr"] or not old["lr"]:
        return float(new["lr"])
    return float(lr * new["lr"] / old["lr"])


def _like(current: Any, value: Any) -> Any:
    """Return plain data as the kind of thing that stands in its place now."""
    if isinstance(current, Tensor):
        return torch.tensor(value, dtype=current.dtype, device=current.device)
    return type(current)(value) if isinstance(current, (tuple, dict)) else value


def _reapply_scheduler(scheduler: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in new.keys() & old.keys():
        if name in _DERIVED or new[name] == old[name]:
            continue
        if name == "_schedulers":
            # Those that a SequentialLR or a ChainedScheduler runs.
            for inner, old_state, new_state in zip(scheduler._schedulers, old[name], new[name], strict=True):
                _reapply_scheduler(inner, old_state, new_state)
        elif name == "lr_lambdas":
            for one, state in zip(scheduler.lr_lambdas, new[name], strict=True):
                vars(one).update(state or {})
        else:
            setattr(scheduler, name, _like(getattr(scheduler, name), new[name]))
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
