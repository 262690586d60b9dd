"""Quantization-aware training against rounding afterwards and against torchao: FashionMNIST, one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/quantization_aware_training.py

Every row of a network starts from the same trained weights of its seed and gets the same 300 steps of 128 images; only
the rounding differs. Artifacts are timed in turns with the module: read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore import measure_alternatives
from lightning_optcore.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from lightning_optcore.compression.quantization import post_training_quantize
from lightning_optcore.data import FashionMNIST
from lightning_optcore.models import CNN, Classifier

STEPS = 300
FLOATING = "fp32, fine-tuned alike"


def cnn() -> nn.Module:
    """Convolutions with batch norms, 0.07M parameters."""
    made = CNN(width=16)
    return nn.Sequential(made.features, made.head)


def narrow() -> nn.Module:
    """Eight hidden layers of 32 units: none is redundant. Images are padded to 32 x 32, for torchao."""
    hidden = [layer for _ in range(7) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.ZeroPad2d(2), nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(), *hidden, nn.Linear(32, 10))


class FineTuned(Classifier):
    """A schedule over the fine-tuning steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    """Train, fine-tune and measure for each seed; print one table a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=("cnn", "narrow"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = FashionMNIST()
    data.setup()
    for make, rows, epochs in ((narrow, _int4_rows, 5), (cnn, _int8_rows, 2)):
        if options.only not in (None, make.__name__):
            continue
        results: dict[str, list[dict[str, float]]] = {}
        for seed in range(options.seeds):
            seed_everything(seed, verbose=False)
            trained = Classifier(make())
            _trainer(max_epochs=epochs).fit(trained, data)
            weights = {name: value.clone() for name, value in trained.network.state_dict().items()}
            for name, figures in _one_seed(make, weights, seed, data, rows, options.rounds).items():
                results.setdefault(name, []).append(figures)
            print(f"{make.__name__}: seed {seed} done", flush=True)
        Console(width=170).print(_table(make.__doc__ or "", results))
    print("versions:", ", ".join(f"{n} {version(n)}" for n in ("torch", "lightning", "onnxruntime", "torchao")))


Fit = Callable[..., tuple[FineTuned, Any]]


def _int8_rows(fit: Fit) -> dict[str, tuple[Any, Any]]:
    floating, rounded_after = fit(PostTrainingQuantization(scheme="static", rounds=2))
    return {
        FLOATING: (floating, None),
        "PostTrainingQuantization, int8 static": (None, rounded_after.artifact),
        "QuantizationAwareTraining, int8": _both(fit(QuantizationAwareTraining("int8", rounds=2))),
    }


def _int4_rows(fit: Fit) -> dict[str, tuple[Any, Any]]:
    floating, rounded_after = fit(PostTrainingQuantization(weight_bits=4, embedding_bits=4, rounds=2))
    return {
        FLOATING: (floating, None),
        "PostTrainingQuantization, weight_bits=4": (None, rounded_after.artifact),
        "torchao QAT, int4 in groups of 32": _torchao(fit, dynamic=False),
        "torchao QAT, int8 per token + int4": _torchao(fit, dynamic=True),
        "QuantizationAwareTraining, int4_weight_only": _both(
            fit(QuantizationAwareTraining("int4_weight_only", rounds=2))
        ),
        "QuantizationAwareTraining, int8_dynamic_int4": _both(
            fit(QuantizationAwareTraining("int8_dynamic_int4", rounds=2))
        ),
    }


def _both(fitted: tuple[FineTuned, Any]) -> tuple[FineTuned, Any]:
    model, callback = fitted
    assert callback.artifact is not None, callback.error
    return model, callback.artifact


def _torchao(fit: Fit, *, dynamic: bool) -> tuple[FineTuned, Any]:
    """Fine-tune with torchao's fake quantization; its own int4 runs on no CPU, so its weights go to ONNX Runtime."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if dynamic else None
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    configuration = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    model, _ = fit(None, prepare=lambda network: quantize_(network, configuration))
    plain = narrow()
    assert sum(isinstance(child, FakeQuantizedLinear) for child in model.network.modules()) == 9
    plain.load_state_dict(model.network.state_dict())
    return model, post_training_quantize(plain, [torch.zeros(2, 1, 28, 28)], weight_bits=4).model


def _one_seed(
    make: Callable[[], nn.Module],
    weights: dict[str, Tensor],
    seed: int,
    data: FashionMNIST,
    rows: Callable[[Fit], dict[str, tuple[Any, Any]]],
    rounds: int,
) -> dict[str, dict[str, float]]:
    def fit(callback: Any, prepare: Callable[[nn.Module], Any] = lambda _: None) -> tuple[FineTuned, Any]:
        network = make()
        network.load_state_dict(weights)
        prepare(network)
        model = FineTuned(network, lr=5e-4)
        seed_everything(100 + seed, verbose=False)
        with tempfile.TemporaryDirectory(prefix="optcore-bench-") as folder:
            callbacks = [] if callback is None else [callback]
            _trainer(*callbacks, max_steps=STEPS, default_root_dir=folder).fit(model, data)
        return model.eval(), callback

    made = rows(fit)
    images, labels = data.test_set.tensors
    floating = made[FLOATING][0]
    artifacts = {name: artifact for name, (_, artifact) in made.items() if artifact is not None}
    taken = measure_alternatives(
        {FLOATING: floating, **artifacts}, images[:32], batch_sizes=(1, 32), num_threads=1, rounds=rounds
    )
    whole = taken[FLOATING]
    expected = _accuracy(floating, images, labels)
    figures = {}
    for name, (module, artifact) in made.items():
        one = taken[name]
        figures[name] = {"bytes": one.size_bytes} | {
            f"batch {size}": whole.latency_ms[size].p50 / one.latency_ms[size].p50 for size in (1, 32)
        }
        if module is not None:
            figures[name]["module"] = 100 * _accuracy(module, images, labels)
        if artifact is not None:
            figures[name]["artifact"] = 100 * _accuracy(artifact, images, labels)
            figures[name]["points"] = figures[name]["artifact"] - 100 * expected
        if module is not None and artifact is not None:
            figures[name]["gap"] = figures[name]["artifact"] - figures[name]["module"]
    return figures


def _accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return float((found == labels).float().mean())


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


def _table(title: str, results: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title=title.splitlines()[0].split(":")[0], title_justify="left")
    columns = {
        "module": ("module, test acc", "{:.2f}"),
        "artifact": ("artifact, test acc", "{:.2f}"),
        "points": ("points", "{:+.2f}"),
        "gap": ("artifact - module", "{:+.3f}"),
        "bytes": ("bytes", "{:,.0f}"),
        "batch 1": ("x eager, batch 1", "{:.2f}"),
        "batch 32": ("batch 32", "{:.2f}"),
    }
    table.add_column("mean ± standard deviation", no_wrap=True)
    for name, _ in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for name, runs in results.items():
        table.add_row(
            name, *(_cell([run[key] for run in runs if key in run], form) for key, (_, form) in columns.items())
        )
    return table


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return form.format(statistics.mean(values)) + (f" ± {spread:.2g}" if spread else "")


if __name__ == "__main__":
    main()
