"""Two gloo ranks factor, fuse and lower one model with ``ddp``: two_ranks_low_rank.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_optcore.callbacks import KernelFusion, LowRankFactorization, MixedPrecision
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN


def main() -> None:
    folder = Path(sys.argv[1])
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=3,
        callbacks=[
            LowRankFactorization(target_params=0.6, start_epoch=1, faster=False),
            KernelFusion(rounds=2),
            MixedPrecision(measured_steps=3, rounds=2),
        ],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Digits())
    kept = {"weights": model.state_dict(), "recipe": recipe_of(model).to_json()}
    torch.save(kept, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
