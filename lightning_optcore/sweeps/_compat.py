"""What Lightning does not offer: to choose the checkpoint of a fit from within a callback."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def restore_in_this_fit(trainer: Trainer, path: Path) -> None:
    """Let a fit that is being set up begin at a checkpoint, as ``trainer.fit(ckpt_path=path)`` would.

    ``trainer.ckpt_path`` set in a ``setup`` hook has no effect: ``Trainer._run`` was handed its path before. What is
    loaded here is found by every later step of the restoring, unless the fit was given a checkpoint of its own.

    Args:
        trainer: In its ``setup`` hook.
        path: A checkpoint that was written by this very sweep, and is therefore trusted.
    """
    trainer._checkpoint_connector.resume_start(path, weights_only=False)
