"""What each layer of a network can become, and how many bytes that takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import numpy as np
from onnx import numpy_helper
from torch import nn

from lightning_optcore.compression.channel_choice import fewest_units
from lightning_optcore.compression.channel_groups import ChannelGroups, apply_cut, plan_cut
from lightning_optcore.compression.onnx_layerwise import forms_of
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import Scheme
from lightning_optcore.compression.reconstruction import compensate
from lightning_optcore.compression.structure import Structure
from lightning_optcore.measurement.inputs import Inputs

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_BLOCK = 32
_PACKED_TABLE_BLOCKS = (64, 32, 16)
# Folding a batch norm scales an output channel; more than that is another weight.
_SAME = 1e-4


@dataclass(frozen=True)
class Option:
    """What a layer can become.

    Args:
        form: ``"fp32"``, ``"int8"`` or ``"int4"``.
        units: How many units of its channel group stay; ``None`` leaves it as wide as it is.
        ranks: Of the thin layers that take its place; empty leaves it whole.
    """

    form: str
    units: int | None = None
    ranks: tuple[int, ...] = ()

    @property
    def whole(self) -> Option:
        """The same form with all channels, in one piece."""
        return Option(self.form)

    def __str__(self) -> str:
        if self.ranks:
            return f"{self.form}, rank {' x '.join(map(str, self.ranks))}"
        return self.form if self.units is None else f"{self.form}, {self.units} units"


@dataclass(frozen=True)
class Layer:
    """A layer with weights, as it stands in the module and in the graph.

    Args:
        name: Of the module, or of the graph's weight where no module has it.
        nodes: Names of the nodes that read the weight.
        weight: Shape of the weight: outputs, inputs, kernel; rows and columns of a table.
        options: What it can become.
        is_table: Whether rows are looked up in it.
        group: Name of the channel group that it alone makes, if widths are chosen for it.
        group_units: Units of that group.
        reads: By channel group, how many of its inputs belong to one unit.
    """

    name: str
    nodes: tuple[str, ...]
    weight: tuple[int, ...]
    options: tuple[Option, ...]
    is_table: bool = False
    group: str | None = None
    group_units: int = 0
    reads: Mapping[str, float] = field(default_factory=dict)

    def resized(self, option: Option, inputs_removed: float = 0.0) -> tuple[int, ...]:
        """Return the weight's shape with an option's units, and with some inputs fewer."""
        outputs, inputs, *rest = self.weight
        if option.units is not None:
            outputs = outputs * option.units // self.group_units
        return (outputs, round(inputs - inputs_removed), *rest)

    def stored_bytes(self, option: Option, scheme: Scheme, inputs_removed: float = 0.0) -> int:
        """Return the bytes of its weights with an option, and with some inputs fewer."""
        *before, last = _parts(self.resized(option, inputs_removed), option.ranks)
        first = sum(stored_bytes(shape, option.form, scheme, has_bias=False) for shape in before)
        return first + stored_bytes(last, option.form, scheme, self.is_table)


def find_layers(
    module: nn.Module,
    model: OnnxModel,
    scheme: Scheme,
    found: ChannelGroups,
    widths: Sequence[float],
    ranks: Mapping[str, Sequence[tuple[int, ...]]],
) -> list[Layer]:
    """Return the layers of a graph with the options of each.

    A width is an option where one layer alone makes the channels: the ends of a shortcut have to agree.

    Args:
        module: The module that was exported.
        model: Its prepared graph.
        scheme: How int8 activations get their ranges.
        found: Channel groups of the module.
        widths: Fractions of the units to offer, beside all of them.
        ranks: By the name of the layer, the ranks to offer.
    """
    forms = forms_of(model, scheme)
    makers: dict[str, list[str]] = {}
    reads: dict[str, dict[str, float]] = {}
    for channels in found.groups.values():
        for member in channels.members:
            layer, _, tensor = member.tensor.rpartition(".")
            if tensor != "weight" or not isinstance(module.get_submodule(layer), _WEIGHTED):
                continue
            if member.axis == 0:
                makers.setdefault(channels.name, []).append(layer)
            else:
                reads.setdefault(layer, {})[channels.name] = len(member.index) / channels.units
    alone = {names[0]: group for group, names in makers.items() if len(set(names)) == 1}
    layers = []
    for name, nodes in named_nodes(model, module, list(forms)).items():
        node_forms = forms[nodes[0]]
        options = [Option(form) for form in node_forms]
        options += [Option("int8", ranks=one) for one in ranks.get(name, ()) if "int8" in node_forms]
        group = alone.get(name)
        # Attention heads have shapes of their own.
        if group is not None and found.groups[group].heads_of is None:
            units = found.groups[group].units
            kept = sorted({max(fewest_units(units), round(units * width)) for width in widths}, reverse=True)
            options += [Option(form, k) for form in node_forms if form != "fp32" for k in kept if k < units]
        weight, is_table = _weight_of(model, nodes[0])
        layers.append(
            Layer(
                name,
                tuple(nodes),
                weight.shape,
                tuple(options),
                is_table,
                group if any(option.units is not None for option in options) else None,
                found.groups[group].units if group is not None else 0,
                reads.get(name, {}),
            )
        )
    return layers


def _parts(shape: tuple[int, ...], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shapes of the thin layers in the place of one."""
    if not ranks:
        return [shape]
    outputs, inputs, *kernel = shape
    ones = [1] * len(kernel)
    last = (outputs, ranks[-1], *ones)
    if len(ranks) == 1:
        return [(ranks[0], inputs, *kernel), last]
    return [(ranks[0], inputs, *ones), (ranks[1], ranks[0], *kernel), last]


