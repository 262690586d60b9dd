"""A table of real trainings to search: 1,350 configurations of a classifier of digits, each trained twice.

    OMP_NUM_THREADS=1 python benchmarks/digits_table.py      (writes benchmarks/digits_table.json)

Objectives: validation accuracy and multiply-accumulates; searchers can be compared on it without training anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_optcore.files import write_atomically

SPACE: dict[str, list[Any]] = {
    "width": [4, 8, 16, 32, 64],
    "depth": [1, 2, 3],
    "activation": ["relu", "tanh", "gelu"],
    "lr": [0.0003, 0.001, 0.003, 0.01, 0.03],
    "batch_size": [16, 64, 256],
    "dropout": [0.0, 0.2],
}
SEEDS = (0, 1)
EPOCHS = 5
FILE = Path(__file__).with_suffix(".json")
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def main() -> None:
    """Train every configuration and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    table = {}
    for values in itertools.product(*SPACE.values()):
        config = dict(zip(SPACE, values, strict=True))
        accuracies = [accuracy(config, data, order, seed) for seed in SEEDS]
        table[json.dumps(values)] = {"accuracy": accuracies, "macs": macs(config)}
    content = {"space": SPACE, "epochs": EPOCHS, "torch": torch.__version__, "table": table}
    write_atomically(arguments.output, json.dumps(content))
    print(f"{len(table)} configurations in {arguments.output}")


def accuracy(config: dict[str, Any], data: tuple[torch.Tensor, torch.Tensor], order: torch.Tensor, seed: int) -> float:
    """Return the accuracy on 450 held-out images after a training on the others."""
    torch.manual_seed(seed)
    model = network(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    images, labels = data[0][order], data[1][order]
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels) - 450).split(config["batch_size"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return round(float((model(images[-450:]).argmax(1) == labels[-450:]).float().mean()), 4)


def network(config: dict[str, Any]) -> nn.Sequential:
    """Return the untrained network of a configuration."""
    layers: list[nn.Module] = []
    width = 64
    for _ in range(config["depth"]):
        layers += [nn.Linear(width, config["width"]), _ACTIVATIONS[config["activation"]]()]
        layers += [nn.Dropout(config["dropout"])]
        width = config["width"]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def macs(config: dict[str, Any]) -> int:
    """Return the multiply-accumulates of one image."""
    width, depth = config["width"], config["depth"]
    return 64 * width + (depth - 1) * width * width + width * 10


if __name__ == "__main__":
    main()
