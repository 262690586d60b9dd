"""Two gloo ranks under ``ddp``, the second with a slow dataset: slow_rank.py FOLDER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
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


def main() -> None:
    folder = Path(sys.argv[1])
    seed_everything(0, verbose=False)
    profiler = PerformanceProfiler(live=False, output_dir=str(folder))
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=6, callbacks=[profiler], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CNN(width=8, depth=1), Data())
    (folder / f"rank{trainer.global_rank}.json").write_text(profiler.report.to_json())


if __name__ == "__main__":
    main()
