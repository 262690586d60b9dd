"""What the techniques share: a task ends where a fit ends, and nothing is left on the module after it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from lightning_optcore.meta.continual.stepping import leave_step


class TaskCallback(Callback):
    """A callback whose tasks are the fits of one module, one after the other, with one callback object.

    Subclasses say what happens at the beginning of a task and at its end.

    Attributes:
        num_tasks: How many tasks have ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_tasks = 0
        self._open = False
        self._hooks: list[Any] = []

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Join the training of a task; optimizers are there, and what a checkpoint had is restored."""

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Keep what must not be forgotten of the task."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a task."""
        self._open = True
        self.begin_task(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the task; one that was broken off has no end."""
        self._leave(pl_module)
        if self._open:
            self._open = False
            self.end_task(trainer, pl_module)
            self.num_tasks += 1

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._open = False
        self._leave(pl_module)

    def _after_steps(self, trainer: Any, hook: Any) -> None:
        """Call ``hook(optimizer, args, kwargs)`` after every step that an optimizer really takes."""
        self._hooks += [optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers]

    def _leave(self, pl_module: Any) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        leave_step(pl_module)
