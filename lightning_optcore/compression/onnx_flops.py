"""Parameters and FLOPs of an ONNX graph, plain or quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import onnx
from onnx import shape_inference

_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_CONVOLUTIONS = {"Conv", "ConvInteger", "FusedConv"}
_PRODUCTS = {
    "MatMul",
    "MatMulInteger",
    "Gemm",
    "FusedMatMul",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
}
_WEIGHT_TYPES = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT4,
    onnx.TensorProto.UINT4,
    onnx.TensorProto.INT32,
}


def num_parameters(model: onnx.ModelProto) -> int:
    """Return the number of weights: initializers without shapes, scales and zero points."""
    skipped = {name for node in model.graph.node if node.op_type in _QUANTIZERS for name in list(node.input)[1:]}
    # Dynamic quantization hands scales and zero points to other nodes; its names are the convention.
    suffixes = ("_scale", "_zero_point", "_quantized_scale", "_int4_low", "_int4_high", "_int4_sixteenth", "_int4_zero")
    # Two weights of 4 bits share a byte, and scales follow as the next input.
    halves = {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}
    halves |= {
        node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[0].endswith("_int4")
    }
    blocks = ("MatMulNBits", "GatherBlockQuantized")
    skipped |= {name for node in model.graph.node if node.op_type in blocks for name in list(node.input)[2:]}
    return sum(
        prod(tensor.dims) * (2 if tensor.name in halves else 1)
        for tensor in model.graph.initializer
        if tensor.data_type in _WEIGHT_TYPES and tensor.name not in skipped and not tensor.name.endswith(suffixes)
    )


def count_flops(model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the FLOPs of convolutions and matrix products for inputs of the given shapes.

    A multiply-add is two operations, as in ``torch.utils.flop_counter``. Returns ``None`` if a shape
    cannot be inferred.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, input_shapes[value.name], strict=True):
            dim.Clear()
            dim.dim_value = size
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    del sized.graph.value_info[:]
    try:
        inferred = shape_inference.infer_shapes(sized, data_prop=True)
    except shape_inference.InferenceError:
        return None
    shapes = {tensor.name: list(tensor.dims) for tensor in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    total = 0
    for node in inferred.graph.node:
        if node.op_type not in _CONVOLUTIONS | _PRODUCTS:
            continue
        left, right, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
        if left is None or right is None or out is None:
            return None
        total += 2 * _multiply_adds(node, left, right, out)
    return total


def _multiply_adds(node: onnx.NodeProto, left: list[int], right: list[int], out: list[int]) -> int:
    if node.op_type in _CONVOLUTIONS:
        # The weight is (out channels, in channels / groups, *kernel).
        return prod(out) * prod(right[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return prod(out) * (left[0] if transposed else left[-1])
