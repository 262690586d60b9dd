"""Post-training quantization to a deployable int8 artifact.

Static ranges: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018 (arXiv:1712.05877).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optcore.compression import onnx_quantization
from lightning_optcore.compression.artifact import Artifact, ArtifactError, write_artifact
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.export import ExportError, export_onnx
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import QuantizationError, Widths
from lightning_optcore.compression.user_validation import UserValidation
from lightning_optcore.measurement.directions import direction_of
from lightning_optcore.measurement.forward_calls import ForwardRecorder, detached_copy, submodule
from lightning_optcore.measurement.inputs import Inputs, joined
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.measurement.timing import time_in_turns
from lightning_optcore.measurement.yardstick import check_arguments, measure_alternatives
from lightning_optcore.recipe import register_step

log = logging.getLogger(__name__)

BACKENDS = ("onnxruntime", "openvino")
SCHEMES = ("auto", "static", "dynamic")
WEIGHT_BITS = (8, 4)
EMBEDDING_BITS = (8, 4)
STEP = "post_training_quantization"

# The metric that stands in where validation does not run the model.
OUTPUT_COSINE = "output_cosine"
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
        model = onnx_quantization.quantized_for_openvino(prepared, calibration, excluded)
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
        backend: ``"onnxruntime"``; or ``"openvino"``: NNCF quantizes (static, 8 bits), OpenVINO runs it (extra).
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
    if backend == "openvino" and (scheme == "dynamic" or weight_bits != 8 or embedding_bits != 8):
        raise MisconfigurationException(
            f"{STEP}.backend='openvino': has scheme static with 8 bits alone, not scheme={scheme!r}, "
            f"weight_bits={weight_bits}, embedding_bits={embedding_bits}"
        )
    if weight_bits == 4 and scheme == "static":
        raise MisconfigurationException(f"{STEP}.scheme='static': weight_bits=4 leaves activations in floating point")


class PostTrainingQuantization(Callback):
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
        super().__init__()
        _check_options(backend, scheme, weight_bits, embedding_bits)
        if backend == "openvino":
            _check_installed("nncf", "openvino")
        _check_drop(max_quality_drop)
        if mode not in (None, "min", "max"):
            raise MisconfigurationException(f"{STEP}.mode={mode!r}: expected one of min, max, null")
        try:
            check_arguments(batch_sizes, num_threads, rounds)
            check_arguments([calibration_samples], 1, 1)
        except ValueError as error:
            wrong = f"batch_sizes=[{calibration_samples!r}]"
            text = str(error).replace(wrong, f"calibration_samples={calibration_samples!r}")
            raise MisconfigurationException(f"{STEP}.{text}") from error
        for key, text_or_none in (("output_dir", output_dir), ("monitor", monitor)):
            if text_or_none is not None and not isinstance(text_or_none, (str, Path)):
                raise MisconfigurationException(f"{STEP}.{key}={text_or_none!r}: expected text, or null")
        self.backend = backend
        self.scheme = scheme
        self.weight_bits = weight_bits
        self.embedding_bits = embedding_bits
        self.reduce_range = reduce_range
        self.max_quality_drop = max_quality_drop
        self.output_dir = output_dir
        self.monitor = monitor
        self.mode = mode
        self.calibration_samples = calibration_samples
        self.batch_sizes = tuple(batch_sizes)
        self.num_threads = num_threads
        self.rounds = rounds
        self.artifact: Artifact | None = None
        self.before: Measurement | None = None
        self.after: Measurement | None = None
        self.error: str | None = None
        self._training_calls: ForwardRecorder | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is a place for the artifact before anything is trained for it."""
        folder = Path(self.output_dir or trainer.default_root_dir)
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        others = [c for c in trainer.callbacks if isinstance(c, PostTrainingQuantization) and c is not self]
        if any(other.output_dir == self.output_dir for other in others):
            raise MisconfigurationException(
                f"{STEP}.output_dir={self.output_dir}: two callbacks quantize into one folder; give each its own"
            )
        if stage == "fit" and (not there.is_dir() or not os.access(there, os.W_OK | os.X_OK)):
            raise MisconfigurationException(
                f"{STEP}.output_dir={self.output_dir}: {there} is no folder that can be written; name another"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record the inputs of the model for the calibration."""
        self.artifact = self.before = self.after = self.error = None
        self._training_calls = ForwardRecorder(pl_module, self.calibration_samples)
        self._training_calls.attach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Stop to record once there are enough samples: later steps cost nothing."""
        calls = self._training_calls
        if calls is not None and calls.samples >= self.calibration_samples:
            calls.detach()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation inputs are no calibration data."""
        if self._training_calls is not None:
            self._training_calls.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        if self._training_calls is not None:
            self._training_calls.detach()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Quantize, check, measure and write."""
        if self._training_calls is not None:
            self._training_calls.detach()
        if trainer.is_global_zero:
            try:
                self._make_artifact(trainer, pl_module)
            except (ExportError, QuantizationError, ArtifactError, _Refused) as error:
                self.error = str(error)
            except Exception as error:
                # Whatever the user's validation does with an artifact in it, the fit was good.
                log.debug("no artifact", exc_info=True)
                self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self.error is not None:
                rank_zero_warn(f"{STEP}: no artifact. {self.error}")
        trainer.strategy.barrier("post_training_quantization")

    def _make_artifact(self, trainer: Any, pl_module: Any) -> None:
        device = next((p.device for p in pl_module.parameters()), None)
        pl_module.to("cpu")
        try:
            self._make_artifact_on_cpu(trainer, pl_module)
        finally:
            if device is not None:
                pl_module.to(device)

    def _make_artifact_on_cpu(self, trainer: Any, pl_module: Any) -> None:
        validation = UserValidation(trainer, pl_module)
        name, batches = self._calibration(validation, pl_module)
        batches = [batch.map(_in_single_precision) for batch in batches]
        quality_before = {**validation.of_model(), OUTPUT_COSINE: 1.0}
        target = _single_precision_copy(submodule(pl_module, name))
        candidates = quantization_candidates(
            target,
            batches,
            backend=self.backend,
            scheme=self.scheme,
            weight_bits=self.weight_bits,
            embedding_bits=self.embedding_bits,
            reduce_range=self.reduce_range,
        )
        _require_int8(candidates[0])
        result, quality_after = self._accepted(trainer, validation, name, target, candidates, quality_before)
        if OUTPUT_COSINE not in quality_after:
            quality_before.pop(OUTPUT_COSINE)
        measurements = measure_alternatives(
            {"before": target, "after": result.model},
            batches[0],
            batch_sizes=self.batch_sizes,
            num_threads=self.num_threads,
            rounds=self.rounds,
            quality={"before": quality_before, "after": quality_after},
        )
        folder = Path(self.output_dir or Path(trainer.default_root_dir) / "artifact")
        self.artifact = write_artifact(
            folder,
            result.model,
            recipe_of(pl_module).then(STEP, **vars(result.parameters)),
            before=measurements["before"],
            after=measurements["after"],
        )
        self.before, self.after = measurements["before"], measurements["after"]
        rank_zero_info(f"{STEP}: wrote {folder}")

    def _calibration(self, validation: UserValidation, pl_module: Any) -> tuple[str, list[Inputs]]:
        """Return the called module's name and batches of its inputs, from training where there was any."""
        training = self._training_calls.inputs if self._training_calls is not None else {}
        name = validation.target()
        if name is None or not training.get(name):
            recorded_in_training = self._training_calls.target() if self._training_calls is not None else None
            name = name if name is not None else recorded_in_training
        if name is None:
            example = getattr(pl_module, "example_input_array", None)
            if example is None:
                raise ExportError(
                    f"cannot tell what {type(pl_module).__name__} takes: neither training_step nor "
                    "validation_step called a module with parameters; set its example_input_array"
                )
            return "", [Inputs.of(example)]
        batches = training.get(name) or validation.training_inputs(name, self.calibration_samples)
        merged = joined(_of_one_structure(batches))
        count = min(merged.batch_size, self.calibration_samples)
        return name, _split(merged, count)

    def _accepted(
        self,
        trainer: Any,
        validation: UserValidation,
        name: str,
        target: nn.Module,
        candidates: Sequence[QuantizedModel],
        before: dict[str, float],
    ) -> tuple[QuantizedModel, dict[str, float]]:
        """Return the cheapest candidate within ``max_quality_drop``, else one with as few layers in fp32 as will do."""
        result = candidates[0]
        quality = self._quality_of(validation, name, target, result)
        if self.max_quality_drop is None:
            if self.monitor is not None and self.monitor not in quality:
                rank_zero_warn(f"{STEP}.monitor={self.monitor!r} was never logged in validation: only {list(quality)}")
            return result, quality
        metric = self._metric(trainer, before, quality)
        drop, allowed = _drop(metric, self.mode, before, quality), self.max_quality_drop
        if drop <= allowed:
            return result, quality
        for candidate in candidates[1:]:
            reached = self._quality_of(validation, name, target, candidate)
            if _drop(metric, self.mode, before, reached) <= allowed:
                return candidate, reached
        nodes = result.most_sensitive_nodes()
        tried: dict[int, tuple[QuantizedModel, dict[str, float], float]] = {}

        def accepted(count: int) -> bool:
            candidate = result.excluding(nodes[:count])
            reached = self._quality_of(validation, name, target, candidate)
            tried[count] = (candidate, reached, _drop(metric, self.mode, before, reached))
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
        raise _Refused(
            f"{STEP}.max_quality_drop={self.max_quality_drop}: {metric} dropped by {drop:.4g}{with_some}; "
            "allow more, or train with quantization"
        )

    def _quality_of(
        self, validation: UserValidation, name: str, target: nn.Module, result: QuantizedModel
    ) -> dict[str, float]:
        evaluation = validation.of_replacement(name, result.model)
        if evaluation.replacement_calls and evaluation.metrics:
            return evaluation.metrics
        rank_zero_warn(
            f"{STEP}: validation does not run the exported module or logs no metric, so the quality of "
            f"the artifact is reported as the agreement of its outputs with the model's ({OUTPUT_COSINE})"
        )
        probe = result.calibration[-1]
        expected = _evaluated(target, probe)
        return {OUTPUT_COSINE: onnx_quantization.cosine_similarity(expected, probe.call(result.model))}

    def _metric(self, trainer: Any, before: dict[str, float], after: dict[str, float]) -> str:
        known = [name for name in before if name in after]
        if self.monitor is not None:
            if self.monitor not in known:
                raise _Refused(
                    f"{STEP}.monitor={self.monitor!r} was never logged in validation: expected one of {known}"
                )
            return self.monitor
        checkpoint = getattr(trainer, "checkpoint_callback", None)
        monitored = getattr(checkpoint, "monitor", None)
        if monitored in known:
            return str(monitored)
        return next((name for name in known if direction_of(name) == "maximize"), known[0])


def _single_precision_copy(module: nn.Module) -> nn.Module:
    """Return the module, or a copy in float32 where its weights have another floating type."""
    if all(t.dtype is torch.float32 for t in module.parameters() if t.is_floating_point()):
        return module
    return detached_copy(module).float()


def _in_single_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _require_int8(result: QuantizedModel) -> None:
    """Refuse an artifact with nothing quantized in it; warn where most of it stayed as it was."""
    whole, small = onnx_quantization.weight_bytes(result.model)
    if small == 0:
        raise QuantizationError(
            "ONNX Runtime quantized nothing: the network has no convolution, linear or LSTM layer that it takes"
        )
    if small < 0.5 * whole:
        rank_zero_warn(f"{STEP}: {whole - small:,} of {whole:,} bytes of weights are of layers that have no int8 form")


def _check_installed(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MisconfigurationException(
            f"{STEP}.backend='openvino': needs {' and '.join(missing)}: pip install \"lightning-optcore[openvino]\""
        )


def _check_drop(value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value < float("inf")):
        raise MisconfigurationException(f"{STEP}.max_quality_drop={value!r}: expected a number of at least 0, or null")


class _Refused(RuntimeError):
    """No artifact is good enough, or the configuration does not fit what the model logs."""


def _evaluated(module: nn.Module, inputs: Inputs) -> Any:
    training = module.training
    module.eval()
    with torch.no_grad():
        output = inputs.call(module)
    module.train(training)
    return output


def _of_one_structure(batches: Sequence[Inputs]) -> list[Inputs]:
    """Keep the batches whose tensors differ from the first one's in the batch axis only."""

    def form(batch: Inputs) -> list[tuple[int, ...]]:
        axes = batch.batch_axes()
        tensors = zip(batch.tensors(), axes, strict=True)
        return [tuple(0 if i == axis else n for i, n in enumerate(t.shape)) for t, axis in tensors]

    return [batch for batch in batches if form(batch) == form(batches[0])]


def _split(merged: Inputs, count: int, size: int = 32) -> list[Inputs]:
    """Cut the first ``count`` samples into batches of ``size``."""
    return [merged.samples(start, min(start + size, count)) for start in range(0, count, size)]


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


def _drop(metric: str, mode: str | None, before: dict[str, float], after: dict[str, float]) -> float:
    loss = after[metric] - before[metric]
    lower_is_better = mode == "min" if mode is not None else direction_of(metric) == "minimize"
    return loss if lower_is_better else -loss
