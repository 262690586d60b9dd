"""Adaptation to one task: some steps of gradient descent from where the module is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.meta.functional import LossFunction, descend, functional_loss, learned_parameters
from lightning_optcore.meta.meta_gradient import MetaLearningError


def adapt(
    module: nn.Module,
    loss_fn: LossFunction,
    support: Any,
    inner_lr: float = 0.01,
    num_inner_steps: int = 5,
    adapts: Callable[[str], bool] | None = None,
) -> nn.Module:
    """Return a copy of a module that is adapted to a support set; the module stays as it is.

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
    if num_inner_steps < 1:
        raise MetaLearningError(f"num_inner_steps={num_inner_steps}: expected at least 1")
    copied = detached_copy(module)
    loss = functional_loss(copied, loss_fn)
    parameters = {
        name: value.detach() for name, value in learned_parameters(copied).items() if adapts is None or adapts(name)
    }
    buffers = dict(copied.named_buffers())
    fast = parameters
    for _ in range(num_inner_steps):
        fast = descend(
            lambda p: loss(p, {name: value.clone() for name, value in buffers.items()}, support),
            fast,
            inner_lr,
            1,
            first_order=True,
        )
    with torch.no_grad():
        for name, value in copied.named_parameters():
            if name in fast:
                value.copy_(fast[name])
    return copied
