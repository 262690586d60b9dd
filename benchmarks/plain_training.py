"""Training runs without a bottleneck: data, networks, a loader. What is slow is put in by ``injections.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

FEATURES = 256
BATCH = 64


class Samples(Dataset[Any]):
    """Random vectors whose fetching can be made dear."""

    def __init__(self, count: int = 64 * 400, before: Callable[[int], None] | None = None) -> None:
        self.inputs = torch.randn(4096, FEATURES)
        self.count = count
        self.before = before

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.before is not None:
            self.before(index)
        return self.inputs[index % 4096], index % 10


class Stream(IterableDataset[Any]):
    """The same without an order of its own."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.inputs = torch.randn(4096, FEATURES)
        self.before = before

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for index in range(64 * 400):
            self.before(index)
            yield self.inputs[index % 4096], index % 10


class Network(LightningModule):
    """An MLP whose step takes a few milliseconds on one core."""

    def __init__(self, width: int = 768, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(FEATURES, width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def loader_of(
    dataset: Any = None, batch_size: int = BATCH, shuffle: bool | None = None, **options: Any
) -> DataLoader[Any]:
    """Return a loader, shuffled where its dataset can be."""
    dataset = dataset if dataset is not None else Samples()
    shuffle = not isinstance(dataset, IterableDataset) if shuffle is None else shuffle
    return DataLoader(dataset, batch_size, shuffle=shuffle, **options)


class WithAdam(Network):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Convolutions(Network):
    def __init__(self) -> None:
        super().__init__(8, 1)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * 36, 10),
        )  # fmt: skip


class Recurrent(Network):
    def __init__(self) -> None:
        super().__init__(8, 1)
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.net = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden, _ = self.lstm(batch[0].unflatten(1, (16, 16)))
        return nn.functional.cross_entropy(self.net(hidden[:, -1]), batch[1])


class Attention(Network):
    def __init__(self) -> None:
        super().__init__(8, 1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.net = nn.Sequential(
            nn.Unflatten(1, (8, 32)), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(256, 10)
        )


class Manual(Network):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()  # type: ignore[union-attr]
