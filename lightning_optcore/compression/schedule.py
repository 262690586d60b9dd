"""When a technique that works in steps acts: from one epoch to another, at once or gradually."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.option_values import is_number

# A gradual schedule acts this often; each time the training has some steps to recover.
_GRADUAL_ACTIONS = 10


@dataclass(frozen=True)
class Schedule:
    """Cubic progress from 0 to 1 over training batches (Zhu and Gupta, 2017, arXiv:1710.01878).

    Args:
        start_epoch: Epoch of the first action; may be a fraction.
        end_epoch: Epoch of the last one; ``None`` acts once.
        warm_up: Batches that must have passed before the first action. A fit that is planned to be shorter
            than the schedule compresses it: the first action moves to the first half, the last one to three
            quarters.
    """

    start_epoch: float = 0
    end_epoch: float | None = None
    warm_up: int = 0

    def check(self, technique: str) -> None:
        """Raise :class:`MisconfigurationException` if the epochs make no sense."""
        for key, epoch in (("start_epoch", self.start_epoch), ("end_epoch", self.end_epoch)):
            if key == "end_epoch" and epoch is None:
                continue
            if not is_number(epoch) or not 0 <= epoch < float("inf"):
                raise MisconfigurationException(f"{technique}.{key}={epoch!r}: expected a number of at least 0")
        if self.end_epoch is not None and self.end_epoch < self.start_epoch:
            raise MisconfigurationException(
                f"{technique}.end_epoch={self.end_epoch}: expected at least start_epoch={self.start_epoch}"
            )

    def due(self, trainer: Any, batch: int) -> float | None:
        """Return the progress that the fit's batch number ``batch`` should bring, ``None`` if it brings none."""
        first, last = self._span(trainer)
        if batch >= last:
            return 1.0
        if batch < first or (batch - first) % self._every(first, last):
            return None
        return (batch - first) / (last - first)

    def batches_until_next(self, trainer: Any, batch: int) -> int:
        """Return how many batches there are before the next action."""
        first, last = self._span(trainer)
        if batch < first:
            return first - batch
        every = self._every(first, last)
        return every - (batch - first) % every

    def _span(self, trainer: Any) -> tuple[int, int]:
        epoch = trainer.num_training_batches
        planned = epoch * trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
        if trainer.max_steps not in (None, -1):
            planned = min(planned, trainer.max_steps * trainer.accumulate_grad_batches)
        first = max(self.start_epoch * epoch, min(self.warm_up, max(1, planned // 4)))
        if first >= planned:
            first = planned // 2
        last = first if self.end_epoch is None else self.end_epoch * epoch
        if last >= planned:
            last = planned * 0.75
        return int(first), max(int(first), int(last))

    @staticmethod
    def _every(first: int, last: int) -> int:
        return max(1, (last - first) // _GRADUAL_ACTIONS)


def cubic(progress: float) -> float:
    """Return the share of the way that is done at a progress: fast at first, slow at the end."""
    return 1 - (1 - progress) ** 3
