"""Training runs with one bottleneck each, whose cause is known because it was put there.

Every cause is written in two unlike ways, ``a`` and ``b``: thresholds may be tuned on the one half and are tested on
the other. Healthy runs stand beside them.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from injections import (
    DiskFile,
    HoldsCycles,
    KeepsBatches,
    KeepsGraphs,
    LogsALot,
    MakesCycles,
    ManyItems,
    ManyMoments,
    Server,
    SlowCopy,
    SlowLogger,
    SlowMetric,
    SlowOptimizer,
    SlowTransfer,
    SlowValidation,
    Snooping,
    Spinning,
    neighbours,
    slow_collate,
    sort_text,
    spin,
    threads,
    wait_for_socket,
    waiting_collate,
)
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler
from plain_training import Attention, Convolutions, Manual, Network, Recurrent, Samples, Stream, WithAdam, loader_of

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.profiling.profile_report import ProfileReport


@dataclass
class Case:
    """One run.

    Args:
        model: What is trained.
        loader: Its data.
        val_loader: What it is validated on.
        trainer: Arguments of the Trainer.
        callbacks: Beside the profiler.
        around: What is there while it runs, e.g. another process.
        steps: Length of the fit.
    """

    model: LightningModule
    loader: Any
    val_loader: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Callback] = field(default_factory=list)
    around: Callable[[], Any] | None = None
    steps: int = 150


def _checkpointing(folder: str, weights_only: bool) -> list[Callback]:
    return [
        ModelCheckpoint(
            folder, every_n_train_steps=1 if not weights_only else 2, save_top_k=1, save_weights_only=weights_only
        )
    ]


def _case(model: LightningModule | None = None, loader: Any = None, **options: Any) -> Case:
    return Case(model if model is not None else Network(), loader if loader is not None else loader_of(), **options)


def _served(raw: bool) -> Case:
    server = Server(raw)
    return _case(loader=loader_of(Samples(before=server)), around=server.running)


def _validating(model: LightningModule, count: int, interval: int) -> Case:
    return _case(model, val_loader=loader_of(Samples(count)), trainer={"val_check_interval": interval})


# (cause, half) -> how to make the run in an empty folder
CASES: dict[tuple[str, str], Callable[[str], Case]] = {
    ("data.latency", "a"): lambda _: _case(loader=loader_of(Samples(before=lambda _: time.sleep(0.0003)))),
    ("data.latency", "b"): lambda _: _case(loader=loader_of(Stream(wait_for_socket))),
    ("data.cpu", "a"): lambda _: _case(loader=loader_of(Samples(before=lambda _: spin(0.0003)))),
    ("data.cpu", "b"): lambda _: _case(loader=loader_of(Samples(before=sort_text))),
    ("data.workers", "a"): lambda _: _case(
        loader=loader_of(Samples(before=lambda _: time.sleep(0.0006)), num_workers=1, persistent_workers=True)
    ),
    ("data.workers", "b"): lambda _: _case(loader=loader_of(Samples(before=sort_text), num_workers=1)),
    ("data.disk", "a"): lambda _: _case(loader=loader_of(Samples(before=DiskFile(direct=True)))),
    ("data.disk", "b"): lambda _: _case(loader=loader_of(Samples(before=DiskFile(direct=False)), shuffle=False)),
    ("data.collate", "a"): lambda _: _case(loader=loader_of(collate_fn=slow_collate)),
    ("data.collate", "b"): lambda _: _case(loader=loader_of(collate_fn=waiting_collate, num_workers=1)),
    ("network", "a"): lambda _: _served(raw=False),
    ("network", "b"): lambda _: _served(raw=True),
    ("transfer", "a"): lambda _: _case(SlowTransfer()),
    ("transfer", "b"): lambda _: _case(SlowCopy()),
    ("compute", "a"): lambda _: _case(ManyItems()),
    ("compute", "b"): lambda _: _case(SlowMetric()),
    ("launch_overhead", "a"): lambda _: _case(Network(32, 2), loader_of(batch_size=1)),
    ("launch_overhead", "b"): lambda _: _case(Network(16, 24), loader_of(batch_size=4)),
    ("optimizer", "a"): lambda _: _case(ManyMoments(1536, 3)),
    ("optimizer", "b"): lambda _: _case(SlowOptimizer(512, 2)),
    ("logging", "a"): lambda _: _case(LogsALot()),
    ("logging", "b"): lambda _: _case(trainer={"logger": SlowLogger(), "log_every_n_steps": 1}),
    ("callback", "a"): lambda _: _case(callbacks=[Spinning()]),
    ("callback", "b"): lambda _: _case(callbacks=[Snooping()]),
    ("validation", "a"): lambda _: _validating(SlowValidation(), 64 * 4, 10),
    ("validation", "b"): lambda _: _validating(Network(), 64 * 30, 15),
    ("checkpoint", "a"): lambda folder: _case(
        callbacks=_checkpointing(folder, weights_only=False), trainer={"enable_checkpointing": True}
    ),
    ("checkpoint", "b"): lambda folder: _case(
        callbacks=_checkpointing(folder, weights_only=True), trainer={"enable_checkpointing": True}
    ),
    ("garbage_collection", "a"): lambda _: _case(MakesCycles()),
    ("garbage_collection", "b"): lambda _: _case(HoldsCycles()),
    ("oversubscription", "a"): lambda _: _case(around=lambda: threads(16)),
    ("oversubscription", "b"): lambda _: _case(Network(512, 6), around=lambda: threads(6)),
    ("memory.leak", "a"): lambda _: _case(KeepsGraphs(), steps=500),
    ("memory.leak", "b"): lambda _: _case(callbacks=[KeepsBatches()], steps=500),
    ("noisy_neighbour", "a"): lambda _: _case(around=lambda: neighbours(4)),
    ("noisy_neighbour", "b"): lambda _: _case(around=lambda: neighbours(6, numeric=True)),
    ("config", "a"): lambda _: _case(trainer={"detect_anomaly": True}),
    ("config", "b"): lambda folder: _case(trainer={"profiler": AdvancedProfiler(folder, "advanced")}),
}


HEALTHY: dict[str, Callable[[str], Case]] = {
    "mlp": lambda _: _case(),
    "mlp, adam": lambda _: _case(WithAdam()),
    "convolutions": lambda _: _case(Convolutions()),
    "lstm": lambda _: _case(Recurrent()),
    "transformer": lambda _: _case(Attention()),
    "manual optimization": lambda _: _case(Manual()),
    "accumulation": lambda _: _case(WithAdam(), trainer={"accumulate_grad_batches": 4}),
    "one worker": lambda _: _case(loader=loader_of(num_workers=1)),
    "logger and validation": lambda folder: _case(
        val_loader=loader_of(Samples(64 * 5)), trainer={"logger": CSVLogger(folder), "val_check_interval": 60}
    ),
    "checkpoints at times": lambda folder: _case(
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=100)], trainer={"enable_checkpointing": True}
    ),
}


def run(make: Callable[[str], Case], seed: int = 0, **profiler: Any) -> ProfileReport:
    """Make a run and return its profile.

    Args:
        make: Makes the case.
        seed: Of everything random.
        profiler: Arguments of the profiler.
    """
    with tempfile.TemporaryDirectory(prefix="optcore-bottleneck-") as folder:
        callback = PerformanceProfiler(**{"live": False, "output_dir": folder, **profiler})
        _fit(make, seed, folder, callback)
        assert callback.report is not None
        return callback.report


def unobserved_step(make: Callable[[str], Case], seed: int = 0) -> float:
    """Make a run without a profiler and return the seconds of a step, the first ones apart."""
    marks: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="optcore-bottleneck-") as folder:
        _fit(make, seed, folder, Clock())
    return (marks[-1] - marks[4]) / (len(marks) - 5)


def _fit(make: Callable[[str], Case], seed: int, folder: str, callback: Callback) -> None:
    seed_everything(seed, verbose=False)
    case = make(folder)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_steps": case.steps,
        "max_time": {"seconds": 12},
        "default_root_dir": folder,
    }
    trainer = Trainer(**{**settings, **case.trainer}, callbacks=[*case.callbacks, callback])
    try:
        with case.around() if case.around is not None else threading.Lock():
            trainer.fit(case.model, case.loader, case.val_loader)
    finally:
        torch.autograd.set_detect_anomaly(False)
