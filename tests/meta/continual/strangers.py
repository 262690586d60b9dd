"""Modules and data that nobody here wrote."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_optcore.data import Digits


class DictDigits(Dataset):
    """Samples are dicts with keywords for the network."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.dataset[index]
        return {"target": label, "inputs": {"pixels": image.flatten(), "scale": torch.tensor(1.0)}, "number": index}


class DictData(LightningDataModule):
    def setup(self, stage: str | None = None) -> None:
        self.digits = Digits()
        self.digits.setup()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DictDigits(self.digits.train_set), 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(DictDigits(self.digits.val_set), 64)


class Stranger(LightningModule):
    """Dict batches, keyword arguments, a step that calls a child, a loss in a mapping, and a choice of optimizers."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.optimizer, self.lr = optimizer, lr
        self.features = nn.Linear(64, 48)
        self.network = nn.Sequential(nn.ReLU(), nn.Linear(48, 10))

    def classify(self, pixels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.network(self.features(pixels * scale[:, None]))

    def training_step(self, batch: dict[str, Any]) -> Any:
        loss = nn.functional.cross_entropy(self.classify(**batch["inputs"]), batch["target"])
        self.log("train/loss", loss)
        if self.automatic_optimization:
            return {"loss": loss}
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None

    def validation_step(self, batch: dict[str, Any]) -> None:
        found = self.classify(**batch["inputs"]).argmax(1)
        self.log("val/acc", (found == batch["target"]).float().mean())

    def configure_optimizers(self) -> Any:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        if self.automatic_optimization:
            return kinds[self.optimizer](self.parameters(), lr=self.lr)
        return [kinds[self.optimizer](part.parameters(), lr=self.lr) for part in (self.features, self.network)]


class Plain(LightningModule):
    """Tuple batches, one network, plain SGD or Adam."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1) -> None:
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        return kinds[self.optimizer](self.parameters(), lr=self.lr)
