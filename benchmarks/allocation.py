"""A form and a width for every layer, against the same ones for all: FashionMNIST, one CPU thread, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/allocation.py

Budgets and the harms of options are judged on training images, accuracies are of the 10,000 test images. A uniform
width leaves every layer that share of its channels; it is made as an allocation's is, and followed by the same int8.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore.compression.allocation import allocate
from lightning_optcore.compression.allocation_options import narrowed
from lightning_optcore.compression.channel_groups import find_channel_groups
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.quantization import post_training_quantize
from lightning_optcore.compression.reconstruction import rank_by_reconstruction
from lightning_optcore.data import FashionMNIST
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.timing import time_in_turns
from lightning_optcore.models import CNN, Classifier

# Of the bytes of uniform int8.
BUDGETS = (0.9, 0.75, 0.5, 0.3)
# Of its latency.
LATENCIES = (0.95, 0.85)
CALIBRATION = 4


def mlp() -> LightningModule:
    """Return two hidden layers of 256 units."""
    layers = [nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return Classifier(nn.Sequential(*layers))


NETS = {"MLP": mlp, "CNN": lambda: CNN(width=16)}


def main() -> None:
    """Train, allocate and measure for each seed; print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of training, 128 images each")
    parser.add_argument("--nets", nargs="*", choices=list(NETS), default=list(NETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = FashionMNIST(batch_size=128)
    data.setup()
    for net in options.nets:
        results: dict[str, list[dict[str, float]]] = {}
        for seed in range(options.seeds):
            start = time.perf_counter()
            for name, figures in one_seed(net, seed, data, options.steps).items():
                results.setdefault(name, []).append(figures)
            print(f"{net}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        Console(width=190).print(_table(net, results))
    print("versions:", ", ".join(f"{n} {version(n)}" for n in ("torch", "onnxruntime", "scipy", "torch-pruning")))


def one_seed(net: str, seed: int, data: FashionMNIST, steps: int) -> dict[str, dict[str, float]]:
    """Return the figures of every alternative for one seed."""
    seed_everything(seed, verbose=False)
    module = NETS[net]()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, **quiet).fit(module, data)
    module.eval()
    batches = [images for (images, _), _ in zip(data.train_dataloader(), range(CALIBRATION), strict=False)]
    test = list(data.test_dataloader())
    reference = accuracy_of(module, test)

    def figures(model: Any, **others: float) -> dict[str, float]:
        reached = accuracy_of(model, test)
        return {"accuracy": reached, "points": 100 * (reached - reference), "kB": model.size_bytes / 1e3, **others}

    int8 = post_training_quantize(module, batches).model
    found = {"fp32": figures(_exported(module, batches)), "uniform int8": figures(int8)}
    narrow = {
        f"uniform width {width}, int8": post_training_quantize(_narrowed(module, batches, width), batches).model
        for width in (0.75, 0.5)
    }
    for name, model in narrow.items():
        found[name] = figures(model)
        allocated = allocate(module, batches, budget_bytes=model.size_bytes)
        found[f"allocated, as many bytes as {name}"] = figures(allocated.model, **_errors(allocated))
    for share in BUDGETS:
        allocated = allocate(module, batches, budget_bytes=share * int8.size_bytes)
        found[f"allocated, {share:.0%} of uniform int8"] = figures(allocated.model, **_errors(allocated))
    base = _milliseconds({"int8": int8}, batches)["int8"]
    for share in LATENCIES:
        try:
            allocated = allocate(module, batches, budget_latency_ms=share * base)
        except ValueError as error:
            print(f"{net}, seed {seed}, {share:.0%} of the latency: {error}", flush=True)
            continue
        name = f"allocated, {share:.0%} of its latency"
        taken = _milliseconds({"int8": int8, "allocated": allocated.model}, batches)
        found[name] = figures(allocated.model, **_errors(allocated), latency=taken["allocated"] / taken["int8"])
    return found


def _errors(allocated: Any) -> dict[str, float]:
    """Return by how much the predictions were off, in percent."""
    return {
        f"{name} off": 100 * abs(allocated.predicted[name] / allocated.realised[name] - 1)
        for name in allocated.predicted
        if name != "harm"
    }


def _exported(module: nn.Module, batches: Sequence[Tensor]) -> OnnxModel:
    return post_training_quantize(module, batches, scheme="dynamic").prepared


def _narrowed(module: LightningModule, batches: Sequence[Tensor], width: float) -> nn.Module:
    """Leave every layer but the last a share of its units, the least important ones gone."""
    narrow = copy.deepcopy(module)
    inputs = Inputs.of(torch.cat(list(batches))[:128])
    groups = find_channel_groups(narrow, inputs)
    rankings = rank_by_reconstruction(narrow, inputs, groups)
    removed = {
        name: rankings[name].order[: group.units - round(width * group.units)]
        for name, group in groups.groups.items()
        if name in rankings
    }
    narrowed(narrow, inputs, removed, groups)
    return narrow


def accuracy_of(model: Any, test: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy on labelled images."""
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    return right / sum(len(labels) for _, labels in test)


def _milliseconds(models: dict[str, OnnxModel], batches: Sequence[Tensor]) -> dict[str, float]:
    sample = batches[0][:1]
    runners = {name: model.runner(1) for name, model in models.items()}
    calls = {name: (lambda runner=runner: runner(sample)) for name, runner in runners.items()}
    return {name: one.p50 for name, one in time_in_turns(calls, rounds=20).items()}


def _table(net: str, results: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title=net)
    titles = {
        "kB": ("kB", "{:.1f}"),
        "accuracy": ("test acc", "{:.4f}"),
        "points": ("points", "{:+.2f}"),
        "size_bytes off": ("bytes off, %", "{:.2f}"),
        "latency": ("x latency of int8", "{:.2f}"),
        "latency_ms off": ("latency off, %", "{:.1f}"),
    }
    table.add_column("mean ± standard deviation", no_wrap=True)
    for title, _ in titles.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, runs in results.items():
        cells = []
        for key, (_, form) in titles.items():
            values = [run[key] for run in runs if key in run]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread if values else "")
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
