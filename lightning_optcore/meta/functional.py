"""A module and a loss as a function of the module's parameters, and steps of gradient descent on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

# loss_fn(module, batch) -> scalar
LossFunction = Callable[[nn.Module, Any], Any]
Parameters = dict[str, Tensor]
# From parameters, buffers and a batch to what the function of a module and a batch returns.
Functional = Callable[[Parameters, Parameters, Any], Any]

_HELD = "held."


class _Holder(nn.Module):
    def __init__(self, module: nn.Module, fn: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.held = module
        self._fn = fn

    def forward(self, batch: Any) -> Any:
        return self._fn(self.held, batch)


def functional(module: nn.Module, fn: Callable[[nn.Module, Any], Any]) -> Functional:
    """Return ``fn(module, batch)`` as a function of parameters, buffers and a batch; the module's own stay as they are.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> loss = functional(net, lambda module, batch: module(batch).sum())
        >>> float(loss({"weight": torch.tensor([[3.0]])}, {}, torch.ones(2, 1)))
        6.0
    """
    holder = _Holder(module, fn)

    def call(parameters: Parameters, buffers: Parameters, batch: Any) -> Any:
        state = {f"{_HELD}{name}": value for name, value in {**parameters, **buffers}.items()}
        return functional_call(holder, state, (batch,))

    return call


def learned_parameters(module: nn.Module) -> Parameters:
    """Return the parameters that have a gradient, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


Gradient = Callable[[Callable[[Parameters], Tensor], Parameters, bool], Parameters]


def by_transform(loss: Callable[[Parameters], Tensor], parameters: Parameters, first_order: bool) -> Parameters:
    """Return the gradient by ``torch.func``: under ``vmap``, without gradients and in inference mode, too."""
    gradients: Parameters = torch.func.grad(loss)(parameters)
    return {name: one.detach() for name, one in gradients.items()} if first_order else gradients


def by_autograd(loss: Callable[[Parameters], Tensor], parameters: Parameters, first_order: bool) -> Parameters:
    """Return the gradient with respect to parameters that require one; of first order it keeps no graph."""
    found = torch.autograd.grad(
        loss(parameters), list(parameters.values()), create_graph=not first_order, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def descend(
    losses: Sequence[Callable[[Parameters], Tensor]],
    parameters: Parameters,
    rates: float | Mapping[str, Tensor],
    steps: range,
    *,
    first_order: bool = False,
    gradient: Gradient = by_transform,
) -> Parameters:
    """Take steps of gradient descent, through which gradients flow.

    Args:
        losses: Scalars of the parameters, of which each step takes the next.
        parameters: Where it begins.
        rates: The learning rate; or one for every number of every parameter, where there is one more axis at each step,
            of which the last goes on.
        steps: The numbers of the steps, from 0.
        first_order: Whether the gradients of the steps are constants to what comes after.
        gradient: How a gradient is computed.

    Example:
        >>> descend([lambda p: (p["x"] ** 2).sum()], {"x": torch.tensor([1.0])}, 0.25, range(2))
        {'x': tensor([0.2500])}
    """
    for number in steps:
        gradients = gradient(losses[number % len(losses)], parameters, first_order)
        parameters = {
            name: value - _rate(rates, name, value, number) * gradients[name] for name, value in parameters.items()
        }
    return parameters


def _rate(rates: float | Mapping[str, Tensor], name: str, parameter: Tensor, number: int) -> float | Tensor:
    if isinstance(rates, (int, float)):
        return rates
    rate = rates[name]
    return rate[min(number, len(rate) - 1)] if rate.dim() > parameter.dim() else rate


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[bool]:
    """Let batch norm use and keep the statistics of a single batch; yields whether there is any that keeps some."""
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    earlier = [(one.training, one.momentum) for one in norms]
    for one in norms:
        one.training, one.momentum = True, 1.0
    try:
        yield bool(norms)
    finally:
        for one, (training, momentum) in zip(norms, earlier, strict=True):
            one.training, one.momentum = training, momentum
