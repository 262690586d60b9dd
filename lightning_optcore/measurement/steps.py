"""The steps of a LightningModule, called as Lightning calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

Step = Callable[..., Any]


def call_step(step: Step, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """Call a step with those of the arguments that it takes.

    Args:
        step: A bound ``training_step``, ``validation_step`` or the like.
        batch: A batch.
        batch_idx: Its number.
        dataloader_idx: Number of its loader.

    Example:
        >>> call_step(lambda batch: batch, 3, 0), call_step(lambda batch, batch_idx: batch_idx, 3, 7)
        (3, 7)
    """
    parameters = inspect.signature(step).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    positional = kinds.count(Parameter.POSITIONAL_OR_KEYWORD) + kinds.count(Parameter.POSITIONAL_ONLY)
    given = (batch, batch_idx) if positional > 1 or Parameter.VAR_POSITIONAL in kinds else (batch,)
    return step(*given, dataloader_idx=dataloader_idx) if "dataloader_idx" in parameters else step(*given)
