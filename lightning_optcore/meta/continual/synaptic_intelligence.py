"""Synaptic intelligence: how much each weight did for a task is summed up while the task is learned.

Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017 (arXiv:1703.04200).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.quadratic import QuadraticPenalty, Tensors, in_full, scaled
from lightning_optcore.meta.functional import learned_parameters
from lightning_optcore.option_values import is_number

STEP = "synaptic_intelligence"


def path_importance(path: Tensors, moved: Tensors, damping: float = 0.1) -> Tensors:
    """Return what each weight did for a task, for the distance that it went.

    Args:
        path: Sum over the steps of ``-gradient * change``, by name.
        moved: The change over the whole task.
        damping: Added to the square of the change, in units of its mean over all weights, so that weights which hardly
            moved do not count as the most important ones.

    Example:
        >>> path_importance({"w": torch.tensor([4.0, -1.0])}, {"w": torch.tensor([1.0, 1.0])}, damping=1.0)
        {'w': tensor([2., 0.])}
    """
    number = sum(value.numel() for value in moved.values())
    mean = sum(float(value.double().square().sum()) for value in moved.values()) / max(1, number)
    floor = damping * mean + torch.finfo(torch.float32).tiny
    return {name: value.clamp_min(0) / (moved[name].square() + floor) for name, value in path.items()}


class SynapticIntelligence(TaskCallback):
    """Hold the weights that did much for earlier tasks; it costs no pass over the data.

    A task is a fit: give one callback object to the fits of one module, one after the other. The gradients are those of
    the training, before they are clipped. The pull is a proximal step, as in :class:`ElasticWeightConsolidation`.

    Args:
        strength: Of the pull.
        damping: As in :func:`path_importance`.
        decay: What is left of the importance of earlier tasks whenever one ends.
        normalize: Scale each task's importance to a mean of .001, so that a strength means the same for any model.

    Raises:
        MisconfigurationException: If an option makes no sense, or the model's shape changes between tasks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SynapticIntelligence(strength=100.0)], logger=False)
    """

    def __init__(
        self, strength: float = 100.0, damping: float = 0.1, decay: float = 1.0, normalize: bool = True
    ) -> None:
        super().__init__()
        if not (is_number(strength) and strength >= 0):
            raise MisconfigurationException(f"{STEP}.strength={strength!r}: expected at least 0")
        if not (is_number(damping) and damping > 0):
            raise MisconfigurationException(f"{STEP}.damping={damping!r}: expected more than 0")
        if not (is_number(decay) and 0 <= decay <= 1):
            raise MisconfigurationException(f"{STEP}.decay={decay!r}: expected a share from 0 to 1")
        self.strength = strength
        self.damping = damping
        self.decay = decay
        self.normalize = normalize
        self.penalty = QuadraticPenalty()
        self._path: Tensors = {}
        self._start: Tensors = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Follow every step."""
        trained = learned_parameters(pl_module)
        if not self._start:
            self._start = {name: value.detach().clone() for name, value in trained.items()}
            self._path = {name: in_full(value) for name, value in self._start.items()}
        self._before = {}
        names = {id(parameter): name for name, parameter in trained.items()}

        def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if id(parameter) in names:
                    self._add(names[id(parameter)], parameter)
            self.penalty.pull_(optimizer, names, self.strength)

        self._after_steps(trainer, follow)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Remember where the step begins, and the gradient there."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        self._before = {
            name: (parameter.detach().clone(), parameter.grad.detach().clone())
            for name, parameter in learned_parameters(pl_module).items()
            if id(parameter) in stepped and parameter.grad is not None
        }

    def _add(self, name: str, parameter: Tensor) -> None:
        if name not in self._before or name not in self._path:
            return
        before, gradient = self._before.pop(name)
        path = self._path[name].to(parameter.device)
        if path.shape == parameter.shape == before.shape:
            self._path[name] = path - gradient * (parameter.detach() - before)

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Sum up what the task did."""
        trained = learned_parameters(pl_module)
        names = [
            name for name, value in trained.items() if name in self._path and value.shape == self._path[name].shape
        ]
        moved = {name: trained[name].detach() - self._start[name].to(trained[name].device) for name in names}
        path = {name: self._path[name].to(trained[name].device) for name in names}
        importance = path_importance(path, moved, self.damping)
        if self.normalize:
            importance = scaled(importance)
        self.penalty.add(importance, trained, online=True, decay=self.decay)
        self._path, self._start, self._before = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the importance and the anchors, and the path of the task that is being learned."""
        return {
            "num_tasks": self.num_tasks,
            "penalty": self.penalty.state_dict(),
            "path": dict(self._path),
            "start": dict(self._start),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take those of the interrupted run."""
        self.num_tasks = state_dict["num_tasks"]
        self.penalty.load_state_dict(state_dict["penalty"])
        self._path, self._start = dict(state_dict["path"]), dict(state_dict["start"])
