"""The gradient of what a function of parameters and inner learning rates gives, and where ``torch.func`` has it wrong.

A function here is ``function(parameters, rates, ...) -> (losses, ...)``; what is made of it returns the gradients of
the sum of the losses, ``(of the parameters, of the rates)``, and all that the function returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_optcore.meta.functional import Parameters
from lightning_optcore.meta.tasks import MetaLearningError

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


def judged_steps(
    num_steps: int, weights: Sequence[float] | None, key: str = "num_inner_steps"
) -> list[tuple[int, float]]:
    """Return after how many inner steps the query set is judged, and what its loss there counts.

    Args:
        num_steps: How many steps there are.
        weights: One for each step; ``None``: only what is left after the last counts.
        key: The name of ``num_steps``, for messages.

    Raises:
        MetaLearningError: If the weights are not one for each step, or make no sense.

    Example:
        >>> judged_steps(3, [0.5, 0.0, 1.0])
        [(1, 0.5), (3, 1.0)]
    """
    if weights is None:
        return [(num_steps, 1.0)]
    shown = f"query_loss_weights={list(weights)}"
    if len(weights) != num_steps or not num_steps:
        raise MetaLearningError(f"{shown}: {len(weights)} weights for {key}={num_steps}; expected one for each step")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise MetaLearningError(f"{shown}: expected numbers of at least 0")
    if weights[-1] == 0:
        raise MetaLearningError(f"{shown}: nothing counts after the last step; expected more than 0, or fewer steps")
    return [(number, float(weight)) for number, weight in enumerate(weights, start=1) if weight]


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
