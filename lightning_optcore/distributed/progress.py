"""The progress of a fit that was interrupted, in a form from which Lightning does the interrupted batch again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, cast

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import BatchSampler

_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_STEPPED = "_batches_that_stepped"


def after_last_step(trainer: Trainer, steps_before_batch: int) -> dict[str, Any] | None:
    """Return the state of the fit loop after the last optimizer step.

    Lightning resumes what was saved at the end of a batch, of an epoch or within a validation; its counters in the
    middle of a batch would be one too high from then on. Batches of which only gradients were accumulated are done
    again as well, because a checkpoint holds no gradients.

    Args:
        trainer: Whose fit was interrupted.
        steps_before_batch: Its global step when the batch began.

    Returns:
        None if the model is between two states, or has not been trained yet: then there is nothing to resume.
    """
    loop = trainer.fit_loop
    batches = cast(_ProcessedTracker, loop.epoch_loop.batch_progress.current)
    in_batch = batches.processed < batches.ready
    stepped = in_batch and trainer.global_step > steps_before_batch
    if trainer.global_step == 0 or (stepped and not trainer.lightning_module.automatic_optimization):
        return None  # in manual optimization some of several optimizers may have stepped
    if trainer.validating:
        return _before_validation(loop.state_dict())
    return _after_batch(
        loop.state_dict(),
        done=batches.processed + stepped,
        accumulate=trainer.accumulate_grad_batches,
        num_batches=trainer.num_training_batches,
        ends_by_steps=trainer.max_steps != -1,
    )


def skip_done_batches(trainer: Trainer, dataloader: Any) -> None:
    """Let a loader that was made anew begin with the batch that is to be done, where a fit resumes within an epoch.

    Lightning counts on, but would begin with the first batch of the epoch again. Samplers draw the same order for the
    same epoch; a loader that restores its own state is left alone.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = 0 if progress.is_last_batch else progress.current.ready
    sampler = getattr(dataloader, "batch_sampler", None)
    if done and isinstance(sampler, BatchSampler) and not isinstance(dataloader, _Stateful):
        sampler.sampler = _WithoutFirst(sampler.sampler, done * sampler.batch_size)


class _WithoutFirst:
    """A sampler that leaves out its first indices, once."""

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler = sampler
        self._count = count

    def __iter__(self) -> Iterator[int]:
        count, self._count = self._count, 0
        return itertools.islice(self._sampler, count, None)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def _before_validation(loops: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in which Lightning goes back to a validation, from its first batch on."""
    state = _without_begun(loops)
    _count(state[_VALIDATION]["current"], 0)
    total = state[_VALIDATION]["total"]
    _count(total, total["completed"])
    total["ready"] = total["started"] = total["completed"] + 1
    return state


def _after_batch(
    loops: Mapping[str, Any], *, done: int, accumulate: int, num_batches: float, ends_by_steps: bool
) -> dict[str, Any] | None:
    state = _without_begun(loops)
    batches, epochs = state[_BATCHES], state["epoch_progress"]
    counted = batches["current"]["completed"]
    epoch = epochs["current"]["processed"]
    if epoch == epochs["current"]["started"]:
        epoch -= 1  # at the end of an epoch, or before the next one
    done -= 0 if done == num_batches else done % accumulate
    total = batches["total"]["completed"] - counted + done
    if done == 0:
        if epoch == 0 or num_batches == float("inf"):
            return None
        epoch, done = epoch - 1, int(num_batches)
    at_end = done == num_batches
    if at_end and not ends_by_steps:
        _count_batches(batches, done, total)
        _count_epochs(epochs, finished=epoch + 1)
        epochs["current"]["completed"] -= 1
        epochs["total"]["completed"] -= 1
    else:
        _count_batches(batches, done, total)
        batches["current"]["completed"] -= 1
        batches["total"]["completed"] -= 1
        _count_epochs(epochs, finished=epoch)
        for tracker in epochs.values():
            tracker["ready"] += 1
            tracker["started"] += 1
        if counted >= done or counted == 0:
            # The end of that batch has been counted for the loggers, and is counted again.
            state["epoch_loop.state_dict"][_STEPPED] -= 1
    batches["is_last_batch"] = at_end
    return state


def _count(tracker: dict[str, int], count: int) -> None:
    for name in tracker:
        tracker[name] = count


def _count_batches(batches: Mapping[str, Any], current: int, total: int) -> None:
    _count(batches["current"], current)
    _count(batches["total"], total)


def _count_epochs(epochs: Mapping[str, dict[str, int]], finished: int) -> None:
    earlier = epochs["total"]["processed"] - epochs["current"]["processed"]
    _count(epochs["current"], finished)
    _count(epochs["total"], finished + earlier)


def _without_begun(loops: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which no step of an optimizer or a scheduler has begun that has not ended."""
    state = copy.deepcopy(dict(loops))
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    several = (
        optimizer["step"],
        optimizer["zero_grad"],
        state["epoch_loop.manual_optimization.optim_step_progress"],
        state["epoch_loop.scheduler_progress"],
    )
    for progress in several:
        for tracker in progress.values():
            _count(tracker, tracker["completed"])
    return state
