"""Two gloo ranks over a slow link and over none: time, bytes and what is learned, stock DDP beside OptCoreDDPStrategy.

    OMP_NUM_THREADS=1 python benchmarks/distributed.py slow_link|loopback [--seeds 3]

``slow_link`` puts each rank into a network namespace of its own, with 100 Mbit/s between them (Linux, as root). All
train a CNN of 1.6M parameters on FashionMNIST, 64 images a rank and step, with the same seeds. The ceiling is two
processes that train at the same time and never communicate. Held-out losses are of 2,000 test images, and the clock
stands still while they are computed, but not while ranks are brought together for them. Bytes are those that the
strategy counts, beside those of the network interface. ``loopback`` lets the strategies take turns on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.data import FashionMNIST
from lightning_optcore.strategies import OptCoreDDPStrategy

BATCH, HELD_OUT = 64, 2000
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "no communication": ("alone", {}),
    "stock DDP": ("ddp", {}),
    "none": ("none", {}),
    "bf16": ("bf16", {}),
    "int8": ("int8", {}),
    "topk": ("topk", {}),
    "powersgd": ("powersgd", {}),
    "local_sgd": ("local_sgd", {}),
    "diloco": ("diloco", {}),
    "auto": ("auto", {}),
}


class Net(LightningModule):
    """1.63M parameters, most of them in one layer."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


class Clock(Callback):
    """Notes the seconds of training at every validation, and its loss; the first steps are not timed."""

    untimed = 10

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.perf_counter()
        self.curve: list[tuple[int, float, float]] = []
        self.first: tuple[int, float] | None = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.first is None and trainer.global_step >= self.untimed:
            self.first = trainer.global_step, self.now()

    def now(self) -> float:
        return self.seconds + time.perf_counter() - self.since

    # The ranks are brought together after on_validation_start.
    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.seconds = self.now()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.since = time.perf_counter()
        self.curve.append((trainer.global_step, self.seconds, float(trainer.callback_metrics["val/loss"])))


def interface_bytes() -> int:
    """What the interface of this rank sent so far, headers and all."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())


def train(way: str, options: dict[str, Any], steps: int, every: int, seed: int) -> dict[str, Any]:
    """Train one rank, as its environment says."""
    seed_everything(seed, verbose=False)
    data = FashionMNIST(batch_size=BATCH)
    data.setup()
    alone = way == "alone"
    strategy = "auto" if alone else "ddp" if way == "ddp" else OptCoreDDPStrategy(way, options)  # type: ignore[arg-type]
    rank = int(os.environ["LOCAL_RANK"])
    if alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", devices=1 if alone else 2, strategy=strategy, max_steps=steps, max_epochs=-1,
        val_check_interval=every, check_val_every_n_epoch=None, num_sanity_val_steps=0, callbacks=[clock], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    images, labels = data.train_set.tensors
    held_out = TensorDataset(*(one[:HELD_OUT] for one in data.test_set.tensors))
    order = torch.Generator().manual_seed(seed + 1000 * rank if alone else seed)
    loader = DataLoader(TensorDataset(images, labels), BATCH, shuffle=True, generator=order)
    before = interface_bytes()
    trainer.fit(Net(), loader, DataLoader(held_out, 500))
    assert clock.first is not None
    first, start = clock.first
    last, end, _ = clock.curve[-1]
    return {
        "rank": rank,
        "ms": 1e3 * (end - start) / (last - first),
        "curve": clock.curve,
        "counted": getattr(trainer.strategy, "bytes_sent", 0),
        "interface": interface_bytes() - before,
        "steps": last,
        "decision": str(getattr(trainer.strategy, "decision", None)),
    }


@contextmanager
def namespaces(rate: str) -> Any:
    """Two network namespaces with a link of so much between them; yields their names and addresses."""
    names, ends = ("optcore0", "optcore1"), ("veth0", "veth1")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            shaping = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
            subprocess.run(["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, *shaping], check=True)
        yield [
            (["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": end}) for name, end in zip(names, ends, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


LOOPBACK: list[tuple[list[str], dict[str, str]]] = [([], {}), ([], {})]


def run(
    places: list[tuple[list[str], dict[str, str]]], way: str, options: dict[str, Any], steps: int, every: int, seed: int
) -> list[dict[str, Any]]:
    """Train two ranks, each at its place, and return what they found."""
    address = "10.77.0.1" if places[0][0] else "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, (prefix, environment) in enumerate(places):
            found = Path(folder) / f"{rank}.json"
            task = json.dumps({"way": way, "options": options, "steps": steps, "every": every, "seed": seed})
            env = os.environ | environment | {
                "MASTER_ADDR": address, "MASTER_PORT": str(29500 + os.getpid() % 2000), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [*prefix, sys.executable, __file__, "rank", "--task", task, "--found", str(found)]
            processes.append((subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True), found))
        for process, _ in processes:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(errors)
        return [json.loads(found.read_text()) for _, found in processes]


def slow_link(options: argparse.Namespace) -> None:
    """Print what the ways to communicate reach over 100 Mbit/s."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with namespaces("100mbit") as places:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name in options.only or WAYS:
                way, its_options = WAYS[name]
                found = run(places, way, its_options, options.steps, options.every, seed)
                # Of both ranks, whose processors may differ.
                found[0]["ms"] = statistics.mean(one["ms"] for one in found)
                runs.setdefault(name, []).append(found[0])
                line = {key: value for key, value in found[0].items() if key != "rank"}
                print(f"seed {seed}, {name}: {json.dumps(line)}", flush=True)
    table = Table(title=f"100 Mbit/s, {options.steps} steps, mean ± standard deviation of {options.seeds} seeds")
    columns = ("ms a step", "% of the ceiling", "kB sent a step", "interface / counted", "held-out loss", "x DDP's")
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right")
    ceiling = runs.get("no communication")
    ddp = runs.get("stock DDP") or runs.get("none")
    for name, found in runs.items():
        ms = [one["ms"] for one in found]
        share = [100 * top["ms"] / one["ms"] for top, one in zip(ceiling or found, found, strict=True)]
        loss = [one["curve"][-1][2] for one in found]
        relative = [one / other["curve"][-1][2] for one, other in zip(loss, ddp or found, strict=True)]
        counted = [one["counted"] / one["steps"] / 1e3 for one in found]
        ratio = [one["interface"] / one["counted"] for one in found if one["counted"]]
        cells = [spread(cell) if cell else "" for cell in (ms, share, counted, ratio, loss, relative)]
        table.add_row(name, *cells)
    Console(width=150).print(table)
    if ddp:
        for name, found in runs.items():
            if name != "no communication" and found is not ddp:
                print(f"{name}: {always_below(found, ddp)}")


