"""Learning without forgetting: on the new task's samples the outputs stay near what they were after the last one.

Li and Hoiem, "Learning without Forgetting", ECCV 2016 (arXiv:1606.09282).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optcore.compression.distillation import distillation_loss
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.stepping import (
    Call,
    calls_recorded,
    check_network,
    join_loss,
    last_call,
    last_logits,
    loss_aside,
)
from lightning_optcore.option_values import is_number

STEP = "learning_without_forgetting"


def retention_loss(present: Tensor, former: Tensor, temperature: float = 2.0) -> Tensor:
    """Return how far outputs are from former ones; outputs that came since, at the end of axis 1, are free.

    Args:
        present: Logits (samples, classes, ...).
        former: Logits of the same samples, of as many classes or fewer.
        temperature: Softens both distributions.

    Raises:
        ValueError: If the shapes do not go together.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 5.0]])
        >>> float(retention_loss(logits, logits[:, :2]))
        0.0
    """
    return distillation_loss(present[:, : former.shape[1]], former, temperature=temperature)


class LearningWithoutForgetting(TaskCallback):
    """Keep the outputs on the new task's samples near what the model gave after the last task; no sample is kept.

    A task is a fit: give one callback object to the fits of one module, one after the other. It needs a network
    that returns logits, as a tensor (samples, classes, ...) or under ``logits``. Works with automatic and manual
    optimization (there the first ``manual_backward`` of a step carries it).

    Args:
        strength: How much more than your own loss the distance weighs. The larger of both weighs 1, so that no strength
            makes longer steps, which would diverge.
        temperature: Softens the distributions.
        network: Name of the submodule whose outputs are kept, where a step calls several; ``None``: the last one.

    Raises:
        MisconfigurationException: If an option makes no sense, or the network gives no logits.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LearningWithoutForgetting(strength=1.0)], logger=False)
    """

    def __init__(self, strength: float = 1.0, temperature: float = 2.0, network: str | None = None) -> None:
        super().__init__()
        if not (is_number(strength) and strength >= 0):
            raise MisconfigurationException(f"{STEP}.strength={strength!r}: expected at least 0")
        if not (is_number(temperature) and temperature > 0):
            raise MisconfigurationException(f"{STEP}.temperature={temperature!r}: expected more than 0")
        self.strength = strength
        self.temperature = temperature
        self.network = network
        self._former: Any = None
        self._restored: dict[str, Tensor] | None = None

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Let the former model join the training step, once there is one."""
        check_network(pl_module, self.network, STEP)
        if self._restored is not None:
            self._former = _frozen_copy(pl_module)
            try:
                self._former.load_state_dict(self._restored)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise MisconfigurationException(f"{STEP}: the checkpoint's former model: {reason}") from error
            self._restored = None
        if self._former is None or self.strength == 0:
            return
        self._former.trainer = trainer
        self._former.to(pl_module.device)
        own_weight = 1 / max(1.0, self.strength)
        join_loss(pl_module, lambda batch, calls: self._added(pl_module, batch, calls), own_weight=own_weight)

    def _added(self, pl_module: Any, batch: Any, calls: list[Call]) -> Tensor:
        assert self._former is not None
        try:
            present = last_logits(calls, self.network)
            with torch.no_grad(), calls_recorded(self._former) as former_calls:
                loss_aside(self._former, batch)
            former = last_logits(former_calls, last_call(calls, self.network).name)
            # Samples that another technique put after the batch's own are not the new task's.
            distance = retention_loss(present[: len(former)], former, self.temperature)
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}: {error}") from error
        pl_module.log("train/retention", distance.detach())
        return min(1.0, self.strength) * distance

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Keep the model as it is now."""
        self._former = _frozen_copy(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the former weights."""
        former = self._restored if self._former is None else dict(self._former.state_dict())
        return {"num_tasks": self.num_tasks, "former": former}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take those of the interrupted run."""
        self.num_tasks = state_dict["num_tasks"]
        self._former, self._restored = None, state_dict["former"]


def _frozen_copy(pl_module: nn.Module) -> Any:
    return detached_copy(pl_module).requires_grad_(False).eval()
