"""The structure of a module as data: shapes of its tensors and sizes that its layers remember.

A pruned model differs from a fresh one in these alone, so they are what a recipe keeps: with them a fresh
module is brought to the pruned shape, or a pruned one back, before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.compression.fake_quantization import RANGE


@dataclass
class Structure:
    """Shapes and sizes of a module, or of those parts of it that changed.

    Args:
        shapes: Shape by the name of a parameter or buffer.
        sizes: Integers and tuples of integers that a submodule holds as attributes (``in_channels``,
            ``num_features``, ``normalized_shape``), by the submodule's name and the attribute's.
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Structure:
        """Read the whole structure of a module, but for the ranges of fake quantization: their step makes them.

        Example:
            >>> Structure.of(nn.Linear(4, 2)).shapes
            {'weight': [2, 4], 'bias': [2]}
        """
        return cls(
            {name: list(t.shape) for name, t in named_tensors(module).items() if not name.endswith(RANGE)},
            {name: _sizes(child) for name, child in module.named_modules()},
        )

    def changed_to(self, after: Structure) -> Structure:
        """Return the parts of ``after`` that differ from this structure."""
        sizes = {}
        for name, values in after.sizes.items():
            before = self.sizes.get(name, {})
            different = {key: value for key, value in values.items() if before.get(key) != value}
            if different:
                sizes[name] = different
        shapes = {name: shape for name, shape in after.shapes.items() if self.shapes.get(name) != shape}
        return Structure(shapes, sizes)

    def only(self, keys: Mapping[str, Iterable[str]]) -> Structure:
        """Return the structure with those sizes alone: a user's own counters are integers too."""
        sizes = {
            name: {key: value for key, value in values.items() if key in set(keys[name])}
            for name, values in self.sizes.items()
            if name in keys
        }
        return Structure(dict(self.shapes), {name: values for name, values in sizes.items() if values})

    def prefixed(self, prefix: str) -> Structure:
        """Return the same as part of a module that holds this one under a name."""
        return Structure(
            {prefix + name: shape for name, shape in self.shapes.items()},
            {(prefix + name).rstrip("."): values for name, values in self.sizes.items()},
        )


def resize(module: nn.Module, structure: Structure) -> None:
    """Give the tensors and layers of ``module`` the shapes and sizes of ``structure``, in place.

    Parameters keep their identity (an optimizer still knows them) but lose their values where the shape
    changes: load weights afterwards. What ``structure`` does not name stays.

    Raises:
        ValueError: If it names a tensor, layer or attribute that the module does not have.
    """
    tensors, children = named_tensors(module), dict(module.named_modules())
    for name, values in structure.sizes.items():
        for key, value in values.items():
            if name not in children or not _is_size(children[name].__dict__.get(key)) or not _is_size(value):
                raise ValueError(f"the module has no size {name}.{key} to set to {value!r}")
    for name, shape in structure.shapes.items():
        if name not in tensors:
            raise ValueError(f"the module has no tensor {name} to bring to the shape {shape}")
    for name, shape in structure.shapes.items():
        if list(tensors[name].shape) != shape:
            tensors[name].grad = None
            tensors[name].data = tensors[name].new_zeros(shape)
    set_sizes(module, structure.sizes)


def set_sizes(module: nn.Module, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the size attributes of the submodules, by name."""
    children = dict(module.named_modules())
    for name, values in sizes.items():
        for key, value in values.items():
            setattr(children[name], key, tuple(value) if isinstance(value, list) else value)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; one that is shared has its first name only."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in module.__dict__.items()
        if not key.startswith("_") and _is_size(value)
    }


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(_is_size(item) for item in value)
    return isinstance(value, int) and not isinstance(value, (bool, torch.SymInt))
