"""Do zero-cost proxies help AdaptiveEvolution, in a space of small convolutional networks on digits?

    OMP_NUM_THREADS=1 python benchmarks/nas_proxies.py

All 150 architectures of ``spaces.cnn_cell(widths=(4, 8, 16), num_stages=1, num_nodes=2)`` are trained with several
seeds. A search is told the accuracy of one of them at random, on the 539 images that nothing was trained with, and the
parameters, which it knows beforehand; what it found is judged by the means over the seeds. The proxies are those that
``LightningEvaluator`` computes. Printed are how they rank the architectures, beside the number of parameters, and how
good searches with and without them are: the share of the table's hypervolume (accuracy and logarithm of the parameters,
scaled to 0..1), by how much it is more than without proxies, seed by seed, and how far their best accuracy is behind
the best there is.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import AdaptiveEvolution, LightningEvaluator, spaces
from lightning_optcore.nas.module_proxies import PROXIES
from lightning_optcore.search import hypervolume
from lightning_optcore.search.space import key_of

BUDGETS = (15, 20, 25)
VARIANTS: dict[str, tuple[str, ...]] = {"none": (), **{name: (name,) for name in PROXIES}, "all three": PROXIES}
SPACE = spaces.cnn_cell(widths=(4, 8, 16), num_stages=1, num_nodes=2)


def main() -> None:
    """Train the table, compute the proxies, search, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="of the searches")
    parser.add_argument("--trainings", type=int, default=2, help="seeds of each training")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    points = SPACE.choices.points() or []
    start = time.process_time()
    accuracies = np.array(
        [[trained(point, seed, options.epochs) for seed in range(options.trainings)] for point in points]
    )
    print(f"{len(points)} architectures trained: {time.process_time() - start:.0f} s of CPU", flush=True)
    evaluator = LightningEvaluator(SPACE, Classifier, Digits)
    params = np.array([evaluator.estimate(point)["params"] for point in points])
    figures: dict[str, np.ndarray] = {}
    for name in PROXIES:
        start = time.process_time()
        figures[name] = np.array([evaluator.proxies[name](point) for point in points])
        print(f"{name}: {1000 * (time.process_time() - start) / len(points):.0f} ms of CPU an architecture", flush=True)

    truth = accuracies.mean(1)
    print(f"mean accuracy {truth.min():.3f} to {truth.max():.3f}, median {np.median(truth):.3f}")
    agreeing = spearmanr(accuracies[:, 0], accuracies[:, 1]).statistic if options.trainings > 1 else float("nan")
    ranked = {"params": params, **figures}
    told = ", ".join(f"{name} {spearmanr(np.nan_to_num(one), truth).statistic:.2f}" for name, one in ranked.items())
    print(f"Spearman with the mean accuracy: {told}; one training with the other: {agreeing:.2f}", flush=True)

    costs = np.stack([scaled(-truth), scaled(np.log(params))], axis=1)
    whole = hypervolume(costs, np.ones(2))
    table = Table(title=f"{options.seeds} searches, mean ± standard error")
    table.add_column("proxies")
    for budget in BUDGETS:
        table.add_column(f"hypervolume after {budget}, %", justify="right")
    table.add_column(f"more than without after {BUDGETS[-1]}", justify="right")
    table.add_column(f"behind the best after {BUDGETS[-1]}, points", justify="right")
    shares: dict[str, np.ndarray] = {}
    for variant, names in VARIANTS.items():
        found, gaps = [], []
        for seed in range(options.seeds):
            asked = searched(points, accuracies, params, [figures[name] for name in names], seed)
            found.append([100 * hypervolume(costs[asked[:budget]], np.ones(2)) / whole for budget in BUDGETS])
            gaps.append(100 * (truth.max() - truth[asked].max()))
        shares[variant] = np.array(found)
        more = shares[variant][:, -1] - shares["none"][:, -1]
        table.add_row(variant, *map(stated, shares[variant].T), stated(more), stated(np.array(gaps), 2))
    Console(width=120).print(table)
    packages = ("lightning-optcore", "torch", "lightning", "nni", "numpy")
    print("versions:", ", ".join(f"{package} {version(package)}" for package in packages))


def trained(architecture: dict[str, Any], seed: int, epochs: int) -> float:
    """Return the accuracy of a training on the images of validation and test."""
    seed_everything(seed, verbose=False)
    model, data = Classifier(SPACE.build(architecture), lr=1e-2), Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    Trainer(accelerator="cpu", max_epochs=epochs, enable_model_summary=False, **quiet).fit(model, datamodule=data)
    images, labels = (torch.cat(parts) for parts in zip(data.val_set.tensors, data.test_set.tensors, strict=True))
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def searched(
    points: list[dict[str, Any]], accuracies: np.ndarray, params: np.ndarray, figures: list[np.ndarray], seed: int
) -> list[int]:
    """Return the indices of the architectures that a search asked for."""
    index = {key_of(point): i for i, point in enumerate(points)}
    rng = np.random.default_rng(seed)
    searcher = AdaptiveEvolution(
        SPACE.choices,
        ["maximize", "minimize"],
        seed=seed,
        known_costs=lambda one: {1: params[index[key_of(one)]]},
        proxies=(lambda one: [figure[index[key_of(one)]] for figure in figures]) if figures else None,
    )
    asked = []
    for _ in range(BUDGETS[-1]):
        (candidate,) = searcher.ask()
        asked.append(index[key_of(candidate.params)])
        searcher.tell(candidate, [float(rng.choice(accuracies[asked[-1]])), params[asked[-1]]])
    return asked


def scaled(values: np.ndarray) -> np.ndarray:
    """Return values from 0 to 1."""
    return (values - values.min()) / np.ptp(values)


def stated(values: np.ndarray, digits: int = 1) -> str:
    """Return a mean with its standard error."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


if __name__ == "__main__":
    main()
