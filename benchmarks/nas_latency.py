"""Predicted against measured latency of random architectures.

    OMP_NUM_THREADS=1 python benchmarks/nas_latency.py

Two spaces: NNI's NasBench201 (16 channels, one cell a stage) and a plain factory of convolutional networks whose
widths, kernels, depths and kinds of convolution are chosen. The table's two factors are fitted to 8 networks, and 50
others are predicted. All are measured whole in the same 30 interleaved rounds: processor time of one thread, batch 1,
10th percentile.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from lightning_optcore.measurement.hardware import cpu_name
from lightning_optcore.nas._nni_compat import nni_nas
from lightning_optcore.nas.latency_table import LatencyTable, quiet_latencies


def main() -> None:
    """Fit, predict and measure; print one row a space."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--fitted", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    nni_nas()  # which sets its own level
    logging.getLogger("nni").setLevel(logging.ERROR)
    printed = Table(title=f"{options.networks} networks that the factors were not fitted to, batch 1, one thread")
    for title in ("space", "parts", "ms", "within 15%", "median error", "Spearman", "within 15%, plain sum", "seconds"):
        printed.add_column(title, justify="left" if title == "space" else "right")
    for name, make in {"NasBench201": nas_bench_201, "convolutional": convolutional}.items():
        start = time.perf_counter()
        torch.manual_seed(options.seed)
        networks, example = make(options.fitted + options.networks, options.seed)
        fitted, others = networks[: options.fitted], networks[options.fitted :]
        table = LatencyTable()
        plain = np.array([table.predict(network, example) for network in others])
        # All in the same rounds: what else the machine does from minute to minute is no error of the table's.
        measured = np.array(quiet_latencies(networks, example))
        table.fit(fitted, example, measured[: options.fitted].tolist())
        measured = measured[options.fitted :]
        predicted = np.array([table.predict(network, example) for network in others])
        errors = abs(predicted / measured - 1)
        printed.add_row(
            name,
            str(len(table)),
            f"{measured.min():.2f} to {measured.max():.2f}",
            f"{100 * np.mean(errors <= 0.15):.0f}%",
            f"{100 * np.median(errors):.1f}%",
            f"{spearmanr(predicted, measured).statistic:.3f}",
            f"{100 * np.mean(abs(plain / measured - 1) <= 0.15):.0f}%",
            f"{time.perf_counter() - start:.0f}",
        )
        scale, overhead = table.factors(example)
        print(f"{name}: scale {scale:.2f}, {1e3 * overhead:.1f} µs a module that holds others", flush=True)
    Console(width=120).print(printed)
    print(f"{cpu_name()}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("versions:", ", ".join(f"{package} {version(package)}" for package in ("lightning-optcore", "torch", "nni")))


def nas_bench_201(count: int, seed: int) -> tuple[list[nn.Module], torch.Tensor]:
    """Return distinct random networks of NNI's space."""
    nas = nni_nas()
    space = nas.hub.NasBench201(16, 1)
    labels = {label: list(one.values) for label, one in space.simplify().items()}
    return _distinct(
        lambda rng: {label: rng.choice(values) for label, values in labels.items()}, space.freeze, count, seed
    )


def convolutional(count: int, seed: int) -> tuple[list[nn.Module], torch.Tensor]:
    """Return distinct random networks of a plain factory."""

    def draw(rng: random.Random) -> dict[str, object]:
        return {
            f"{name}{stage}": rng.choice(values)
            for stage in range(3)
            for name, values in {
                "width": (8, 16, 24, 32, 48, 64),
                "kernel": (3, 5),
                "depth": (1, 2, 3),
                "kind": ("full", "separable"),
            }.items()
        }

    return _distinct(draw, Convolutional, count, seed)


class Convolutional(nn.Module):
    """Three stages of convolutions with shortcuts."""

    def __init__(self, chosen: dict[str, object]) -> None:
        super().__init__()
        channels, self.stages = 3, nn.ModuleList()
        for stage in range(3):
            width, kernel = int(chosen[f"width{stage}"]), int(chosen[f"kernel{stage}"])  # type: ignore[call-overload]
            separable = chosen[f"kind{stage}"] == "separable"
            blocks = [_block(channels, width, kernel, False, stride=1 if stage == 0 else 2)]
            depth = int(chosen[f"depth{stage}"])  # type: ignore[call-overload]
            blocks += [_block(width, width, kernel, separable) for _ in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
            channels = width
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        for first, *others in self.stages:
            x = torch.relu(first(x))
            for block in others:
                x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def _block(channels: int, width: int, kernel: int, separable: bool, stride: int = 1) -> nn.Module:
    if separable:
        first = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        return nn.Sequential(first, nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width))


def _distinct(
    draw: Callable[[random.Random], dict[str, object]], build: Callable[..., nn.Module], count: int, seed: int
) -> tuple[list[nn.Module], torch.Tensor]:
    rng, chosen = random.Random(seed), {}
    while len(chosen) < count:
        one = draw(rng)
        chosen[str(one)] = one
    return [build(one) for one in chosen.values()], torch.randn(1, 3, 32, 32)


if __name__ == "__main__":
    main()
