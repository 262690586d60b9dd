"""Averaged gradient episodic memory: no step may raise the loss of earlier tasks, as far as some samples tell.

Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019 (arXiv:1812.00420).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.buffer import SampleBuffer, as_batch
from lightning_optcore.meta.continual.stepping import batch_size_of, loss_aside, training_batches
from lightning_optcore.option_values import is_whole

STEP = "averaged_gem"


def project_(gradients: Sequence[Tensor], references: Sequence[Tensor]) -> bool:
    """Take out of a gradient what opposes another one; return whether there was anything.

    Args:
        gradients: Changed in place.
        references: One for each, of its shape.

    Example:
        >>> gradient = torch.tensor([1.0, -1.0])
        >>> project_([gradient], [torch.tensor([0.0, 2.0])]), gradient
        (True, tensor([1., 0.]))
    """
    pairs = list(zip(gradients, references, strict=True))
    inner = sum(float((g.double() * r.double()).sum()) for g, r in pairs)
    square = sum(float(r.double().square().sum()) for _, r in pairs)
    if not (inner < 0 < square):
        return False
    for gradient, reference in pairs:
        gradient.sub_(reference.to(gradient), alpha=inner / square)
    return True


class AveragedGEM(TaskCallback):
    """Project every gradient that would raise the loss on samples of earlier tasks.

    A task is a fit: give one callback object to the fits of one module, one after the other. Before each step of an
    optimizer the class's own training step says what the gradient of some earlier samples is; nothing of that is logged
    or counted. It costs a forward and a backward pass a step.

    Args:
        size: Samples that are kept, of all tasks together.
        batch_size: Samples that a step is compared with; by default as many as the batch has.
        balance: As in :class:`ExperienceReplay`; a memory of each task is the paper's.
        label: As in :class:`ExperienceReplay`.
        max_memory: As in :class:`ExperienceReplay`.
        folder: As in :class:`ExperienceReplay`.
        seed: Of what is kept and drawn.

    Attributes:
        num_projected: Steps of the last fit that were projected.

    Raises:
        MisconfigurationException: If an option makes no sense, there is no room, or samples differ in shape.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AveragedGEM(size=500)], logger=False)
    """

    def __init__(
        self,
        size: int = 500,
        batch_size: int | None = None,
        balance: str = "task",
        label: str | int | None = None,
        max_memory: int | None = None,
        folder: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None and not is_whole(batch_size, least=1):
            raise MisconfigurationException(f"{STEP}.batch_size={batch_size!r}: expected at least 1, a whole number")
        self.size = size
        self.batch_size = batch_size
        self.balance = balance
        self.label = label
        self.max_memory = max_memory
        self.folder = folder
        self.seed = seed
        self.num_projected = 0
        self.buffer = SampleBuffer(size, balance, label, seed, max_memory, folder, owner=STEP)
        self._batch: Any = None

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Count anew."""
        self.num_projected = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check before a long fit that its samples can be kept."""
        self.buffer.check(batch)
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Project the gradient."""
        if not len(self.buffer) or self._batch is None:
            return
        samples = self.buffer.draw(self.batch_size or batch_size_of(self._batch))
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with torch.enable_grad():
            loss = loss_aside(pl_module, as_batch(self._batch, samples))
            if loss is None:
                return
            found = torch.autograd.grad(loss, stepped, allow_unused=True)
        gradients, references = [], []
        for parameter, reference in zip(stepped, found, strict=True):
            if reference is not None and parameter.grad is not None:
                gradients.append(parameter.grad)
                references.append(trainer.strategy.reduce(reference, reduce_op="mean"))
        self.num_projected += project_(gradients, references)

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Keep some of the task's samples."""
        self._batch = None
        for batch in training_batches(trainer, pl_module):
            self.buffer.add(batch, self.num_tasks)

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer."""
        return {"num_tasks": self.num_tasks, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that of the interrupted run."""
        self.num_tasks = state_dict["num_tasks"]
        self.buffer.load_state_dict(state_dict["buffer"])
