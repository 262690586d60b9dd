"""Digits 5 to 9 from few images, after 0 to 4: from scratch, by ordinary and by discriminative fine-tuning.

python benchmarks/transfer.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.callbacks import DiscriminativeFinetuning
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN

# What is compared: a name, and the options of the callback.
METHODS: dict[str, dict[str, Any] | None] = {
    "from scratch": None,
    "all layers at one rate": {"decay": 1, "start": "all"},
    "decay 1.5, all": {"decay": 1.5, "start": "all"},
    "decay 1.5, unfrozen gradually": {"decay": 1.5},
    "decay 2.6, unfrozen gradually": {},
}
RATES = (0.01, 0.03, 0.1)


def digits(first: int, part: str, size: int | None = None) -> TensorDataset:
    """Return the images of five digits, numbered from 0."""
    data = Digits()
    data.setup()
    images, labels = getattr(data, f"{part}_set").tensors
    some = ((labels >= first) & (labels < first + 5)).nonzero().flatten()[:size]
    return TensorDataset(images[some], labels[some] - first)


def trained(rate: float, data: TensorDataset, batch_size: int, epochs: int, *callbacks: Any) -> LightningModule:
    """Return a network after its training."""
    module = CNN(width=16, depth=2, num_classes=5, lr=rate)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size, shuffle=True))
    return module


def accuracy(module: LightningModule, data: TensorDataset) -> float:
    """Return the share of right answers."""
    images, labels = data.tensors
    with torch.no_grad():
        return (module.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Print a table: for every method the best of the learning rates, by the mean over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 30])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_optcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pretrained = []
    for seed in range(given.seeds):
        seed_everything(seed, verbose=False)
        pretrained.append(trained(0.01, digits(0, "train", 600), 32, 16))
    test_set = digits(5, "test")
    table = Table("", *(f"{size} images" for size in given.sizes))
    for method, options in METHODS.items():
        cells = []
        for size in given.sizes:
            found: dict[float, list[float]] = {rate: [] for rate in RATES}
            for rate in RATES:
                for seed, source in enumerate(pretrained):
                    seed_everything(100 + seed, verbose=False)
                    callbacks = [] if options is None else [DiscriminativeFinetuning(source, **options)]
                    module = trained(rate, digits(5, "train", size), 5, 8, *callbacks)
                    found[rate].append(accuracy(module, test_set))
            rate = max(found, key=lambda one: statistics.mean(found[one]))
            spread = statistics.stdev(found[rate]) if given.seeds > 1 else 0.0
            cells.append(f"{statistics.mean(found[rate]):.3f} ± {spread:.3f} (lr {rate})")
        table.add_row(method, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
