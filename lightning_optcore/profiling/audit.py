"""What no clock shows: settings of the Trainer, the loader and torch that cost time, or may."""

from __future__ import annotations

from typing import Any

import torch

from lightning_optcore.profiling.evidence import Audited


def audit(trainer: Any, loader: Any) -> list[Audited]:
    """Look at the settings of a run.

    Args:
        trainer: The Trainer, in its run.
        loader: The training loader, or ``None``.

    Returns:
        The settings that stand out; those that cost time in every run first.
    """
    found = [*_of_torch(trainer), *_of_trainer(trainer), *_of_loader(trainer, loader)]
    return sorted(found, key=lambda one: not one.sure)


def _of_torch(trainer: Any) -> list[Audited]:
    found = []
    if torch.is_anomaly_enabled() or getattr(trainer, "_detect_anomaly", False):
        why = "anomaly detection records a traceback for every operation and checks every gradient"
        found.append(Audited("detect_anomaly", "True", "false", "trainer", (1.1, 2.5), why, sure=True))
    if torch.are_deterministic_algorithms_enabled():
        why = "deterministic algorithms can be slower than the fastest ones"
        found.append(Audited("deterministic", "True", "false", "trainer", (1.0, 1.3), why))
    return found


def _of_trainer(trainer: Any) -> list[Audited]:
    found = []
    profiler = type(getattr(trainer.profiler, "inner", trainer.profiler)).__name__
    if profiler in ("AdvancedProfiler", "PyTorchProfiler"):
        why = f"{profiler} slows every step down"
        found.append(Audited("profiler", profiler, "null", "trainer", (1.05, 1.6), why, sure=True))
    if trainer.loggers and trainer.log_every_n_steps < 5:
        text, why = str(trainer.log_every_n_steps), "the loggers write at almost every step"
        found.append(Audited("log_every_n_steps", text, "50", "trainer", (1.0, 1.2), why))
    if str(trainer.precision).startswith("32") and _has_bfloat16(trainer.strategy.root_device):
        # On a CPU the casts can cost more than the arithmetic gains, small batches above all.
        gain = (0.8, 1.5) if trainer.strategy.root_device.type == "cpu" else (1.0, 2.0)
        why = "this hardware computes in bfloat16"
        found.append(Audited("precision", str(trainer.precision), "bf16-mixed", "trainer", gain, why))
    for callback in trainer.checkpoint_callbacks:
        every = getattr(callback, "_every_n_train_steps", 0)
        if 0 < every < 20:
            name, why = type(callback).__name__, "checkpoints are written every few steps"
            found.append(Audited("every_n_train_steps", str(every), str(50 * every), name, (1.0, 1.5), why))
    return found


def _of_loader(trainer: Any, loader: Any) -> list[Audited]:
    found = []
    workers = getattr(loader, "num_workers", 0)
    if workers and not loader.persistent_workers and (trainer.max_epochs is None or trainer.max_epochs != 1):
        why = "the workers are started anew in every epoch"
        found.append(Audited("persistent_workers", "False", "true", "loader", (1.0, 1.1), why))
    if loader is not None and trainer.strategy.root_device.type == "cuda" and not getattr(loader, "pin_memory", True):
        why = "copies from pageable memory to the GPU wait for the copy"
        found.append(Audited("pin_memory", "False", "true", "loader", (1.0, 1.2), why))
    return found


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(device.type == "cpu" and supported is not None and supported())
