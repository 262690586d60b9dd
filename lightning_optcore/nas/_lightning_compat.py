"""What Lightning does not offer: to change the training loader of a fit, and to take a batch as its loop does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


def on_training_loader(trainer: Trainer, change: Callable[[Any], Any]) -> None:
    """Let a fit that is being set up train on ``change(loader)``.

    The loader may come from the ``fit`` call, the module or the data module; a ``setup`` hook sees none of them yet,
    and later hooks come too late. The next fit has a source of its own.
    """
    source = trainer.fit_loop._data_source
    theirs = source.dataloader
    source.dataloader = lambda: change(theirs())  # type: ignore[method-assign]


def on_device(trainer: Trainer, batch: Any) -> Any:
    """Return a batch as the training loop hands it to ``training_step``, with all hooks of the user."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
