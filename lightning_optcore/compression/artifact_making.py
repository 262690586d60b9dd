"""What callbacks that end a fit with an artifact share: inputs from training, validation, measurement, the folder."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optcore.compression.artifact import Artifact, ArtifactError, write_artifact
from lightning_optcore.compression.export import ExportError
from lightning_optcore.compression.fake_quantization import settings_of
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import QuantizationError, cosine_similarity, weight_bytes
from lightning_optcore.compression.user_validation import UserValidation, guarded_metric
from lightning_optcore.measurement.forward_calls import ForwardRecorder, detached_copy, submodule
from lightning_optcore.measurement.inputs import Inputs, joined
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.measurement.yardstick import check_arguments, measure_alternatives
from lightning_optcore.recipe import Recipe

log = logging.getLogger(__name__)

# The metric that stands in where validation does not run the model.
OUTPUT_COSINE = "output_cosine"


class NoArtifact(RuntimeError):
    """No artifact is good enough, or the configuration does not fit what was trained; the message says why."""


@dataclass(frozen=True)
class Source:
    """What an artifact is made of.

    Args:
        name: Name of the module that the steps call, in the LightningModule.
        module: That module, on the CPU.
        batches: Its inputs, from training.
        validation: The user's validation.
    """

    name: str
    module: nn.Module
    batches: list[Inputs]
    validation: UserValidation


@dataclass(frozen=True)
class Made:
    """A quantized model, and what it is compared with.

    Args:
        original: The module in floating point: what is timed as "before".
        model: The quantized model.
        recipe: All that was done.
        quality_before: Metrics of the module.
        quality_after: Metrics of the quantized model.
    """

    original: nn.Module
    model: OnnxModel
    recipe: Recipe
    quality_before: dict[str, float]
    quality_after: dict[str, float]


class ArtifactCallback(Callback):
    """Records inputs during the training, and writes what :meth:`make` returns at the end of the fit.

    Attributes:
        artifact: The loaded artifact after the fit, or ``None``.
        before: Measurement of the model, or ``None``.
        after: Measurement of the artifact, or ``None``.
        error: Why there is no artifact, or ``None``.
    """

    # The technique's name in messages.
    step: str
    # Whether another callback may make an artifact of the same fit.
    shares_the_fit = True

    def __init__(
        self,
        output_dir: str | None,
        calibration_samples: int,
        batch_sizes: Sequence[int],
        num_threads: int,
        rounds: int,
    ) -> None:
        super().__init__()
        try:
            check_arguments(batch_sizes, num_threads, rounds)
            check_arguments([calibration_samples], 1, 1)
        except ValueError as error:
            wrong = f"batch_sizes=[{calibration_samples!r}]"
            text = str(error).replace(wrong, f"calibration_samples={calibration_samples!r}")
            raise MisconfigurationException(f"{self.step}.{text}") from error
        self.check_text("output_dir", output_dir)
        self.output_dir = output_dir
        self.calibration_samples = calibration_samples
        self.batch_sizes = tuple(batch_sizes)
        self.num_threads = num_threads
        self.rounds = rounds
        self.artifact: Artifact | None = None
        self.before: Measurement | None = None
        self.after: Measurement | None = None
        self.error: str | None = None
        self.training_calls: ForwardRecorder | None = None

    def check_text(self, key: str, value: Any) -> None:
        """Raise :class:`MisconfigurationException` unless an option is text or ``None``."""
        if value is not None and not isinstance(value, (str, Path)):
            raise MisconfigurationException(f"{self.step}.{key}={value!r}: expected text, or null")

    def make(self, trainer: Any, pl_module: Any, source: Source) -> Made:
        """Make the quantized model."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is a place for the artifact before anything is trained for it."""
        settings = settings_of(pl_module)
        if settings is not None and self.shares_the_fit:
            raise MisconfigurationException(
                f"{self.step}: the model computes with rounding already (scheme {settings.scheme}); let "
                "QuantizationAwareTraining make the artifact, with the ranges that it learned"
            )
        folder = Path(self.output_dir or trainer.default_root_dir)
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        for other in trainer.callbacks:
            if other is self or not isinstance(other, ArtifactCallback):
                continue
            alone = next((one.step for one in (self, other) if not one.shares_the_fit), None)
            if alone is not None:
                raise MisconfigurationException(
                    f"{alone}: it makes the artifact itself; remove the other callback of this Trainer that "
                    f"quantizes ({type(other if alone == self.step else self).__name__})"
                )
            if other.output_dir == self.output_dir:
                raise MisconfigurationException(
                    f"{self.step}.output_dir={self.output_dir}: two callbacks quantize into one folder; "
                    "give each its own"
                )
        if stage == "fit" and (not there.is_dir() or not os.access(there, os.W_OK | os.X_OK)):
            raise MisconfigurationException(
                f"{self.step}.output_dir={self.output_dir}: {there} is no folder that can be written; name another"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record the inputs of the model."""
        self.artifact = self.before = self.after = self.error = None
        self.training_calls = ForwardRecorder(pl_module, self.calibration_samples)
        self.training_calls.attach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Stop to record once there are enough samples: later steps cost nothing."""
        calls = self.training_calls
        if calls is not None and calls.samples >= self.calibration_samples:
            calls.detach()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation inputs are no calibration data."""
        if self.training_calls is not None:
            self.training_calls.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        if self.training_calls is not None:
            self.training_calls.detach()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Quantize, check, measure and write."""
        if self.training_calls is not None:
            self.training_calls.detach()
        if trainer.is_global_zero:
            try:
                self._write(trainer, pl_module)
            except (ExportError, QuantizationError, ArtifactError, NoArtifact) as error:
                self.error = str(error)
            except Exception as error:
                # Whatever the user's validation does with an artifact in it, the fit was good.
                log.debug("no artifact", exc_info=True)
                self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self.error is not None:
                rank_zero_warn(f"{self.step}: no artifact. {self.error}")
        trainer.strategy.barrier(self.step)

    def _write(self, trainer: Any, pl_module: Any) -> None:
        device = next((p.device for p in pl_module.parameters()), None)
        pl_module.to("cpu")
        try:
            validation = UserValidation(trainer, pl_module)
            name, batches = self._inputs(validation, pl_module)
            batches = [batch.map(_in_single_precision) for batch in batches]
            made = self.make(trainer, pl_module, Source(name, submodule(pl_module, name), batches, validation))
            before = dict(made.quality_before)
            if OUTPUT_COSINE not in made.quality_after:
                before.pop(OUTPUT_COSINE, None)
            measurements = measure_alternatives(
                {"before": made.original, "after": made.model},
                batches[0],
                batch_sizes=self.batch_sizes,
                num_threads=self.num_threads,
                rounds=self.rounds,
                quality={"before": before, "after": made.quality_after},
            )
        finally:
            if device is not None:
                pl_module.to(device)
        folder = Path(self.output_dir or Path(trainer.default_root_dir) / "artifact")
        self.artifact = write_artifact(folder, made.model, made.recipe, **measurements)
        self.before, self.after = measurements["before"], measurements["after"]
        rank_zero_info(f"{self.step}: wrote {folder}")

    def _inputs(self, validation: UserValidation, pl_module: Any) -> tuple[str, list[Inputs]]:
        """Return the called module's name and batches of its inputs, from training where there was any."""
        training = self.training_calls.inputs if self.training_calls is not None else {}
        name = validation.target()
        if name is None or not training.get(name):
            recorded_in_training = self.training_calls.target() if self.training_calls is not None else None
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

    def quality_of(self, source: Source, model: OnnxModel, probe: Inputs) -> dict[str, float]:
        """Return the metrics of the user's validation with a model in the module's place.

        Args:
            source: What the model was made of.
            model: The model.
            probe: A batch on which the outputs are compared where validation says nothing.
        """
        evaluation = source.validation.of_replacement(source.name, model)
        if evaluation.replacement_calls and evaluation.metrics:
            return evaluation.metrics
        rank_zero_warn(
            f"{self.step}: validation does not run the exported module or logs no metric, so the quality of "
            f"the artifact is reported as the agreement of its outputs with the model's ({OUTPUT_COSINE})"
        )
        expected = _evaluated(single_precision_copy(source.module), probe)
        return {OUTPUT_COSINE: cosine_similarity(expected, probe.call(model))}


def single_precision_copy(module: nn.Module) -> nn.Module:
    """Return the module, or a copy in float32 where its weights have another floating type."""
    if all(t.dtype is torch.float32 for t in module.parameters() if t.is_floating_point()):
        return module
    return detached_copy(module).float()


def require_small_weights(step: str, model: OnnxModel) -> None:
    """Refuse a model with nothing quantized in it; warn where most of it stayed as it was.

    Raises:
        QuantizationError: If no weight is of 8 bits or less.
    """
    whole, small = weight_bytes(model)
    if small == 0:
        raise QuantizationError(
            "ONNX Runtime quantized nothing: the network has no convolution, linear or LSTM layer that it takes"
        )
    if small < 0.5 * whole:
        rank_zero_warn(f"{step}: {whole - small:,} of {whole:,} bytes of weights are of layers that have no int8 form")


def check_openvino(step: str) -> None:
    """Raise :class:`MisconfigurationException` unless the extra ``openvino`` is installed."""
    missing = [name for name in ("nncf", "openvino") if importlib.util.find_spec(name) is None]
    if missing:
        raise MisconfigurationException(
            f"{step}.backend='openvino': needs {' and '.join(missing)}: pip install \"lightning-optcore[openvino]\""
        )


def _in_single_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


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


def required_metric(
    step: str, monitor: str | None, trainer: Any, before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    """Return the metric that must not fall; see :func:`~lightning_optcore.compression.user_validation.guarded_metric`.

    Args:
        step: The technique's name in messages.
        monitor: The name that was given.
        trainer: The Trainer.
        before: Metrics of the module.
        after: Metrics of what takes its place.

    Raises:
        NoArtifact: If it was never logged.
    """
    metric = guarded_metric(trainer, monitor, before, after)
    if metric is None:
        known = [name for name in before if name in after]
        raise NoArtifact(f"{step}.monitor={monitor!r} was never logged in validation: expected one of {known}")
    return metric
