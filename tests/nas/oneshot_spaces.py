"""Small spaces, data and a module of a user, for the tests of supernets."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.nas._nni_compat import nni_nas

nas = nni_nas()


class Layers(nas.nn.ModelSpace):
    """Choices of layers and of a depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nas.nn.MutableConv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.a = nas.nn.LayerChoice([nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Identity()], label="a")
        self.deep = nas.nn.Repeat(
            lambda i: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), nas.nni.choice("depth", [1, 2, 3])
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.deep(torch.relu(self.a(self.norm(self.stem(x))))).mean((2, 3)))


class Widths(nas.nn.ModelSpace):
    """Choices of a width, a kernel and a depth; layers without bias."""

    def __init__(self) -> None:
        super().__init__()
        width, kernel = nas.nni.choice("width", [4, 8]), nas.nni.choice("kernel", [3, 5])
        self.stem = nas.nn.MutableConv2d(1, width, 3, padding=1, bias=False)
        self.norm = nas.nn.MutableBatchNorm2d(width)
        self.conv = nas.nn.MutableConv2d(width, width, kernel, padding=kernel // 2)
        self.deep = nas.nn.Repeat(
            lambda i: nn.Sequential(nas.nn.MutableConv2d(width, width, 1), nn.ReLU()), nas.nni.choice("depth", [1, 2])
        )
        self.head = nas.nn.MutableLinear(width, 4)

    def forward(self, x):
        return self.head(self.deep(torch.relu(self.conv(self.norm(self.stem(x))))).mean((2, 3)))


class Cells(nas.nn.ModelSpace):
    """A cell whose operations are made by factories, as DARTS has them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nas.nn.Cell(
            {"conv": lambda node, op, source: nn.Conv2d(3, 3, 1), "skip": lambda node, op, source: nn.Identity()},
            num_nodes=2,
            num_ops_per_node=2,
            num_predecessors=1,
            label="cell",
        )

    def forward(self, x):
        return self.cell([x])


class Classifier(L.LightningModule):
    """A user's module, which knows nothing of any search."""

    def __init__(self, network: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)


def loader(samples: int = 64, pixels: int = 6, channels: int = 1, size: int = 8, shuffle: bool = True) -> DataLoader:
    """Images whose class is the brightest quarter."""
    images = torch.rand(samples, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))
    half = pixels // 2
    quarters = torch.stack(
        [images[:, :, i : i + half, j : j + half].mean((1, 2, 3)) for i in (0, half) for j in (0, half)]
    )
    return DataLoader(TensorDataset(images, quarters.argmax(0)), size, shuffle=shuffle)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAfter(L.Callback):
    """As if it were killed when an epoch has ended."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs
