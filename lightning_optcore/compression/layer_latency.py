"""Latency of single layers in the backend that will run them, measured once and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lightning_optcore.compression.onnx_model import new_session
from lightning_optcore.fingerprints import hardware_fingerprint
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.modes import evaluating, fused_attention_off
from lightning_optcore.measurement.timing import fastest_burst, torch_threads
from lightning_optcore.store import Store

BACKENDS = ("torch", "onnxruntime", "onnxruntime-int8")
_OPERATORS = {"Conv1d": "Conv", "Conv2d": "Conv", "Conv3d": "Conv", "Linear": "Gemm"}


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer as far as its speed depends on it.

    Args:
        kind: Name of its class.
        weight: Shape of its weight.
        places: Size of the input without batch and channels (height and width; the tokens of a linear layer).
        stride: Stride of a convolution.
        padding: Padding of a convolution.
        dilation: Dilation of a convolution.
        groups: Groups of a convolution.
    """

    kind: str
    weight: tuple[int, ...]
    places: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def resized(self, weight: Sequence[int]) -> LayerShape:
        """Return the same layer with a weight of another size."""
        depthwise = self.groups > 1 and self.weight[1] == 1 and self.groups == self.weight[0]
        return replace(self, weight=tuple(weight), groups=weight[0] if depthwise else self.groups)

    @property
    def in_channels(self) -> int:
        """Channels (features) of the input."""
        return self.weight[1] * self.groups


class LayerLatency:
    """Times layers of a backend; every size is measured once, and kept in a store if there is one.

    Args:
        backend: ``"torch"`` (eager), ``"onnxruntime"`` (fp32) or ``"onnxruntime-int8"``.
        batch_sizes: Latencies are summed over these, weighted so that each counts per sample.
        store: Path of the store that keeps the table; ``None`` keeps it for this process.
    """

    def __init__(
        self, backend: str = "torch", batch_sizes: Sequence[int] = (1, 32), store: str | Path | None = None
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
        self.backend = backend
        self.batch_sizes = tuple(batch_sizes)
        self._store = store
        self._known: dict[str, float] = {}
        self._new: dict[str, float] = {}
        if store is not None:
            with Store(store) as opened:
                self._known = opened.layer_latencies(hardware_fingerprint(), backend)

    def __call__(self, shape: LayerShape) -> float:
        """Return the latency in ms per sample, averaged over the batch sizes."""
        return sum(self._at(shape, size) / size for size in self.batch_sizes) / len(self.batch_sizes)

    def save(self) -> None:
        """Write what was measured since to the store."""
        if self._store is not None and self._new:
            with Store(self._store) as opened:
                opened.add_layer_latencies(hardware_fingerprint(), self.backend, self._new)
        self._new = {}

    def _at(self, shape: LayerShape, batch_size: int) -> float:
        key = json.dumps({**asdict(shape), "batch": batch_size}, sort_keys=True)
        if key not in self._known:
            # Weights of no meaning are drawn here, which the training must not notice.
            with torch_threads(1), torch.inference_mode(), torch.random.fork_rng(devices=[]):
                call = _layer_call(shape, batch_size, self.backend)
                self._known[key] = self._new[key] = fastest_burst(call)
        return self._known[key]


def backend_after(trainer: Any, callback: Any) -> str:
    """Return where the model of a callback will run: where a later callback deploys it, else torch."""
    later = trainer.callbacks[trainer.callbacks.index(callback) + 1 :]
    return next((other.deploys_to for other in later if hasattr(other, "deploys_to")), "torch")


def default_cache() -> Path:
    """Return the store that keeps the timed layers of this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lightning_optcore" / "latency.db"


def layer_shapes(module: nn.Module, inputs: Inputs) -> dict[str, LayerShape]:
    """Return the layers that can be timed, with the sizes of one sample of ``inputs``."""
    found: dict[str, LayerShape] = {}
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def hook(child: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if name not in found:
                found[name] = _shape_of(child, arguments[0])

        return hook

    for name, child in module.named_modules():
        if type(child).__name__ in _OPERATORS:
            hooks.append(child.register_forward_hook(watch(name)))
    try:
        with evaluating(module), fused_attention_off(), torch.no_grad():
            inputs.resized(1).call(module)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _shape_of(layer: Any, x: torch.Tensor) -> LayerShape:
    kind, weight = type(layer).__name__, tuple(layer.weight.shape)
    if kind == "Linear":
        return LayerShape(kind, weight, (max(1, x.numel() // x.shape[-1]),))
    padding = layer.padding
    if isinstance(padding, str):
        same = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        padding = same if padding == "same" else (0,) * len(same)
    return LayerShape(
        kind, weight, tuple(x.shape[2:]), tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups
    )


def _layer_call(shape: LayerShape, batch_size: int, backend: str) -> Callable[[], object]:
    if shape.kind == "Linear":
        size: tuple[int, ...] = (batch_size * shape.places[0], shape.in_channels)
    else:
        size = (batch_size, shape.in_channels, *shape.places)
    if backend == "torch":
        layer, x = _torch_layer(shape), torch.randn(size)
        return lambda: layer(x)
    session = new_session(_layer_graph(shape, size, int8=backend == "onnxruntime-int8"), 1)
    random = np.random.default_rng(0)
    if backend == "onnxruntime-int8":
        feeds = {"x": random.integers(0, 256, size).astype(np.uint8)}
    else:
        feeds = {"x": random.standard_normal(size).astype(np.float32)}
    return lambda: session.run(None, feeds)


def _torch_layer(shape: LayerShape) -> nn.Module:
    if shape.kind == "Linear":
        return nn.Linear(shape.weight[1], shape.weight[0]).eval()
    return getattr(nn, shape.kind)(
        shape.in_channels,
        shape.weight[0],
        shape.weight[2:],
        shape.stride,
        shape.padding,
        shape.dilation,
        shape.groups,
    ).eval()


def _layer_graph(shape: LayerShape, size: Sequence[int], *, int8: bool) -> bytes:
    """Return an ONNX graph of one layer, with 8-bit tensors at both ends or floats."""
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape.weight).astype(np.float32)
    bias = np.zeros(shape.weight[0], np.float32)
    operator = _OPERATORS[shape.kind]
    attributes: dict[str, Any] = {"transB": 1}
    if operator == "Conv":
        attributes = {
            "strides": shape.stride,
            "pads": [*shape.padding, *shape.padding],
            "dilations": shape.dilation,
            "group": shape.groups,
        }
    if not int8:
        nodes = [helper.make_node(operator, ["x", "w", "b"], ["y"], **attributes)]
        constants = {"w": weight, "b": bias}
        end = TensorProto.FLOAT
    else:
        scale, zero = np.float32(0.02), np.uint8(128)
        constants = {
            "s": np.array(scale),
            "z": np.array(zero),
            "w": np.clip(weight * 40, -63, 63).astype(np.int8),
            "ws": np.full(shape.weight[0], 0.025, np.float32),
            "wz": np.zeros(shape.weight[0], np.int8),
            "b": np.zeros(shape.weight[0], np.int32),
            "bs": np.full(shape.weight[0], 0.0005, np.float32),
            "bz": np.zeros(shape.weight[0], np.int32),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xf"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bf"], axis=0),
            helper.make_node(operator, ["xf", "wf", "bf"], ["yf"], **attributes),
            helper.make_node("QuantizeLinear", ["yf", "s", "z"], ["y"]),
        ]
        end = TensorProto.UINT8
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", end, list(size))],
        [helper.make_tensor_value_info("y", end, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
