"""Two gloo ranks prune, or round, one model with ``ddp``: two_ranks.py FOLDER [--quantize] [--resume CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optcore.callbacks import KnowledgeDistillation, QuantizationAwareTraining, StructuredPruning
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--resume")
    options = parser.parse_args()
    # The sampler of ranks takes its order from this seed.
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    technique = StructuredPruning(target_flops=0.5, criterion="taylor", start_epoch=2)
    if options.quantize:
        technique = QuantizationAwareTraining(output_dir=str(options.folder / "artifact"), rounds=1, batch_sizes=[1])
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=4,
        callbacks=[
            KnowledgeDistillation(alpha=0.3),
            technique,
            ModelCheckpoint(dirpath=options.folder, save_top_k=-1, filename="{epoch}"),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Digits(), ckpt_path=options.resume)
    name = "resumed" if options.resume else "whole"
    torch.save(model.state_dict(), options.folder / f"{name}{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
