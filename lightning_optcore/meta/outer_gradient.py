"""The gradient of what a function of parameters and inner learning rates gives, and where ``torch.func`` has it wrong.

A function here is ``function(parameters, rates, ...) -> (losses, ...)``; what is made of it returns the gradients of
the sum of the losses, ``(of the parameters, of the rates)``, and all that the function returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_optcore.meta.functional import Parameters

_NORMS = ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm")


class CallRecorder(TorchFunctionMode):
    """Notes the names of the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))

    @property
    def norms(self) -> bool:
        """Whether there are norms: the gradient of a sum over ``vmap`` is wrong through layer and batch norm, as the
        batching rules of their backward are (pytorch/functorch #534; seen in torch 2.13)."""
        return any(name.endswith(_NORMS) for name in self.names)

    @property
    def convolutions(self) -> bool:
        """Whether there are convolutions: with weights of each task they are grouped ones, which on a CPU take tens of
        times the memory and no less time."""
        return any(name.startswith("conv") for name in self.names)


def by_outer_transform(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what gives the gradients of the sum of the losses, and all that the function gives, by ``torch.func``."""

    def total(*arguments: Any) -> Any:
        found = function(*arguments)
        return found[0].sum(), found

    return torch.func.grad(total, argnums=(0, 1), has_aux=True)


def by_outer_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same by autograd."""

    def step(parameters: Parameters, rates: Parameters, *others: Any) -> Any:
        leaves = [{name: one.detach().requires_grad_() for name, one in given.items()} for given in (parameters, rates)]
        with torch.enable_grad():
            found = function(*leaves, *others)
            wanted = [one for given in leaves for one in given.values()]
            slopes = torch.autograd.grad(found[0].sum(), wanted, materialize_grads=True)
        split = len(parameters)
        gradients = (
            dict(zip(parameters, slopes[:split], strict=True)),
            dict(zip(rates, slopes[split:], strict=True)),
        )
        return gradients, tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, found)

    return step


@contextmanager
def forked_random_numbers(parameters: Parameters) -> Iterator[None]:
    """Leave the random numbers of the parameters' device, and of the CPU, as they were."""
    device = next(iter(parameters.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
