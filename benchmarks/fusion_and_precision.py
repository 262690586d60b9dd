"""Kernel fusion and mixed precision on five unlike networks: what is kept, and whether anything gets slower.

    OMP_NUM_THREADS=1 python benchmarks/fusion_and_precision.py

Each network is trained for some steps on FashionMNIST with both callbacks. Then it is timed as trained and as they
left it, in turns, apart from what they measured themselves: read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore.callbacks import KernelFusion, MixedPrecision
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.speed_check import check_speed
from lightning_optcore.data import FashionMNIST
from lightning_optcore.measurement.environment import hardware_name
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.quality import validate
from lightning_optcore.models import CNN, MLP, Classifier


def main() -> None:
    """Train and change each network; print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", nargs="*", choices=tuple(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = FashionMNIST(batch_size=64)
    data.setup()
    table = Table()
    for title in ("", "part", "decision and measurement in the recipe"):
        table.add_column(title)
    for title in ("x as trained, again: batch 1", "batch 32", "bytes", "test acc"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in options.only:
        for row in one_network(name, data, options):
            table.add_row(*row)
        table.add_section()
    Console(width=190).print(table)
    print("versions:", ", ".join(f"{n} {version(n)}" for n in ("torch", "lightning")))
    print(hardware_name(torch.device("cpu")))


def one_network(name: str, data: FashionMNIST, options: argparse.Namespace) -> list[list[str]]:
    """Return the table's rows of one network."""
    seed_everything(0, verbose=False)
    model = NETWORKS[name]()
    trained = Trained()
    fusion = KernelFusion(compile=not options.no_compile, rounds=options.rounds)
    precision = MixedPrecision(rounds=options.rounds)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=options.steps,
        limit_val_batches=20,
        callbacks=[trained, fusion, precision],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)
    assert trained.model is not None
    images = Inputs.of(next(iter(data.val_dataloader()))[0])
    again = check_speed(trained.model, model, images, batch_sizes=(1, 32), num_threads=1, rounds=options.rounds)
    judged = data.test_dataloader()
    accuracy = [validate(m, judged, limit_batches=30).metrics["val/acc"] for m in (trained.model, model)]
    sizes = [sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (trained.model, model)]
    recorded = {part: text for step in recipe_of(model).steps for part, text in step.parameters["decisions"].items()}
    print(f"{name}: {recorded}, again {again}, {accuracy}", flush=True)
    rows = [["", part, re.sub(r"\s+", " ", text), "", "", "", ""] for part, text in recorded.items()]
    rows[0][0] = name
    figures = [f"{again.speedup[size]:.2f} ± {again.noise[size]:.2f}" for size in ("1", "32")]
    rows[0][3:] = [*figures, f"{sizes[1] / sizes[0]:.2f}", f"{accuracy[0]:.4f} → {accuracy[1]:.4f}"]
    return rows


class Trained(Callback):
    """Keeps the model as the training left it."""

    def __init__(self) -> None:
        self.model: Any = None

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.model = detached_copy(pl_module)


class Block(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Add what two convolutions make of the input to it."""
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class Rows(nn.Module):
    """Reads an image row by row, with a Transformer encoder or an LSTM."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.embedding = nn.Linear(28, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.body = nn.LSTM(128, 128, batch_first=True) if recurrent else nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.body(self.embedding(images.squeeze(1)))
        hidden = hidden[0][:, -1] if isinstance(self.body, nn.LSTM) else hidden.mean(1)
        return self.head(hidden)


def resnet() -> Classifier:
    """Three stages of two blocks."""
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(a, b) for a, b in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]
    return Classifier(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


NETWORKS = {
    "CNN": CNN,
    "ResNet": resnet,
    "MLP": lambda: MLP(width=1024, depth=3, in_features=784),
    "Transformer": lambda: Classifier(Rows(recurrent=False)),
    "LSTM": lambda: Classifier(Rows(recurrent=True)),
}

if __name__ == "__main__":
    main()
