"""Zero-cost proxies: figures of an untrained network, from one batch, that hint at how good it will be.

Sources: ``gradient_norm`` is grad_norm of Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", ICLR 2021;
``synflow`` is Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
NeurIPS 2020, in the sum over all parameters that Abdelfattah et al. use; ``naswot`` is Mellor et al., "Neural
Architecture Search without Training", ICML 2021.

Every function leaves the network as it was: weights, buffers, gradients, mode, and the state of the random numbers.
Draw the weights of the networks that are to be compared from one seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_optcore.measurement.inputs import Inputs, tensors_in

Loss = Callable[[Any, Tensor], Tensor]

# Units that are off for what they do not let through.
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)


def gradient_norm(network: nn.Module, batch: tuple[Any, Tensor], loss: Loss | None = None) -> float:
    """Return the sum of the norms of the weights' gradients after one batch; more is better.

    Args:
        network: An untrained network.
        batch: What ``forward`` takes (as ``example_inputs`` of the yardstick), and the targets.
        loss: Of the output and the targets; by default cross-entropy where the targets are whole numbers, else the
            mean squared error.

    Example:
        >>> network = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(network.weight)
        >>> gradient_norm(network, (torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])))
        10.0
    """
    inputs, targets = batch
    with _randomness_kept(network), torch.enable_grad():
        tried = _copy(network).train()
        value = (loss or _usual_loss)(Inputs.of(inputs).call(tried), targets)
        gradients = torch.autograd.grad(value, list(tried.parameters()), allow_unused=True)
    return sum_of_norms(gradients)


def sum_of_norms(gradients: Iterable[Tensor | None]) -> float:
    """Return the sum of the norms of gradients; a weight that has none adds nothing.

    Example:
        >>> sum_of_norms([torch.tensor([3.0, 4.0]), None, torch.tensor([1.0])])
        6.0
    """
    return float(sum(gradient.norm() for gradient in gradients if gradient is not None))


def synflow(network: nn.Module, inputs: Any) -> float:
    """Return the logarithm of the synaptic flow, which is the sum over the paths of the product of their weights.

    Every weight is taken by its absolute value, and batch norm is left out; the input is one sample of ones. The
    logarithm keeps the order and spares deep networks the overflow. More is better.

    Args:
        network: An untrained network.
        inputs: What ``forward`` takes; only its shapes count.

    Returns:
        Natural logarithm of the sum of ``|weight * gradient|``; minus infinity if nothing flows.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = network[0].weight.copy_(torch.tensor([[1.0, -2.0]])), network[1].weight.fill_(3.0)
        >>> round(math.exp(synflow(network, torch.zeros(1, 2))), 6)  # paths of 3 and of 6; each weight layer sees both
        18.0
    """
    tried = _copy(network).double().eval()
    ones = Inputs.of(inputs).resized(1).map(lambda x: torch.ones_like(x).double() if x.is_floating_point() else x)
    for module in tried.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _identity  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        for tensor in (*tried.parameters(), *tried.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    weights = list(tried.parameters())
    with _randomness_kept(network), torch.enable_grad():
        flow = torch.stack([one.sum() for one in tensors_in(ones.call(tried)) if one.requires_grad]).sum()
        gradients = torch.autograd.grad(flow, weights, allow_unused=True)
    pairs = [(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    total = sum((weight * gradient).abs().sum().item() for weight, gradient in pairs)
    return math.log(total) if total > 0 else -math.inf


def naswot(network: nn.Module, inputs: Any) -> float:
    """Return how well the units that are on tell the samples of a batch apart; more is better.

    Args:
        network: An untrained network with activations that are modules (ReLU and its like).
        inputs: What ``forward`` takes; a batch of 32 to 128 distinct samples.

    Returns:
        Logarithm of the determinant of the samples' kernel, in which two samples have in common as many units as are
        on, or off, for both; minus infinity if two samples are not told apart.

    Raises:
        ValueError: If the network has no activation that is a module.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = network[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        >>> round(naswot(network, torch.tensor([[1.0], [-1.0]])), 4)  # [[2, 0], [0, 2]]
        1.3863
    """
    example = Inputs.of(inputs)
    size = example.batch_size
    kernels: list[Tensor] = []

    # Before the activation, which may work in place.
    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        on = (arguments[0].detach().reshape(size, -1) > 0).double()
        kernels.append(on @ on.T + (1 - on) @ (1 - on).T)

    tried = _copy(network).train()
    for module in tried.modules():
        if isinstance(module, _ACTIVATIONS):
            module.register_forward_pre_hook(watch)
    with _randomness_kept(network), torch.no_grad():
        example.call(tried)
    if not kernels:
        names = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
        raise ValueError(f"{type(network).__name__} calls no activation that is a module: expected one of {names}")
    sign, logarithm = torch.linalg.slogdet(torch.stack(kernels).sum(0))
    return float(logarithm) if sign > 0 else -math.inf


def _usual_loss(output: Any, targets: Tensor) -> Tensor:
    first = next(tensors_in(output))
    return mse_loss(first, targets) if targets.is_floating_point() else cross_entropy(first, targets)


def _identity(x: Tensor) -> Tensor:
    return x


def _copy(network: nn.Module) -> nn.Module:
    """Return a copy with gradients for every weight, frozen ones included."""
    return copy.deepcopy(network).requires_grad_(True)


@contextmanager
def _randomness_kept(network: nn.Module) -> Iterator[None]:
    """Put back the random numbers that a forward with dropout draws."""
    devices = sorted({tensor.get_device() for tensor in network.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield
