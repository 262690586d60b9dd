"""Export of any module to an ONNX model with a free batch size, checked against the module."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from lightning_optcore.compression.onnx_model import OnnxModel, Signature, TensorSpec
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.modes import evaluating, fused_attention_off

# Neither 0 nor 1 (exporters treat these as constants), and unlikely to be the size of another axis.
_EXPORT_BATCH = 3
_CHECKED_BATCHES = (5, 1)


class ExportError(RuntimeError):
    """A module that cannot be exported; the message says why, in one line."""


def export_onnx(module: nn.Module, example_inputs: Any, *, tracing_first: bool = False) -> OnnxModel:
    """Export a module to ONNX with a free batch size.

    The module is exported in evaluation mode, by ``torch.export`` first and by tracing where that
    refuses. The result is run at other batch sizes and compared with the module, so that a graph in
    which a batch size or a random number was frozen is refused.

    Args:
        module: A plain module or a LightningModule, on the CPU. It is left as it was.
        example_inputs: What ``forward`` takes: a tensor, a tuple or a dict of keyword arguments.
        tracing_first: Trace, and ``torch.export`` only where that refuses: a fraction of the time, for graphs that
            are looked at and thrown away.

    Raises:
        ExportError: If no exporter takes the module, or the graph does not give the module's outputs.

    Example:
        >>> exported = export_onnx(nn.Linear(4, 2), torch.randn(8, 4))
        >>> exported(torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """
    inputs = Inputs.of(example_inputs)
    names, inputs = _named(module, inputs)
    small = inputs.resized(_EXPORT_BATCH)
    axes = inputs.batch_axes()
    with evaluating(module), torch.no_grad():
        output = small.call(module)
        other = inputs.resized(_CHECKED_BATCHES[0]).call(module)
        if not list(tensors_in(output)):
            raise ExportError(f"{type(module).__name__}.forward returns no tensor in dicts, lists or tuples")
        reasons = []
        for exporter in (_trace, _export_program) if tracing_first else (_export_program, _trace):
            try:
                with _export_settings():
                    proto = exporter(_Flat(module, small).eval(), small.tensors(), axes, _tensor_names(names, small))
                model = _wrap(proto, names, inputs, output, other)
                _check(module, model, inputs)
            except Exception as error:
                reasons.append(f"{exporter.__doc__}: {_first_line(error)}")
            else:
                return model
    raise ExportError(f"{type(module).__name__} cannot be exported to ONNX. " + " | ".join(reasons))


def stripped(proto: onnx.ModelProto) -> bytes:
    """Serialise a model without what running it does not need (doc strings, metadata, inferred shapes)."""
    lean = onnx.ModelProto()
    lean.CopyFrom(proto)
    del lean.metadata_props[:]
    del lean.graph.value_info[:]
    del lean.graph.metadata_props[:]
    lean.doc_string = ""
    lean.graph.doc_string = ""
    del lean.functions[:]
    for node in lean.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for item in (*lean.graph.initializer, *lean.graph.input, *lean.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    used = {name for node in lean.graph.node for name in node.input} | {o.name for o in lean.graph.output}
    kept = [tensor for tensor in lean.graph.initializer if tensor.name in used]
    del lean.graph.initializer[:]
    lean.graph.initializer.extend(kept)
    return lean.SerializeToString()


class _Flat(nn.Module):
    """The module as a function of plain tensors: exporters stumble over keywords, constants and nested arguments."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.module = module
        self._inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return tuple(tensors_in(self._inputs.map(lambda _: next(given)).call(self.module)))


def _export_program(
    module: _Flat, tensors: Sequence[Tensor], axes: Sequence[int | None], names: Sequence[str]
) -> onnx.ModelProto:
    """torch.export"""
    batch = Dim("batch", min=1, max=1 << 20)
    shapes = tuple({axis: batch} if axis is not None else None for axis in axes)
    program = torch.export.export(module, tuple(tensors), dynamic_shapes={"tensors": shapes}, strict=False)
    exported = torch.onnx.export(program, input_names=list(names), dynamo=True, verbose=False)
    if exported is None:
        raise ExportError("the exporter returned nothing")
    return exported.model_proto


def _trace(
    module: _Flat, tensors: Sequence[Tensor], axes: Sequence[int | None], names: Sequence[str]
) -> onnx.ModelProto:
    """tracing"""
    free = {name: {axis: "batch"} for name, axis in zip(names, axes, strict=True) if axis is not None}
    with tempfile.TemporaryDirectory(prefix="optcore-export-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            tuple(tensors),
            path,
            dynamo=False,
            input_names=list(names),
            dynamic_axes=free,
            opset_version=18,
        )
        return onnx.load(path)


def _tensor_names(names: Sequence[str], inputs: Inputs) -> list[str]:
    """Name each tensor after its argument, with a number where the argument holds several."""
    found: list[str] = []
    for name, value in zip(names, [*inputs.args, *inputs.kwargs.values()], strict=True):
        count = len(list(tensors_in(value)))
        found += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return found


def _named(module: nn.Module, inputs: Inputs) -> tuple[list[str], Inputs]:
    """Give each argument the name it has in ``forward``, in that order."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExportError(f"{type(module).__name__}.forward does not take the inputs: {error}") from error
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(len(value))]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names += list(value)
        else:
            names.append(name)
    return names, Inputs(bound.args, dict(bound.kwargs))


def _wrap(proto: onnx.ModelProto, names: list[str], inputs: Inputs, output: Any, other: Any) -> OnnxModel:
    values = [*inputs.args, *inputs.kwargs.values()]
    graph_inputs = iter(value.name for value in proto.graph.input)
    axes = iter(inputs.batch_axes())
    if len(proto.graph.input) != len(inputs.tensors()):
        raise ExportError(f"the graph takes {len(proto.graph.input)} tensors, not {len(inputs.tensors())}")
    graph_outputs = iter(value.name for value in proto.graph.output)
    sizes = iter(list(tensors_in(other)))

    def output_spec(tensor: Tensor) -> TensorSpec:
        pairs = enumerate(zip(tensor.shape, next(sizes).shape, strict=True))
        axis = next((axis for axis, (first, second) in pairs if first != second), None)
        return _spec(tensor, next(graph_outputs), axis)

    signature = Signature(
        inputs={
            name: _structure(value, lambda tensor: _spec(tensor, next(graph_inputs), next(axes)))
            for name, value in zip(names, values, strict=True)
        },
        output=_structure(output, output_spec),
        batch_size=inputs.batch_size,
    )
    return OnnxModel(stripped(proto), signature)


def _structure(value: Any, leaf: Callable[[Tensor], TensorSpec]) -> Any:
    """Describe nested tensors; unlike ``map_tensors`` it forgets classes that JSON cannot name."""
    if isinstance(value, Tensor):
        return leaf(value)
    if isinstance(value, Mapping):
        return {str(key): _structure(item, leaf) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_structure(item, leaf) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ExportError(f"a {type(value).__name__} among the arguments or outputs: expected tensors or plain values")


def _spec(tensor: Tensor, name: str, axis: int | None) -> TensorSpec:
    array = tensor.detach().cpu()
    dtype = str(array.numpy().dtype) if array.dtype is not torch.bfloat16 else "float32"
    low, high = (float(array.min()), float(array.max())) if array.numel() else (0.0, 0.0)
    return TensorSpec(name, dtype, tuple(tensor.shape), axis, low, high)


def _check(module: nn.Module, model: OnnxModel, inputs: Inputs) -> None:
    for size in _CHECKED_BATCHES:
        batch = inputs.resized(size)
        expected = [t.detach().float().numpy() for t in tensors_in(batch.call(module))]
        got = [t.float().numpy() for t in tensors_in(model(*batch.args, **batch.kwargs))]
        for first, second in zip(expected, got, strict=True):
            scale = float(np.abs(first[np.isfinite(first)]).max(initial=1.0))
            if first.shape != second.shape or not np.allclose(first, second, rtol=1e-3, atol=1e-3 * scale):
                raise ExportError(
                    f"the graph's output differs from the module's at batch size {size} ({_suspect(module)})"
                )


def _suspect(module: nn.Module) -> str:
    encoders = [child for child in module.modules() if isinstance(child, nn.TransformerEncoder)]
    if any(encoder.use_nested_tensor for encoder in encoders):
        return (
            "nn.TransformerEncoder sets what it returns for padding to 0, in evaluation alone: leave padding out "
            "afterwards, or make it with enable_nested_tensor=False"
        )
    return "is there a random number or a fixed batch size in forward?"


@contextmanager
def _export_settings() -> Iterator[None]:
    """Export what has a counterpart in ONNX, and keep the exporters' progress and notes out of the log."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # The fused kernel of nn.TransformerEncoderLayer has no counterpart in ONNX; torch.export prints the whole graph
        # to stderr where it meets what it cannot trace.
        with (
            fused_attention_off(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: BaseException) -> str:
    # Exporters wrap the reason; the innermost cause names it.
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
