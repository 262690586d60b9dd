"""Meta-learning on one rank, and the same tasks on two, for test_meta_learning.py: weights go to files."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_optcore.callbacks import MetaLearning
from lightning_optcore.meta import EpisodicDataModule

sys.path.insert(0, str(Path(__file__).parent))
from test_meta_learning import AFTER_EACH_STEP, ALGORITHMS, NETWORKS, Sinusoids, a_module


def run(folder: Path, ranks: int) -> None:
    found = {}
    for name in (*ALGORITHMS, *AFTER_EACH_STEP, "batch_norm"):
        module = a_module(NETWORKS["batch_norm"] if name == "batch_norm" else None, optimizer=torch.optim.SGD, lr=1e-3)
        if name == "protonet":
            module.network[-1] = nn.Linear(20, 4)
        options = AFTER_EACH_STEP.get(name, {"algorithm": "maml" if name == "batch_norm" else name})
        callback = MetaLearning(**options, adaptation_steps=2, backend="loop")
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            max_epochs=2,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        tasks = Sinusoids(32, labels=name == "protonet")
        listed = [(tasks[i]["support"], tasks[i]["query"]) for i in range(32)]
        data = EpisodicDataModule(listed, tasks_per_batch=8 // ranks, num_val_tasks=4)
        trainer.fit(module, datamodule=data)
        found[name] = {key: value.clone() for key, value in module.state_dict().items()}
        found[name] |= {f"rate of {key}": value for key, value in callback.state_dict()["rates"].items()}
    if trainer.is_global_zero:
        torch.save(found, folder / f"{ranks}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
