"""A fit on two ranks, as a script that tests start, and of which a rank fails as they say.

Every batch is noted in ``log-RANK.jsonl`` when it is done, so that it is known what was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_optcore.data import Digits
from lightning_optcore.distributed.failures import RankFailure
from lightning_optcore.models import MLP
from lightning_optcore.strategies import OptCoreDDPStrategy


class Model(MLP):
    """Fails where it is told to, at its first start."""

    failing: argparse.Namespace

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        options = self.failing
        time.sleep(options.pause)
        at = options.fail_rank in (-1, self.global_rank) and options.fail_step == self.global_step
        at &= options.fail_batch in (-1, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        if at and options.fail_in == "training_step":
            fail(options.fail)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        options = self.failing
        at = options.fail_rank in (-1, self.global_rank) and options.fail_step == self.global_step
        if at and options.fail_in == "validation_step" and batch_idx == 1:
            fail(options.fail)
        super().validation_step(batch, batch_idx)


def fail(how: str) -> None:
    """Fail in one of several ways, at the first start."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "raise":
        raise ValueError("no such label")
    elif how == "hang":
        while True:
            time.sleep(0.1)


class Log(Callback):
    """Notes every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note(trainer, "batch")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.note(trainer, "epoch_start")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.note(trainer, "validation")

    def note(self, trainer: Trainer, what: str) -> None:
        loop = trainer.fit_loop.epoch_loop
        line = {
            "what": what,
            "time": time.time(),
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "pid": os.getpid(),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": loop.batch_idx,
            "total_batch": loop.total_batch_idx,
            "logged_step": loop._batches_that_stepped,
        }
        with (self.folder / f"log-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def run(*arguments: str, restart: int | None = None) -> str:
    """Fit, in this process as it was launched; return the error of a rank that failed."""
    if restart is not None:
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(restart), "TORCHELASTIC_RUN_ID": "a run"}
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="ours")
    parser.add_argument("--communication", default="none")
    parser.add_argument("--timeout", type=float, default=3.0)
    parser.add_argument("--max-epochs", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--fail", default="")
    parser.add_argument("--fail-in", default="training_step")
    parser.add_argument("--fail-rank", type=int, default=1)
    parser.add_argument("--fail-step", type=int, default=7)
    parser.add_argument("--fail-batch", type=int, default=-1)
    parser.add_argument("--validate-every", type=int, default=0)
    options = parser.parse_args(arguments)
    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    callbacks: list[Callback] = [Log(options.folder)]
    if options.save_every:
        callbacks.append(ModelCheckpoint(options.folder / "checkpoints", every_n_train_steps=options.save_every))
    ours = options.strategy == "ours"
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=OptCoreDDPStrategy(options.communication, timeout=options.timeout) if ours else DDPStrategy(),
        max_epochs=options.max_epochs,
        max_steps=options.max_steps,
        accumulate_grad_batches=options.accumulate,
        val_check_interval=options.validate_every or 1.0,
        logger=False,
        enable_checkpointing=bool(options.save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.folder,
        callbacks=callbacks,
    )
    model = Model(in_features=64, num_classes=10)
    model.failing = options
    try:
        trainer.fit(model, Digits(batch_size=64, num_workers=options.workers))
    except (RankFailure, ValueError) as failure:
        if restart is None:
            raise
        return str(failure)
    if trainer.is_global_zero:
        torch.save(model.state_dict(), options.folder / "final.pt")
    return ""


if __name__ == "__main__":
    run(*sys.argv[1:])
