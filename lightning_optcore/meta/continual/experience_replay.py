"""Experience replay: some samples of earlier tasks are learned beside those of the present one.

Ratcliff, Psychological Review 1990; Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019
(arXiv:1902.10486).
"""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.buffer import SampleBuffer, with_samples
from lightning_optcore.meta.continual.stepping import Step, batch_size_of, join_step, training_batches

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
        max_memory: Bytes of samples beyond which they go to a file; by default half of the memory that is free.
        folder: Where that file goes; by default the system's folder of temporary files.
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
        max_memory: int | None = None,
        folder: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise MisconfigurationException(f"{STEP}.batch_size={batch_size}: expected at least 1")
        self.size = size
        self.batch_size = batch_size
        self.balance = balance
        self.label = label
        self.max_memory = max_memory
        self.folder = folder
        self.seed = seed
        self.buffer = SampleBuffer(size, balance, label, seed, max_memory, folder, owner=STEP)

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Let samples join the batches, once there are some."""
        if len(self.buffer):
            join_step(pl_module, lambda step: self._joined(pl_module, step))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check before a long fit that its samples can be kept."""
        self.buffer.check(batch)

    def _joined(self, pl_module: Any, step: Step) -> Step:
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            samples = self.buffer.draw(self.batch_size or batch_size_of(batch))
            whole = with_samples(batch, samples)
            return step(whole, *args, **kwargs)

        return training_step

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Keep some of the task's samples."""
        for batch in training_batches(trainer, pl_module):
            self.buffer.add(batch, self.num_tasks)

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer."""
        return {"num_tasks": self.num_tasks, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that of the interrupted run."""
        self.num_tasks = state_dict["num_tasks"]
        self.buffer.load_state_dict(state_dict["buffer"])
