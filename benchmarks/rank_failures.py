"""Ranks under torchrun that are killed now and then: when it is named, when they train again, and what is lost.

    OMP_NUM_THREADS=1 python benchmarks/rank_failures.py [--kills 20] [--seeds 1]

Two gloo ranks train a small CNN on FashionMNIST for 2,000 steps. At random moments one of them gets SIGKILL; what its
survivor saved is taken up by torchrun's restart. The same run without a kill stands beside it.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from lightning_optcore.data import FashionMNIST
from lightning_optcore.models import CNN
from lightning_optcore.strategies import OptCoreDDPStrategy

STEPS = 2000


class Steps(Callback):
    """Notes every step when it is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        line = {"step": trainer.global_step, "restart": restart, "time": time.time(), "pid": os.getpid()}
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def train(folder: Path, seed: int) -> None:
    """Train one rank of torchrun's."""
    seed_everything(seed, verbose=False)
    data = FashionMNIST(batch_size=32)
    data.setup()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=OptCoreDDPStrategy(timeout=10.0), max_steps=STEPS, logger=False,
        limit_val_batches=0, callbacks=[Steps(folder)], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    module = CNN(width=8, depth=2)
    trainer.fit(module, DataLoader(data.train_set, 32, shuffle=True))
    if trainer.is_global_zero:
        images, labels = data.test_set.tensors
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(module.eval()(images), labels))
        (folder / "loss.json").write_text(json.dumps(loss))


def steps_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    file = folder / f"rank{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def run(folder: Path, kills: int, seed: int) -> list[dict[str, float]]:
    """Train under torchrun, and kill ranks meanwhile; return what each kill cost."""
    out = folder / "out.txt"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(kills)]
    command = [sys.executable, *torchrun, __file__, "--rank-of", str(folder), "--first-seed", str(seed)]
    numbers = random.Random(seed)
    # In every part of the run one.
    due = [STEPS * (i + numbers.random()) / (kills + 1) for i in range(kills)]
    costs = []
    with out.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        for at in due:
            while process.poll() is None and max((one["step"] for one in steps_of(folder)), default=0) < at:
                time.sleep(0.02)
            if process.poll() is None:
                costs.append(kill(folder, numbers.randrange(2), out))
        if process.wait():
            sys.exit(out.read_text()[-3000:])
    return costs


def kill(folder: Path, rank: int, out: Path) -> dict[str, float]:
    """Kill a rank, and wait until the ranks train again."""
    last = steps_of(folder, rank)[-1]
    said = out.stat().st_size
    os.kill(last["pid"], signal.SIGKILL)
    start, named = time.time(), float("nan")
    while True:
        if math.isnan(named) and b"died after" in out.read_bytes()[said:]:
            named = time.time() - start
        done = steps_of(folder)
        again = [one for one in done if one["restart"] > last["restart"]]
        if again:
            before = max(one["step"] for one in done if one["restart"] == last["restart"])
            lost = before - again[0]["step"] + 1
            found = {"named": named, "again": again[0]["time"] - start, "lost": max(lost, 0)}
            print(json.dumps({"rank": rank, "step": before, **found}), flush=True)
            return found
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rank-of", type=Path)
    options = parser.parse_args()
    if options.rank_of is not None:
        train(options.rank_of, options.first_seed)
        return
    table = Table(title=f"two ranks under torchrun, {STEPS} steps")
    for column in ("seed", "kills", "named after, s", "training again after, s", "steps lost", "held-out loss"):
        table.add_column(column)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for kills in (0, options.kills):
            with tempfile.TemporaryDirectory() as folder:
                costs = run(Path(folder), kills, seed)
                loss = json.loads((Path(folder) / "loss.json").read_text())
            cells = [spread([one[name] for one in costs]) for name in ("named", "again", "lost")]
            table.add_row(str(seed), str(len(costs)), *cells, f"{loss:.6f}")
    Console().print(table)
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning")))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} (at most {max(values):.2f})" if values else ""


if __name__ == "__main__":
    main()
