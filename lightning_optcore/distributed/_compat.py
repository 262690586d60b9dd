"""What Lightning does otherwise than a slow link needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
