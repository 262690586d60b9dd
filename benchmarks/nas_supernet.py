"""Does a supernet rank its sub-networks as training each of them alone would?

    OMP_NUM_THREADS=1 python benchmarks/nas_supernet.py

40 architectures of a space of small convolutional networks are drawn, and each is trained alone until its rate has
decayed to nothing, with several seeds; their mean accuracy on images that nothing was trained with is the truth. A
supernet is trained once a seed by ``SampledTraining``, and the same architectures are judged with its weights, with
batch norm recalibrated. Printed is Kendall's tau between both. What it is worth is seen beside the tau of one seed of
the truth with the others', and that of the number of parameters, which costs nothing.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.callbacks import SampledTraining
from lightning_optcore.nas._nni_compat import nni_nas
from lightning_optcore.nas.once_for_all import inherited_evaluator
from lightning_optcore.nas.supernet import random_architecture, supernet

nas = nni_nas()
TRAINING_IMAGES = 1_000
BATCH_SIZE = 100


class Convolutions(nas.nn.ModelSpace):
    """Images of 8 x 8: a stem, three operations and a classifier; 750 architectures.

    Depthwise layers have few parameters and see neighbours, pointwise ones have many and see none: the number of
    parameters alone does not tell what is good.
    """

    def __init__(self) -> None:
        super().__init__()
        width, stem = nas.nni.choice("width", [4, 8, 16]), nas.nni.choice("stem", [1, 3])
        conv, norm = nas.nn.MutableConv2d, nas.nn.MutableBatchNorm2d
        self.stem = conv(1, width, stem, padding=stem // 2, bias=False)
        self.norm = norm(width)
        self.operations = nn.ModuleList(
            nas.nn.LayerChoice(
                {
                    "conv": nn.Sequential(conv(width, width, 3, padding=1, bias=False), norm(width)),
                    "depthwise": nn.Sequential(conv(width, width, 3, padding=1, groups=width, bias=False), norm(width)),
                    "pointwise": nn.Sequential(conv(width, width, 1, bias=False), norm(width)),
                    "pool": nn.AvgPool2d(3, 1, 1),
                    "skip": nn.Identity(),
                },
                label=f"operation{i}",
            )
            for i in range(3)
        )
        self.head = nas.nn.MutableLinear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = torch.relu(self.norm(self.stem(x)))
        for operation in self.operations:
            x = torch.relu(operation(x))
        return self.head(x.mean((2, 3)))


class Classifier(LightningModule):
    """A network, AdamW and a cosine to nothing."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """AdamW, whose rate decays by steps."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@cache
def images() -> tuple[TensorDataset, Tensor, Tensor]:
    """Return the digits to train with, and the others with their labels."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    training, rest = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return TensorDataset(pixels[training], labels[training]), pixels[rest], labels[rest]


def train(network: nn.Module, epochs: int, lr: float, seed: int, *callbacks: Any, **options: Any) -> nn.Module:
    """Train a network and return it."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(Classifier(network, lr), DataLoader(images()[0], BATCH_SIZE, shuffle=True))
    return network


def accuracy(network: nn.Module) -> dict[str, float]:
    """Return the share of the other images that a network names rightly."""
    _, pixels, labels = images()
    with torch.no_grad():
        return {"accuracy": float((network.eval()(pixels).argmax(1) == labels).float().mean())}


def alone(architecture: dict[str, Any], seed: int, epochs: int) -> tuple[float, int]:
    """Return the accuracy of an architecture that is trained alone, and how many parameters it has."""
    seed_everything(seed, verbose=False)
    network = Convolutions().freeze(architecture)
    parameters = sum(one.numel() for one in network.parameters())
    return accuracy(train(network, epochs, 1e-2, seed))["accuracy"], parameters


def judged(architectures: list[dict[str, Any]], seed: int, epochs: int, rule: str) -> list[float]:
    """Train a supernet and return what it makes of the architectures."""
    seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"accumulate_grad_batches": 4} if rule == "sandwich" else {}
    network = train(supernet(Convolutions()), epochs, 1e-2, seed, SampledTraining(rule=rule, seed=seed), **options)
    evaluate = inherited_evaluator(network.eval(), accuracy, calibration=DataLoader(images()[0], BATCH_SIZE))
    return [evaluate(architecture)["accuracy"] for architecture in architectures]


def main() -> None:
    """Print the agreement, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, default=40)
    parser.add_argument("--drawn", type=int, default=0, help="seed of the architectures")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="of the supernets")
    parser.add_argument("--truth-seeds", type=int, nargs="+", default=[1000, 1001])
    parser.add_argument("--epochs", type=int, default=30, help="of an architecture alone")
    parser.add_argument("--supernet-epochs", type=int, default=500)
    parser.add_argument("--rule", nargs="+", default=["random", "sandwich"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "nni"):
        logging.getLogger(name).setLevel(logging.ERROR)

    rng, space, drawn = random.Random(arguments.drawn), supernet(Convolutions()), []
    while len(drawn) < arguments.architectures:
        architecture = random_architecture(space, rng)
        if architecture not in drawn:
            drawn.append(architecture)

    start = time.process_time()
    results = [[alone(one, seed, arguments.epochs) for one in drawn] for seed in arguments.truth_seeds]
    seconds = time.process_time() - start
    by_seed = [[one[0] for one in seed] for seed in results]
    truth = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    console = Console(width=110)
    console.print(
        f"torch {version('torch')}, nni {version('nni')}; {len(drawn)} architectures alone, "
        f"{len(by_seed)} seeds of {arguments.epochs} epochs: {seconds:.0f} s of CPU; "
        f"accuracy {min(truth):.3f} to {max(truth):.3f}, median {statistics.median(truth):.3f}"
    )
    if len(by_seed) > 1:
        taus = [kendalltau(one, other)[0] for i, one in enumerate(by_seed) for other in by_seed[i + 1 :]]
        console.print(f"tau of one seed of the truth with another: {statistics.fmean(taus):.2f}")
    console.print(f"tau of the number of parameters: {kendalltau([one[1] for one in results[0]], truth)[0]:.2f}")

    table = Table("rule", *(f"seed {seed}" for seed in arguments.seeds), "mean", "CPU s a supernet", "best of its 5")
    for rule in arguments.rule:
        start, taus, regrets = time.process_time(), [], []
        for seed in arguments.seeds:
            values = judged(drawn, seed, arguments.supernet_epochs, rule)
            taus.append(kendalltau(values, truth)[0])
            console.print(f"{rule}, seed {seed}: tau {taus[-1]:.3f}")
            favoured = sorted(range(len(drawn)), key=lambda i: -values[i])[:5]
            regrets.append(max(truth) - max(truth[i] for i in favoured))
        seconds = (time.process_time() - start) / len(arguments.seeds)
        shown = (*(f"{tau:.2f}" for tau in taus), f"{statistics.fmean(taus):.2f}", f"{seconds:.0f}")
        table.add_row(rule, *shown, f"-{100 * statistics.fmean(regrets):.1f} points")
    console.print(table)


if __name__ == "__main__":
    main()
