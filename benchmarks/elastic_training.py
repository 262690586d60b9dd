"""What it costs when replicas die: a CNN on images of clothes, two replicas, SIGKILL at random moments.

    OMP_NUM_THREADS=1 python benchmarks/elastic_training.py

Trains a small CNN of 10,000 images of FashionMNIST for 2,000 steps with ``ElasticDDPStrategy``, with three seeds:
undisturbed, and while 20 times a replica, drawn at random, is killed at a random moment of the two seconds after both
train. Replicas that are killed pause for 0.1 s after each step as if it were a larger one, so that there is time to
start again. "Pause" is the longest time between two steps of the one that lives, less that 0.1 s; "away" the share of
steps that were done by one alone. Takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from lightning_optcore.data import FashionMNIST
from lightning_optcore.distributed.elastic import ElasticDDPStrategy
from lightning_optcore.models import CNN

IMAGES, BATCH = 10_000, 32


class _Trace(Callback):
    """Writes a line after each step, for the one who kills."""

    def __init__(self, folder: Path, pause: float) -> None:
        self.folder, self.pause = folder, pause

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        assert isinstance(trainer.strategy, ElasticDDPStrategy) and trainer.strategy.replicas is not None
        line = {
            "pid": os.getpid(),
            "time": time.time(),
            "step": trainer.global_step,
            "ranks": trainer.strategy.replicas.ranks,
        }
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(self.pause)


def train(folder: Path, steps: int, seed: int, pause: float) -> None:
    """What each replica runs, and its supervisor before it becomes one."""
    seed_everything(seed)
    data = FashionMNIST(batch_size=BATCH)
    data.setup()
    assert data.train_set is not None
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ElasticDDPStrategy(max_restarts=100),
        max_steps=steps,
        max_epochs=math.ceil(steps / (IMAGES // (2 * BATCH))),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Trace(folder, pause)],
    )
    model = CNN(width=8)
    trainer.fit(model, DataLoader(Subset(data.train_set, range(IMAGES)), BATCH, shuffle=True))
    assert data.val_set is not None
    result = trainer.validate(model, DataLoader(data.val_set, 500), verbose=False)[0]
    torch.save({"result": result, "weights": model.state_dict()}, folder / f"{trainer.global_rank}.pt")


def lines(folder: Path, rank: int) -> list[dict[str, Any]]:
    """Return the steps of a rank so far."""
    path = folder / f"{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def disturbed(folder: Path, steps: int, seed: int, pause: float, kills: int) -> tuple[float, list[dict[str, Any]]]:
    """Run a training, kill replicas, and return its seconds and what each kill cost."""
    command = [sys.executable, __file__, "--train", str(folder), "--steps", str(steps), "--seed", str(seed)]
    chance = random.Random(seed)
    begin = time.time()
    costs: list[dict[str, Any]] = []
    process = subprocess.Popen([*command, "--pause", str(pause)])
    killed: dict[str, Any] | None = None
    while process.poll() is None:
        time.sleep(0.02)
        both = [lines(folder, rank) for rank in (0, 1)]
        if not all(both):
            continue
        if killed is not None:
            back = [line for line in both[killed["rank"]] if line["pid"] != killed["pid"]]
            back = [line for line in back if line["time"] > killed["time"] and line["ranks"] == [0, 1]]
            if not back:
                continue
            times = [line for line in both[1 - killed["rank"]] if line["time"] > killed["time"] - 1]
            gaps = [b["time"] - a["time"] for a, b in pairwise(times) if a["time"] < killed["time"] + 5]
            lost = sum(b["step"] != a["step"] + 1 for a, b in pairwise(times))
            costs.append({"pause": max(gaps) - pause, "lost": lost, "back": back[0]["time"] - killed["time"], **killed})
            killed = None
        if len(costs) < kills:
            time.sleep(chance.uniform(0, 2))
            rank = chance.randrange(2)
            last = lines(folder, rank)[-1]
            if process.poll() is None and last["step"] < steps - 50:
                os.kill(last["pid"], signal.SIGKILL)
                killed = {"rank": rank, "pid": last["pid"], "time": time.time()}
    if process.returncode:
        raise SystemExit(f"the training ended with {process.returncode}")
    return time.time() - begin, costs


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()
    if given.train is not None:
        train(given.train, given.steps, given.seed, given.pause)
        return
    table = Table(
        "", "kills", "s", "pause, s", "steps lost", "back after, s", "away", "loss", "accuracy", "replicas equal"
    )
    runs = [(seed, kills, given.pause if kills else 0.0) for kills in sorted({0, given.kills}) for seed in given.seeds]
    for seed, kills, pause in runs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            seconds, costs = disturbed(folder, given.steps, seed, pause, kills)
            finals = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
            weights = [final["weights"] for final in finals]
            equal = len(finals) == 2 and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
            done = [line for rank in (0, 1) for line in lines(folder, rank)]
            together = {line["step"] for line in done if line["ranks"] == [0, 1]}
            pauses = [cost["pause"] for cost in costs]
            backs = [cost["back"] for cost in costs]
            table.add_row(
                f"seed {seed}",
                str(len(costs)),
                f"{seconds:.0f}",
                f"{statistics.median(pauses):.2f}, at most {max(pauses):.2f}" if pauses else "",
                str(sum(cost["lost"] for cost in costs)),
                f"{statistics.median(backs):.1f}, at most {max(backs):.1f}" if backs else "",
                f"{1 - len(together) / given.steps:.0%}",
                *(f"{finals[0]['result'][key]:.4f}" for key in ("val/loss", "val/acc")),
                str(equal),
            )
            Console(width=160).print(table)


if __name__ == "__main__":
    main()
