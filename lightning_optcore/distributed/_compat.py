"""What torch and Lightning do not offer in public, or do otherwise than ranks need that are far apart, or die."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed import distributed_c10d


def default_store() -> torch.distributed.Store:
    """Return the store of the default process group.

    ``init_process_group`` makes one from the environment and keeps it to itself.
    """
    return distributed_c10d._get_default_store()


def set_timeout(seconds: float) -> None:
    """Let the collectives of the default process group wait for so long from now on.

    ``init_process_group(timeout=...)`` sets one value for the start, which may take long, and for all that follows.
    """
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), torch.distributed.group.WORLD)


def resume_from(trainer: Trainer, path: Path) -> None:
    """Let the fit that is being set up restore a checkpoint, whatever its caller gave.

    ``Trainer.fit`` takes the path as an argument, before ranks can talk to each other; nothing sets it later.
    """
    connector = trainer._checkpoint_connector
    restore = connector._restore_modules_and_callbacks

    def restore_ours(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        connector._restore_modules_and_callbacks = restore  # type: ignore[method-assign]
        restore(path, weights_only)

    connector._restore_modules_and_callbacks = restore_ours  # type: ignore[method-assign]


def agree_on_signals_when(loop: Any, due: Callable[[], bool], waited: Callable[[Callable[[], object]], None]) -> None:
    """Let the loop over an epoch ask rank 0 for a SIGTERM only now and then.

    Lightning 2.6 does so before every batch, and ranks that learn by themselves would wait for each other at every step
    (``_TrainingEpochLoop._broadcast_sigterm_tensor``).

    Args:
        loop: The Trainer's ``fit_loop.epoch_loop``.
        due: Returns whether to ask before this batch; the same on all ranks.
        waited: Calls its argument, which waits for the other ranks.
    """
    ask = getattr(type(loop), "_broadcast_sigterm_tensor", None)
    if ask is None:
        return

    def ask_when_due() -> None:
        if due():
            waited(lambda: ask(loop))

    loop._broadcast_sigterm_tensor = ask_when_due
