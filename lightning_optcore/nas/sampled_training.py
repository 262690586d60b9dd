"""Training the weights of a supernet, for a search over its sub-networks that comes after.

It is a callback on a Trainer's own optimization, so that gradient clipping, accumulation, schedulers, precision and
other callbacks go on working.

Sources: Guo et al., "Single Path One-Shot Neural Architecture Search", 2020, https://arxiv.org/abs/1904.00420; Cai et
al., "Once-for-All", 2020, https://arxiv.org/abs/1908.09791, and Yu and Huang, "Universally Slimmable Networks", 2019,
https://arxiv.org/abs/1903.05134 (the sandwich rule).
"""

from __future__ import annotations

import random
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_optcore.nas.supernet import Architecture, choose, largest, random_architecture, smallest
from lightning_optcore.nas.supernet_callbacks import choose_in, random_state, set_random_state, supernet_in


class SampledTraining(Callback):
    """Trains the weights of a supernet of kind ``sampled``, another architecture in every batch.

    What comes after is a search over its sub-networks, with the weights that they share: see
    :mod:`lightning_optcore.nas.once_for_all`. Validation and tests are of the largest architecture.

    Args:
        rule: ``"random"``: each batch has an architecture at random (RandomOneShot). ``"sandwich"``: batches have in
            turn the largest, the smallest and ``num_random`` random ones (once-for-all); with
            ``trainer.accumulate_grad_batches`` at ``2 + num_random`` each step of the weights is for all of them.
        num_random: Random ones between the largest and the next; for ``"sandwich"``.
        seed: Of the architectures.

    Raises:
        MisconfigurationException: If an argument is out of its range, there is not one such supernet, or for several
            devices.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SampledTraining(rule="sandwich")], accumulate_grad_batches=4, logger=False)
    """

    def __init__(self, rule: Literal["random", "sandwich"] = "random", num_random: int = 2, seed: int = 0) -> None:
        super().__init__()
        if rule not in ("random", "sandwich"):
            raise MisconfigurationException(f"rule={rule!r}: expected random or sandwich")
        if num_random < 0:
            raise MisconfigurationException(f"num_random={num_random}: expected 0 or more")
        self.rule = rule
        self.num_random = num_random
        self.seed = seed
        self._network: nn.Module | None = None
        self._fitting = False
        self._trained = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the supernet."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._network = supernet_in(pl_module, ("sampled",), "DifferentiableSearch")
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"trainer.devices: {trainer.world_size} processes would train other layers each; expected devices=1"
            )
        self._trained = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose the architecture of this batch."""
        assert self._network is not None
        choose(self._network, self._next(self._network))

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the batch."""
        self._trained += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the largest architecture."""
        choose_in(pl_module, "sampled", largest)

    on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches there were, and the state of random numbers."""
        return {"trained": self._trained, "random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        if not self._fitting:
            return
        self._trained = state_dict["trained"]
        set_random_state(state_dict["random"])

    def _next(self, network: nn.Module) -> Architecture:
        place = self._trained % (2 + self.num_random)
        if self.rule == "sandwich" and place < 2:
            return largest(network) if place == 0 else smallest(network)
        return random_architecture(network, random.Random(f"{self.seed} {self._trained}"))
