"""What a replica that joins needs beside a checkpoint, to do what the others do next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

from lightning.pytorch import Trainer
from torch.utils.data import Sampler

_OF_MODEL_CHECKPOINT = ("_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation")


def in_step(trainer: Trainer) -> dict[str, Any]:
    """Return what checkpoints leave out: without it, one who joins would save or stop when others do not."""
    connector = trainer._logger_connector
    return {
        "should_stop": trainer.should_stop,
        "metrics": [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics],
        "checkpoints": [
            {name: getattr(callback, name) for name in _OF_MODEL_CHECKPOINT if hasattr(callback, name)}
            for callback in trainer.checkpoint_callbacks
        ],
    }


def get_in_step(trainer: Trainer, state: dict[str, Any]) -> None:
    """Take what :func:`in_step` returned elsewhere."""
    connector = trainer._logger_connector
    trainer.should_stop = state["should_stop"]
    mine = (connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics)
    for metrics, theirs in zip(cast(Any, mine), state["metrics"], strict=True):
        metrics.update(theirs)
    for callback, attributes in zip(trainer.checkpoint_callbacks, state["checkpoints"], strict=True):
        for name, value in attributes.items():
            setattr(callback, name, value)


class Beginning(Sampler[Any]):
    """A sampler that leaves out its first samples, as long as it is told to.

    Args:
        sampler: Gives the samples.
        skip: How many are left out.
        skips: Whether they are left out now.
    """

    def __init__(self, sampler: Iterable[Any], skip: int, skips: Callable[[], bool]) -> None:
        self.sampler, self.skip, self.skips = sampler, skip, skips

    def __len__(self) -> int:
        return len(cast(Any, self.sampler))

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.sampler), self.skip if self.skips() else 0, None)

    def set_epoch(self, epoch: int) -> None:
        """Pass on the epoch, by which samples are shuffled."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