def always_below(found: list[dict[str, Any]], ddp: list[dict[str, Any]]) -> str:
    """Say whether a curve of mean losses against seconds lies below that of DDP wherever both were measured."""
    ours, theirs = (mean_curve(one) for one in (found, ddp))
    worse = []
    for seconds, loss in ours:
        reached = [value for time_, value in theirs if time_ <= seconds]
        if reached and loss >= reached[-1]:
            worse.append(f"{seconds:.1f} s: {loss:.3f} against {reached[-1]:.3f}")
    return (
        f"not below DDP's curve at {', '.join(worse)}" if worse else "its curve of loss against seconds is below DDP's"
    )


def mean_curve(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    points = zip(*(one["curve"] for one in found), strict=True)
    return [(statistics.mean(p[1] for p in at), statistics.mean(p[2] for p in at)) for at in points]


def loopback(options: argparse.Namespace) -> None:
    """Print the time of a step without a slow link, the strategies taking turns."""
    names = options.only or ["stock DDP", "none", "bf16", "local_sgd", "diloco", "auto"]
    ms: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in names:
            way, its_options = WAYS[name]
            found = run(LOOPBACK, way, its_options, options.steps, options.steps, seed)
            ms[name].append(statistics.mean(one["ms"] for one in found))
            print(f"turn {seed}, {name}: {ms[name][-1]:.2f} ms a step", flush=True)
    table = Table(title=f"loopback, {options.seeds} turns of {options.steps} steps")
    for column in ("", "ms a step, median", "x throughput of stock DDP, median of the turns"):
        table.add_column(column)
    for name in names:
        ratios = [other / one for one, other in zip(ms[name], ms[names[0]], strict=True)]
        table.add_row(name, f"{statistics.median(ms[name]):.2f}", f"{statistics.median(ratios):.3f}")
    Console().print(table)


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("slow_link", "loopback", "rank"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--only", nargs="+", choices=list(WAYS))
    parser.add_argument("--task", type=json.loads)
    parser.add_argument("--found", type=Path)
    options = parser.parse_args()
    if options.part == "rank":
        options.found.write_text(json.dumps(train(**options.task)))
        return
    {"slow_link": slow_link, "loopback": loopback}[options.part](options)
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning")))


if __name__ == "__main__":
    main()