def stored_bytes(shape: Sequence[int], form: str, scheme: Scheme, is_table: bool = False, has_bias: bool = True) -> int:
    """Return the bytes of a layer's weights with what belongs to them: scales, zero points and the bias.

    Args:
        shape: Of the weight: outputs, inputs, kernel.
        form: ``"fp32"``, ``"int8"`` or ``"int4"``.
        scheme: How int8 activations get their ranges.
        is_table: Whether rows are looked up in it.
        has_bias: Whether it has a bias.

    Example:
        >>> stored_bytes((10, 64), "fp32", "dynamic"), stored_bytes((10, 64), "int4", "dynamic")
        (2600, 440)
    """
    outputs, count = shape[0], prod(shape)
    if is_table:
        if form == "int4":
            block = next(size for size in _PACKED_TABLE_BLOCKS if shape[1] % size == 0)
            return count // 2 + 4 * count // block
        return count + 5 if form == "int8" else 4 * count
    if form == "int4":
        blocks = ceil(shape[1] / _BLOCK)
        return outputs * blocks * (_BLOCK // 2 + 4) + 4 * outputs * has_bias
    if form == "int8":
        # Scale and zero point of each output; a static bias is a whole number with a scale and zero point, too.
        return count + 5 * outputs + (12 if scheme == "static" else 4) * outputs * has_bias
    return 4 * count + 4 * outputs * has_bias


def narrowed(
    module: nn.Module, inputs: Inputs, removed: Mapping[str, Sequence[int]], found: ChannelGroups
) -> Structure:
    """Remove units of channel groups in place; those that stay make up for them. Return what changed."""
    before = Structure.of(module)
    cut = plan_cut(module, inputs, removed, found)
    compensate(module, inputs, removed, found)
    apply_cut(module, cut)
    return before.changed_to(Structure.of(module)).only(cut.change.sizes)


def named_nodes(model: OnnxModel, module: nn.Module, nodes: Sequence[str]) -> dict[str, list[str]]:
    """Return the nodes of every layer, by the name of the module that has the weight.

    A weight is recognised by its values, up to a factor for each output (a batch norm that was folded). One that no
    module has, e.g. a part of fused attention, is named by what it holds, which is the same in another export.
    """
    theirs = [
        (name, _canonical(child.weight.detach().cpu().numpy(), table=isinstance(child, nn.Embedding)))
        for name, child in module.named_modules()
        if isinstance(child, (*_WEIGHTED, nn.Embedding))
    ]
    by_weight: dict[str, list[str]] = {}
    for node in model.proto.graph.node:
        if node.name in nodes:
            by_weight.setdefault(node.input[0 if node.op_type == "Gather" else 1], []).append(node.name)
    found: dict[str, list[str]] = {}
    for members in by_weight.values():
        weight, is_table = _weight_of(model, members[0])
        mine = _canonical(weight, table=is_table)
        name = next((name for name, other in theirs if name not in found and _same(mine, other)), None)
        if name is None:
            digest = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()[:12]
            name = f"weight {digest}"
        found.setdefault(name, []).extend(members)
    return found


def _weight_of(model: OnnxModel, node_name: str) -> tuple[np.ndarray, bool]:
    """Return a node's weight with its outputs first, and whether it is a table."""
    node: Any = next(one for one in model.proto.graph.node if one.name == node_name)
    is_table = node.op_type == "Gather"
    name = node.input[0 if is_table else 1]
    tensor = next(one for one in model.proto.graph.initializer if one.name == name)
    array = numpy_helper.to_array(tensor)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    if array.ndim == 2 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed)):
        array = array.T
    return array, is_table


def _canonical(weight: np.ndarray, table: bool) -> np.ndarray:
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    if table:
        return rows
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return rows * np.where(largest < 0, -1.0, 1.0)


def _same(mine: np.ndarray, other: np.ndarray) -> bool:
    return mine.shape == other.shape and bool(np.abs(mine - other).max(initial=0.0) < _SAME)
