"""Which choices of a ModelSpace decide nothing: those of a layer that is not built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_optcore.nas._nni_compat import nni_nas


def mute_labels(space: nn.Module, sample: Mapping[str, Any]) -> set[str]:
    """Return the labels of the choices that change nothing about a network.

    They stand only in blocks beyond the depth of a ``Repeat``, or in candidates of a ``LayerChoice`` that are not
    chosen.

    Args:
        space: A ``ModelSpace`` of NNI.
        sample: A value for each of its labels, as NNI takes it.

    Example:
        >>> nas = nni_nas()
        >>> class Space(nas.nn.ModelSpace):
        ...     def __init__(self):
        ...         super().__init__()
        ...         kind = lambda i: nas.nn.LayerChoice([nn.Identity(), nn.ReLU()], label=f"kind{i}")
        ...         self.layers = nas.nn.Repeat(kind, nas.nni.choice("depth", [1, 2]))
        >>> mute_labels(Space(), {"depth": 1, "kind0": 0, "kind1": 1})
        {'kind1'}
    """
    heard: set[str] = set()
    left_out: set[str] = set()
    _visit(space, sample, heard, left_out)
    return left_out - heard


def _visit(module: Any, sample: Mapping[str, Any], heard: set[str], left_out: set[str]) -> None:
    nas = nni_nas().nn
    heard |= _labels(module)
    built: list[Any] = list(module.children())
    others: list[Any] = []
    # What is built of a subclass may be other layers than these.
    if type(module) is nas.Repeat:
        depth = module.depth_choice if isinstance(module.depth_choice, int) else module.depth_choice.freeze(sample)
        built, others = list(module.blocks[:depth]), list(module.blocks[depth:])
    elif type(module) is nas.LayerChoice:
        built = [module[module.choice.freeze(sample)]]
        others = [one for one in module.children() if one is not built[0]]
    for one in built:
        _visit(one, sample, heard, left_out)
    for one in others:
        left_out |= set().union(*map(_labels, one.modules()))


def _labels(module: Any) -> set[str]:
    """Return the labels of a module's own choices."""
    return {label for one in getattr(module, "mutables", ()) for label in one.simplify()}
