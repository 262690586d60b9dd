"""Smoothing of activations before they are rounded: difficult channels lend their range to the weights.

Xiao et al., "SmoothQuant", ICML 2023 (arXiv:2211.10438), equation 4, for the layers where it is nearly free: wide ones
behind a normalisation, as the first layer of a transformer's feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_optcore.compression.onnx_model import OnnxModel, new_session
from lightning_optcore.measurement.inputs import Inputs

_ALPHA = 0.6
# One multiplication per input is cheap where it serves many outputs.
_WIDENING = 2


def smoothed(model: OnnxModel, calibration: Sequence[Inputs]) -> OnnxModel:
    """Return the model with one multiplication before each wide layer behind a normalisation, and weights to match.

    In floating point it computes the same.

    Args:
        model: A model in floating point.
        calibration: Batches that show the range of each channel.
    """
    groups = _wide_readers_of_normalisations(model)
    if not groups:
        return model
    largest = _largest_by_channel(model, list(groups), calibration)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    scalings = {}
    for source, names in groups.items():
        readers = [node for node in proto.graph.node if node.name in names]
        arrays = {node.input[1]: numpy_helper.to_array(weights[node.input[1]]) for node in readers}
        height = np.maximum(np.max([np.abs(array).max(axis=1) for array in arrays.values()], axis=0), 1e-6)
        scale = np.maximum(largest[source], 1e-6) ** _ALPHA / height ** (1 - _ALPHA)
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        for name, array in arrays.items():
            weights[name].CopyFrom(numpy_helper.from_array((array * scale[:, None]).astype(np.float32), name))
        proto.graph.initializer.append(numpy_helper.from_array(1 / scale, f"{source}_smoothing"))
        for node in readers:
            node.input[0] = f"{source}_smoothed"
        scalings[source] = helper.make_node(
            "Mul", [source, f"{source}_smoothing"], [f"{source}_smoothed"], name=f"{source}_smooth"
        )
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        nodes += [scalings[output] for output in node.output if output in scalings]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return OnnxModel(proto.SerializeToString(), model.signature)


def _wide_readers_of_normalisations(model: OnnxModel) -> dict[str, list[str]]:
    graph = model.proto.graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    normalised = {node.output[0] for node in graph.node if node.op_type == "LayerNormalization"}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    groups: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[0] not in normalised or uses[node.input[1]] > 1:
            continue
        shape = shapes.get(node.input[1])
        if shape is not None and len(shape) == 2 and shape[1] >= _WIDENING * shape[0]:
            groups.setdefault(node.input[0], []).append(node.name)
    return groups


def _largest_by_channel(
    model: OnnxModel, tensors: Sequence[str], calibration: Sequence[Inputs]
) -> dict[str, np.ndarray]:
    watched = onnx.ModelProto()
    watched.CopyFrom(model.proto)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    session = new_session(watched.SerializeToString(), 1)
    largest = {name: np.float32(0) for name in tensors}
    for batch in calibration:
        values = session.run(list(tensors), model.feeds(batch))
        for name, value in zip(tensors, values, strict=True):
            largest[name] = np.maximum(largest[name], np.abs(value).reshape(-1, value.shape[-1]).max(axis=0))
    return {name: np.asarray(value) for name, value in largest.items()}
