"""A module and a loss as a function of the module's parameters, and steps of gradient descent on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# loss_fn(module, batch) -> scalar
LossFunction = Callable[[nn.Module, Any], Tensor]
Parameters = dict[str, Tensor]
# From parameters, buffers and a batch to a scalar.
FunctionalLoss = Callable[[Parameters, Parameters, Any], Tensor]

_HELD = "held."


class _Loss(nn.Module):
    def __init__(self, module: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.held = module
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self._loss_fn(self.held, batch)


def functional_loss(module: nn.Module, loss_fn: LossFunction) -> FunctionalLoss:
    """Return the loss as a function of parameters, buffers and a batch; the module's own stay as they are.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> loss = functional_loss(net, lambda module, batch: module(batch).sum())
        >>> float(loss({"weight": torch.tensor([[3.0]])}, {}, torch.ones(2, 1)))
        6.0
    """
    holder = _Loss(module, loss_fn)

    def loss(parameters: Parameters, buffers: Parameters, batch: Any) -> Tensor:
        state = {f"{_HELD}{name}": value for name, value in {**parameters, **buffers}.items()}
        return functional_call(holder, state, (batch,))

    return loss


def learned_parameters(module: nn.Module) -> Parameters:
    """Return the parameters that have a gradient, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def descend(
    loss: Callable[[Parameters], Tensor],
    parameters: Parameters,
    rates: float | Mapping[str, Tensor],
    num_steps: int,
    *,
    first_order: bool = False,
) -> Parameters:
    """Take steps of gradient descent, through which gradients flow.

    Args:
        loss: A scalar of the parameters.
        parameters: Where it begins.
        rates: The learning rate; or one for every number of every parameter.
        num_steps: How many steps.
        first_order: Whether the gradients of the steps are constants to what comes after.

    Example:
        >>> descend(lambda p: (p["x"] ** 2).sum(), {"x": torch.tensor([1.0])}, 0.25, 2)
        {'x': tensor([0.2500])}
    """
    for _ in range(num_steps):
        gradients = torch.func.grad(loss)(parameters)
        if first_order:
            gradients = {name: gradient.detach() for name, gradient in gradients.items()}
        parameters = {
            name: value - (rates if isinstance(rates, (int, float)) else rates[name]) * gradients[name]
            for name, value in parameters.items()
        }
    return parameters
