"""Training a supernet's weights and its architecture together.

It is a callback on a Trainer's own automatic optimization, so that gradient clipping, accumulation, schedulers,
precision and other callbacks go on working.

Sources: see :mod:`lightning_optcore.nas.supernet`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optcore.measurement.steps import call_step
from lightning_optcore.nas._lightning_compat import on_device, on_training_loader
from lightning_optcore.nas._nni_compat import nni_nas
from lightning_optcore.nas.split_loader import split_training_loader
from lightning_optcore.nas.supernet import (
    Architecture,
    SupernetError,
    alphas,
    best_architecture,
    collect,
    probabilities,
)
from lightning_optcore.nas.supernet_callbacks import (
    choose_in,
    supernet_in,
    unobserved,
)
from lightning_optcore.random_states import random_states, restore_random_states

# By label and option: what it costs.
CostTable = Mapping[str, Mapping[Any, float]]
# From the probability of every option, by label, to the expected cost.
ExpectedCost = Callable[[Mapping[str, Mapping[Any, Tensor]]], Tensor]

_BETAS = (0.5, 0.999)


def expected_cost(model_space: nn.Module, example_input: Tensor, what: Literal["flops", "parameters"]) -> ExpectedCost:
    """Return a function from the probabilities of options to a space's expected cost, which has a gradient.

    Args:
        model_space: The ``ModelSpace``, before it became a supernet.
        example_input: A batch of one.
        what: ``"flops"`` (as NNI counts them: multiply-accumulates) or ``"parameters"``.

    Raises:
        SupernetError: If ``what`` is neither.

    Example:
        >>> from lightning_optcore.nas._nni_compat import nni_nas
        >>> class Space(nni_nas().nn.ModelSpace):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nni_nas().nn.LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], label="layer")
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> cost = expected_cost(Space(), torch.zeros(1, 4), "parameters")
        >>> float(cost({"layer": {0: torch.tensor(0.25), 1: torch.tensor(0.75)}}))
        17.0
    """
    nas = nni_nas()
    profilers = {"flops": nas.profiler.FlopsProfiler, "parameters": nas.profiler.NumParamsProfiler}
    if what not in profilers:
        raise SupernetError(f"what={what!r}: expected flops or parameters")
    expression = profilers[what](copy.deepcopy(model_space), example_input).expression

    def cost(odds: Mapping[str, Mapping[Any, Tensor]]) -> Tensor:
        return torch.as_tensor(nas.expressions.expression_expectation(expression, dict(odds)))

    return cost


def expected_cost_of_table(table: CostTable, odds: Mapping[str, Mapping[Any, Tensor]]) -> Tensor:
    """Return the expected sum of the costs in a table, e.g. of measured latencies in ms.

    Raises:
        SupernetError: If the table names a label or lacks an option of the supernet.

    Example:
        >>> odds = {"width": {8: torch.tensor(0.5), 16: torch.tensor(0.5)}}
        >>> float(expected_cost_of_table({"width": {8: 1.0, 16: 3.0}}, odds))
        2.0
    """
    total = torch.zeros(())
    for label, costs in table.items():
        if label not in odds:
            raise SupernetError(f"cost.{label}: the supernet weighs {', '.join(odds) or 'nothing'}")
        # A table from a file has text for keys.
        known = {str(option): cost for option, cost in costs.items()}
        for option, probability in odds[label].items():
            if str(option) not in known:
                raise SupernetError(f"cost.{label}: has {', '.join(known)}, but not {option}")
            total = total.to(probability.device) + probability * known[str(option)]
    return total


class DifferentiableSearch(Callback):
    """Learns an architecture while its weights are trained: DARTS of first order, GumbelDARTS or ProxylessNAS.

    The LightningModule holds a supernet of :func:`lightning_optcore.nas.supernet.supernet`, of kind ``darts``,
    ``gumbel_darts`` or ``proxyless``. Before each step of the weights the architecture takes one, on a part of the
    training set that the weights never see. When training ends, ``callback.architecture`` is what was found.
    Resumed from a checkpoint of an epoch's end, training ends as it would have without the interruption.

    Args:
        learning_rate: Of the architecture (Adam).
        weight_decay: Of the architecture.
        validation_fraction: Which part of the training set the architecture learns from.
        warmup_epochs: For how many epochs only the weights learn.
        temperature: Of ``gumbel_darts``, at the beginning and at the end.
        cost: What an architecture costs: a table ``{label: {option: cost}}``, whose costs are summed, e.g. of measured
            latencies in ms; or a function like that of :func:`expected_cost`.
        cost_weight: Weight of the cost in the loss of the architecture.
        cost_limits: Least and greatest cost, either of which may be ``None``: only what is below or above is
            punished, by its share. Without them every cost is, relative to that at the beginning. A least one keeps a
            search from ending in skip connections only.
        seed: Of the split and of the order of batches.

    Raises:
        MisconfigurationException: If an argument is out of its range; if there is not one such supernet; for manual
            optimization, a loss scaler (``16-mixed``) or several devices; if the training set cannot be split.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DifferentiableSearch(learning_rate=0.01)], max_epochs=50, logger=False)
    """

    def __init__(
        self,
        learning_rate: float = 3e-4,
        weight_decay: float = 1e-3,
        validation_fraction: float = 0.5,
        warmup_epochs: int = 0,
        temperature: Sequence[float] = (1.0, 0.33),
        cost: CostTable | ExpectedCost | None = None,
        cost_weight: float = 0.1,
        cost_limits: Sequence[float | None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _positive("learning_rate", learning_rate)
        if not 0 < validation_fraction < 1:
            raise MisconfigurationException(f"validation_fraction={validation_fraction}: expected 0 < fraction < 1")
        if len(temperature) != 2 or min(temperature) <= 0:
            raise MisconfigurationException(f"temperature={temperature}: expected two positive numbers, first and last")
        for name, value in (("weight_decay", weight_decay), ("warmup_epochs", warmup_epochs)):
            if value < 0:
                raise MisconfigurationException(f"{name}={value}: expected 0 or more")
        if cost_limits is not None:
            _check_limits(cost, cost_limits)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.warmup_epochs = warmup_epochs
        self.temperature = tuple(temperature)
        self.cost = cost
        self.cost_weight = cost_weight
        self.cost_limits = None if cost_limits is None else tuple(cost_limits)
        self.seed = seed
        self._network: nn.Module | None = None
        self._alphas: list[nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Any] | None = None
        self._loader: DataLoader | None = None
        self._batches: Iterator[Any] | None = None
        self._fitting = False
        # Batches that the weights saw, and those that the architecture did.
        self._trained = 0
        self._stepped = 0
        self._first_cost: float | None = None

    @property
    def architecture(self) -> Architecture:
        """What the architecture parameters favour now.

        Raises:
            SupernetError: If nothing was trained yet.
        """
        if self._network is None:
            raise SupernetError("no architecture yet: DifferentiableSearch was not trained")
        return best_architecture(self._network)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the architecture's parameters away from the optimizer of the weights, and its part of the data."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._refuse(trainer, pl_module)
        self._network = supernet_in(pl_module, ("darts", "gumbel_darts", "proxyless"), "SampledTraining")
        self._alphas = list({id(alpha): alpha for alpha in alphas(self._network).values()}.values())
        self._optimizer = self._restored = self._first_cost = self._batches = None
        self._trained = self._stepped = 0
        for alpha in self._alphas:
            alpha.requires_grad_(False)
        on_training_loader(trainer, self._split)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or continue, the optimizer of the architecture, whose parameters are on their device by now."""
        self._optimizer = torch.optim.Adam(
            self._alphas, self.learning_rate, betas=_BETAS, weight_decay=self.weight_decay
        )
        if self._restored is not None:
            self._optimizer.load_state_dict(self._restored)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cool the noise of ``gumbel_darts``."""
        assert self._network is not None
        first, last = self.temperature
        epochs = trainer.max_epochs or 0
        done = min(1.0, trainer.current_epoch / epochs) if epochs > 0 else 0.0
        for module in self._network.modules():
            if isinstance(module, nni_nas().supermodule.differentiable.GumbelSoftmax):
                module.tau = first + (last - first) * done

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the architecture take its step, once for every step of the weights."""
        assert self._network is not None
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.current_epoch >= self.warmup_epochs:
            self._step(trainer, pl_module, batch_idx)
        collect(self._network, "resample")

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the batch."""
        self._trained += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a proxyless supernet be judged by what it favours."""
        choose_in(pl_module, "proxyless", best_architecture)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the supernet as it was: with gradients for all."""
        for alpha in self._alphas:
            alpha.requires_grad_(True)
        self._batches = self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer of the architecture, the places in the data, and the state of random numbers."""
        optimizer = self._optimizer.state_dict() if self._optimizer is not None else self._restored
        return {
            "optimizer": optimizer,
            "trained": self._trained,
            "stepped": self._stepped,
            "first_cost": self._first_cost,
            "random": random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        if not self._fitting:
            return
        self._restored = state_dict["optimizer"]
        self._trained, self._stepped = state_dict["trained"], state_dict["stepped"]
        self._first_cost = state_dict["first_cost"]
        restore_random_states(state_dict["random"])

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{name}.automatic_optimization=False: its training_step steps the weights itself, also where only the "
                "architecture should learn; expected automatic optimization"
            )
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"trainer.devices: {trainer.world_size} processes would each learn an architecture of their own; "
                "expected devices=1"
            )
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            raise MisconfigurationException(
                f"trainer.precision={trainer.precision}: its loss scaler follows the gradients of the weights only; "
                "expected bf16-mixed or 32-true"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{name}.training_step takes dataloader_iter, and would take batches of the weights; expected batch"
            )

    def _split(self, loader: Any) -> DataLoader:
        weights, self._loader = split_training_loader(
            loader, self.validation_fraction, self.seed, lambda: self._trained, lambda: self._stepped
        )
        self._batches = None
        return weights

    def _step(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        assert self._network is not None and self._loader is not None and self._optimizer is not None
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = on_device(trainer, next(self._batches))
        self._stepped += 1
        collect(self._network, "resample")
        with _only_learns(pl_module, self._alphas), trainer.precision_plugin.train_step_context():
            output = call_step(pl_module.training_step, batch, batch_idx)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is None:
                return
            (loss + self._penalty(loss)).backward()
            self._optimizer.step()

    def _penalty(self, loss: Tensor) -> Tensor:
        """Return the expected cost's share of the loss."""
        if self.cost is None or self._network is None:
            return loss.new_zeros(())
        odds = probabilities(self._network)
        cost = self.cost(odds) if callable(self.cost) else expected_cost_of_table(self.cost, odds)
        if self.cost_limits is None:
            if self._first_cost is None:
                self._first_cost = float(cost.detach())
            return self.cost_weight * cost / self._first_cost
        least, greatest = self.cost_limits
        excess = cost.new_zeros(())
        if least is not None:
            excess = excess + torch.relu(1 - cost / least)
        if greatest is not None:
            excess = excess + torch.relu(cost / greatest - 1)
        return self.cost_weight * excess


@contextmanager
def _only_learns(pl_module: LightningModule, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let a training step change nothing but the gradients of some parameters.

    Weights get none and keep what they accumulated; statistics of batch norm, running metrics and the log stay.
    """
    weights = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    for weight in weights:
        weight.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        with unobserved(pl_module):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise MisconfigurationException(f"{name}={value}: expected a positive number")


def _check_limits(cost: Any, limits: Sequence[float | None]) -> None:
    if cost is None:
        raise MisconfigurationException(f"cost_limits={limits} without cost: expected a table of costs or a function")
    given = [limit for limit in limits if limit is not None]
    if len(limits) != 2 or not given or min(given) <= 0 or given != sorted(given):
        raise MisconfigurationException(f"cost_limits={limits}: expected the least and the greatest, both positive")
