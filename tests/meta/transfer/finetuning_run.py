"""Fine-tuning in a process of its own, for test_discriminative_finetuning.py: the weights go to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.callbacks import DiscriminativeFinetuning
from lightning_optcore.data import Digits

SCHEDULES = {
    "none": None,
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.8**epoch),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=16),
}
PER_STEP = ("one_cycle",)


class Network(LightningModule):
    """Convolutions with batch norm, dropout, and a head."""

    def __init__(self, schedule="cosine", optimizer="adam", num_classes=5):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 16), nn.ReLU()),
        )
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        if self.hparams.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        else:
            groups = [
                {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 1e-2, "lr": 0.02},
                {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.01},
            ]
            optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = SCHEDULES[self.hparams.schedule]
        if schedule is None:
            return optimizer
        interval = "step" if self.hparams.schedule in PER_STEP else "epoch"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule(optimizer), "interval": interval},
        }


def digits(classes, train_size=None, batch_size=32):
    """Return loaders of some of the digits, numbered from 0."""
    data = Digits()
    data.setup()
    loaders = []
    for part, size in ((data.train_set, train_size), (data.val_set, None)):
        images, labels = part.tensors
        chosen = torch.isin(labels, torch.tensor(classes)).nonzero().flatten()[:size]
        dataset = TensorDataset(images[chosen], labels[chosen] - min(classes))
        loaders.append(DataLoader(dataset, batch_size, shuffle=size is not None))
    return loaders


def trainer_in(folder, *callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    saved = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    return Trainer(callbacks=[*callbacks, saved], **{**settings, **options})


def ranks(folder: Path, devices: int) -> None:
    seed_everything(0, verbose=False)
    module = Network("lambda", "sgd")
    # Statistics and dropout differ from rank to rank, and so does what is in a batch: one batch holds all.
    module.backbone[1].eval()
    module.backbone[4].eval()
    module.backbone[7].p = 0.0
    train, _ = digits(range(5, 10), 128, 128 // devices)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = trainer_in(folder, DiscriminativeFinetuning(), max_epochs=6, devices=devices, strategy=strategy)
    trainer.fit(module, train)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / f"{devices}.pt")


def resume(folder: Path) -> None:
    seed_everything(99, verbose=False)
    module = Network()
    trainer = trainer_in(folder / "resumed", DiscriminativeFinetuning(folder / "no_longer_there.ckpt"))
    trainer.fit(module, *digits(range(5, 10), 128), ckpt_path=folder / "epoch=1.ckpt")
    torch.save(module.state_dict(), folder / "resumed.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "resume":
        resume(Path(sys.argv[1]))
    else:
        ranks(Path(sys.argv[1]), int(sys.argv[2]))
