"""Structured pruning, distillation and int8 together, against Torch-Pruning: FashionMNIST, one CPU thread, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/pruning.py

Every alternative starts from the same dense weights of its seed, gets the same 150 fine-tuning steps of 128 images, and
is timed in turns with the dense model: read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore import measure_alternatives
from lightning_optcore.callbacks import KnowledgeDistillation, PostTrainingQuantization, StructuredPruning
from lightning_optcore.data import FashionMNIST
from lightning_optcore.measurement.quality import validate
from lightning_optcore.models import CNN

STEPS = 150
TARGET_FLOPS = 0.46
# Chosen on the validation images of two other seeds; the table's accuracy is that of the test images.
DISTILLATION = {"alpha": 0.3, "temperature": 4.0}
DENSE = "dense, fine-tuned alike"


class FineTuned(CNN):
    """The CNN with a schedule over the fine-tuning steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    """Train, prune, fine-tune and measure for each seed; print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--target-latency", type=float, default=0.57, help="of the layers in torch, for modules")
    parser.add_argument("--only", nargs="*", help="these rows and the dense one")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--images", choices=("test", "validation"), default="test", help="what accuracy is taken on")
    parser.add_argument("--dense-weights", type=Path, help="a folder that keeps the dense weights from run to run")
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = FashionMNIST()
    data.setup()
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name, figures in one_seed(seed, data, options).items():
            results.setdefault(name, []).append(figures)
        print(f"seed {seed} done", flush=True)
    Console(width=150).print(_table(results))
    print("versions:", ", ".join(f"{n} {version(n)}" for n in ("torch", "lightning", "torch-pruning", "onnxruntime")))


def one_seed(seed: int, data: FashionMNIST, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of every alternative for one seed."""
    weights = _dense_weights(seed, data, options)

    def fresh() -> FineTuned:
        model = FineTuned()
        model.load_state_dict(weights)
        return model

    def tuned(model: FineTuned, *callbacks: Callback) -> FineTuned:
        seed_everything(100 + seed, verbose=False)
        _trainer(*callbacks, max_steps=STEPS).fit(model, data)
        return model.eval()

    def compressed(*callbacks: Callback) -> Any:
        with tempfile.TemporaryDirectory(prefix="optcore-bench-") as folder:
            quantization = PostTrainingQuantization(rounds=2, output_dir=f"{folder}/artifact")
            tuned(fresh(), *callbacks, quantization)
            assert quantization.artifact is not None, quantization.error
            return quantization.artifact

    pruning = {"target_flops": TARGET_FLOPS}
    fast = {**pruning, "target_latency": options.target_latency}
    makers: dict[str, Callable[[], Any]] = {
        DENSE: lambda: tuned(fresh()),
        "Torch-Pruning, L2 uniform": lambda: tuned(torch_pruned(fresh(), data, "l2", global_pruning=False)),
        "Torch-Pruning, L2 global": lambda: tuned(torch_pruned(fresh(), data, "l2", global_pruning=True)),
        "Torch-Pruning, Taylor global": lambda: tuned(torch_pruned(fresh(), data, "taylor", global_pruning=True)),
        "StructuredPruning": lambda: tuned(fresh(), StructuredPruning(**fast)),
        "StructuredPruning, distilled": lambda: tuned(
            fresh(), KnowledgeDistillation(**DISTILLATION), StructuredPruning(**fast)
        ),
        "PostTrainingQuantization alone": compressed,
        "prune + distil + int8": lambda: compressed(
            KnowledgeDistillation(**DISTILLATION), StructuredPruning(**pruning)
        ),
    }
    wanted = makers if options.only is None else {name: makers[name] for name in (DENSE, *options.only)}
    models = {name: make() for name, make in wanted.items()}
    images = torch.cat([batch for (batch, _), _ in zip(data.train_dataloader(), range(1), strict=False)])
    taken = measure_alternatives(models, images, batch_sizes=(1, 32), num_threads=1, rounds=options.rounds)
    whole = taken[DENSE]
    judged = data.test_dataloader() if options.images == "test" else data.val_dataloader()
    accuracy = {name: accuracy_of(models[DENSE], model, judged) for name, model in models.items()}
    return {
        name: {
            "accuracy": accuracy[name],
            "points": 100 * (accuracy[name] - accuracy[DENSE]),
            "macs": one.flops / whole.flops,
            "megabytes": one.size_bytes / 1e6,
            "batch 1": whole.latency_ms[1].p50 / one.latency_ms[1].p50,
            "batch 32": whole.latency_ms[32].p50 / one.latency_ms[32].p50,
        }
        for name, one in taken.items()
    }


def _dense_weights(seed: int, data: FashionMNIST, options: argparse.Namespace) -> dict[str, Tensor]:
    kept = options.dense_weights and options.dense_weights / f"epochs={options.epochs},seed={seed}.pt"
    if kept and kept.exists():
        return torch.load(kept, weights_only=True)
    seed_everything(seed, verbose=False)
    dense = CNN()
    _trainer(max_epochs=options.epochs).fit(dense, data)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dense.state_dict(), kept)
    return {name: value.clone() for name, value in dense.state_dict().items()}


def accuracy_of(dense: FineTuned, alternative: Any, images: Iterable[Any]) -> float:
    """Return the accuracy on these labelled images, through the model's own validation."""
    if isinstance(alternative, nn.Module):
        return validate(alternative, images).metrics["val/acc"]
    outcome = validate(dense, images, replace="", replacement=alternative.runner(1))
    assert outcome.replacement_calls > 0
    return outcome.metrics["val/acc"]


def torch_pruned(model: FineTuned, data: FashionMNIST, criterion: str, *, global_pruning: bool) -> FineTuned:
    """Prune with Torch-Pruning's own pruner to the same share of MACs, as closely as its ratio allows."""
    example = torch.zeros(2, 1, 28, 28)
    if criterion == "taylor":
        images, labels = next(iter(data.train_dataloader()))
        nn.functional.cross_entropy(model(images), labels).backward()
    importance: Callable[..., Any] = (
        tp.importance.GroupTaylorImportance() if criterion == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
    )
    whole = tp.utils.count_ops_and_params(model, example)[0]
    pruner = tp.pruner.MetaPruner(
        model,
        example,
        importance=importance,
        pruning_ratio=0.8,
        max_pruning_ratio=0.8,
        iterative_steps=40,
        global_pruning=global_pruning,
        ignored_layers=[model.head[2]],
    )
    while tp.utils.count_ops_and_params(model, example)[0] > TARGET_FLOPS * whole:
        pruner.step()
    return model


def _trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _table(results: dict[str, list[dict[str, float]]]) -> Table:
    table = Table()
    titles = {
        "accuracy": ("test acc", "{:.4f}"),
        "points": ("points", "{:+.2f}"),
        "macs": ("MACs", "{:.3f}"),
        "megabytes": ("MB", "{:.3f}"),
        "batch 1": ("x dense, batch 1", "{:.2f}"),
        "batch 32": ("batch 32", "{:.2f}"),
    }
    table.add_column("mean ± standard deviation", no_wrap=True)
    for title, _ in titles.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, runs in results.items():
        cells = []
        for key, (_, form) in titles.items():
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
