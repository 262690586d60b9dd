"""The layers of a network from its input to its output, in groups, and the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_optcore.option_values import is_whole

ENOUGH_GROUPS = 4
_NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# One group's patterns of names.
Patterns = str | Sequence[str]


class TransferError(ValueError):
    """What cannot be transferred; the message says what would be right."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are frozen together and learn at one rate.

    Args:
        name: The modules or patterns that it was made from.
        parameters: Names of its parameters.
        normalizations: Names of its layers that keep running statistics.
    """

    name: str
    parameters: tuple[str, ...]
    normalizations: tuple[str, ...] = ()


def layer_groups(
    module: nn.Module, patterns: Sequence[Patterns] | None = None, head: str | None = None
) -> list[LayerGroup]:
    """Return a module's parameters in groups, in order from the input to the output.

    Without patterns these are its children, in the order in which they are defined; the largest ``nn.Sequential`` or
    ``nn.ModuleList`` among them (or what wraps one, or a single child) is opened until there are four groups.
    Normalization stays with the layer before it. A shared parameter belongs to the first group that has it.

    Args:
        module: Any module.
        patterns: For every group, from the input to the output, one or several names of modules or parameters, ``*``
            allowed; the first that matches a parameter has it.
        head: Name of the module that gives the output, if that is not the one defined last.

    Raises:
        TransferError: If a pattern matches nothing, a parameter matches none, or there is no such head.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
        >>> [group.name for group in layer_groups(net)]
        ['0+1', '3']
        >>> layer_groups(net, [["0", "1"], "3"])[1].parameters
        ('3.weight', '3.bias')
    """
    if not any(True for _ in module.parameters()):
        raise TransferError("the module has no parameters")
    if head is not None:
        check_head(module, head)
    groups = _by_pattern(module, patterns) if patterns is not None else _by_child(module)
    if head is None:
        return groups
    last = [group for group in groups if any(_is_in(name, (head,)) for name in group.parameters)]
    return [group for group in groups if group not in last] + last


def last_layer(module: nn.Module) -> str:
    """Return the name of the linear layer or convolution that is defined last.

    Raises:
        TransferError: If there is none.
    """
    names = [name for name, one in module.named_modules() if isinstance(one, _HEADS)]
    if not names:
        raise TransferError("head=null: there is no linear layer and no convolution; name the module of the output")
    return names[-1]


def replace_head(module: nn.Module, num_classes: int, head: str | None = None) -> str:
    """Give a module a new last layer, of its kind, device and type; return its name.

    Where the hyperparameters of a LightningModule hold the old ``num_classes``, they get the new one, so that
    ``load_from_checkpoint`` builds the right size. Metrics of the module that were made for a number of classes are
    the caller's.

    Args:
        module: Is changed.
        num_classes: Outputs of the new layer.
        head: Name of the layer; ``None``: the linear layer or convolution that is defined last.

    Raises:
        TransferError: If there is no such layer, it is of another kind, or ``num_classes`` is less than 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> replace_head(net, 3), net[2].out_features
        ('2', 3)
    """
    if not is_whole(num_classes, least=1):
        raise TransferError(f"num_classes={num_classes!r}: expected at least 1, a whole number")
    name = last_layer(module) if head is None else head
    check_head(module, name)
    old = module.get_submodule(name)
    if not isinstance(old, _HEADS):
        raise TransferError(f"head={name}: is a {type(old).__name__}, expected a linear layer or a convolution")
    new = _resized(old, num_classes).train(old.training)
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, new)
    hparams: Any = getattr(module, "hparams", {})
    outputs = old.out_features if isinstance(old, nn.Linear) else old.out_channels
    if hparams.get("num_classes") == outputs:
        hparams["num_classes"] = num_classes
    return name


def check_head(module: nn.Module, head: str) -> None:
    """Raise a TransferError if no module with parameters has this name."""
    known = dict(module.named_modules())
    if not head or head not in known or not any(True for _ in known[head].parameters()):
        names = [name for name, one in known.items() if name and any(True for _ in one.parameters())]
        raise TransferError(f"head={head!r}: expected one of {', '.join(names) or 'no layer: there is none'}")


def _resized(old: nn.Module, num_classes: int) -> nn.Module:
    weight = old.weight
    options: dict[str, Any] = {"bias": old.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, num_classes, **options)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        options[name] = getattr(old, name)
    return type(old)(old.in_channels, num_classes, **options)


def _by_pattern(module: nn.Module, patterns: Sequence[Patterns]) -> list[LayerGroup]:
    all_of_them = [(one,) if isinstance(one, str) else tuple(one) for one in patterns]
    left = [name for name, _ in module.named_parameters()]
    normalizations = [name for name, one in module.named_modules() if isinstance(one, _NormBase)]
    every = ", ".join(left)
    groups = []
    for some in all_of_them:
        for pattern in some:
            if not any(_is_in(name, (pattern,)) for name, _ in module.named_parameters()):
                raise TransferError(f"groups: {pattern!r} matches none of {every}")
        own = tuple(name for name in left if _is_in(name, some))
        if not own:
            raise TransferError(f"groups: all that {list(some)} match is in groups before it")
        norms = tuple(name for name in normalizations if _is_in(name, some))
        groups.append(LayerGroup("+".join(some), own, norms))
        left = [name for name in left if name not in own]
        normalizations = [name for name in normalizations if name not in norms]
    if left:
        raise TransferError(f"groups: no pattern matches {', '.join(left)}")
    return groups


def _by_child(module: nn.Module) -> list[LayerGroup]:
    units = _children(module, "")
    while len(_joined(units, module)) < ENOUGH_GROUPS:
        openable = [name for name in units if _opens(module.get_submodule(name), alone=len(units) == 1)]
        if not openable:
            break
        largest = max(openable, key=lambda name: sum(p.numel() for p in module.get_submodule(name).parameters()))
        at = units.index(largest)
        units[at : at + 1] = _children(module.get_submodule(largest), largest)
    groups: list[LayerGroup] = []
    left = [name for name, _ in module.named_parameters()]
    for unit in _joined(units, module):
        own = tuple(name for name in left if _is_in(name, unit))
        norms = tuple(
            name
            for name, one in module.named_modules()
            if isinstance(one, _NormBase) and any(_within(name, part) for part in unit)
        )
        left = [name for name in left if name not in own]
        if own:
            groups.append(LayerGroup("+".join(unit), own, norms))
        elif groups and norms:
            groups[-1] = LayerGroup(groups[-1].name, groups[-1].parameters, groups[-1].normalizations + norms)
    if left:
        # Parameters of a module that holds others: tokens and positions, which meet the input.
        first = groups[0] if groups else LayerGroup("", ())
        groups[:1] = [LayerGroup(first.name, (*left, *first.parameters), first.normalizations)]
    return groups


def _children(module: nn.Module, name: str) -> list[str]:
    prefix = f"{name}." if name else ""
    return [
        f"{prefix}{child}"
        for child, one in module.named_children()
        if any(True for _ in one.parameters()) or isinstance(one, _NormBase)
    ]


def _opens(module: nn.Module, *, alone: bool) -> bool:
    children = _children(module, "")
    own = any(True for _ in module.parameters(recurse=False))
    contains = isinstance(module, (nn.Sequential, nn.ModuleList)) or len(children) == 1
    return bool(children) and not own and (contains or alone)


def _joined(units: Sequence[str], module: nn.Module) -> list[tuple[str, ...]]:
    """Return the units with normalization beside the layer before it."""
    joined: list[tuple[str, ...]] = []
    for name in units:
        if joined and isinstance(module.get_submodule(name), _NORMALIZATIONS):
            joined[-1] += (name,)
        else:
            joined.append((name,))
    return joined


def _within(name: str, module_name: str) -> bool:
    return name == module_name or name.startswith(f"{module_name}.")


def _is_in(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*") for pattern in patterns)
