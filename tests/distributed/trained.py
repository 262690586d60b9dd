"""Functions that a rank runs: a small network is trained on digits, as the environment says which rank it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.strategies import OptCoreDDPStrategy

SILENT = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
}  # fmt: skip


class Digits(LightningModule):
    """Convolution, batch norm, dropout, Adam and a schedule."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)
        self.log("checksum", checksum(self), reduce_fx="max", sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def checksum(module: nn.Module) -> float:
    return sum(float(one.detach().double().abs().sum()) for one in module.parameters())


def loader(first: int = 0, last: int = 1280, shuffle: bool = True) -> DataLoader:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[first:last], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(images, torch.tensor(labels[first:last])), 32, shuffle=shuffle)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().double().flatten() for one in module.parameters()])


def fitted(
    communication: str,
    options: dict[str, Any],
    *,
    module: LightningModule | None = None,
    ckpt_path: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    strategy: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Trainer, LightningModule]:
    seed_everything(0, verbose=False)
    module = Digits() if module is None else module
    made = OptCoreDDPStrategy(communication, options, **(strategy or {}))  # type: ignore[arg-type]
    settings = {"max_epochs": 2, **SILENT, **settings}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=made, callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(), loader(1280, 1797, shuffle=False), ckpt_path=ckpt_path)
    return trainer, module
