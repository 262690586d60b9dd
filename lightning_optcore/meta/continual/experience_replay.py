"""Experience replay: some samples of earlier tasks are learned beside those of the present one.

Ratcliff, Psychological Review 1990; Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019
(arXiv:1902.10486). With what the network said of a sample beside it: Buzzega et al., "Dark Experience for General
Continual Learning", NeurIPS 2020 (arXiv:2004.07211), here as soft labels (Hinton, Vinyals and Dean, 2015,
arXiv:1503.02531).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optcore.compression.distillation import distillation_loss
from lightning_optcore.measurement.modes import evaluating
from lightning_optcore.measurement.steps import Step
from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.buffer import SampleBuffer, with_samples
from lightning_optcore.meta.continual.stepping import (
    Call,
    batch_size_of,
    calls_recorded,
    check_network,
    join_loss,
    join_step,
    last_logits,
    loss_aside,
    training_batches,
)
from lightning_optcore.option_values import is_number, is_whole

STEP = "experience_replay"


class ExperienceReplay(TaskCallback):
    """Learn a few samples of earlier tasks beside those of the present one.

    A task is a fit: give one callback object to the fits of one module, one after the other. When a fit ends, samples
    of its training batches go into the buffer; in later fits every batch is followed by some of them, so your own step
    and loss see one larger batch, of any nesting of tensors.

    Args:
        size: Samples that are kept, of all tasks together.
        batch_size: Samples that join a batch; by default as many as it has.
        balance: ``"none"``: a uniform sample of all that was seen (a reservoir). ``"task"``: as many of each task.
            ``"class"``: as many of each class of each task.
        label: Key or index of the class labels in a batch; by default the last tensor of integers, one a sample.
        logits_weight: Weight, beside your own loss, of the distance between the network's logits for earlier samples
            and those at the end of their task, which go into the buffer as well; 0 keeps none. It needs a network that
            returns logits, as a tensor (samples, classes) or under ``logits``.
        temperature: Softens both distributions.
        max_memory: Bytes of samples beyond which they go to a file; by default half of the memory that is free.
        folder: Where that file goes; by default the system's folder of temporary files.
        network: With ``logits_weight``: name of the submodule that gives the logits, where a step calls several;
            ``None``: the last one.
        seed: Of what is kept and drawn; the training's own random numbers stay as they are.

    Raises:
        MisconfigurationException: If an option makes no sense, there is no room, or samples differ in shape.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExperienceReplay(size=500, balance="class")], logger=False)
    """

    def __init__(
        self,
        size: int = 500,
        batch_size: int | None = None,
        balance: str = "none",
        label: str | int | None = None,
        logits_weight: float = 0.0,
        temperature: float = 2.0,
        max_memory: int | None = None,
        folder: str | None = None,
        network: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None and not is_whole(batch_size, least=1):
            raise MisconfigurationException(f"{STEP}.batch_size={batch_size!r}: expected at least 1, a whole number")
        if not (is_number(logits_weight) and logits_weight >= 0):
            raise MisconfigurationException(f"{STEP}.logits_weight={logits_weight!r}: expected at least 0")
        if not (is_number(temperature) and temperature > 0):
            raise MisconfigurationException(f"{STEP}.temperature={temperature!r}: expected more than 0")
        self.size = size
        self.batch_size = batch_size
        self.balance = balance
        self.label = label
        self.logits_weight = logits_weight
        self.temperature = temperature
        self.network = network
        self.max_memory = max_memory
        self.folder = folder
        self.seed = seed
        self._drawn: list[Tensor] = []
        self.buffer = SampleBuffer(size, balance, label, seed, max_memory, folder, owner=STEP)

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Let samples join the batches, once there are some."""
        check_network(pl_module, self.network, STEP)
        if not len(self.buffer):
            return
        if self.logits_weight:
            join_loss(pl_module, lambda batch, calls: self._added(pl_module, batch, calls), self._replayed)
        else:
            join_step(pl_module, self._joined)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check before a long fit that its samples can be kept."""
        self.buffer.check(batch)

    def _joined(self, step: Step) -> Step:
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return step(self._replayed(batch), *args, **kwargs)

        return training_step

    def _replayed(self, batch: Any) -> Any:
        self._drawn = self.buffer.draw(self.batch_size or batch_size_of(batch))
        return with_samples(batch, self._drawn)

    def _added(self, pl_module: Any, batch: Any, calls: list[Call]) -> Tensor:
        try:
            present, former = last_logits(calls, self.network), self._drawn[-1]
            if len(present) != batch_size_of(batch):
                raise ValueError(f"{len(present)} rows of logits for {batch_size_of(batch)} samples")
            replayed = present[-len(former) :, : former.shape[1]]
            distance = distillation_loss(replayed, former.to(present), temperature=self.temperature)
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}.logits_weight={self.logits_weight}: {error}; set 0") from error
        pl_module.log("train/replayed_logits", distance.detach())
        return self.logits_weight * distance

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Keep some of the task's samples."""
        with torch.no_grad(), evaluating(pl_module):
            for batch in training_batches(trainer, pl_module):
                self.buffer.add(batch, self.num_tasks, self._logits(pl_module, batch))

    def _logits(self, pl_module: Any, batch: Any) -> list[Tensor]:
        if not self.logits_weight:
            return []
        with calls_recorded(pl_module) as calls:
            loss_aside(pl_module, batch)
        try:
            return [last_logits(calls, self.network).float()]
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}.logits_weight={self.logits_weight}: {error}; set 0") from error

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer."""
        return {"num_tasks": self.num_tasks, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that of the interrupted run."""
        self.num_tasks = state_dict["num_tasks"]
        self.buffer.load_state_dict(state_dict["buffer"])
