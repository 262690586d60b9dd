"""Small, plain image classifiers for the demo, the tests and the benchmarks."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class _Classifier(LightningModule):
    """Cross-entropy training with Adam and a cosine schedule; logs ``val/acc`` and ``val/loss``."""

    def __init__(self, num_classes: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"model.lr={lr}: expected more than 0")
        self.lr = lr
        self.weight_decay = weight_decay
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, prog_bar=stage == "val", sync_dist=True)
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._step(batch, "train", self.train_acc)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/acc`` and ``val/loss``."""
        self._step(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/acc`` and ``test/loss``."""
        self._step(batch, "test", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with decoupled weight decay, cosine schedule over the epochs."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        epochs = max(1, self.trainer.max_epochs or 1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
                "interval": "epoch",
            },
        }


class CNN(_Classifier):
    """Blocks of convolution, batch norm and ReLU; the width doubles and the side halves per stage.

    Args:
        width: Channels of the first stage.
        depth: Number of stages, two blocks each.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.

    Example:
        >>> CNN(width=8, depth=2)(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        width: int = 32,
        depth: int = 3,
        in_channels: int = 1,
        num_classes: int = 10,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.save_hyperparameters()
        _check_size(width, depth)
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in range(depth):
            out = width * 2**stage
            for block in range(2):
                stride = 2 if block == 0 and stage > 0 else 1
                layers += [
                    nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(out),
                    nn.ReLU(),
                ]
                channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        return self.head(self.features(images))


class MLP(_Classifier):
    """Hidden layers of equal width with ReLU.

    Args:
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        in_features: Pixels of an image.
        num_classes: Number of classes.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        width: int = 256,
        depth: int = 2,
        in_features: int = 64,
        num_classes: int = 10,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.save_hyperparameters()
        _check_size(width, depth)
        layers: list[nn.Module] = [nn.Flatten()]
        for layer in range(depth):
            layers += [nn.Linear(in_features if layer == 0 else width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images of any shape with ``in_features`` pixels."""
        return self.net(images)


class Classifier(_Classifier):
    """Any network that returns logits, trained as the classifiers here are.

    Args:
        network: Takes images, returns logits (batch, classes).
        num_classes: Number of classes.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.

    Example:
        >>> Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(self, network: nn.Module, num_classes: int = 10, lr: float = 2e-3, weight_decay: float = 1e-2) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        return self.network(images)


def _check_size(width: int, depth: int) -> None:
    if width < 1 or depth < 1:
        raise ValueError(f"model.width={width}, model.depth={depth}: expected at least 1 each")
