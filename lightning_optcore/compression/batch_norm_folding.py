"""Batch norms become part of the convolution or linear layer before them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_optcore.compression.speed_check import evaluated, same_outputs
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.measurement.inputs import Inputs

Pair = tuple[str, str]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BEFORE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable_pairs(module: nn.Module, inputs: Inputs) -> list[Pair]:
    """Return the batch norms that can be folded, each with the layer that it becomes part of, by name.

    A pair is a layer and a norm that is given its output as it is; both run once, without hooks and without weights
    that others have too. Whether somebody else reads the output in between is found by trying: the network's output
    must stay as it was.

    Args:
        module: Any module; left as it is.
        inputs: What ``forward`` takes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> foldable_pairs(net, Inputs.of(torch.randn(2, 1, 8, 8)))
        [('0', '1')]
    """
    expected = evaluated(module, inputs)

    def unchanged(pairs: Sequence[Pair]) -> bool:
        trial = detached_copy(module)
        fold(trial, pairs)
        return same_outputs(expected, evaluated(trial, inputs))

    pairs = _adjacent(module, inputs)
    if not pairs or unchanged(pairs):
        return pairs
    return [pair for pair in pairs if unchanged([pair])]


def _adjacent(module: nn.Module, inputs: Inputs) -> list[Pair]:
    trial = detached_copy(module)
    names = {child: name for name, child in trial.named_modules()}
    homes: dict[int, int] = {}
    for _, parameter in trial.named_parameters(remove_duplicate=False):
        homes[id(parameter)] = homes.get(id(parameter), 0) + 1
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    calls: dict[nn.Module, int] = {}
    found: list[tuple[nn.Module, nn.Module]] = []

    def watch(child: nn.Module) -> Callable[..., None]:
        def hook(layer: Any, arguments: tuple[Any, ...], output: Any) -> None:
            calls[layer] = calls.get(layer, 0) + 1
            if type(layer) in _NORMS and arguments and id(arguments[0]) in made:
                before = made[id(arguments[0])][1]
                if _fits(before, layer, arguments[0]):
                    found.append((before, layer))
            if type(layer) in _BEFORE:
                # The tensor is kept, so that its id is not given away.
                made[id(output)] = (output, layer)

        return hook

    for child in trial.modules():
        own = [homes[id(p)] == 1 for p in child.parameters(recurse=False)]
        if (
            type(child) in (*_BEFORE, *_NORMS)
            and all(own)
            and not child._forward_hooks
            and not child._forward_pre_hooks
        ):
            child.register_forward_hook(watch(child))
    evaluated(trial, inputs)
    return [(names[first], names[norm]) for first, norm in found if calls[first] == calls[norm] == 1]


def _fits(before: Any, norm: Any, between: Tensor) -> bool:
    channels = before.out_features if isinstance(before, nn.Linear) else before.out_channels
    flat = not isinstance(before, nn.Linear) or between.dim() == 2
    return flat and norm.track_running_stats and norm.num_features == channels


def fold(module: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold batch norms, with their present statistics, in place; an ``nn.Identity`` stands where they were."""
    for name, norm_name in pairs:
        before: Any = module.get_submodule(name)
        norm: Any = module.get_submodule(norm_name)
        training = before.training
        before.eval()
        norm.eval()
        if isinstance(before, nn.Linear):
            folded: nn.Module = fuse_linear_bn_eval(before, norm)
        else:
            folded = fuse_conv_bn_eval(before, norm, transpose=isinstance(before, _TRANSPOSED))
        module.set_submodule(name, folded.train(training))
        module.set_submodule(norm_name, nn.Identity().train(training))


def folded_form(module: nn.Module, pairs: Sequence[Pair]) -> None:
    """Bring a fresh module to the shape that :func:`fold` leaves, with weights of no meaning.

    Raises:
        ValueError: If it has no such layers.
    """
    for name, norm_name in pairs:
        try:
            before: Any = copy.deepcopy(module.get_submodule(name))
            module.get_submodule(norm_name)
        except AttributeError as error:
            raise ValueError(f"the module has no layers {name} and {norm_name} to fold") from error
        if before.bias is None:
            channels = before.out_features if isinstance(before, nn.Linear) else before.out_channels
            before.bias = nn.Parameter(torch.zeros(channels).to(before.weight))
        module.set_submodule(name, before)
        module.set_submodule(norm_name, nn.Identity())
