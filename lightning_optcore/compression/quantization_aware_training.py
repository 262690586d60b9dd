"""Quantization-aware training: the model learns to live with the integers that it will be deployed in.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018
(arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optcore.compression import onnx_quantization
from lightning_optcore.compression.artifact_making import (
    OUTPUT_COSINE,
    ArtifactCallback,
    Made,
    NoArtifact,
    Source,
    check_openvino,
    require_small_weights,
)
from lightning_optcore.compression.checkpoints import (
    averaged_models,
    close_ledger,
    ledger_of,
    open_ledger,
    recipe_of,
    write_recipe,
)
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.fake_quantization import (
    SCHEMES,
    FakeQuantization,
    add_fake_quantization,
    fitting_layers,
    quantized_layers,
    ranges_of,
    remove_fake_quantization,
    settings_of,
)
from lightning_optcore.compression.onnx_learned_ranges import export_with_ranges, quantized_with_ranges
from lightning_optcore.compression.onnx_model import RUNTIMES, OnnxModel
from lightning_optcore.compression.training_state import all_finite
from lightning_optcore.measurement.forward_calls import detached_copy, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.modes import fused_attention_off
from lightning_optcore.option_values import is_number
from lightning_optcore.random_states import random_states, restore_random_states
from lightning_optcore.recipe import Step, register_step

STEP = "quantization_aware_training"
# The last share of the training with quantization, in which the ranges stay as they are.
_FROZEN_SHARE = 0.1


@dataclass
class QuantizationAwareTrainingParameters:
    """The recipe step: which layers compute with rounded numbers, and how. Names are those in the whole module."""

    scheme: str = "int8"
    reduce_range: bool = True
    layers: list[str] = field(default_factory=list)


@register_step(STEP, QuantizationAwareTrainingParameters)
def _rebuild(module: nn.Module, parameters: QuantizationAwareTrainingParameters) -> nn.Module:
    add_fake_quantization(module, parameters.layers, FakeQuantization(parameters.scheme, parameters.reduce_range))
    return module


def prepare_quantization_aware(module: nn.Module, *, scheme: str = "int8", reduce_range: bool = True) -> Step:
    """Let a module compute with the numbers that its integer form will have, in place; then train it.

    Parameters keep their names and identity. While ``module.training``, the ranges of activations follow a running
    average of what the module is given; in evaluation they stay.

    Args:
        module: Any module.
        scheme: ``"int8"``: weights with one scale per output channel and activations with learned ranges, of
            convolutions, linear and attention layers, and embeddings with one scale per row. ``"int8_dynamic_int4"``:
            4-bit weights of linear and attention layers in blocks of 32 inputs, activations in 8 bits with scales
            taken at run time, 4-bit embeddings. ``"int4_weight_only"``: the same with activations as they are.
        reduce_range: Weights of ``"int8"`` take 7 of 8 bits, so that no processor saturates.

    Returns:
        The recipe step.

    Raises:
        MisconfigurationException: If the scheme is none of these, no layer fits it, or weights are quantized already.

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> prepare_quantization_aware(net, scheme="int4_weight_only").parameters["layers"]
        ['0', '2']
    """
    _check_scheme(scheme)
    _check_not_quantized(module)
    layers = fitting_layers(module, scheme)
    if not layers:
        taken = "convolution, linear, attention or embedding" if scheme == "int8" else "linear or attention"
        raise MisconfigurationException(
            f"{STEP}.scheme={scheme!r}: {type(module).__name__} has no {taken} layer that it could round"
        )
    add_fake_quantization(module, layers, FakeQuantization(scheme, reduce_range, learning=True))
    return Step(STEP, {"scheme": scheme, "reduce_range": reduce_range, "layers": layers})


def export_quantized(
    module: nn.Module, calibration_inputs: Sequence[Any], *, backend: str = "onnxruntime"
) -> OnnxModel:
    """Export a module that was trained so; its weights and learned ranges are taken as they are.

    Args:
        module: What :func:`prepare_quantization_aware` prepared, trained, on the CPU; left as it was.
        calibration_inputs: Batches of what ``forward`` takes (tensor, tuple or dict of keyword arguments). With
            ``"int8"`` they give the ranges of what is no layer's input (sums and pooled maps).
        backend: ``"onnxruntime"``; or ``"openvino"``, for ``"int8"``.

    Raises:
        ValueError: If the module was not prepared, or there are no inputs.
        ExportError: If the module cannot be exported.
        QuantizationError: If ONNX Runtime does not take the graph.

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> step = prepare_quantization_aware(net)
        >>> loss = net(torch.randn(32, 16)).square().mean()
        >>> export_quantized(net, [torch.randn(32, 16)])(torch.randn(5, 16)).shape
        torch.Size([5, 4])
    """
    settings = settings_of(module)
    batches = [Inputs.of(batch) for batch in calibration_inputs]
    if settings is None or not batches:
        raise ValueError("give a module that prepare_quantization_aware prepared, and at least one batch of its inputs")
    with fused_attention_off():
        return _exported(module, settings, batches, backend)


def _exported(module: nn.Module, settings: FakeQuantization, batches: Sequence[Inputs], backend: str) -> OnnxModel:
    plain = _in_floating_point(module)
    if settings.scheme != "int8":
        prepared = onnx_quantization.prepared(export_onnx(plain, batches[0]))
        widths = onnx_quantization.Widths(weight_bits=4, embedding_bits=4)
        return onnx_quantization.quantized(prepared, "dynamic", batches, widths=widths)
    learned = {name: [(low, high) for low, high in ranges.tolist()] for name, ranges in ranges_of(module).items()}
    ranged = export_with_ranges(plain, batches[0], learned)
    model = quantized_with_ranges(ranged, batches, reduce_range=settings.reduce_range)
    return OnnxModel(model.content, model.signature, runtime=backend)


def _in_floating_point(module: nn.Module) -> nn.Module:
    plain = detached_copy(module).float()
    remove_fake_quantization(plain)
    return plain


class QuantizationAwareTraining(ArtifactCallback):
    """Train with the rounding of the integers that the model will be deployed in, and deploy it at the end of the fit.

    From ``start_epoch`` on, the module that the steps call computes with rounded weights and activations; gradients
    pass the rounding. Nothing is wrapped: names, parameters, optimizers and classes stay. Batch norms need no folding
    in training, because a scale per channel rounds the same before and after it. Checkpoints hold the recipe:
    resuming, testing and loading follow it.

    At the end, ``artifact/`` is written as by ``PostTrainingQuantization``, with the ranges that the training found;
    "before" in its measurement is the module: its quality is that with rounding, its latency and bytes those in
    floating point. The torch module goes on to compute with rounding.

    Args:
        scheme: ``"int8"``, ``"int8_dynamic_int4"`` or ``"int4_weight_only"``, as in
            :func:`prepare_quantization_aware`.
        start_epoch: Epoch from which on weights and activations are rounded; may be a fraction.
        freeze_epoch: Epoch from which on the ranges of activations stay; ``None`` freezes them for the last tenth of
            the training with rounding.
        reduce_range: Weights of ``"int8"`` take 7 of 8 bits, so that no processor saturates.
        backend: ``"onnxruntime"``; or ``"openvino"`` for the scheme ``"int8"`` (extra).
        output_dir: Folder of the artifact; ``<default_root_dir>/artifact`` by default.
        calibration_samples: Training samples for what has no learned range.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.

    Attributes:
        artifact: The loaded artifact after the fit, or ``None``.
        before: Measurement of the model, or ``None``.
        after: Measurement of the artifact, or ``None``.
        error: Why there is no artifact, or ``None``.

    Raises:
        MisconfigurationException: If an option makes no sense, the fit is to end before ``start_epoch``, or the model
            has no layer that fits or is quantized already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[QuantizationAwareTraining("int8", start_epoch=2)], logger=False)
    """

    step = STEP
    shares_the_fit = False

    def __init__(
        self,
        scheme: str = "int8",
        start_epoch: float = 0,
        freeze_epoch: float | None = None,
        reduce_range: bool = True,
        backend: str = "onnxruntime",
        output_dir: str | None = None,
        calibration_samples: int = 512,
        batch_sizes: Sequence[int] = (1, 32),
        num_threads: int = 1,
        rounds: int = 30,
    ) -> None:
        _check_scheme(scheme)
        _check_epochs(start_epoch, freeze_epoch)
        if backend not in RUNTIMES:
            raise MisconfigurationException(f"{STEP}.backend={backend!r}: expected one of {', '.join(RUNTIMES)}")
        if backend == "openvino":
            if scheme != "int8":
                raise MisconfigurationException(
                    f"{STEP}.scheme={scheme!r}: backend='openvino' runs int8 alone; take backend=onnxruntime"
                )
            check_openvino(STEP)
        super().__init__(output_dir, calibration_samples, batch_sizes, num_threads, rounds)
        self.scheme = scheme
        self.start_epoch = start_epoch
        self.freeze_epoch = freeze_epoch
        self.reduce_range = reduce_range
        self.backend = backend
        # Callbacks before it choose by what is fast there.
        self.deploys_to = "onnxruntime-int8" if scheme == "int8" else "onnxruntime"
        self._target: str | None = None
        self._settings: FakeQuantization | None = None
        self._opened = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to keep the recipe in checkpoints."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _check_not_quantized(pl_module)
        if not self._opened:
            open_ledger(pl_module, trainer)
            self._opened = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the schedule, and learn from the first batch which module the steps call."""
        super().on_train_start(trainer, pl_module)
        end = _planned_epochs(trainer)
        if self.start_epoch >= end:
            raise MisconfigurationException(
                f"{STEP}.start_epoch={self.start_epoch}: the fit ends after {end:g} epochs; expected less"
            )
        self._settings = settings_of(pl_module)
        if self._settings is not None and self._settings.scheme != self.scheme:
            raise MisconfigurationException(
                f"{STEP}.scheme={self.scheme!r}: the model is being trained with {self._settings.scheme!r} already"
            )
        if self._settings is not None and STEP not in ledger_of(pl_module).steps:
            self._record(pl_module, self._settings, list(quantized_layers(pl_module)))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to round, and freeze the ranges, where the schedule says so."""
        length = trainer.num_training_batches
        epoch = trainer.current_epoch + (batch_idx / length if length != float("inf") else 0)
        if self._target is None and self.training_calls is not None:
            self._target = self.training_calls.target()
        if self._settings is None and epoch >= self.start_epoch and self._target is not None:
            self._begin(trainer, pl_module)
        if self._settings is not None:
            self._settings.learning = epoch < self._frozen_from(trainer)

    def _frozen_from(self, trainer: Any) -> float:
        if self.freeze_epoch is not None:
            return self.freeze_epoch
        end = _planned_epochs(trainer)
        return end if end == float("inf") else end - _FROZEN_SHARE * (end - self.start_epoch)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        assert self._target is not None
        target = submodule(pl_module, self._target)
        prefix = f"{self._target}." if self._target else ""
        step = prepare_quantization_aware(target, scheme=self.scheme, reduce_range=self.reduce_range)
        layers = [(prefix + layer).rstrip(".") for layer in step.parameters["layers"]]
        for average in averaged_models(trainer):
            add_fake_quantization(average, layers, FakeQuantization(self.scheme, self.reduce_range))
        self._settings = settings_of(target)
        assert self._settings is not None
        self._record(pl_module, self._settings, layers)
        rank_zero_info(f"{STEP}: {len(layers)} layers of {type(target).__name__} compute in {self.scheme} from now on")

    @staticmethod
    def _record(pl_module: Any, settings: FakeQuantization, layers: list[str]) -> None:
        parameters = {"scheme": settings.scheme, "reduce_range": settings.reduce_range, "layers": layers}
        ledger_of(pl_module).record(STEP, Step(STEP, parameters))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Let all ranks agree on the ranges."""
        super().on_train_batch_end(trainer, pl_module)
        if self._settings is not None and self._settings.learning and trainer.world_size > 1:
            agree_on_ranges(list(ranges_of(pl_module).values()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Freeze the ranges."""
        if self._settings is not None:
            self._settings.learning = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the recipe into checkpoints that are saved after the fit, too."""
        write_recipe(pl_module, checkpoint)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module's hooks as they were."""
        super().on_exception(trainer, pl_module, exception)
        self._close(pl_module)

    def _close(self, pl_module: Any) -> None:
        if self._settings is not None:
            self._settings.learning = False
        if self._opened:
            close_ledger(pl_module)
            self._opened = False

    def state_dict(self) -> dict[str, Any]:
        """Return which module the steps call, and the random state, so that a resumed run is the same run."""
        return {"target": self._target, "random": random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self._target = state_dict["target"]
        restore_random_states(state_dict["random"])

    def make(self, trainer: Any, pl_module: Any, source: Source) -> Made:
        """Export with the learned ranges."""
        if settings_of(source.module) is None:
            raise NoArtifact(
                f"the fit ended before {STEP}.start_epoch={self.start_epoch}, or validation calls another module: "
                "what it calls was not trained with rounding"
            )
        if not all_finite(source.module.parameters()):
            raise NoArtifact(
                "the weights are not finite (NaN or infinity): the training diverged; lower the learning rate"
            )
        quality_before = {**source.validation.of_model(), OUTPUT_COSINE: 1.0}
        model = export_quantized(source.module, source.batches, backend=self.backend)
        require_small_weights(STEP, model)
        quality_after = self.quality_of(source, model, source.batches[-1])
        return Made(_in_floating_point(source.module), model, recipe_of(pl_module), quality_before, quality_after)


def agree_on_ranges(ranges: Sequence[Tensor]) -> None:
    """Give all ranks the widest ranges of any, in place."""
    if not ranges:
        return
    sign = ranges[0].new_tensor([1.0, -1.0])
    flat = torch.cat([one * sign for one in ranges])
    torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MIN)
    for one, agreed in zip(ranges, flat.split([len(one) for one in ranges]), strict=True):
        one.copy_(agreed * sign)


def _planned_epochs(trainer: Any) -> float:
    limits = [float("inf")]
    if trainer.max_epochs not in (None, -1):
        limits.append(trainer.max_epochs)
    if trainer.max_steps not in (None, -1) and trainer.num_training_batches not in (0, float("inf")):
        limits.append(trainer.max_steps * trainer.accumulate_grad_batches / trainer.num_training_batches)
    return float(min(limits))


def _check_scheme(scheme: Any) -> None:
    if scheme not in SCHEMES:
        raise MisconfigurationException(f"{STEP}.scheme={scheme!r}: expected one of {', '.join(SCHEMES)}")


def _check_epochs(start: Any, freeze: Any) -> None:
    for key, value in (("start_epoch", start), ("freeze_epoch", freeze)):
        if not (is_number(value) and 0 <= value < float("inf")) and not (key == "freeze_epoch" and value is None):
            raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected a number of at least 0")
    if freeze is not None and freeze < start:
        raise MisconfigurationException(f"{STEP}.freeze_epoch={freeze}: expected at least start_epoch={start}")


def _check_not_quantized(module: nn.Module) -> None:
    """Refuse what another tool quantized or prepared: rounding twice trains something that nobody deploys."""
    for name, child in module.named_modules():
        kinds = [type(p.data).__name__ for p in child.parameters(recurse=False) if type(p.data) is not Tensor]
        fake = next((key for key in ("weight_fake_quant", "weight_fake_quantizer") if hasattr(child, key)), None)
        quantized = ".quantized" in type(child).__module__
        if kinds or fake or quantized:
            what = (
                f"its weight is a {kinds[0]}" if kinds else f"it is a {type(child).__module__}.{type(child).__name__}"
            )
            raise MisconfigurationException(
                f"{STEP}: the layer {name or type(child).__name__} is quantized already ({what}); "
                "give the model in floating point"
            )
