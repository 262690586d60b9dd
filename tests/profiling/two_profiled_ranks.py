"""Two gloo ranks under ``ddp``: two_profiled_ranks.py FOLDER straggler|communication.

The second rank has a slow dataset, or both have a large network and small batches.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import Dataset

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN


class SlowOnOneRank(Dataset):
    def __init__(self, inner) -> None:
        self.inner = inner
        self.rank = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int):
        if self.rank:
            time.sleep(0.0005)
        return self.inner[index]


class Data(Digits):
    def setup(self, stage=None) -> None:
        super().setup(stage)
        self.train_set = SlowOnOneRank(self.train_set)
        self.train_set.rank = self.trainer.global_rank


class Wide(LightningModule):
    """Many weights and little to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 20_000) for _ in range(3))

    def training_step(self, batch, batch_idx):
        return sum(layer(batch[0].flatten(1)).square().mean() for layer in self.layers)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    seed_everything(0, verbose=False)
    profiler = PerformanceProfiler(live=False, output_dir=str(folder))
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=6, max_steps=80, callbacks=[profiler], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if kind == "straggler":
        trainer.fit(CNN(width=8, depth=1), Data())
    else:
        trainer.fit(Wide(), Digits(batch_size=2))
    (folder / f"rank{trainer.global_rank}.json").write_text(profiler.report.to_json())


if __name__ == "__main__":
    main()
