"""Ranks that learn by themselves, and exchange what they learned every so many steps.

Post-local SGD averages the parameters (Lin et al., "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020). DiLoCo
takes the mean of what the ranks learned for the gradient of an outer optimizer with Nesterov's momentum (Douillard et
al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023), may round it, and sends it while the
ranks go on (Douillard et al., "Streaming DiLoCo with overlapping communication", 2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optcore.distributed.collectives import Collectives
from lightning_optcore.distributed.exchange import ErrorFeedback, Exchange


class LocalUpdates:
    """Brings the parameters of ranks together that make optimizer steps of their own.

    The anchor is where all ranks were after the last outer step. What a rank learned is its parameters less the anchor;
    the mean over the ranks is given to the outer optimizer, which moves the anchor::

        momentum = outer_momentum * momentum + learned
        anchor = anchor + outer_lr * (learned + outer_momentum * momentum)

    With ``outer_lr=1`` and ``outer_momentum=0`` this is the average of the parameters.

    Args:
        module: Whose parameters that require gradients, and floating-point buffers, are brought together.
        collectives: Whose ranks take part.
        exchange: How what was learned is averaged.
        period: So many steps lie between two outer steps.
        outer_lr: Learning rate of the outer optimizer.
        outer_momentum: Its momentum.
        overlap: An outer step comes so many steps after its exchange began; what is learned meanwhile is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        collectives: Collectives,
        exchange: ErrorFeedback,
        *,
        period: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        overlap: int = 0,
    ) -> None:
        self.module = module
        self.collectives = collectives
        self.exchange = exchange
        self.period = period
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.overlap = overlap
        self.anchor = _flat(self.parameters())
        self.momentum = torch.zeros_like(self.anchor) if outer_momentum else None
        # Steps since the last exchange began, and since all ranks were equal.
        self.steps = 0
        self.apart = 0
        self._sent: tuple[Tensor, Exchange] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are learned."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def step(self, *, counts: bool = True) -> None:
        """Take notice of a step of this rank's optimizer; exchange what was learned where its time has come.

        Args:
            counts: Whether it is one of those between exchanges; of several optimizers only one's are.
        """
        self.apart += 1
        if not counts:
            return
        self.steps += 1
        if self._sent is not None and self.steps >= self.overlap:
            self._outer_step()
        if self.steps >= self.period:
            self._follow_shapes()
            self.steps = 0
            here = _flat(self.parameters())
            self._sent = here, self.exchange(here - self.anchor, self.collectives)
            if not self.overlap:
                self._outer_step()
                self.apart = 0

    def _outer_step(self) -> None:
        assert self._sent is not None
        (there, exchange), self._sent = self._sent, None
        learned = exchange.finish()
        if self._were_cut():
            # What was sent is of other parameters; the next exchange begins anew.
            return
        if self.momentum is not None:
            self.momentum.mul_(self.outer_momentum).add_(learned)
            learned = learned + self.outer_momentum * self.momentum
        self.anchor.add_(learned, alpha=self.outer_lr)
        if self.overlap:
            # What this rank learned since is its own still.
            moved = self.anchor - there
            for parameter, part in zip(self.parameters(), _parts(moved, self.parameters()), strict=True):
                parameter.add_(part)
        else:
            _write(self.anchor, self.parameters())
        self._average_buffers()

    @torch.no_grad()
    def bring_together(self) -> None:
        """Give all ranks the mean of their parameters, as before a validation, a checkpoint and at the end.

        It is no outer step: the anchor and the momentum stay, and the mean of what the ranks learned since is the same
        as before. All ranks must call it.
        """
        if self._sent is not None:
            self._outer_step()
        if not self.apart:
            return
        self._follow_shapes()
        learned = self.exchange(_flat(self.parameters()) - self.anchor, self.collectives).finish()
        _write(self.anchor + learned, self.parameters())
        self._average_buffers()
        self.apart = 0

    def _average_buffers(self) -> None:
        buffers = [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        mean = _flat(buffers).div_(self.collectives.world_size)
        self.collectives.all_reduce(mean).wait()
        _write(mean, buffers)

    def _follow_shapes(self) -> None:
        """Begin anew where parameters were cut or frozen: all ranks do it alike, and start from their mean."""
        if not self._were_cut():
            return
        mean = _flat(self.parameters()).div_(self.collectives.world_size)
        self.collectives.all_reduce(mean).wait()
        _write(mean, self.parameters())
        self.anchor = mean
        self.momentum = None if self.momentum is None else torch.zeros_like(mean)
        self.exchange.residual = None

    def _were_cut(self) -> bool:
        return sum(parameter.numel() for parameter in self.parameters()) != len(self.anchor)

    def shared_state(self) -> dict[str, Any]:
        """Return what is the same on every rank once they were brought together."""
        return {"anchor": self.anchor, "momentum": self.momentum, "steps": self.steps}

    def own_state(self) -> dict[str, Any]:
        """Return what is this rank's own: what it has not said yet."""
        return {"residual": self.exchange.residual}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take up the states of a checkpoint; the parameters are those that it holds."""
        if len(shared["anchor"]) == len(self.anchor):
            self.anchor = shared["anchor"].to(self.anchor).clone()
            if self.momentum is not None and shared["momentum"] is not None:
                self.momentum = shared["momentum"].to(self.anchor).clone()
            self.steps = int(shared["steps"])
            residual = own.get("residual")
            self.exchange.residual = None if residual is None else residual.to(self.anchor)


@torch.no_grad()
def average_optimizers(optimizers: Iterable[Optimizer], collectives: Collectives) -> None:
    """Give all ranks the mean of their optimizers' states; they would part again where these differ."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [one for state in states for one in state.values() if isinstance(one, Tensor) and one.is_floating_point()]
    if tensors:
        mean = _flat(tensors).div_(collectives.world_size)
        collectives.all_reduce(mean).wait()
        _write(mean, tensors)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


def _parts(flat: Tensor, like: list[Any]) -> list[Tensor]:
    sizes = [tensor.numel() for tensor in like]
    return [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), like, strict=True)]


def _write(flat: Tensor, tensors: list[Any]) -> None:
    for tensor, part in zip(tensors, _parts(flat, tensors), strict=True):
        tensor.copy_(part)
