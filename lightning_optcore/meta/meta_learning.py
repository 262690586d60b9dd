"""Meta-learning as a callback: any LightningModule learns a start from which few steps and samples suffice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_optcore.measurement.steps import Step
from lightning_optcore.meta.algorithms import in_head, last_layer
from lightning_optcore.meta.functional import Parameters, learned_parameters
from lightning_optcore.meta.learners import PRE_ADAPTATION, GradientLearner, Learner, PrototypeLearner
from lightning_optcore.meta.meta_gradient import BACKENDS, Backend, MetaStep
from lightning_optcore.meta.outer_gradient import judged_steps
from lightning_optcore.meta.tasks import MetaLearningError, TaskBatch, task_batch
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.random_states import random_states, restore_random_states

log = logging.getLogger(__name__)

STEP = "meta_learning"
Algorithm = Literal["maml", "fomaml", "anil", "meta_sgd", "reptile", "protonet"]
ALGORITHMS = ("maml", "fomaml", "anil", "meta_sgd", "reptile", "protonet")
_EVALUATIONS = {"validate": "validation", "test": "test", "predict": "predict", "fit": "validation"}


class MetaLearning(Callback):
    """Trains a module for fast adaptation: its own ``training_step`` is the loss, each batch holds tasks.

    A batch is ``{"support": ..., "query": ...}``, pytrees of tensors with the tasks along the first axis; or a list of
    such mappings, one for each task, where their shapes differ. The module's steps see one task's set at a time, as
    if it were an ordinary batch. In training the module's own optimizer steps along the gradient of the query loss
    after adaptation to the support set. In validation, test and prediction the module is adapted to each task's
    support set, batch norm to its statistics, and its own step sees the query set. What the steps log is the mean over
    the tasks after adaptation; ``pre_adaptation/<name>`` is the same before it.

    The checkpoint holds the learned inner rates, the backend and the state of random numbers: a resumed training ends
    as it would have without the interruption.

    Args:
        algorithm: ``"maml"``; ``"fomaml"``, its first-order form; ``"anil"``, which adapts the head only;
            ``"meta_sgd"``, which learns an inner learning rate for every number; ``"reptile"``; or ``"protonet"``,
            whose batches hold ``(inputs, labels)``, and for which the module's ``forward`` returns embeddings (samples,
            features) while its own steps are not used: ``train/loss``, ``val/acc`` and the like are logged.
        adaptation_steps: Gradient steps of the adaptation, each on the whole support set.
        meta_learning_rate: Sets the learning rate of the module's optimizer; ``None`` leaves it.
        inner_lr: Learning rate of the adaptation; for ``"meta_sgd"`` the first one.
        transfer_learning: Whether validation, test and prediction adapt to the support sets; else they judge the
            learned start as it is.
        backend: ``"vmap"`` computes all tasks at once, ``"loop"`` one after the other, ``"auto"`` times both once.
        chunk_size: Tasks that are computed together: memory grows with it. ``None``: all.
        evaluation_steps: Gradient steps in validation, test and prediction; ``None``: as in training.
        head: For ``"anil"``: names of the modules or parameters that are adapted, ``*`` allowed; ``None``: the last
            module that has parameters of its own.
        query_loss_weights: What the query loss after each step of the adaptation counts in training, one number for
            each: of a start that is to be good after few steps and after many (MAML++, Antoniou et al., 2019).
            ``None``: only what is left after the last step counts.
        rates_per_step: Whether ``"meta_sgd"`` learns other rates for each step; what takes more steps goes on with the
            last.

    Attributes:
        backend_reason: Which backend is used, and why, once that is known.

    Raises:
        MisconfigurationException: If an argument is out of its range, the module optimizes manually, or a batch holds
            no tasks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MetaLearning(algorithm="anil", adaptation_steps=5)], logger=False)
    """

    # Who validates the module without this callback cannot read its batches.
    changes_steps = True

    def __init__(
        self,
        algorithm: Algorithm = "maml",
        adaptation_steps: int = 10,
        meta_learning_rate: float | None = None,
        inner_lr: float = 0.01,
        transfer_learning: bool = True,
        backend: Backend = "auto",
        chunk_size: int | None = None,
        evaluation_steps: int | None = None,
        head: str | Sequence[str] | None = None,
        query_loss_weights: Sequence[float] | None = None,
        rates_per_step: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("algorithm", algorithm, ALGORITHMS)
        _check_choice("backend", backend, BACKENDS)
        for name, steps in (("adaptation_steps", adaptation_steps), ("evaluation_steps", evaluation_steps)):
            if steps is not None and not is_whole(steps, least=1):
                raise MisconfigurationException(f"{STEP}.{name}={steps!r}: expected at least 1, a whole number")
        for name, rate in (("meta_learning_rate", meta_learning_rate), ("inner_lr", inner_lr)):
            if rate is not None and not (is_number(rate) and rate > 0):
                raise MisconfigurationException(f"{STEP}.{name}={rate!r}: expected more than 0")
        if chunk_size is not None and not is_whole(chunk_size, least=1):
            raise MisconfigurationException(
                f"{STEP}.chunk_size={chunk_size!r}: expected at least 1, a whole number, or null"
            )
        if head is not None and algorithm != "anil":
            raise MisconfigurationException(f"{STEP}.head={head}: only algorithm=anil adapts a head")
        if query_loss_weights is not None and algorithm in ("reptile", "protonet"):
            raise MisconfigurationException(
                f"{STEP}.query_loss_weights={list(query_loss_weights)}: algorithm={algorithm} has no query loss after "
                "each step; expected null"
            )
        if rates_per_step and algorithm != "meta_sgd":
            raise MisconfigurationException(f"{STEP}.rates_per_step=True: only algorithm=meta_sgd learns inner rates")
        try:
            judged_steps(adaptation_steps, query_loss_weights, "adaptation_steps")
        except MetaLearningError as error:
            raise MisconfigurationException(f"{STEP}.{error}") from error
        self.algorithm = algorithm
        self.adaptation_steps = adaptation_steps
        self.meta_learning_rate = meta_learning_rate
        self.inner_lr = inner_lr
        self.transfer_learning = transfer_learning
        self.backend = backend
        self.chunk_size = chunk_size
        self.evaluation_steps = evaluation_steps
        self.head = head
        self.query_loss_weights = None if query_loss_weights is None else list(query_loss_weights)
        self.rates_per_step = rates_per_step
        self._head = head
        self._restored_random: Any = None
        self._fitting = False
        self._joined: dict[str, Any] = {}
        self._training: Learner | None = None
        self._evaluating: Learner | None = None
        self._rates: Parameters = {}

    @property
    def backend_reason(self) -> str:
        """Which backend is used, and why."""
        learner = self._training or self._evaluating
        if learner is None or learner.meta_gradient.chosen is None:
            return ""
        return f"{learner.meta_gradient.chosen}: {learner.meta_gradient.reason}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of the module's steps."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{STEP}: {type(pl_module).__name__} has automatic_optimization=False; its training_step must return "
                "the loss of a batch, and leave the optimizer to the Trainer"
            )
        self._leave(pl_module)
        self._fitting = stage == "fit"
        own = pl_module.training_step
        if self._fitting:
            self._training = self._learner(pl_module, own, self.adaptation_steps, self.query_loss_weights)
            self._join(pl_module, "training_step", self._training_step(trainer, pl_module, self._training))
        self._evaluating = self._learner(pl_module, own, self.evaluation_steps or self.adaptation_steps)
        name = f"{_EVALUATIONS[stage]}_step"
        if name == "predict_step" or self.algorithm == "protonet" or is_overridden(name, pl_module):
            step = getattr(pl_module, name)
            step = _of_inputs(step) if name == "predict_step" and not is_overridden(name, pl_module) else step
            self._join(pl_module, name, self._evaluation_step(name, step, self._evaluating))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the outer learning rate, and let the optimizer learn the inner ones."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(f"{STEP}: expected one optimizer, not {len(trainer.optimizers)}")
        if self.algorithm == "meta_sgd":
            self._make_rates(pl_module)
            trainer.optimizers[0].param_groups[0]["params"].extend(self._rates.values())
        if self.meta_learning_rate is not None:
            _set_learning_rate(trainer, self.meta_learning_rate)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what adaptation gained."""
        if not trainer.is_global_zero:
            return
        for name, before in trainer.callback_metrics.items():
            after = trainer.callback_metrics.get(name.removeprefix(PRE_ADAPTATION))
            if name.startswith(PRE_ADAPTATION) and after is not None:
                log.info("%s: %.4f before adaptation, %.4f after", name.removeprefix(PRE_ADAPTATION), before, after)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Average the gradients of the inner rates, which are no parameters of the module, over the ranks."""
        if trainer.world_size > 1:
            for rate in self._rates.values():
                if rate.grad is not None:
                    rate.grad = trainer.strategy.reduce(rate.grad, reduce_op="mean")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner rates, what is adapted, the backend, by which sums are rounded, and random numbers."""
        return {
            "rates": {name: rate.detach() for name, rate in self._rates.items()},
            "algorithm": self.algorithm,
            "head": self._head,
            "backend": self._training.meta_gradient.chosen if self._training is not None else None,
            "random": random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; backend and random numbers only where a training goes on."""
        before = state_dict.get("algorithm", self.algorithm)
        if self._fitting and before != self.algorithm and "meta_sgd" in (before, self.algorithm):
            raise MisconfigurationException(
                f"{STEP}.algorithm={self.algorithm}: the checkpoint is of {before}, and only meta_sgd has inner rates "
                f"to optimize; expected algorithm={before}, or a training that begins with the checkpoint's weights"
            )
        if self.algorithm == "meta_sgd":
            self._rates = dict(state_dict["rates"])
        if self._fitting and self._training is not None:
            if self.backend == "auto" and state_dict["backend"] is not None:
                self._training.meta_gradient.keep(state_dict["backend"], "as before the training was resumed")
            restore_random_states(state_dict["random"])
            self._restored_random = state_dict["random"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore random numbers again in the middle of an epoch: that its loader was made anew drew some."""
        if self._restored_random is not None and batch_idx > 0:
            restore_random_states(self._restored_random)
        self._restored_random = None

    def _learner(
        self, pl_module: LightningModule, training_step: Step, num_steps: int, weights: list[float] | None = None
    ) -> Learner:
        shared = {"backend": self.backend, "chunk_size": self.chunk_size}
        if self.algorithm == "protonet":
            return PrototypeLearner(pl_module, shared)
        adapts = None
        if self.algorithm == "anil":
            try:
                self._head = last_layer(pl_module) if self.head is None else self.head
                adapts = in_head(pl_module, self._head)
            except MetaLearningError as error:
                raise MisconfigurationException(f"{STEP}.{error}") from error
        own = {
            "inner_lr": self.inner_lr,
            "num_inner_steps": num_steps,
            "query_loss_weights": weights,
            "first_order": self.algorithm == "fomaml",
            "adapts": adapts,
            "direction": "displacement" if self.algorithm == "reptile" else "gradient",
        }
        return GradientLearner(pl_module, training_step, {**shared, **own})

    def _training_step(self, trainer: Trainer, pl_module: LightningModule, learner: Learner) -> Step:
        def training_step(batch: Any, batch_idx: int) -> Tensor:
            every = int(getattr(trainer, "log_every_n_steps", 0))
            before = batch_idx == 0 or (bool(every) and (trainer.global_step + 1) % every == 0)
            with _configuration_errors():
                found = learner.train(_tasks_in(batch), batch_idx, self._rates, before=before)
            if trainer.world_size > 1 and pl_module.training:
                _average_buffers(trainer, pl_module)
            return _with_gradients(found, learned_parameters(pl_module), self._rates)

        return training_step

    def _evaluation_step(self, name: str, own: Step, learner: Learner) -> Step:
        def step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            known = self._training.meta_gradient.chosen if self._training is not None else None
            if known is not None and learner.meta_gradient.chosen is None:
                learner.meta_gradient.keep(known, "as in the training")
            with _configuration_errors():
                tasks, places = _tasks_in(batch), (batch_idx, dataloader_idx)
                return learner.evaluate(name, own, tasks, places, self._rates, adapt=self.transfer_learning)

        return step

    def _join(self, pl_module: LightningModule, name: str, step: Step) -> None:
        self._joined[name] = pl_module.__dict__.get(name)
        pl_module.__dict__[name] = step

    def _leave(self, pl_module: LightningModule) -> None:
        for name, earlier in self._joined.items():
            pl_module.__dict__.pop(name, None)
            if earlier is not None:
                pl_module.__dict__[name] = earlier
        self._joined = {}

    def _make_rates(self, pl_module: LightningModule) -> None:
        """Give every parameter its inner learning rates, those of the checkpoint where there is one."""
        for name, parameter in learned_parameters(pl_module).items():
            shape = (self.adaptation_steps, *parameter.shape) if self.rates_per_step else parameter.shape
            rate = self._rates.get(name)
            if rate is None or rate.shape != shape:
                rate = parameter.new_full(shape, self.inner_lr)
            self._rates[name] = rate.detach().to(parameter.device).clone().requires_grad_(True)


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed before: scaling, accumulation and averaging work as with any other."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return (None, None, *(outputs[0] * gradient for gradient in ctx.saved_tensors))


def _with_gradients(found: MetaStep, parameters: Parameters, rates: Parameters) -> Tensor:
    pairs = [(parameters[name], gradient) for name, gradient in found.gradients.items()]
    pairs += [(rates[name], gradient) for name, gradient in found.rate_gradients.items()]
    loss: Tensor = _KnownGradients.apply(found.loss.detach(), [two for _, two in pairs], *(one for one, _ in pairs))
    return loss


def _tasks_in(batch: Any) -> TaskBatch:
    """Return the tasks of a batch."""
    if isinstance(batch, Mapping) and {"support", "query"} <= batch.keys():
        return task_batch((batch["support"], batch["query"]))
    if isinstance(batch, list) and all(
        isinstance(one, Mapping) and {"support", "query"} <= one.keys() for one in batch
    ):
        return task_batch([(one["support"], one["query"]) for one in batch])
    kind = f"a mapping of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise MetaLearningError(
        f"the batch is {kind}: expected a mapping of support and query, with the tasks along the first axis, or a "
        "list of such mappings; EpisodicDataModule makes them of any labelled data"
    )


def _is_task(batch: Any) -> bool:
    return isinstance(batch, Mapping) and {"support", "query"} <= batch.keys()


@contextmanager
def _configuration_errors() -> Iterator[None]:
    try:
        yield
    except MetaLearningError as error:
        raise MisconfigurationException(f"{STEP}: {error}") from error


def _of_inputs(step: Step) -> Step:
    """Return Lightning's own predict step, which hands to ``forward`` what it gets, for the inputs of a pair."""

    def predict_step(query: Any, batch_idx: int) -> Any:
        pair = isinstance(query, (tuple, list)) and len(query) == 2
        return step(query[0] if pair else query, batch_idx)

    return predict_step


def _average_buffers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Average running statistics over the ranks, each of which saw other tasks."""
    for buffer in pl_module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


def _set_learning_rate(trainer: Trainer, rate: float) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = rate
        if "initial_lr" in group:
            group["initial_lr"] = rate
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [rate] * len(config.scheduler.base_lrs)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise MisconfigurationException(f"{STEP}.{name}={value!r}: expected one of {', '.join(choices)}")
