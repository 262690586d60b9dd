"""How a LightningModule's own steps learn from tasks, and judge them: by gradient steps, or by prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_optcore.measurement.steps import Step, call_step
from lightning_optcore.meta.functional import Parameters, functional
from lightning_optcore.meta.meta_gradient import MetaGradient, MetaStep
from lightning_optcore.meta.prototypes import num_classes, prototype_logits, prototype_loss, with_support
from lightning_optcore.meta.recorded_step import RecordedStep, replaced
from lightning_optcore.meta.tasks import OnePerTask, TaskBatch, stacked

PRE_ADAPTATION = "pre_adaptation/"


class Learner(Protocol):
    """What a callback does with a batch of tasks."""

    meta_gradient: MetaGradient

    def train(self, tasks: TaskBatch, batch_idx: int, rates: Parameters, *, before: bool) -> MetaStep:
        """Return loss and gradients of a batch of tasks, and log; ``before`` adaptation, too, if so."""

    def evaluate(
        self, name: str, own: Step, tasks: TaskBatch, places: tuple[int, int], rates: Parameters, *, adapt: bool
    ) -> Any:
        """Return what the step ``own``, called ``name``, gives of the tasks; ``places`` of the batch and its loader."""


class GradientLearner:
    """Learns by adaptation in gradient steps, whose loss is the module's own training step.

    Args:
        pl_module: The module.
        training_step: Its own.
        options: Of :class:`~lightning_optcore.meta.MetaGradient`.
    """

    def __init__(self, pl_module: LightningModule, training_step: Step, options: Mapping[str, Any]) -> None:
        self._pl_module = pl_module
        self._recorded = RecordedStep(pl_module, training_step)
        self.meta_gradient = MetaGradient(pl_module, self._recorded.loss, has_aux=True, **options)

    def train(self, tasks: TaskBatch, batch_idx: int, rates: Parameters, *, before: bool) -> MetaStep:
        """Return loss and gradients, and log what the training step does, of the query sets after adaptation."""
        self._recorded.batch_idx = batch_idx
        if before:
            _log_before(self._pl_module, self._recorded, tasks)
        found = self.meta_gradient(tasks, rates)
        self._recorded.log(found.aux, tasks.count)
        return found

    def evaluate(
        self, name: str, own: Step, tasks: TaskBatch, places: tuple[int, int], rates: Parameters, *, adapt: bool
    ) -> Any:
        """Return what the step gives of the query sets, after adaptation if ``adapt``."""
        if name != "predict_step" and adapt:
            recorded = RecordedStep(self._pl_module, own)
            recorded.batch_idx, recorded.dataloader_idx = places
            _log_before(self._pl_module, recorded, tasks)
        fast = self.meta_gradient.adapted(tasks, rates) if adapt else [{}] * tasks.count
        step = functional(self._pl_module, lambda _, query: call_step(own, query, *places))
        with _each_task_counts_alike(self._pl_module):
            return _together([step(fast[i], {}, tasks.pair(i)[1]) for i in range(tasks.count)])


class PrototypeLearner:
    """Learns embeddings: a sample is of the class to whose mean embedding it is nearest.

    Args:
        pl_module: Its ``forward`` returns embeddings (samples, features).
        options: ``backend`` and ``chunk_size`` of :class:`~lightning_optcore.meta.MetaGradient`.
    """

    def __init__(self, pl_module: LightningModule, options: Mapping[str, Any]) -> None:
        self._pl_module = pl_module
        self._classes = 0
        self.meta_gradient = MetaGradient(pl_module, self._loss, num_inner_steps=0, **options)

    def _loss(self, module: nn.Module, pair: Any) -> Tensor:
        return prototype_loss(module, pair, classes=self._classes)

    def train(self, tasks: TaskBatch, batch_idx: int, rates: Parameters, *, before: bool) -> MetaStep:
        """Return loss and gradients, and log ``train/loss``."""
        self._classes = num_classes(tasks)
        found = self.meta_gradient(with_support(tasks))
        self._pl_module.log("train/loss", found.loss, batch_size=tasks.count)
        return found

    def evaluate(
        self, name: str, own: Step, tasks: TaskBatch, places: tuple[int, int], rates: Parameters, *, adapt: bool
    ) -> Any:
        """Return the logits of the query sets, and log loss and accuracy."""
        classes = num_classes(tasks)
        pairs = [tasks.pair(i) for i in range(tasks.count)]
        logits = [prototype_logits(self._pl_module, support, query[0], classes) for support, query in pairs]
        if name != "predict_step":
            stage = {"validation_step": "val"}.get(name, name.removesuffix("_step"))
            labels = [query[1] for _, query in pairs]
            losses = [nn.functional.cross_entropy(one, of) for one, of in zip(logits, labels, strict=True)]
            hits = [(one.argmax(1) == of).float().mean() for one, of in zip(logits, labels, strict=True)]
            for quality, values in (("loss", losses), ("acc", hits)):
                self._pl_module.log(f"{stage}/{quality}", torch.stack(values).mean(), batch_size=tasks.count)
        return _together(logits)


def _log_before(pl_module: LightningModule, recorded: RecordedStep, tasks: TaskBatch) -> None:
    """Log what a step would of the query sets before adaptation; nothing in the module changes by that."""
    buffers = {name: value.detach() for name, value in pl_module.named_buffers()}
    step, device = functional(pl_module, recorded.output), pl_module.device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        aux = OnePerTask(
            step({}, {name: value.clone() for name, value in buffers.items()}, tasks.pair(i)[1])[1]
            for i in range(tasks.count)
        )
    recorded.log(aux, tasks.count, PRE_ADAPTATION, keep_metrics=False)


def _together(outputs: list[Any]) -> Any:
    """Return the outputs of tasks stacked, where their shapes allow it."""
    try:
        return stacked(outputs)
    except (RuntimeError, ValueError):
        return outputs


@contextmanager
def _each_task_counts_alike(pl_module: LightningModule) -> Iterator[None]:
    own: Callable[..., None] = pl_module.log

    def log(*arguments: Any, **options: Any) -> None:
        own(*arguments, **{"batch_size": 1, **options})

    with replaced(pl_module, "log", log):
        yield
