"""Embeddings in 4 or 8 bits: half of a small transformer is its table of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.rounding import SCALE_FACTORS, embedding_block


def embedding_nodes(model: OnnxModel) -> list[str]:
    """Return the names of the look-ups in tables that are large enough to be stored in 4 bits."""
    tables = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    return [
        node.name
        for node in model.proto.graph.node
        if node.op_type == "Gather" and node.input[0] in tables and _block_of(tables[node.input[0]]) is not None
    ]


def with_int4_embeddings(model: OnnxModel, nodes: Sequence[str] | None = None) -> OnnxModel:
    """Store the embeddings of a model in 4 bits, in blocks along a row, each with the scale of least squared error.

    The tables are looked up by ONNX Runtime's ``GatherBlockQuantized``, which unpacks the rows that are asked for.

    Args:
        model: A model in floating point, or with other layers quantized.
        nodes: Names of the look-ups to change, out of :func:`embedding_nodes`; by default all.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tables = {tensor.name: tensor for tensor in proto.graph.initializer}
    chosen = set(embedding_nodes(model) if nodes is None else nodes)
    changed = []
    for node in proto.graph.node:
        if node.name not in chosen:
            changed.append(node)
            continue
        name = node.input[0]
        block = _block_of(tables[name])
        assert block is not None
        if f"{name}_int4" not in {tensor.name for tensor in proto.graph.initializer}:
            numbers, scales = _rounded(numpy_helper.to_array(tables[name]), block)
            packed = TensorProto(name=f"{name}_int4", data_type=TensorProto.INT4, dims=numbers.shape)
            packed.raw_data = _packed(numbers)
            proto.graph.initializer.extend([packed, numpy_helper.from_array(scales, f"{name}_int4_scale")])
        attributes: dict[str, Any] = {"block_size": block, "gather_axis": 0, "quantize_axis": 1, "bits": 4}
        changed.append(
            helper.make_node(
                "GatherBlockQuantized",
                [f"{name}_int4", node.input[1], f"{name}_int4_scale"],
                list(node.output),
                name=node.name,
                domain="com.microsoft",
                **attributes,
            )
        )
    del proto.graph.node[:]
    proto.graph.node.extend(changed)
    if not any(opset.domain == "com.microsoft" for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return OnnxModel(proto.SerializeToString(), model.signature)


def with_int8_embeddings(model: OnnxModel) -> OnnxModel:
    """Store the embeddings of a model in 8 bits, each row with a scale of its own.

    ONNX Runtime's own form has one scale for a whole table.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tables = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        along_rows = not any(attribute.name == "axis" and attribute.i != 0 for attribute in node.attribute)
        if table is None or table.data_type != TensorProto.FLOAT or len(table.dims) != 2 or not along_rows:
            nodes.append(node)
            continue
        numbers, scales = f"{table.name}_int8", f"{table.name}_int8_scale"
        if numbers not in tables:
            rows = numpy_helper.to_array(table)
            height = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
            scale = np.where(height > 0, height, 1).astype(np.float32)
            added = (
                numpy_helper.from_array(np.round(rows / scale).astype(np.int8), numbers),
                numpy_helper.from_array(scale, scales),
            )
            proto.graph.initializer.extend(added)
            tables |= {tensor.name: tensor for tensor in added}
        name, (output,) = node.name, node.output
        row, scale_of_row, number = f"{output}_row", f"{output}_row_scale", f"{output}_row_number"
        nodes += [
            helper.make_node("Gather", [numbers, node.input[1]], [row], name=f"{name}_row"),
            helper.make_node("Gather", [scales, node.input[1]], [scale_of_row], name=f"{name}_row_scale"),
            helper.make_node("Cast", [row], [number], name=f"{name}_row_number", to=TensorProto.FLOAT),
            helper.make_node("Mul", [number, scale_of_row], [output], name=name),
        ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return OnnxModel(proto.SerializeToString(), model.signature)


def _block_of(table: TensorProto) -> int | None:
    if table.data_type != TensorProto.FLOAT or len(table.dims) != 2:
        return None
    return embedding_block(*table.dims)


def _rounded(table: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers from -8 to 7 and one scale per block."""
    rows, columns = table.shape
    blocks = table.reshape(rows, columns // block, block).astype(np.float32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    least = np.full(largest.shape, np.inf, np.float32)
    best = np.ones_like(largest)
    for factor in SCALE_FACTORS:
        # The sign brings the largest value to -8, which reaches one step further than 7.
        scale = (-largest / 8 * factor).astype(np.float32)
        scale[scale == 0] = 1.0
        numbers = np.clip(np.round(blocks / scale), -8, 7)
        error = np.square(numbers * scale - blocks).sum(-1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    numbers = np.clip(np.round(blocks / best), -8, 7).astype(np.int8).reshape(rows, columns)
    return numbers, best[..., 0].astype(np.float32)


def _packed(numbers: np.ndarray) -> bytes:
    pairs = (numbers.reshape(-1, 2) & 0xF).astype(np.uint8)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).astype(np.uint8).tobytes()
