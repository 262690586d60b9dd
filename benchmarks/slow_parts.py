"""Parts for ``optcore profile``: a data module, a logger and a callback that are slow on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from injections import spin
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from plain_training import Network, Samples
from torch.utils.data import DataLoader, default_collate


def _waiting_collate(samples: list[Any]) -> Any:
    time.sleep(0.02)
    return default_collate(samples)


__all__ = ["Network", "SlowCallback", "SlowData", "SlowLogger"]

_FETCHES: dict[str, Callable[[int], None] | None] = {
    "plain": None,
    "latency": lambda _: time.sleep(0.0003),
    "cpu": lambda _: spin(0.00012),
}


class SlowData(LightningDataModule):
    """Batches that take their time, by ``kind``: plain, latency, cpu or collate."""

    def __init__(self, kind: str = "plain", batch_size: int = 64, num_workers: int = 0, val_samples: int = 64) -> None:
        super().__init__()
        self.kind = kind
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_samples = val_samples

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches to train on."""
        collate = _waiting_collate if self.kind == "collate" else None
        samples = Samples(before=_FETCHES.get(self.kind))
        return DataLoader(samples, self.batch_size, shuffle=True, num_workers=self.num_workers, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the batches to validate on."""
        return DataLoader(Samples(self.val_samples), 64)


class SlowLogger(Logger):
    """A service that takes 10 ms to answer."""

    name, version = "slow", 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Keep none."""

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Take 10 ms."""
        time.sleep(0.01)


class SlowCallback(Callback):
    """Works for 10 ms after every batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Work."""
        spin(0.01)
