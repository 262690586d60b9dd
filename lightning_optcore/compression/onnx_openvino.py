"""The backend ``openvino``: NNCF quantizes the ONNX graph, OpenVINO runs it. Extra: ``openvino``."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

_NORMALISATIONS_OF_TRANSFORMERS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")

# Nodes between matrix products are fused, and shapes not worked out at each call, where shapes are fixed: a tenth of
# the time of a small transformer at batch 1. What is compiled takes about twice the bytes of the artifact.
_FIXED_SHAPES = 4
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_ANY: _Shapes = ()

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def open_model(content: bytes, num_threads: int | None) -> Run:
    """Return a function from the inputs of a serialised ONNX model to its outputs, on the CPU.

    The model is compiled anew for each of the first four shapes of its inputs, when they come; all others share one
    that takes any.

    Raises:
        ModuleNotFoundError: If OpenVINO is not installed; the message names the extra.
    """
    openvino = _required("openvino")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    core = openvino.Core()
    model = core.read_model(content)
    compiled: dict[_Shapes, Run] = {}
    # Unlike a session of ONNX Runtime, a request has one set of buffers: calls of several threads take turns.
    lock = threading.Lock()

    def call_for(shapes: _Shapes) -> Run:
        if shapes in compiled:
            return compiled[shapes]
        for name, shape in shapes:
            # To reshape is to allow what the model was not exported for: another length, or rank.
            if not model.input(name).partial_shape.compatible(openvino.PartialShape(list(shape))):
                expected = model.input(name).partial_shape.to_string()
                raise ValueError(f"{name}: has the shape {list(shape)}, expected {expected} (? is any)")
        key = shapes if len(compiled) < _FIXED_SHAPES else _ANY
        if key not in compiled:
            shaped = model.clone()
            if key != _ANY:
                shaped.reshape({name: list(shape) for name, shape in shapes})
            compiled[key] = _call_of(core.compile_model(shaped, "CPU", settings))
        return compiled[key]

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with lock:
            return call_for(tuple((name, value.shape) for name, value in feeds.items()))(feeds)

    return run


def _call_of(compiled: Any) -> Run:
    request = compiled.create_infer_request()
    # The request owns its buffers and writes them again at the next call: results are copied.
    if any(port.partial_shape.is_dynamic for port in (*compiled.inputs, *compiled.outputs)):
        return lambda feeds: [
            np.array(value) for value in request.infer(dict(feeds), share_inputs=True, share_outputs=True).to_tuple()
        ]
    inputs = {name: request.get_tensor(port).data for port in compiled.inputs for name in port.names}
    outputs = [request.get_tensor(port).data for port in compiled.outputs]

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for name, value in feeds.items():
            inputs[name][...] = value
        request.infer(share_outputs=True)
        return [value.copy() for value in outputs]

    return run


def quantized_by_nncf(
    proto: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], excluded: Sequence[str]
) -> onnx.ModelProto:
    """Quantize weights and activations to 8 bits with NNCF, with its bias correction.

    A graph with layer normalisations is quantized as NNCF does transformers: with SmoothQuant, and with what it knows
    to be sensitive in attention left in fp32. As any other, a sentence encoder comes out unlike itself.

    Args:
        proto: A model in floating point.
        feeds: What the graph is fed with, batch by batch.
        excluded: Names of nodes that stay in fp32.

    Raises:
        ModuleNotFoundError: If NNCF is not installed; the message names the extra.
    """
    nncf = _required("nncf")
    scope = nncf.IgnoredScope(names=list(excluded)) if excluded else None
    is_transformer = any(node.op_type in _NORMALISATIONS_OF_TRANSFORMERS for node in proto.graph.node)
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made: onnx.ModelProto = nncf.quantize(
                proto, nncf.Dataset(list(feeds)), ignored_scope=scope, model_type=kind
            )
    finally:
        nncf.set_log_level(level or logging.INFO)
    return made


def _required(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'backend=openvino needs {name}: pip install "lightning-optcore[openvino]"'
        ) from error
