"""A module and data of one's own, for ``optcore train`` (see README.md in this folder)."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Spirals(LightningDataModule):
    """Two interleaved spirals: points of the plane in two classes."""

    def __init__(self, points: int = 2000, noise: float = 0.1, batch_size: int = 64) -> None:
        super().__init__()
        self.points, self.noise, self.batch_size = points, noise, batch_size

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        label = torch.randint(0, 2, (self.points,), generator=generator)
        angle = 3 * torch.pi * torch.rand(self.points, generator=generator).sqrt()
        turned = angle + torch.pi * label
        place = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1) / 3
        place += self.noise * torch.randn(place.shape, generator=generator)
        self.train, self.val = (TensorDataset(place[part], label[part]) for part in (slice(400, None), slice(400)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class LitModel(LightningModule):
    def __init__(self, hidden: int = 64, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
        )

    def training_step(self, batch, batch_idx):
        place, label = batch
        return nn.functional.cross_entropy(self.net(place), label)

    def validation_step(self, batch, batch_idx):
        place, label = batch
        self.log("val/acc", (self.net(place).argmax(1) == label).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)
