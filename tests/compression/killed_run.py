"""A fit that prunes and saves, to be killed and resumed.

killed_run.py FOLDER [--net cnn|transformer] [--quantize] [--slow] [--resume CHECKPOINT]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import RowsClassifier

from lightning_optcore.callbacks import (
    KnowledgeDistillation,
    LowRankFactorization,
    QuantizationAwareTraining,
    StructuredPruning,
)
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN


class Slow(Callback):
    def on_train_batch_end(self, *_: object) -> None:
        time.sleep(0.03)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--net", choices=("cnn", "transformer"), default="cnn")
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--resume")
    options = parser.parse_args()
    seed_everything(7 if options.resume else 0, verbose=False)
    model = CNN(width=16, depth=2) if options.net == "cnn" else RowsClassifier()
    checkpoint = ModelCheckpoint(dirpath=options.folder, save_top_k=-1, filename="{epoch}", save_last=True)
    target = {"target_params": 0.6} if options.quantize else {"target_flops": 0.5}
    callbacks = [KnowledgeDistillation(alpha=0.3), StructuredPruning(**target, start_epoch=1, end_epoch=3)]
    if options.quantize:
        callbacks.append(LowRankFactorization(target_params=0.8, start_epoch=1.5, faster=False))
        folder = str(options.folder / "artifact")
        callbacks.append(QuantizationAwareTraining(start_epoch=2, output_dir=folder, rounds=1, batch_sizes=[1]))
    Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=[*callbacks, checkpoint, *([Slow()] if options.slow else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, Digits(), ckpt_path=options.resume)
    torch.save(model.state_dict(), options.folder / "final.pt")


if __name__ == "__main__":
    main()
