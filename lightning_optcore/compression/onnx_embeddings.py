"""Embeddings in 4 or 8 bits: half of a small transformer is its table of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.rounding import EMBEDDING_BLOCKS, SCALE_FACTORS, embedding_block

_SHORTEST_BLOCK = min(EMBEDDING_BLOCKS)


def embedding_nodes(model: OnnxModel) -> list[str]:
    """Return the names of the look-ups in tables that are large enough to be stored in 4 bits."""
    tables = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    return [
        node.name
        for node in model.proto.graph.node
        if node.op_type == "Gather" and node.input[0] in tables and _block_of(tables[node.input[0]]) is not None
    ]


def with_int4_embeddings(
    model: OnnxModel, nodes: Sequence[str] | None = None, *, standard_operators: bool = False
) -> OnnxModel:
    """Store the embeddings of a model in 4 bits, in blocks along a row, each with the scale of least squared error.

    Args:
        model: A model in floating point, or with other layers quantized.
        nodes: Names of the look-ups to change, out of :func:`embedding_nodes`; by default all.
        standard_operators: Unpack the rows that are asked for with operators of the ONNX standard, which every runtime
            has, and not with ONNX Runtime's own ``GatherBlockQuantized``. Blocks are half as long then, with scales
            in half precision, which ``GatherBlockQuantized`` takes for half-precision outputs only.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tables = {tensor.name: tensor for tensor in proto.graph.initializer}
    chosen = set(embedding_nodes(model) if nodes is None else nodes)
    look_up = _standard_look_up if standard_operators else _contributed_look_up
    changed: list[onnx.NodeProto] = []
    added: dict[str, TensorProto] = {}
    for node in proto.graph.node:
        if node.name not in chosen:
            changed.append(node)
            continue
        table = tables[node.input[0]]
        block = _block_of(table)
        assert block is not None
        nodes_of_look_up, tensors = look_up(node, table, block)
        changed += nodes_of_look_up
        added |= {tensor.name: tensor for tensor in tensors}
    proto.graph.initializer.extend(added.values())
    del proto.graph.node[:]
    proto.graph.node.extend(changed)
    if not standard_operators and not any(opset.domain == "com.microsoft" for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    _drop_unused_tables(proto.graph)
    return OnnxModel(proto.SerializeToString(), model.signature, runtime=model.runtime)


def _contributed_look_up(
    node: onnx.NodeProto, table: TensorProto, block: int
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    numbers, scales = _rounded(numpy_helper.to_array(table), block)
    packed = TensorProto(name=f"{table.name}_int4", data_type=TensorProto.INT4, dims=numbers.shape)
    packed.raw_data = _packed(numbers)
    scale = numpy_helper.from_array(scales, f"{table.name}_int4_scale")
    attributes: dict[str, Any] = {"block_size": block, "gather_axis": 0, "quantize_axis": 1, "bits": 4}
    inputs = [packed.name, node.input[1], scale.name]
    made = helper.make_node(
        "GatherBlockQuantized", inputs, list(node.output), name=node.name, domain="com.microsoft", **attributes
    )
    return [made], [packed, scale]


def _standard_look_up(
    node: onnx.NodeProto, table: TensorProto, block: int
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    if block > _SHORTEST_BLOCK:
        block //= 2
    numbers, scales = _rounded(numpy_helper.to_array(table), block, np.float16)
    columns = numbers.shape[1]
    # A byte holds the numbers of two columns half a row apart, so that a row is put together by one concatenation.
    halves = (numbers + 8).astype(np.uint8)
    constants = {
        "int4": halves[:, : columns // 2] | (halves[:, columns // 2 :] << 4),
        "int4_scale": scales[..., None],
        "int4_low": np.array(0x0F, np.uint8),
        "int4_high": np.array(0xF0, np.uint8),
        "int4_sixteenth": np.array(1 / 16, np.float32),
        "int4_zero": np.array(8, np.float32),
        "int4_blocks": np.array([-1, columns // block, block]),
        "int4_columns": np.array([columns]),
        "int4_flat": np.array([-1]),
    }
    tensors = {key: numpy_helper.from_array(value, f"{table.name}_{key}") for key, value in constants.items()}
    made: list[onnx.NodeProto] = []

    def step(operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        label = f"{node.name}_{operator.lower()}_{len(made)}"
        names = [tensors[name].name if name in tensors else name for name in inputs]
        made.append(helper.make_node(operator, names, [output or label], name=label, **attributes))
        return output or label

    indices = step("Reshape", node.input[1], "int4_flat")
    pairs = step("Gather", "int4", indices)
    low = step("Cast", step("BitwiseAnd", pairs, "int4_low"), to=TensorProto.FLOAT)
    high = step("Cast", step("BitwiseAnd", pairs, "int4_high"), to=TensorProto.FLOAT)
    # No BitShift: OpenVINO divides by 16 instead, and rounds up where it computes in 8 bits.
    row = step("Concat", low, step("Mul", high, "int4_sixteenth"), axis=-1)
    row = step("Reshape", step("Sub", row, "int4_zero"), "int4_blocks")
    scale = step("Cast", step("Gather", "int4_scale", indices), to=TensorProto.FLOAT)
    row = step("Mul", row, scale)
    shape = step("Concat", step("Shape", node.input[1]), "int4_columns", axis=0)
    step("Reshape", row, shape, output=node.output[0])
    return made, list(tensors.values())


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
    _drop_unused_tables(proto.graph)
    return OnnxModel(proto.SerializeToString(), model.signature)


def _drop_unused_tables(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _block_of(table: TensorProto) -> int | None:
    if table.data_type != TensorProto.FLOAT or len(table.dims) != 2:
        return None
    return embedding_block(*table.dims)


def _rounded(
    table: np.ndarray, block: int, kept_as: type[np.floating[Any]] = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers from -8 to 7 and one scale per block, in fp32 where ``kept_as`` is too narrow for one."""
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
    limits = np.finfo(kept_as)
    if np.abs(best).min() < limits.tiny or np.abs(best).max() > limits.max:
        kept_as = np.float32
    best = best.astype(kept_as)
    numbers = np.clip(np.round(blocks / best.astype(np.float32)), -8, 7).astype(np.int8).reshape(rows, columns)
    return numbers, best[..., 0]


def _packed(numbers: np.ndarray) -> bytes:
    pairs = (numbers.reshape(-1, 2) & 0xF).astype(np.uint8)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).astype(np.uint8).tobytes()
