"""An ONNX model in memory that is called as the module it was exported from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from lightning_optcore.compression import onnx_flops, onnx_openvino
from lightning_optcore.measurement.inputs import Inputs

RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that goes in or comes out.

    Args:
        name: Its name in the ONNX graph.
        dtype: NumPy's name of its type.
        shape: Its shape in the example.
        batch_axis: The axis whose size is free; ``None`` if there is none.
        low: Smallest value in the example.
        high: Largest value in the example.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    batch_axis: int | None
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Signature:
    """How the exported module is called.

    Args:
        inputs: Structure of each argument by its name, in the order of ``forward``. A structure is
            a :class:`TensorSpec`, a constant, or a dict, list or tuple of structures.
        output: Structure of what comes out.
        batch_size: Batch size of the example.
    """

    inputs: dict[str, Any]
    output: Any
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "inputs": _encode(self.inputs),
            "output": _encode(self.output),
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signature:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If the data has another form.
        """
        try:
            return cls(_decode(data["inputs"]), _decode(data["output"]), int(data["batch_size"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a signature: {error}") from error

    @property
    def input_tensors(self) -> list[TensorSpec]:
        """The tensors that go in."""
        return list(specs_in(self.inputs))


def specs_in(structure: Any) -> Iterator[TensorSpec]:
    """Yield the tensor specifications of a structure, depth first."""
    if isinstance(structure, TensorSpec):
        yield structure
    elif isinstance(structure, Mapping):
        for item in structure.values():
            yield from specs_in(item)
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from specs_in(item)


class OnnxModel:
    """A callable ONNX model: NumPy arrays or torch tensors in, the same out.

    Args:
        content: The serialised model.
        signature: How it is called.
        num_threads: Intra-op threads; ``None`` leaves the runtime's default (all cores).
        runtime: ``"onnxruntime"`` or ``"openvino"``: what runs it.
    """

    def __init__(
        self,
        content: bytes,
        signature: Signature,
        *,
        num_threads: int | None = None,
        runtime: str = "onnxruntime",
    ) -> None:
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime={runtime!r}: expected one of {', '.join(RUNTIMES)}")
        self.content = content
        self.signature = signature
        self.num_threads = num_threads
        self.runtime = runtime

    @cached_property
    def _run(self) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
        if self.runtime == "openvino":
            return onnx_openvino.open_model(self.content, self.num_threads)
        session = new_session(self.content, self.num_threads)
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: session.run(names, feeds)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open model, which cannot be copied; it is opened again where it is needed."""
        return {key: value for key, value in self.__dict__.items() if key != "_run"}

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The parsed model."""
        return onnx.load_from_string(self.content)

    @cached_property
    def _plain_inputs(self) -> list[tuple[str, str, np.dtype[Any]]]:
        """Arguments, names and types of the inputs when all are plain tensors, else none.

        A small model is as fast as its call.
        """
        inputs = self.signature.inputs
        plain = [(key, v.name, np.dtype(v.dtype)) for key, v in inputs.items() if isinstance(v, TensorSpec)]
        return plain if len(plain) == len(inputs) else []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            ValueError: If the arguments differ from the exported module's in name or structure.
        """
        feeds, as_torch = self._feeds(args, kwargs)
        outputs = self._run(feeds)
        structure = self.signature.output
        if isinstance(structure, TensorSpec):
            return torch.from_numpy(outputs[0]) if as_torch else outputs[0]
        return _rebuild(structure, iter(outputs), as_torch)

    @property
    def num_parameters(self) -> int:
        """Number of weights (scales and zero points of a quantization not counted)."""
        return onnx_flops.num_parameters(self.proto)

    @property
    def size_bytes(self) -> int:
        """Bytes of the serialised model."""
        return len(self.content)

    def count_flops(self, inputs: Inputs) -> int | None:
        """Return the FLOPs of one forward pass (a multiply-add is two); ``None`` if a shape is unknown."""
        feeds, _ = self._feeds(inputs.args, inputs.kwargs)
        return onnx_flops.count_flops(self.proto, {name: value.shape for name, value in feeds.items()})

    def feeds(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return what the ONNX graph is fed with for a call."""
        return self._feeds(inputs.args, inputs.kwargs)[0]

    def runner(self, num_threads: int) -> OnnxModel:
        """Return the same model in a session of its own with ``num_threads`` intra-op threads."""
        return OnnxModel(self.content, self.signature, num_threads=num_threads, runtime=self.runtime)

    def example_inputs(self) -> Inputs:
        """Return inputs of the recorded shapes, drawn evenly from the recorded range of values."""
        random = np.random.default_rng(0)

        def draw(structure: Any) -> Any:
            if isinstance(structure, TensorSpec):
                return torch.from_numpy(_draw(structure, random))
            if isinstance(structure, Mapping):
                return {key: draw(item) for key, item in structure.items()}
            if isinstance(structure, (list, tuple)):
                return type(structure)(draw(item) for item in structure)
            return structure

        return Inputs(kwargs=draw(self.signature.inputs))

    def _feeds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], bool]:
        feeds: dict[str, np.ndarray] = {}
        as_torch = False
        plain = self._plain_inputs
        if plain and len(args) + len(kwargs) == len(plain):
            values = [*args, *(kwargs.get(argument) for argument, _, _ in plain[len(args) :])]
            for (_, name, dtype), value in zip(plain, values, strict=True):
                as_torch |= isinstance(value, Tensor)
                array = _as_array(value)
                if array.dtype != dtype:
                    break
                feeds[name] = array
            else:
                return feeds, as_torch
        given = self._bind(args, kwargs)
        for argument, structure in self.signature.inputs.items():
            as_torch |= _collect(argument, structure, given.get(argument), feeds)
        return feeds, as_torch

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = list(self.signature.inputs)
        if len(args) > len(names):
            raise ValueError(f"{len(args)} positional arguments given: this model takes {', '.join(names)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        unknown = [name for name in given if name not in names and given[name] is not None]
        missing = [name for name, spec in self.signature.inputs.items() if name not in given and any(specs_in(spec))]
        if unknown or missing:
            raise ValueError(f"arguments missing: {missing}, unknown: {unknown}; this model takes {names}")
        return {**{n: s for n, s in self.signature.inputs.items() if n not in given}, **given}


def new_session(content: bytes, num_threads: int | None) -> ort.InferenceSession:
    """Open a model in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _collect(path: str, structure: Any, value: Any, feeds: dict[str, np.ndarray]) -> bool:
    """Fill ``feeds`` from one argument; return whether it held a torch tensor."""
    if isinstance(structure, TensorSpec):
        is_torch = isinstance(value, Tensor)
        array = _as_array(value)
        if np.issubdtype(array.dtype, np.floating) and not np.issubdtype(np.dtype(structure.dtype), np.floating):
            raise ValueError(f"{path}: expected {structure.dtype}, not {array.dtype}")
        feeds[structure.name] = array if array.dtype == structure.dtype else array.astype(structure.dtype)
        return is_torch
    if isinstance(structure, Mapping):
        if not isinstance(value, Mapping) or not set(structure) <= set(value):
            raise ValueError(f"{path}: expected a dict with the keys {list(structure)}")
        parts = [(f"{path}.{key}", item, value[key]) for key, item in structure.items()]
    elif isinstance(structure, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(structure):
            raise ValueError(f"{path}: expected {len(structure)} items")
        parts = [(f"{path}.{i}", *pair) for i, pair in enumerate(zip(structure, value, strict=True))]
    elif value != structure:
        raise ValueError(f"{path}={value!r}: the model was exported with {structure!r}, which is fixed in it")
    else:
        parts = []
    found_torch = False
    for part in parts:
        found_torch |= _collect(*part, feeds)
    return found_torch


def _as_array(value: Any) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    # NumPy has no bfloat16.
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy(force=True)


def _rebuild(structure: Any, outputs: Iterator[np.ndarray], as_torch: bool) -> Any:
    if isinstance(structure, TensorSpec):
        value = next(outputs)
        return torch.from_numpy(value) if as_torch else value
    if isinstance(structure, Mapping):
        return {key: _rebuild(item, outputs, as_torch) for key, item in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(_rebuild(item, outputs, as_torch) for item in structure)
    return structure


def _draw(spec: TensorSpec, random: np.random.Generator) -> np.ndarray:
    if spec.dtype == "bool":
        return random.integers(0, 2, spec.shape).astype(bool)
    if np.issubdtype(np.dtype(spec.dtype), np.integer):
        return random.integers(int(spec.low), int(spec.high) + 1, spec.shape).astype(spec.dtype)
    return random.uniform(spec.low, spec.high, spec.shape).astype(spec.dtype)


def _encode(structure: Any) -> dict[str, Any]:
    if isinstance(structure, TensorSpec):
        return {"kind": "tensor", **asdict(structure), "shape": list(structure.shape)}
    if isinstance(structure, Mapping):
        return {"kind": "dict", "items": {key: _encode(item) for key, item in structure.items()}}
    if isinstance(structure, (list, tuple)):
        kind = "list" if isinstance(structure, list) else "tuple"
        return {"kind": kind, "items": [_encode(item) for item in structure]}
    return {"kind": "constant", "value": structure}


def _decode(data: Mapping[str, Any]) -> Any:
    kind = data["kind"]
    if kind == "tensor":
        values = {key: value for key, value in data.items() if key != "kind"}
        return TensorSpec(**{**values, "shape": tuple(values["shape"])})
    if kind == "dict":
        return {key: _decode(item) for key, item in data["items"].items()}
    if kind in ("list", "tuple"):
        items = [_decode(item) for item in data["items"]]
        return items if kind == "list" else tuple(items)
    if kind == "constant":
        return data["value"]
    raise ValueError(f"not a signature: kind={kind!r}")
