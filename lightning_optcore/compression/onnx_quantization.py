"""int8 quantization of an ONNX model with ONNX Runtime's quantizer."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from lightning_optcore.compression.export import stripped
from lightning_optcore.compression.onnx_embeddings import embedding_nodes, with_int4_embeddings
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_openvino import quantized_by_nncf
from lightning_optcore.compression.onnx_smoothing import smoothed
from lightning_optcore.compression.onnx_weight_only import with_int4_weights
from lightning_optcore.measurement.inputs import Inputs, tensors_in

Scheme = Literal["static", "dynamic"]

STATIC_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Dynamic int8 convolutions are slower than fp32 ones in ONNX Runtime: they stay as they are.
DYNAMIC_OPERATORS = ("Gather", "Gemm", "LSTM", "MatMul")
_THIN_CHANNELS = 4
_SMALL_TYPES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


class QuantizationError(RuntimeError):
    """A graph that ONNX Runtime's quantizer does not take; the message says why, in one line."""


class _Calibration(CalibrationDataReader):
    def __init__(self, model: OnnxModel, batches: Sequence[Inputs]) -> None:
        self._feeds = iter([model.feeds(batch) for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def prepared(model: OnnxModel) -> OnnxModel:
    """Fold and fuse what ONNX Runtime can before quantizing (batch norms into convolutions)."""
    with _workspace() as folder, _quiet(), _reported("preparation"):
        source, target = folder / "model.onnx", folder / "prepared.onnx"
        source.write_bytes(model.content)
        try:
            quant_pre_process(str(source), str(target))
        except Exception:
            quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        return OnnxModel(target.read_bytes(), model.signature)


@dataclass(frozen=True)
class Widths:
    """Into how many bits what goes.

    Args:
        weight_bits: 8; or 4 for the weights of linear layers, whose activations then stay in floating point.
        embedding_bits: 8 or 4.
        reduce_range: Use 7 of the 8 bits of a weight: x86 without VNNI adds two products of 8-bit numbers in 16 bits
            and saturates, and an artifact may run on another machine than the one that made it.
    """

    weight_bits: int = 8
    embedding_bits: int = 8
    reduce_range: bool = True


def quantized_for_openvino(
    model: OnnxModel, calibration: Sequence[Inputs], excluded: Sequence[str] = (), embedding_bits: int = 8
) -> OnnxModel:
    """Quantize a prepared model with NNCF, to be run by OpenVINO; arguments as in :func:`quantized`."""
    with _quiet(), _reported("NNCF"):
        tables = embedding_nodes(model) if embedding_bits == 4 else []
        made = quantized_by_nncf(model.proto, [model.feeds(batch) for batch in calibration], [*excluded, *tables])
        result = OnnxModel(stripped(made), model.signature, runtime="openvino")
        if tables:
            result = with_int4_embeddings(result, tables, standard_operators=True)
        return result


def quantized(
    model: OnnxModel,
    scheme: Scheme,
    calibration: Sequence[Inputs],
    *,
    excluded: Sequence[str] = (),
    only: Sequence[str] = (),
    widths: Widths | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> OnnxModel:
    """Quantize weights and activations of a prepared model.

    Args:
        model: What :func:`prepared` returned.
        scheme: ``"static"`` writes quantize/dequantize pairs with ranges from ``calibration`` (min and
            max); ``"dynamic"`` takes the ranges of activations at run time, of smoothed ones where that is nearly free.
        calibration: Batches.
        excluded: Names of nodes that stay in fp32.
        only: Names of the nodes to quantize; empty means all.
        widths: Bits of weights and embeddings; 8 by default.
        ranges: Smallest and largest value of tensors that are known already, for ``"static"``. With them, a linear
            layer's output stays in floating point unless another layer reads it.
    """
    widths = widths or Widths()
    excluded = list(excluded)
    with _quiet(), _reported(scheme):
        small_tables = widths.embedding_bits == 4 and not only
        if small_tables:
            excluded += embedding_nodes(model)
        if widths.weight_bits == 4:
            model = with_int4_weights(model, excluded)
        elif scheme == "static":
            model = _static(model, calibration, excluded, only, widths.reduce_range, ranges)
        else:
            model = _dynamic(smoothed(model, calibration), excluded, only, widths.reduce_range)
        if small_tables:
            model = with_int4_embeddings(model)
        return OnnxModel(stripped(model.proto), model.signature)


def _static(
    model: OnnxModel,
    calibration: Sequence[Inputs],
    excluded: Sequence[str],
    only: Sequence[str],
    reduce_range: bool,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> OnnxModel:
    options: dict[str, Any] = {}
    if ranges is not None:
        as_numbers = {
            name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, (low, high) in ranges.items()
        }
        options = {"TensorQuantOverrides": as_numbers, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    with _workspace() as folder:
        source, target = folder / "model.onnx", folder / "quantized.onnx"
        source.write_bytes(model.content)
        quantize_static(
            str(source),
            str(target),
            _Calibration(model, calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(excluded),
            nodes_to_quantize=list(only),
            extra_options=options,
        )
        return OnnxModel(target.read_bytes(), model.signature)


def _dynamic(model: OnnxModel, excluded: Sequence[str], only: Sequence[str], reduce_range: bool) -> OnnxModel:
    with _workspace() as folder:
        source, target = folder / "model.onnx", folder / "quantized.onnx"
        source.write_bytes(model.content)
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=list(DYNAMIC_OPERATORS),
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_as_products(excluded),
            nodes_to_quantize=_as_products(only),
        )
        return OnnxModel(target.read_bytes(), model.signature)


def _as_products(nodes: Sequence[str]) -> list[str]:
    """Return names also as ONNX Runtime has them once it has written every Gemm as a product."""
    return [*nodes, *(f"{name}_MatMul" for name in nodes)]


def quantizable_nodes(model: OnnxModel, scheme: Scheme) -> list[str]:
    """Return the names of the nodes with weights that a scheme quantizes."""
    operators = STATIC_OPERATORS if scheme == "static" else DYNAMIC_OPERATORS
    weights = {tensor.name for tensor in model.proto.graph.initializer if len(tensor.dims) > 1}
    return [
        node.name for node in model.proto.graph.node if node.op_type in operators and weights.intersection(node.input)
    ]


def weight_bytes(model: OnnxModel) -> tuple[int, int]:
    """Return the bytes of all weights of a model, and of those that take 8 bits or less."""
    sizes = [
        (prod(tensor.dims), 1 if tensor.data_type in _SMALL_TYPES else 4)
        for tensor in model.proto.graph.initializer
        if len(tensor.dims) > 1
    ]
    return sum(count * width for count, width in sizes), sum(count for count, width in sizes if width == 1)


def thin_convolutions(model: OnnxModel) -> list[str]:
    """Return the names of the convolutions of at most four input channels: the first one of an image net.

    Their sums are too short for the integer kernels, and they are the most sensitive to rounding.
    """
    shapes = {tensor.name: tensor.dims for tensor in model.proto.graph.initializer}
    return [
        node.name
        for node in model.proto.graph.node
        if node.op_type == "Conv"
        and node.input[1] in shapes
        and shapes[node.input[1]][1] <= _THIN_CHANNELS
        and not any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    ]


def sensitivity(
    model: OnnxModel, scheme: Scheme, calibration: Sequence[Inputs], reference: Callable[..., object]
) -> list[str]:
    """Return the quantizable nodes, the most harmful first: each is quantized alone and compared.

    The harm is one minus the cosine similarity of the outputs with those of ``reference`` on the
    first calibration batch.
    """
    probe = calibration[0]
    expected = probe.call(reference)
    harm = {
        name: 1 - cosine_similarity(expected, probe.call(quantized(model, scheme, calibration[:4], only=[name])))
        for name in quantizable_nodes(model, scheme)
    }
    return sorted(harm, key=lambda name: harm[name], reverse=True)


def cosine_similarity(expected: object, got: object) -> float:
    """Return the mean cosine similarity per sample of all floating point tensors of two outputs."""
    values = []
    for first, second in zip(tensors_in(expected), tensors_in(got), strict=True):
        if not first.is_floating_point() or first.ndim == 0:
            continue
        a = first.detach().double().reshape(first.shape[0], -1).nan_to_num(posinf=0, neginf=0)
        b = second.detach().double().reshape(first.shape[0], -1).nan_to_num(posinf=0, neginf=0)
        norms = a.norm(dim=1) * b.norm(dim=1)
        same_zero = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
        cosine = (a * b).sum(dim=1) / norms.clamp_min(1e-30)
        values.append(float(cosine.masked_fill(same_zero, 1.0).mean()))
    return float(np.mean(values)) if values else 1.0


@contextmanager
def _workspace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="optcore-quantization-") as folder:
        yield Path(folder)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        raise QuantizationError(f"ONNX Runtime cannot quantize the graph ({what}). {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer's advice to pre-process, which has been followed, on the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
