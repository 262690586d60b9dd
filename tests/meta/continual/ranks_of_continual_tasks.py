"""Two tasks in turn on one rank, and the same batches on two, for test_continual_ranks.py: states go to files."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from strangers import Plain
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.callbacks import (
    AveragedGEM,
    ElasticWeightConsolidation,
    ExperienceReplay,
    LearningWithoutForgetting,
    SynapticIntelligence,
)
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import PermutedTask

# Without random numbers, so that two ranks do what one process does.
ALIKE = {
    "nothing": list,
    "elastic_weight_consolidation": lambda: [ElasticWeightConsolidation(fisher_samples=10**6)],
    "synaptic_intelligence": lambda: [SynapticIntelligence()],
    "learning_without_forgetting": lambda: [LearningWithoutForgetting()],
}
# With a buffer of its own on each rank.
OWN_SAMPLES = {
    "experience_replay": lambda: [ExperienceReplay(size=100, balance="class")],
    "replay_with_logits": lambda: [ExperienceReplay(size=100, logits_weight=0.5)],
    "averaged_gem": lambda: [AveragedGEM(size=100)],
    "replay and consolidation": lambda: [ExperienceReplay(size=100), ElasticWeightConsolidation()],
}
BATCH, SAMPLES = 32, 960


class InOrder(LightningDataModule):
    """A task in whole batches, of which each rank gets its share."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.task = PermutedTask(Digits(), seed)
        self.task.setup()

    def train_dataloader(self) -> DataLoader[Any]:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        samples = next(iter(DataLoader(self.task.train_dataloader().dataset, SAMPLES)))
        return DataLoader(TensorDataset(*(one[rank::ranks] for one in samples)), BATCH // ranks)

    def val_dataloader(self) -> Any:
        return self.task.val_dataloader()


def run(folder: Path, ranks: int) -> None:
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    # Lightning's would shuffle.
    options |= {"use_distributed_sampler": False, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    found: dict[str, Any] = {}
    for name, make in {**ALIKE, **OWN_SAMPLES}.items():
        seed_everything(0, verbose=False)
        model, callbacks = Plain(), make()
        for seed in (None, 1):
            trainer = Trainer(max_epochs=4, callbacks=callbacks, **options)
            trainer.fit(model, datamodule=InOrder(seed))
        first = next(iter(DataLoader(InOrder(None).task.data.val_set, 10**6)))
        accuracy = float((model.net(first[0]).argmax(1) == first[1]).float().mean())
        found[name] = {"weights": model.state_dict(), "accuracy": accuracy}
        found[name]["callbacks"] = [callback.state_dict() for callback in callbacks]
    torch.save(found, folder / f"{ranks}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
