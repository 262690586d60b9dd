"""A pull towards earlier weights, each as strong as the weight was important, that is stable at any strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

Tensors = dict[str, Tensor]
# About that of the Fisher information of a small classifier that was trained.
MEAN_IMPORTANCE = 1e-3


def proximal_pull_(parameter: Tensor, anchor: Tensor, importance: Tensor, step: float | Tensor) -> None:
    """Move a parameter to the minimum of ``importance / 2 * (p - anchor)^2 + (p - parameter)^2 / (2 * step)``.

    An explicit step along the gradient overshoots once ``step * importance`` is more than 2; this one ends between the
    parameter and the anchor, however large that is (Parikh and Boyd, "Proximal Algorithms", 2014).

    Args:
        parameter: Changed in place.
        anchor: Of its shape.
        importance: Of its shape, at least 0; the strength times the curvature.
        step: How far the optimizer goes along a gradient of 1, as :func:`step_size` says; a number, or of its shape.

    Example:
        >>> p = torch.tensor([1.0, 1.0])
        >>> proximal_pull_(p, torch.zeros(2), torch.tensor([0.0, 1e30]), step=0.1)
        >>> p
        tensor([1., 0.])
    """
    weight = importance * step
    # Of an infinite weight, which a large strength in a narrow dtype gives, the share is 1.
    share = torch.where(weight.isinf(), 1.0, weight / (1 + weight))
    parameter.lerp_(anchor.to(parameter), share.to(parameter))


def step_size(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> float | Tensor:
    """Return how far an optimizer goes along a small gradient: by it the pull weighs as much as the loss does.

    It is the learning rate; with momentum all that a gradient comes to; of Adam and its kin one for each weight.

    Args:
        optimizer: After its step.
        group: Of the parameter.
        parameter: One of the group.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        >>> round(step_size(sgd, sgd.param_groups[0], p), 3)
        1.0
    """
    rate = float(group["lr"])
    state = optimizer.state.get(parameter, {})
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if isinstance(second, Tensor) and second.shape == parameter.shape and "betas" in group and "step" in state:
        corrected = second / (1 - float(group["betas"][1]) ** float(state["step"]))
        return rate / (corrected.sqrt() + float(group.get("eps", 0.0)) + torch.finfo(second.dtype).tiny)
    return rate / (1 - float(group.get("momentum", 0.0)) + 1e-8)


@dataclass
class QuadraticPenalty:
    """The sum of the penalties of all earlier tasks, which is one penalty: an importance and an anchor a weight.

    Attributes:
        importance: By the name of the parameter.
        anchors: The weights that it is pulled to.
    """

    importance: Tensors = field(default_factory=dict)
    anchors: Tensors = field(default_factory=dict)

    def add(
        self, importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, online: bool, decay: float
    ) -> None:
        """Add the penalty of a task.

        Args:
            importance: Of every weight for the task.
            parameters: The weights after the task.
            online: Pull to these weights alone (Schwarz et al. 2018; Huszár 2018); else to the weights after each task,
                whose sum of squares is one square about their mean, weighted by importance.
            decay: What is left of the importance for earlier tasks.
        """
        for name, new in importance.items():
            value = parameters[name].detach()
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchors[name] = new.detach().clone(), value.clone()
                continue
            old = old.to(new) * decay
            total = old + new
            moved = (
                value
                if online
                else torch.where(total > 0, self.anchors[name].to(value).lerp(value, new / total), value)
            )
            self.importance[name], self.anchors[name] = total, moved.clone()

    def pull_(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str], strength: float) -> None:
        """Pull what an optimizer has just stepped to the anchors; parameters that are new are free.

        Args:
            optimizer: After its step.
            names: Names of the parameters, by their identity.
            strength: Factor of the importance.

        Raises:
            MisconfigurationException: If a parameter has another shape than after the earlier tasks.
        """
        if strength == 0:
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = names.get(id(parameter))
                    if name in self.anchors and parameter.requires_grad:
                        self._pull(name, parameter, strength, step_size(optimizer, group, parameter))

    def _pull(self, name: str, parameter: Tensor, strength: float, step: float | Tensor) -> None:
        anchor = self.anchors[name]
        if anchor.shape != parameter.shape:
            raise MisconfigurationException(
                f"{name} has the shape {tuple(parameter.shape)}, after the earlier tasks it had {tuple(anchor.shape)}: "
                "change the shape of a model before the first task, or after the last"
            )
        if anchor.device != parameter.device:
            self.to(parameter.device)
        proximal_pull_(parameter, self.anchors[name], self.importance[name] * strength, step)

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.importance = {name: value.to(device) for name, value in self.importance.items()}
        self.anchors = {name: value.to(device) for name, value in self.anchors.items()}

    def state_dict(self) -> dict[str, Tensors]:
        """Return plain tensors."""
        return {"importance": dict(self.importance), "anchors": dict(self.anchors)}

    def load_state_dict(self, state: Mapping[str, Tensors]) -> None:
        """Take what :meth:`state_dict` gave."""
        self.importance, self.anchors = dict(state["importance"]), dict(state["anchors"])


def scaled(importance: Tensors, mean: float = MEAN_IMPORTANCE) -> Tensors:
    """Return the importance scaled to a mean over all weights, so that a strength means the same for any model.

    Zeros stay zeros.

    Example:
        >>> scaled({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0])}, mean=1.0)
        {'a': tensor([0.5000, 1.5000]), 'b': tensor([1.])}
    """
    total = sum(float(value.detach().double().sum()) for value in importance.values())
    number = sum(value.numel() for value in importance.values())
    if not total > 0:
        return importance
    return {name: value * (mean * number / total) for name, value in importance.items()}


def in_full(tensor: Tensor) -> Tensor:
    """Return zeros in a tensor's shape in which small squares can be summed up: of at least 32 bits."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
