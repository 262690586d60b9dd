"""A program that trains on digits, and writes down what each replica did in each step."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_optcore.data import Digits
from lightning_optcore.distributed.elastic import ElasticDDPStrategy


class Classifier(LightningModule):
    def __init__(self, manual: bool, norm: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32) if norm else nn.Identity())
        self.head = nn.Linear(32, 10)
        self.unused = nn.Linear(3, 3)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, _ = batch
        loss = nn.functional.cross_entropy(self.head(self.body(images).relu()), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if not self.automatic_optimization:
            first, second = self.optimizers()
            self.manual_backward(loss)
            self.clip_gradients(first, 0.5)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels, _ = batch
        self.val_acc(self.head(self.body(images).relu()), labels)
        self.log("val/acc", self.val_acc)

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999), "interval": "step"}
        ]


class Diary(Callback):
    def __init__(self, folder: Path, pause: float) -> None:
        self.folder, self.pause = folder, pause

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        page = {
            "pid": os.getpid(),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": i,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "ranks": trainer.strategy.replicas.ranks if isinstance(trainer.strategy, ElasticDDPStrategy) else None,
            "samples": batch[2].tolist(),
        }
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(page) + "\n")
        time.sleep(self.pause)
        trainer.should_stop = trainer.strategy.broadcast((self.folder / "stop").exists())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="elastic")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--norm", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=20)  # of each replica in an epoch
    parser.add_argument("--fails", action="store_true")
    given = parser.parse_args()
    seed_everything(0)
    digits = Digits()
    digits.setup()
    samples = given.batches * 16 * given.devices
    images, labels = digits.train_set[:samples]
    train_set = TensorDataset(images, labels, torch.arange(samples))
    train = DataLoader(train_set, 16, shuffle=True, num_workers=given.workers)
    val = DataLoader(TensorDataset(*digits.val_set[:100], torch.arange(100)), 32)
    checkpoint = ModelCheckpoint(given.folder / "checkpoints", monitor="val/acc", mode="max", save_last=True)
    elastic = ElasticDDPStrategy(max_restarts=given.max_restarts, timeout=given.timeout)
    trainer = Trainer(
        accelerator="cpu",
        devices=given.devices,
        strategy=elastic if given.strategy == "elastic" else "ddp_find_unused_parameters_true",
        max_epochs=-1,
        max_steps=given.max_steps,
        accumulate_grad_batches=given.accumulate,
        gradient_clip_val=None if given.manual else 0.5,
        callbacks=[Diary(given.folder, given.pause), checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(given.manual, given.norm)
    if given.fails:
        module.setup = lambda stage: 1 / 0  # type: ignore[method-assign]
    trainer.fit(module, train, val)
    torch.save(
        {
            "weights": module.state_dict(),
            "step": trainer.global_step,
            "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
            "best": checkpoint.best_model_path,
        },
        given.folder / f"{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
