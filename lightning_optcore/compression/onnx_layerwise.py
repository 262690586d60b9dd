"""An ONNX model whose layers are stored in forms of their own: fp32, int8 or int4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_optcore.compression.onnx_embeddings import embedding_nodes, with_int4_embeddings
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import Scheme, Widths, quantizable_nodes, quantized
from lightning_optcore.compression.onnx_weight_only import with_int4_weights
from lightning_optcore.measurement.inputs import Inputs

FORMS = ("fp32", "int8", "int4")
# A block of the packed product holds so many inputs: fewer would be padding.
_FEWEST_INPUTS = 32


def forms_of(model: OnnxModel, scheme: Scheme) -> dict[str, tuple[str, ...]]:
    """Return the forms that each layer with weights can take, by the name of its node.

    int4 is for linear layers and for tables of at least 256 rows: ONNX Runtime packs nothing else.

    Args:
        model: A prepared model in floating point.
        scheme: How int8 activations get their ranges.
    """
    tables = set(embedding_nodes(model))
    shapes = {tensor.name: tensor.dims for tensor in model.proto.graph.initializer}
    found: dict[str, tuple[str, ...]] = {}
    int8 = set(quantizable_nodes(model, scheme)) | tables
    for node in model.proto.graph.node:
        if node.name not in int8:
            continue
        linear = node.op_type in ("Gemm", "MatMul") and len(node.input) > 1 and len(shapes.get(node.input[1], ())) == 2
        # The axis of a Gemm's inputs depends on an attribute; the shorter one is safe.
        packs = node.name in tables or (
            linear and min(shapes[node.input[1]]) >= 1 and _inputs(node, shapes) >= _FEWEST_INPUTS
        )
        found[node.name] = FORMS if packs else FORMS[:2]
    return found


def with_forms(
    model: OnnxModel,
    forms: Mapping[str, str],
    calibration: Sequence[Inputs],
    scheme: Scheme,
    *,
    reduce_range: bool = True,
) -> OnnxModel:
    """Return a model whose layers are stored as asked.

    Args:
        model: A prepared model in floating point.
        forms: By the name of its node, the form of every layer of :func:`forms_of`.
        calibration: Batches that give the ranges of int8 activations.
        scheme: How int8 activations get their ranges.
        reduce_range: As in :class:`~lightning_optcore.compression.onnx_quantization.Widths`.

    Raises:
        QuantizationError: If ONNX Runtime does not take the graph.
    """
    tables = set(embedding_nodes(model))
    int4 = {name for name, form in forms.items() if form == "int4"}
    packed = int4 - tables
    if packed:
        linear = [node.name for node in model.proto.graph.node if node.op_type in ("Gemm", "MatMul")]
        model = with_int4_weights(model, [name for name in linear if name not in packed])
    if any(form == "int8" for form in forms.values()):
        others = [name for name, form in forms.items() if form == "fp32"] + sorted(int4)
        # What was packed has no such node any more.
        there = {node.name for node in model.proto.graph.node}
        excluded = [name for name in others if name in there]
        model = quantized(model, scheme, calibration, excluded=excluded, widths=Widths(reduce_range=reduce_range))
    if int4 & tables:
        model = with_int4_embeddings(model, sorted(int4 & tables))
    return model


def _inputs(node: object, shapes: Mapping[str, Sequence[int]]) -> int:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)  # type: ignore[attr-defined]
    shape = shapes[node.input[1]]  # type: ignore[attr-defined]
    return shape[1] if transposed else shape[0]
