"""A meta-learned start and a few labelled batches become an adapted model, deployed and measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_optcore.compression.artifact_making import ArtifactCallback, Made, Source, single_precision_copy
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.measurement.forward_calls import submodule
from lightning_optcore.meta.adaptation import take
from lightning_optcore.meta.algorithms import in_head
from lightning_optcore.meta.meta_gradient import MetaGradient
from lightning_optcore.meta.recorded_step import RecordedStep
from lightning_optcore.meta.tasks import MetaLearningError
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.recipe import register_step

STEP = "fast_adaptation"
_META_LEARNING = "MetaLearning"


@dataclass(frozen=True)
class FastAdaptationParameters:
    """What the recipe says of an adaptation.

    Args:
        num_inner_steps: Gradient steps.
        inner_lr: Their learning rate; ``None`` where the checkpoint's learned rates were used.
        num_batches: Labelled batches.
        adapted: Names of the parameters and buffers that changed.
    """

    num_inner_steps: int
    inner_lr: float | None
    num_batches: int
    adapted: list[str]


@register_step(STEP, FastAdaptationParameters)
def _same_shape(module: nn.Module, parameters: FastAdaptationParameters) -> nn.Module:
    return module


class FastAdaptation(ArtifactCallback):
    """Makes of ``trainer.fit`` an adaptation: some gradient steps on the first training batches, and no more.

    Each step is on all these batches, and the loss is the module's own ``training_step``, without its optimizer: what
    :class:`~lightning_optcore.callbacks.MetaLearning` trained the module for. What comes out is an artifact (ONNX, in
    floating point), the module's own validation before and after, and the measurements of both.

    Args:
        checkpoint: Of a training with MetaLearning; its weights are the start, and the inner rates that ``meta_sgd``
            learned are used. ``None``: the module as it is.
        num_inner_steps: Gradient steps.
        inner_lr: Their learning rate, where the checkpoint has none.
        num_batches: So many training batches are adapted to.
        head: Names of the modules or parameters that are adapted, ``*`` allowed; ``None``: those of a checkpoint of
            ``anil``, else all.
        output_dir: Folder of the artifact; ``None``: ``artifact`` in the Trainer's.
        batch_sizes: Batch sizes of the measurement.
        num_threads: Threads of the measurement.
        rounds: Rounds of the measurement.

    Attributes:
        artifact: The loaded artifact after the fit, or ``None``.
        before: Measurement of the start, or ``None``.
        after: Measurement of the artifact, or ``None``.
        error: Why there is no artifact, or ``None``.

    Raises:
        MisconfigurationException: If an option makes no sense, or the checkpoint is missing or of another module.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FastAdaptation(num_inner_steps=5)], logger=False)
    """

    step = STEP

    def __init__(
        self,
        checkpoint: str | None = None,
        num_inner_steps: int = 10,
        inner_lr: float = 0.01,
        num_batches: int = 1,
        head: str | Sequence[str] | None = None,
        output_dir: str | None = None,
        batch_sizes: Sequence[int] = (1, 32),
        num_threads: int = 1,
        rounds: int = 30,
    ) -> None:
        super().__init__(output_dir, 64, batch_sizes, num_threads, rounds)
        for name, value in (("num_inner_steps", num_inner_steps), ("num_batches", num_batches)):
            if not is_whole(value, least=1):
                raise MisconfigurationException(f"{STEP}.{name}={value!r}: expected at least 1, a whole number")
        if not (is_number(inner_lr) and inner_lr > 0):
            raise MisconfigurationException(f"{STEP}.inner_lr={inner_lr!r}: expected more than 0")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise MisconfigurationException(
                f"{STEP}.checkpoint={checkpoint}: no such file; give a checkpoint of a training with MetaLearning"
            )
        self.checkpoint = checkpoint
        self.num_inner_steps = num_inner_steps
        self.inner_lr = inner_lr
        self.num_batches = num_batches
        self.head = head
        self._rates: dict[str, Tensor] = {}
        self._head = head
        self._start: dict[str, Tensor] = {}
        self._adapted: list[str] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the checkpoint's weights and inner rates."""
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"trainer.devices: {trainer.world_size} processes would adapt to other batches each; expected devices=1"
            )
        self._rates, self._head = {}, self.head
        if self.checkpoint is not None:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            _load(pl_module, saved.get("state_dict", saved), self.checkpoint)
            states = saved.get("callbacks", {})
            state: dict[str, Any] = next((states[key] for key in states if key.startswith(_META_LEARNING)), {})
            self._rates = {name: rate.to(pl_module.device) for name, rate in state.get("rates", {}).items()}
            if state.get("algorithm") == "protonet":
                rank_zero_warn(
                    f"{STEP}.checkpoint={self.checkpoint}: was trained with algorithm=protonet, for no gradient steps; "
                    "MetaLearning with protonet is what adapts it"
                )
            self._head = self.head if self.head is not None else state.get("head")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Adapt; nothing else is trained."""
        super().on_train_start(trainer, pl_module)
        loader = itertools.islice(iter(trainer.train_dataloader), self.num_batches)
        batches = [trainer.strategy.batch_to_device(batch, pl_module.device) for batch in loader]
        if not batches:
            raise MisconfigurationException(f"{STEP}: the training loader has no batch to adapt to")
        recorded = RecordedStep(pl_module, pl_module.training_step)
        try:
            with torch.no_grad():
                for batch in batches:
                    # What the module's parts are called with, for the artifact.
                    recorded.output(pl_module, batch)
            self.training_calls.detach()  # type: ignore[union-attr]
            self._adapt(pl_module, recorded, batches)
        except MetaLearningError as error:
            raise MisconfigurationException(f"{STEP}.{error}") from error
        trainer.should_stop = True

    def _adapt(self, pl_module: Any, recorded: RecordedStep, batches: list[Any]) -> None:
        def loss_fn(module: nn.Module, given: list[Any]) -> Tensor:
            return torch.stack([recorded.loss(module, batch)[0] for batch in given]).mean()

        self._start = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        step = MetaGradient(
            pl_module,
            loss_fn,
            inner_lr=self.inner_lr,
            num_inner_steps=self.num_inner_steps,
            adapts=None if self._head is None else in_head(pl_module, self._head),
            backend="loop",
        )
        (fast,) = step.adapted([(batches, batches)], self._rates)
        self._adapted = take(pl_module, fast)

    def make(self, trainer: Any, pl_module: Any, source: Source) -> Made:
        """Export the adapted module; before is the start."""
        model = export_onnx(single_precision_copy(source.module), source.batches[0])
        adapted = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.load_state_dict(self._start)
        try:
            original = single_precision_copy(submodule(pl_module, source.name))
            before = source.validation.of_model()
        finally:
            pl_module.load_state_dict(adapted)
        recipe = recipe_of(pl_module).then(
            STEP,
            num_inner_steps=self.num_inner_steps,
            inner_lr=None if self._rates else self.inner_lr,
            num_batches=self.num_batches,
            adapted=self._adapted,
        )
        return Made(original, model, recipe, before, self.quality_of(source, model, source.batches[0]))


def _load(pl_module: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    try:
        pl_module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise MisconfigurationException(f"{STEP}.checkpoint={path}: is of another module ({reason})") from error
