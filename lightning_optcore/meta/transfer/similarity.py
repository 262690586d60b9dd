"""How alike what two networks' layers represent is: centered kernel alignment.

Sources: linear CKA (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414), its unbiased form over minibatches
(Nguyen et al., 2021, https://arxiv.org/abs/2010.15327).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.meta.transfer.layers import LayerGroup, TransferError

_FEWEST = 4


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two representations of the same samples: 0 (unrelated) to 1 (the same).

    It ignores rotations, scaling and shifts. With fewer samples than features it is near 1 for anything.

    Args:
        x: (samples, ...), flattened to features.
        y: (samples, ...), as many samples.

    Raises:
        TransferError: If the numbers of samples differ, or there is but one.

    Example:
        >>> x = torch.randn(50, 8)
        >>> round(linear_cka(x, 3 * x + 1), 4)
        1.0
    """
    if len(x) != len(y) or len(x) < 2:
        raise TransferError(f"x, y: {len(x)} and {len(y)} samples; expected the same number, at least 2")
    one, other = (value.detach().flatten(1).double() for value in (x, y))
    one, other = one - one.mean(0), other - other.mean(0)
    if max(one.shape[1], other.shape[1]) > len(one):
        # (samples, samples) is smaller than (features, features); the norms are the same.
        gram, gram_of_other = one @ one.T, other @ other.T
        shared, norms = (gram * gram_of_other).sum(), gram.norm() * gram_of_other.norm()
    else:
        shared = (other.T @ one).square().sum()
        norms = (one.T @ one).norm() * (other.T @ other).norm()
    return float(shared / norms) if norms > 0 else 0.0


def layer_similarity(
    one: nn.Module, other: nn.Module, inputs: Iterable[Any], layers: Sequence[str] | None = None
) -> dict[str, float]:
    """Return, layer by layer, the linear CKA of what two modules make of the same inputs.

    It is estimated without bias from batch to batch, so that memory does not grow with the number of samples; it may be
    slightly below 0 or above 1.

    Args:
        one: Any module; is run in evaluation mode, and left as it was.
        other: Another one with layers of the same names, e.g. before and after fine-tuning.
        inputs: Batches of at least 4 samples: a tensor, a tuple of arguments or a mapping of keyword arguments.
        layers: Names of modules; ``None``: all with own parameters that both have.

    Raises:
        TransferError: If there is no such layer, a batch is too small, or there is no batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> {name: round(value, 3) for name, value in layer_similarity(net, net, [torch.randn(64, 8)]).items()}
        {'0': 1.0, '2': 1.0}
    """
    names = _shared_layers(one, other) if layers is None else list(layers)
    for module in (one, other):
        known = {name for name, _ in module.named_modules()}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise TransferError(f"layers: {', '.join(unknown)} not in a {type(module).__name__}")
    if not names:
        raise TransferError("layers: the modules have none of the same name")
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    seen = 0
    for batch in inputs:
        grams, grams_of_other = _grams(one, batch, names), _grams(other, batch, names)
        for name in names:
            if name in grams and name in grams_of_other:
                x, y = grams[name], grams_of_other[name]
                sums[name] += torch.stack([_hsic(x, y), _hsic(x, x), _hsic(y, y)]).cpu()
        seen += 1
    if not seen:
        raise TransferError("inputs: no batch")
    found = {}
    for name, (shared, own, own_of_other) in sums.items():
        scale = (own.clamp(min=0) * own_of_other.clamp(min=0)).sqrt()
        if scale > 0:
            found[name] = float(shared / scale)
    return found


def stable_groups(similarity: Mapping[str, float], groups: Sequence[LayerGroup], threshold: float = 0.95) -> list[str]:
    """Return the names of the groups, from the input on, all of whose layers are at least so similar.

    Compare a network before and after a first fine-tuning: what hardly changed need not be trained the next time.

    Args:
        similarity: By the name of the layer, from :func:`layer_similarity`.
        groups: From :func:`layer_groups`.
        threshold: CKA from which on a layer counts as the same.

    Example:
        >>> groups = [LayerGroup("0", ("0.weight",)), LayerGroup("1", ("1.weight",)), LayerGroup("2", ("2.weight",))]
        >>> stable_groups({"0": 0.99, "1": 0.7, "2": 0.98}, groups)
        ['0']
    """
    stable: list[str] = []
    for group in groups[:-1]:
        layers = {name.rpartition(".")[0] for name in group.parameters} & similarity.keys()
        if not layers or min(similarity[layer] for layer in layers) < threshold:
            break
        stable.append(group.name)
    return stable


def _shared_layers(one: nn.Module, other: nn.Module) -> list[str]:
    known = {name for name, _ in other.named_modules()}
    return [
        name
        for name, module in one.named_modules()
        if name and name in known and any(True for _ in module.parameters(recurse=False))
    ]


def _grams(module: nn.Module, batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the (samples, samples) products of the outputs of some layers."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            value = next(iter(output)) if isinstance(output, (tuple, list)) else output
            if isinstance(value, Tensor) and value.ndim:
                features = value.detach().flatten(1).double() if value.ndim > 1 else value.detach().double()[:, None]
                if len(features) < _FEWEST:
                    raise TransferError(f"inputs: a batch of {len(features)}, expected at least {_FEWEST} samples")
                found[name] = features @ features.T

        return hook

    modes = [(one, one.training) for one in module.modules()]
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_hook(keep(name)).remove)
        try:
            module.eval()
            if isinstance(batch, Mapping):
                module(**batch)
            else:
                module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
        finally:
            for one, mode in modes:
                one.training = mode
    return found


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of the Hilbert-Schmidt independence criterion of two Gram matrices."""
    if len(x) != len(y):
        raise TransferError(f"layers: {len(x)} and {len(y)} rows of outputs; expected one of each sample")
    n = len(x)
    x, y = (gram - gram.diag().diag() for gram in (x, y))
    total = (x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * (x.sum(0) @ y.sum(0)) / (n - 2)
    return total / (n * (n - 3))
