"""Quantize your own LightningModule in your own script: one callback, no Hydra.

python examples/plain_trainer.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_optcore import compare, load_artifact
from lightning_optcore.callbacks import PostTrainingQuantization


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val/acc", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

    quantization = PostTrainingQuantization(max_quality_drop=0.01, monitor="val/acc")
    trainer = Trainer(accelerator="cpu", max_epochs=5, callbacks=[quantization], logger=False)
    trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(val, 64))

    print(compare(quantization.before, quantization.after))
    artifact = load_artifact(quantization.artifact.path)
    print("the artifact says", artifact(images[:1].numpy()).argmax(), "- the label is", digits.target[0])


if __name__ == "__main__":
    main()
