"""Post-training quantization to a deployable int8 artifact.

Static ranges: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018 (arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optcore.compression import onnx_quantization
from lightning_optcore.compression.artifact_making import (
    OUTPUT_COSINE,
    ArtifactCallback,
    Made,
    NoArtifact,
    Source,
    check_openvino,
    require_small_weights,
    required_metric,
    single_precision_copy,
)
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import QuantizationError, Widths
from lightning_optcore.compression.user_validation import quality_drop
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.timing import time_in_turns
from lightning_optcore.option_values import is_number
from lightning_optcore.recipe import register_step

BACKENDS = ("onnxruntime", "openvino")
SCHEMES = ("auto", "static", "dynamic")
WEIGHT_BITS = (8, 4)
EMBEDDING_BITS = (8, 4)
STEP = "post_training_quantization"

_ACCEPTED_COSINE = 0.98


@dataclass
class PostTrainingQuantizationParameters:
    """The recipe step: how an artifact was quantized."""

    backend: str = "onnxruntime"
    scheme: str = "static"
    weight_bits: int = 8
    embedding_bits: int = 8
    reduce_range: bool = True
    excluded_nodes: list[str] = field(default_factory=list)

    @property
    def widths(self) -> Widths:
        """Bits of weights and embeddings."""
        return Widths(self.weight_bits, self.embedding_bits, self.reduce_range)


@register_step(STEP, PostTrainingQuantizationParameters)
def _rebuild(module: nn.Module, parameters: PostTrainingQuantizationParameters) -> nn.Module:
    """The torch module keeps its shape: what is quantized is the exported graph."""
    return module


@dataclass(frozen=True)
class QuantizedModel:
    """What :func:`post_training_quantize` makes.

    Args:
        model: The int8 model.
        parameters: How it was quantized.
        prepared: The fp32 graph that it was made from.
        calibration: Batches that gave the ranges.
    """

    model: OnnxModel
    parameters: PostTrainingQuantizationParameters
    prepared: OnnxModel
    calibration: tuple[Inputs, ...]

    def excluding(self, nodes: Sequence[str]) -> QuantizedModel:
        """Return the same with some more nodes left in fp32."""
        excluded = [*self.parameters.excluded_nodes, *nodes]
        return _quantized(self.prepared, self.calibration, replace(self.parameters, excluded_nodes=excluded))

    def most_sensitive_nodes(self) -> list[str]:
        """Return the names of the quantized nodes, the most harmful first."""
        scheme = _concrete(self.parameters.scheme)
        nodes = onnx_quantization.sensitivity(self.prepared, scheme, self.calibration, self.prepared)
        return [node for node in nodes if node not in self.parameters.excluded_nodes]


def _quantized(
    prepared: OnnxModel, calibration: tuple[Inputs, ...], parameters: PostTrainingQuantizationParameters
) -> QuantizedModel:
    excluded = parameters.excluded_nodes
    if parameters.backend == "openvino":
        model = onnx_quantization.quantized_for_openvino(prepared, calibration, excluded, parameters.embedding_bits)
    else:
        model = onnx_quantization.quantized(
            prepared, _concrete(parameters.scheme), calibration, excluded=excluded, widths=parameters.widths
        )
    return QuantizedModel(model, parameters, prepared, calibration)


def post_training_quantize(
    module: nn.Module,
    calibration_inputs: Sequence[Any],
    *,
    backend: str = "onnxruntime",
    scheme: str = "auto",
    weight_bits: int = 8,
    embedding_bits: int = 8,
    reduce_range: bool = True,
) -> QuantizedModel:
    """Export a trained module to ONNX and quantize weights and activations to integers.

    Args:
        module: Any module, on the CPU; left as it was.
        calibration_inputs: Batches of what ``forward`` takes (tensor, tuple or dict of keyword arguments).
        backend: ``"onnxruntime"``; or ``"openvino"``: NNCF quantizes (static, 8 bits; transformers
            with its SmoothQuant), OpenVINO runs it (extra).
        scheme: ``"static"`` fixes the ranges of activations from the calibration batches: right for
            convolutions. ``"dynamic"`` takes them at run time: right for transformers and recurrent
            nets. ``"auto"`` makes both, and a static one with convolutions of few input channels in fp32
            (int8 seldom pays there); of those whose outputs stay close (cosine similarity of at least
            0.98) it takes the one with the smallest product of bytes and latency (geometric mean of
            batch 1 and 32); the closest one if none stays close.
        weight_bits: 8; or 4 for the weights of linear layers alone, with activations in floating point.
        embedding_bits: 8 or 4, for tables of at least 256 rows.
        reduce_range: Use 7 of the 8 bits of a weight, so that no processor saturates. Without VNNI (or on unknown
            machines) leave it on; with it, turning it off halves the rounding error of the weights.

    Raises:
        MisconfigurationException: If an option is not one of those.
        ExportError: If the module cannot be exported.
        QuantizationError: If ONNX Runtime does not take the graph.
        ValueError: If there are no calibration inputs.

    Example:
        >>> import torch
        >>> batches = [torch.randn(32, 16) for _ in range(4)]
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> post_training_quantize(net, batches, scheme="static").model(batches[0]).shape
        torch.Size([32, 4])
    """
    candidates = quantization_candidates(
        module,
        calibration_inputs,
        backend=backend,
        scheme=scheme,
        weight_bits=weight_bits,
        embedding_bits=embedding_bits,
        reduce_range=reduce_range,
    )
    return candidates[0]


def quantization_candidates(
    module: nn.Module,
    calibration_inputs: Sequence[Any],
    *,
    backend: str = "onnxruntime",
    scheme: str = "auto",
    weight_bits: int = 8,
    embedding_bits: int = 8,
    reduce_range: bool = True,
) -> list[QuantizedModel]:
    """Return every way to quantize that :func:`post_training_quantize` weighs, the one it takes first.

    Arguments and errors are those of :func:`post_training_quantize`. The candidates whose outputs stay close come
    first, the cheapest of them leading; then the others, by how close they stay.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> sorted(c.parameters.scheme for c in quantization_candidates(net, [torch.randn(32, 16)]))
        ['dynamic', 'static']
    """
    _check_options(backend, scheme, weight_bits, embedding_bits)
    batches = tuple(Inputs.of(batch) for batch in calibration_inputs)
    if not batches:
        raise ValueError("calibration_inputs is empty: expected at least one batch")
    exported = export_onnx(module, batches[0])
    prepared = onnx_quantization.prepared(exported)

    def make(scheme: str) -> QuantizedModel:
        parameters = PostTrainingQuantizationParameters(backend, scheme, weight_bits, embedding_bits, reduce_range)
        return _quantized(prepared, batches, parameters)

    if backend == "openvino":
        return [make("static")]
    if weight_bits == 4:
        return [make("dynamic")]
    if scheme != "auto":
        return [make(scheme)]
    candidates, reasons = [], []
    for concrete in ("static", "dynamic"):
        try:
            candidates.append(make(concrete))
        except QuantizationError as error:
            reasons.append(str(error))
    if not candidates:
        raise QuantizationError(" | ".join(reasons))
    thin = onnx_quantization.thin_convolutions(prepared)
    if thin and candidates[0].parameters.scheme == "static":
        candidates.append(candidates[0].excluding(thin))
    return _ranked(candidates, prepared)


def _concrete(scheme: str) -> onnx_quantization.Scheme:
    return "static" if scheme == "static" else "dynamic"


def _ranked(candidates: list[QuantizedModel], reference: OnnxModel) -> list[QuantizedModel]:
    probe = candidates[0].calibration[0]
    expected = probe.call(reference)
    closeness = {id(c): onnx_quantization.cosine_similarity(expected, probe.call(c.model)) for c in candidates}
    by_closeness = sorted(candidates, key=lambda c: closeness[id(c)], reverse=True)
    close = [c for c in candidates if closeness[id(c)] >= _ACCEPTED_COSINE]
    others = [c for c in by_closeness if closeness[id(c)] < _ACCEPTED_COSINE]
    if len(close) < 2:
        return [*close, *others]
    costs = [float(candidate.model.size_bytes) for candidate in close]
    for size in (1, 32):
        batch = probe.resized(size)
        calls = {str(i): _call(c.model.runner(1), batch) for i, c in enumerate(close)}
        latencies = time_in_turns(calls, rounds=8)
        costs = [cost * sqrt(latencies[str(i)].p50) for i, cost in enumerate(costs)]
    order = sorted(range(len(close)), key=costs.__getitem__)
    return [*(close[i] for i in order), *others]


def _call(model: Callable[..., Any], batch: Inputs) -> Callable[[], object]:
    return lambda: batch.call(model)


def _check_options(backend: str, scheme: str, weight_bits: int, embedding_bits: int) -> None:
    for key, value, allowed in (
        ("backend", backend, BACKENDS),
        ("scheme", scheme, SCHEMES),
        ("weight_bits", weight_bits, WEIGHT_BITS),
        ("embedding_bits", embedding_bits, EMBEDDING_BITS),
    ):
        if value not in allowed:
            expected = ", ".join(map(str, allowed))
            raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected one of {expected}")
    if backend == "openvino" and (scheme == "dynamic" or weight_bits != 8):
        raise MisconfigurationException(
            f"{STEP}.backend='openvino': has scheme static with weights of 8 bits alone, not scheme={scheme!r}, "
            f"weight_bits={weight_bits}"
        )
    if weight_bits == 4 and scheme == "static":
        raise MisconfigurationException(f"{STEP}.scheme='static': weight_bits=4 leaves activations in floating point")


class PostTrainingQuantization(ArtifactCallback):
    """Make a deployable int8 artifact of the trained model at the end of the fit.

    The module that the steps really call (the LightningModule, or a child such as ``self.net``) is
    exported to ONNX, calibrated on batches of the training loader, quantized, and run in its place
    through the module's own ``validation_step``. Model and artifact are measured in turns, and
    ``artifact/`` is written as a whole: ``model.onnx``, ``recipe.json``, ``measurement.json``, and a
    manifest with their SHA-256.

    The torch module is left as trained. A model that cannot be exported is reported in a warning
    and in ``error``; the fit succeeds.

    Args:
        backend: ``"onnxruntime"`` or ``"openvino"``, as in :func:`post_training_quantize`.
        scheme: ``"auto"``, ``"static"`` or ``"dynamic"``, as in :func:`post_training_quantize`.
        weight_bits: 8 or 4, as in :func:`post_training_quantize`.
        embedding_bits: 8 or 4.
        max_quality_drop: Largest accepted loss of ``monitor``, in its own unit (0.005 is half a point of
            accuracy). Where it is exceeded, ``"auto"`` takes the cheapest of its candidates that keeps within it;
            if none does, the most sensitive layers stay in fp32, as few as will do;
            if even that is not enough, no artifact is written. ``None`` accepts any.
        output_dir: Folder of the artifact; ``<default_root_dir>/artifact`` by default.
        monitor: The metric that ``max_quality_drop`` guards; by default the one that the checkpoint
            callback monitors, else the first logged metric to be maximized, else the first.
        mode: ``"min"`` or ``"max"``; by default guessed from the metric's name.
        calibration_samples: Training samples that give the ranges of activations.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.
        reduce_range: As in :func:`post_training_quantize`.

    Attributes:
        artifact: The loaded artifact after the fit, or ``None``.
        before: Measurement of the model, or ``None``.
        after: Measurement of the artifact, or ``None``.
        error: Why there is no artifact, or ``None``.

    Raises:
        MisconfigurationException: If an option is not one of those named.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PostTrainingQuantization(max_quality_drop=0.005)], logger=False)
    """

    step = STEP
    # Callbacks before it choose by what is fast there; OpenVINO's layers are taken to be like ONNX Runtime's.
    deploys_to = "onnxruntime-int8"

    def __init__(
        self,
        backend: str = "onnxruntime",
        scheme: str = "auto",
        weight_bits: int = 8,
        embedding_bits: int = 8,
        max_quality_drop: float | None = None,
        output_dir: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        calibration_samples: int = 512,
        batch_sizes: Sequence[int] = (1, 32),
        num_threads: int = 1,
        rounds: int = 30,
        reduce_range: bool = True,
    ) -> None:
        _check_options(backend, scheme, weight_bits, embedding_bits)
        if backend == "openvino":
            check_openvino(STEP)
        _check_drop(max_quality_drop)
        if mode not in (None, "min", "max"):
            raise MisconfigurationException(f"{STEP}.mode={mode!r}: expected one of min, max, null")
        self.check_text("monitor", monitor)
        super().__init__(output_dir, calibration_samples, batch_sizes, num_threads, rounds)
        self.backend = backend
        self.scheme = scheme
        self.weight_bits = weight_bits
        self.embedding_bits = embedding_bits
        self.reduce_range = reduce_range
        self.max_quality_drop = max_quality_drop
        self.monitor = monitor
        self.mode = mode

    def make(self, trainer: Any, pl_module: Any, source: Source) -> Made:
        """Quantize and choose."""
        quality_before = {**source.validation.of_model(), OUTPUT_COSINE: 1.0}
        target = single_precision_copy(source.module)
        candidates = quantization_candidates(
            target,
            source.batches,
            backend=self.backend,
            scheme=self.scheme,
            weight_bits=self.weight_bits,
            embedding_bits=self.embedding_bits,
            reduce_range=self.reduce_range,
        )
        require_small_weights(STEP, candidates[0].model)
        result, quality_after = self._accepted(trainer, source, candidates, quality_before)
        recipe = recipe_of(pl_module).then(STEP, **vars(result.parameters))
        return Made(target, result.model, recipe, quality_before, quality_after)

    def _accepted(
        self, trainer: Any, source: Source, candidates: Sequence[QuantizedModel], before: dict[str, float]
    ) -> tuple[QuantizedModel, dict[str, float]]:
        """Return the cheapest candidate within ``max_quality_drop``, else one with as few layers in fp32 as will do."""

        def quality_of(candidate: QuantizedModel) -> dict[str, float]:
            return self.quality_of(source, candidate.model, candidate.calibration[-1])

        result = candidates[0]
        quality = quality_of(result)
        if self.max_quality_drop is None:
            if self.monitor is not None and self.monitor not in quality:
                rank_zero_warn(f"{STEP}.monitor={self.monitor!r} was never logged in validation: only {list(quality)}")
            return result, quality
        metric = required_metric(STEP, self.monitor, trainer, before, quality)
        drop, allowed = quality_drop(metric, self.mode, before, quality), self.max_quality_drop
        if drop <= allowed:
            return result, quality
        for candidate in candidates[1:]:
            reached = quality_of(candidate)
            if quality_drop(metric, self.mode, before, reached) <= allowed:
                return candidate, reached
        nodes = result.most_sensitive_nodes()
        tried: dict[int, tuple[QuantizedModel, dict[str, float], float]] = {}

        def accepted(count: int) -> bool:
            candidate = result.excluding(nodes[:count])
            reached = quality_of(candidate)
            tried[count] = (candidate, reached, quality_drop(metric, self.mode, before, reached))
            return tried[count][2] <= allowed

        count = _fewest(len(nodes) - 1, accepted)
        if count is not None:
            rank_zero_info(f"{STEP}: kept {count} of {len(nodes)} layers in fp32: {nodes[:count]}")
            return tried[count][:2]
        with_some = (
            f", and by {min(reached for *_, reached in tried.values()):.4g} with the most sensitive layers in fp32"
            if tried
            else ""
        )
        raise NoArtifact(
            f"{STEP}.max_quality_drop={self.max_quality_drop}: {metric} dropped by {drop:.4g}{with_some}; "
            "allow more, or train with quantization"
        )


def _check_drop(value: Any) -> None:
    if value is not None and not (is_number(value) and 0 <= value < float("inf")):
        raise MisconfigurationException(f"{STEP}.max_quality_drop={value!r}: expected a number of at least 0, or null")


def _fewest(most: int, accepted: Callable[[int], bool]) -> int | None:
    """Return the smallest accepted count of 1 to ``most``; ``None`` if there is none.

    Each question costs a validation, hence doubling and bisection: exact where more layers in fp32 never
    make the model worse.
    """
    if most < 1:
        return None
    refused, count = 0, 1
    while not accepted(count):
        if count == most:
            return None
        refused, count = count, min(2 * count, most)
    while count - refused > 1:
        middle = (refused + count) // 2
        refused, count = (refused, middle) if accepted(middle) else (middle, count)
    return count
