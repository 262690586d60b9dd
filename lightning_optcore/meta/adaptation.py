"""Adaptation to one task: some steps of gradient descent from where the module is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.meta.functional import LossFunction
from lightning_optcore.meta.meta_gradient import MetaGradient
from lightning_optcore.meta.tasks import MetaLearningError
from lightning_optcore.option_values import is_whole


def adapt(
    module: nn.Module,
    loss_fn: LossFunction,
    support: Any,
    inner_lr: float = 0.01,
    num_inner_steps: int = 5,
    adapts: Callable[[str], bool] | None = None,
) -> nn.Module:
    """Return a copy of a module that is adapted to a support set; the module stays as it is.

    Batch norm normalizes by the support set's statistics, and keeps these.

    It works in inference mode, too, so that ``validate``, ``test`` and ``predict`` may adapt.

    Args:
        module: Any module.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar.
        support: What the loss takes.
        inner_lr: Learning rate.
        num_inner_steps: Gradient steps, each on the whole support set.
        adapts: Says by its name whether a parameter is adapted; by default all are.

    Raises:
        MetaLearningError: If an argument is out of its range.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> x = torch.randn(10, 1)
        >>> loss_fn = lambda module, batch: (module(batch[0]) - batch[1]).square().mean()
        >>> adapted = adapt(net, loss_fn, (x, 3 * x), inner_lr=0.1, num_inner_steps=20)
        >>> bool(loss_fn(adapted, (x, 3 * x)) < loss_fn(net, (x, 3 * x)))
        True
    """
    if not is_whole(num_inner_steps, least=1):
        raise MetaLearningError(f"num_inner_steps={num_inner_steps!r}: expected at least 1, a whole number")
    copied = detached_copy(module)
    step = MetaGradient(
        copied, loss_fn, inner_lr=inner_lr, num_inner_steps=num_inner_steps, adapts=adapts, backend="loop"
    )
    (adapted,) = step.adapted([(support, support)])
    take(copied, adapted)
    return copied


def take(module: nn.Module, adapted: Mapping[str, Tensor]) -> list[str]:
    """Give a module the parameters and buffers of these names; returns those that were others before."""
    changed = []
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name in adapted and not torch.equal(value, adapted[name]):
                value.copy_(adapted[name])
                changed.append(name)
    return changed
