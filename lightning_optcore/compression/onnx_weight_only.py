"""4-bit weights of linear layers, unpacked while they are multiplied; activations stay in floating point."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.rounding import BLOCK

# 4 multiplies in int8: 0 and 1 were measured to be four times slower.
_ACCURACY_LEVEL = 4


def with_int4_weights(model: OnnxModel, excluded: Sequence[str] = ()) -> OnnxModel:
    """Store the weights of the linear layers in 4 bits, in blocks of 32 along the inputs."""
    proto = _gemms_as_products(model.proto, excluded)
    settings = DefaultWeightOnlyQuantConfig(
        bits=4,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=_ACCURACY_LEVEL,
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=("MatMul",),
    )
    quantizer = MatMulNBitsQuantizer(proto, nodes_to_exclude=list(excluded), algo_config=settings)
    quantizer.process()
    return OnnxModel(quantizer.model.model.SerializeToString(), model.signature)


def _gemms_as_products(source: onnx.ModelProto, excluded: Sequence[str]) -> onnx.ModelProto:
    """Write a linear layer on a matrix (Gemm) as product and sum: only products have a 4-bit form."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA")
        if node.op_type != "Gemm" or node.name in excluded or node.input[1] not in weights or not plain:
            nodes.append(node)
            continue
        array = numpy_helper.to_array(weights[node.input[1]])
        name = f"{node.input[1]}_by_inputs"
        if name not in weights:
            matrix = numpy_helper.from_array(array.T.copy() if attributes.get("transB") else array, name)
            proto.graph.initializer.append(matrix)
            weights[name] = matrix
        has_bias = len(node.input) > 2
        product = f"{node.output[0]}_product" if has_bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], name=node.name))
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], list(node.output), name=f"{node.name}_bias"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto
