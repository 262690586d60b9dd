"""What a network costs as a function of how many units each channel group keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_optcore.compression.channel_groups import ChannelGroups, traceable
from lightning_optcore.compression.layer_latency import LayerLatency, LayerShape, layer_shapes
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.modes import evaluating

Kept = Mapping[str, int]


class ChannelCosts:
    """Parameters, FLOPs and latency of a network by the units that its groups keep.

    Args:
        module: The network, whole.
        example_inputs: What ``forward`` takes.
        found: Its groups.
        latency: Times single layers; ``None`` where latency does not matter.
    """

    def __init__(
        self, module: nn.Module, example_inputs: Any, found: ChannelGroups, latency: LayerLatency | None = None
    ) -> None:
        self._units = {name: group.units for name, group in found.groups.items()}
        self._shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        self._users: dict[str, dict[int, dict[str, float]]] = {}
        for name, group in found.groups.items():
            for member in group.members:
                per_unit = len(member.index) / group.units
                axes = self._users.setdefault(member.tensor, {})
                axes.setdefault(member.axis, {})[name] = axes.get(member.axis, {}).get(name, 0.0) + per_unit
        inputs = Inputs.of(example_inputs)
        self._flops, self._fixed_flops = _flops_by_tensor(module, inputs.resized(1))
        self._latency = latency
        self._layers = layer_shapes(module, inputs) if latency is not None else {}
        self._layers_of = {
            group: [layer for layer in self._layers if group in self._groups_of(f"{layer}.weight")]
            for group in self._units
        }

    @property
    def timed(self) -> bool:
        """Whether layers are timed."""
        return self._latency is not None

    @property
    def whole(self) -> dict[str, int]:
        """Units of the whole network."""
        return dict(self._units)

    def params(self, kept: Kept) -> float:
        """Return the number of parameters."""
        return sum(_product(self._size(name, kept)) for name in self._shapes)

    def flops(self, kept: Kept) -> float:
        """Return the FLOPs of one sample."""
        return self._fixed_flops + sum(
            flops * _product(self._size(name, kept)) / _product(self._shapes[name])
            for name, flops in self._flops.items()
        )

    def latency(self, kept: Kept) -> float:
        """Return the summed latency of the layers, in ms."""
        return sum(self._layer(layer, kept) for layer in self._layers)

    def latency_of(self, group: str, kept: Kept) -> float:
        """Return the latency, in ms, of the layers whose size depends on a group."""
        return sum(self._layer(layer, kept) for layer in self._layers_of[group])

    def shares(self, kept: Kept) -> list[tuple[str, float]]:
        """Return the layers by their share of the FLOPs, the largest first."""
        whole = self.flops(kept) or 1.0
        parts = {
            name.rpartition(".")[0]: flops * _product(self._size(name, kept)) / _product(self._shapes[name]) / whole
            for name, flops in self._flops.items()
        }
        return sorted(parts.items(), key=lambda part: part[1], reverse=True)

    def _groups_of(self, tensor: str) -> set[str]:
        return {group for axis in self._users.get(tensor, {}).values() for group in axis}

    def _size(self, tensor: str, kept: Kept) -> list[float]:
        size = [float(n) for n in self._shapes[tensor]]
        for axis, groups in self._users.get(tensor, {}).items():
            size[axis] -= sum(per_unit * (self._units[g] - kept[g]) for g, per_unit in groups.items())
        return size

    def _layer(self, layer: str, kept: Kept) -> float:
        assert self._latency is not None
        shape: LayerShape = self._layers[layer]
        return self._latency(shape.resized([round(n) for n in self._size(f"{layer}.weight", kept)]))


def _flops_by_tensor(module: nn.Module, sample: Inputs) -> tuple[dict[str, float], float]:
    """Return the FLOPs that each weight takes part in, and those that belong to none."""
    with evaluating(module), traceable(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        sample.call(module)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(module).__name__
    flops: dict[str, float] = {}
    for name, child in module.named_modules():
        own = counts.get(f"{root}.{name}" if name else root, 0)
        matrices = {f"{name}.{key}" if name else key: p for key, p in child.named_parameters() if p.dim() > 1}
        leaf = isinstance(child, nn.MultiheadAttention) or not list(child.children())
        inside = any(isinstance(module.get_submodule(above), nn.MultiheadAttention) for above in _above(name))
        if own and leaf and matrices and not inside:
            whole = sum(p.numel() for p in matrices.values())
            flops.update({key: own * p.numel() / whole for key, p in matrices.items()})
    return flops, max(0.0, float(counter.get_total_flops()) - sum(flops.values()))


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _product(sizes: list[Any]) -> float:
    result = 1.0
    for size in sizes:
        result *= size
    return result
