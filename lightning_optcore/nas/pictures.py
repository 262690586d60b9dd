"""What an architecture looks like, as plain data for the report: cells by its labels, or the layers of its network.

The file is JSON of names and numbers. Whoever reads it needs no torch, and builds nothing from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.files import write_atomically
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.report.architectures import PICTURE_FILE, PICTURE_VERSION

# The operation of an edge that is not there.
_NO_EDGE = "none"
_OPERATION = re.compile(r"(.*?)op_(\d+)(_\d+)?")
_EDGE = re.compile(r"(.*/)?(\d+)_(\d+)")
# By name, as a layer of another kind may be a convolution inside.
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "convolution": (nn.modules.conv._ConvNd,),
    "linear": (nn.Linear, nn.Bilinear),
    "attention": (nn.MultiheadAttention,),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
}

# A node's sources, its operation, and the labels that say so.
_Branch = tuple[list[int], str, list[str]]


def save_picture(directory: Path, cells: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> Path:
    """Write the picture of a trial's architecture into its folder.

    Args:
        directory: The folder.
        cells: Of :func:`cells_of`; where there are any, they are what is shown.
        layers: Of :func:`layers_of`.

    Raises:
        OSError: If it cannot be written; nothing is left half-written.
    """
    content = {"version": PICTURE_VERSION, "cells": list(cells), "layers": list(layers)}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / PICTURE_FILE, json.dumps(content) + "\n")
    return directory / PICTURE_FILE


def cells_of(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells that the labels of an architecture describe; none if they describe no cell.

    Two ways to name one are known: ``op_2`` and ``input_2``, or ``op_2_0`` and ``input_2_0`` for several operations of
    a node, as ``nas.spaces.cnn_cell`` and the cells of NNI do; and ``0_1``, ``0_2`` and so on for an operation between
    each two nodes, as NAS-Bench-201 does. The cell's own name may stand before them.

    Args:
        chosen: The value of every label, :meth:`~lightning_optcore.nas.ArchitectureSpace.chosen`.

    Returns:
        Of each cell its ``name``, ``nodes``, ``edges`` (numbers of source and target, operation) and ``labels``.

    Example:
        >>> (cell,) = cells_of({"width": 8, "op_1": "conv3", "op_2": "pool", "input_2": [0]})
        >>> cell["nodes"], cell["edges"]
        (['input', '1', '2'], [[0, 1, 'conv3'], [0, 2, 'pool']])
    """
    return _cells_of_nodes(chosen) or _cells_of_edges(chosen)


def layers_of(network: nn.Module, inputs: Any) -> list[dict[str, Any]]:
    """Return the layers with weights of a network in the order in which they are called.

    Args:
        network: It is left as it was.
        inputs: What ``forward`` takes; one sample of it is enough.

    Returns:
        Of each layer its ``name``, ``kind``, ``width`` (channels or features of its output) and ``size`` (of its output
        beyond these: height and width, or how many tokens).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> [(layer["kind"], layer["width"], layer["size"]) for layer in layers_of(network, torch.zeros(1, 1, 8, 8))]
        [('convolution', 8, [6, 6]), ('linear', 10, [])]
    """
    layers: list[dict[str, Any]] = []

    def seen(name: str, layer: nn.Module, output: Any) -> None:
        shape = next(tensors_in(output)).shape
        kind = _kind_of(layer)
        axis = 1 if "convolution" in kind or len(shape) == 4 else len(shape) - 1
        size = [int(side) for i, side in enumerate(shape) if i not in (0, axis)]
        layers.append({"name": name, "kind": kind, "width": int(shape[axis]), "size": size})

    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: seen(name, layer, output))
        for name, layer in network.named_modules()
        if any(isinstance(one, Tensor) and one.dim() > 1 for one in layer._parameters.values())
    ]
    training = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            Inputs.of(inputs).resized(1).call(network.eval())
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    return layers


def _kind_of(layer: nn.Module) -> str:
    kind = next((name for name, kinds in _KINDS.items() if isinstance(layer, kinds)), "other")
    groups = getattr(layer, "groups", 1)
    return "depthwise convolution" if kind == "convolution" and 1 < groups == layer.in_channels else kind


def _cells_of_nodes(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[int, list[_Branch]]] = {}
    for label, operation in chosen.items():
        match = _OPERATION.fullmatch(label)
        if match is None:
            continue
        name, node, branch = match[1], int(match[2]), match[3] or ""
        sources, source_label = [0], f"{name}input_{node}{branch}"
        known = source_label in chosen
        if known:
            value = chosen[source_label]
            sources = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        elif node != 1:
            return []
        if not all(isinstance(source, int) and 0 <= source < node for source in sources):
            return []
        labels = [label, source_label] if known else [label]
        found.setdefault(name, {}).setdefault(node, []).append((sources, str(operation), labels))
    cells = [_cell_of_nodes(name, nodes) for name, nodes in found.items()]
    return [cell for cell in cells if cell is not None] if None not in cells else []


def _cell_of_nodes(name: str, nodes: Mapping[int, Sequence[_Branch]]) -> dict[str, Any] | None:
    first, last = min(nodes), max(nodes)
    labels = [label for branches in nodes.values() for *_, own in branches for label in own]
    # Without a choice of inputs, or a node between, these are choices of another sense.
    if len(nodes) != last - first + 1 or all(len(own) == 1 for branches in nodes.values() for *_, own in branches):
        return None
    inputs = ["input"] if first == 1 else [f"input {i + 1}" for i in range(first)]
    edges = [
        [source, node, operation]
        for node in sorted(nodes)
        for sources, operation, _ in nodes[node]
        for source in sources
        if operation != _NO_EDGE
    ]
    names = [*inputs, *(str(i + 1) for i in range(len(nodes)))]
    return {"name": name.strip("/"), "nodes": names, "edges": edges, "labels": labels}


def _cells_of_edges(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[tuple[int, int], str]] = {}
    for label, operation in chosen.items():
        match = _EDGE.fullmatch(label)
        if match is not None:
            found.setdefault(match[1] or "", {})[int(match[2]), int(match[3])] = str(operation)
    cells = []
    for name, pairs in found.items():
        last = max(target for _, target in pairs)
        if last < 2 or pairs.keys() != {(i, j) for j in range(last + 1) for i in range(j)}:
            return []
        edges = [[i, j, operation] for (i, j), operation in sorted(pairs.items()) if operation != _NO_EDGE]
        nodes = ["input", *map(str, range(1, last)), "output"]
        labels = [f"{name}{i}_{j}" for i, j in pairs]
        cells.append({"name": name.strip("/"), "nodes": nodes, "edges": edges, "labels": labels})
    return cells
