"""The ONNX form of a module that was trained with 8-bit numbers: its ranges are those that the training found.

Layers with weights are quantized, and between convolutions what ONNX Runtime has integer kernels for, so that the
numbers stay integers there. What linear layers return stays in floating point unless another layer reads it: that is
how the training computed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
from torch import Tensor, nn

from lightning_optcore.compression import onnx_quantization
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.fake_quantization import layer_inputs
from lightning_optcore.compression.onnx_embeddings import with_int8_embeddings
from lightning_optcore.compression.onnx_model import OnnxModel, Signature
from lightning_optcore.measurement.forward_calls import replaced_forward
from lightning_optcore.measurement.inputs import Inputs

Range = tuple[float, float]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Between convolutions these compute with integers.
_BETWEEN = ("Add", "Clip", "Concat", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Relu", "Sigmoid")
# These only move numbers, so that the range of what goes in is that of what comes out.
_MOVING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
# ONNX Runtime's quantizer would give the output the range of the input; its neighbours round it better.
_LEFT_TO_NEIGHBOURS = ("AveragePool",)


@dataclass(frozen=True)
class RangedModel:
    """An ONNX model in floating point, ready to be quantized.

    Args:
        model: The model, batch norms folded into convolutions.
        ranges: Smallest and largest value of tensors, by their names.
    """

    model: OnnxModel
    ranges: dict[str, Range]


def export_with_ranges(module: nn.Module, inputs: Inputs, ranges: Mapping[str, Sequence[Range]]) -> RangedModel:
    """Export a module and find out which tensors of the graph its layers read.

    Args:
        module: A module in floating point.
        inputs: What its ``forward`` takes.
        ranges: By layer, the range of each of its inputs.

    Raises:
        ExportError: If the module cannot be exported.
        QuantizationError: If ONNX Runtime does not take the graph.
    """
    read: list[Range] = []
    with replaced_forward(module, _returning_inputs(module, ranges, read)):
        exported = export_onnx(module, inputs)
    watched = [spec.name for spec in exported.signature.output["read"]]
    signature = Signature(exported.signature.inputs, exported.signature.output["output"], exported.signature.batch_size)
    proto = onnx.ModelProto()
    proto.CopyFrom(onnx_quantization.prepared(exported).proto)
    known = _spread(proto.graph, dict(zip(watched, read, strict=True)))
    _remove_outputs(proto.graph, watched)
    present = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    return RangedModel(
        OnnxModel(proto.SerializeToString(), signature), {name: known[name] for name in known if name in present}
    )


def _returning_inputs(
    module: nn.Module, ranges: Mapping[str, Sequence[Range]], read: list[Range]
) -> Callable[..., dict[str, Any]]:
    """Return a forward that also returns the tensors that the layers read, whose ranges are appended to ``read``."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> dict[str, Any]:
        seen: dict[int, tuple[Tensor, Range]] = {}
        with _reading(module, ranges, seen):
            output = original(*args, **kwargs)
        read[:] = [found for _, found in seen.values()]
        return {"output": output, "read": [tensor for tensor, _ in seen.values()]}

    return forward


@contextmanager
def _reading(
    module: nn.Module, ranges: Mapping[str, Sequence[Range]], seen: dict[int, tuple[Tensor, Range]]
) -> Iterator[None]:
    def watch(bounds: Sequence[Range]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value, (low, high) in zip(layer_inputs(layer, args, kwargs), bounds, strict=True):
                if low < high:
                    _, (least, most) = seen.get(id(value), (value, (low, high)))
                    seen[id(value)] = (value, (min(low, least), max(high, most)))

        return hook

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(watch(bounds), with_kwargs=True)
        for name, bounds in ranges.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _remove_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Take outputs away from a graph, and the copies that were made for them alone."""
    kept = [output for output in graph.output if output.name not in set(names)]
    read = {output.name for output in kept} | {name for node in graph.node for name in node.input}
    nodes = [node for node in graph.node if node.op_type != "Identity" or node.output[0] in read]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.extend(kept)


def quantized_with_ranges(ranged: RangedModel, calibration: Sequence[Inputs], *, reduce_range: bool) -> OnnxModel:
    """Quantize to 8 bits with the known ranges.

    Args:
        ranged: What :func:`export_with_ranges` returned.
        calibration: Batches that show the ranges of the other tensors (sums and pooled maps between convolutions).
        reduce_range: Weights take 7 of 8 bits.

    Raises:
        QuantizationError: If ONNX Runtime does not take the graph.
    """
    model = with_int8_embeddings(ranged.model)
    nodes = _integer_nodes(model.proto.graph)
    if not nodes:
        return model
    widths = onnx_quantization.Widths(reduce_range=reduce_range)
    return onnx_quantization.quantized(model, "static", calibration, only=nodes, widths=widths, ranges=ranged.ranges)


def _spread(graph: onnx.GraphProto, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Give what only moves numbers the ranges of what it moves, in both directions."""
    known = dict(ranges)
    readers = Counter(name for node in graph.node for name in node.input)
    constants = {tensor.name for tensor in graph.initializer}
    for node in reversed(graph.node):
        # The largest value of a pooled map is that of the map.
        pooled = node.op_type == "MaxPool" and readers[node.input[0]] == 1
        if (node.op_type in _MOVING or pooled) and node.output[0] in known and node.input[0] not in constants:
            known.setdefault(node.input[0], known[node.output[0]])
    for node in graph.node:
        if node.op_type in _MOVING and node.input[0] in known:
            known.setdefault(node.output[0], known[node.input[0]])
    return known


def _integer_nodes(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the layers with weights, and of what keeps integers between convolutions."""
    constants = {tensor.name for tensor in graph.initializer}
    integers: set[str] = set()
    chosen = []
    for node in graph.node:
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            chosen.append(node.name)
            if node.op_type.startswith("Conv"):
                integers.update(node.output)
            continue
        moved = [name for name in node.input if name and name not in constants]
        if node.op_type not in (*_BETWEEN, *_MOVING, *_LEFT_TO_NEIGHBOURS) or not moved:
            continue
        data = moved[:1] if node.op_type in _MOVING else moved
        if all(name in integers for name in data):
            integers.update(node.output)
            if node.op_type not in _LEFT_TO_NEIGHBOURS:
                chosen.append(node.name)
    return chosen
