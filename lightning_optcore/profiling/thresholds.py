"""Where the rules draw their lines; every one can be set in the callback's ``thresholds``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.option_values import is_number


@dataclass(frozen=True)
class Thresholds:
    """Shares are parts of the step's time, 0 to 1, unless a unit says otherwise.

    Args:
        cpu_usage: Percent of a worker's (or the waiting thread's) time on a core from which it is bound by the CPU.
        memory_usage: Percent of the memory limit.
        gpu_memory_usage: Percent of a GPU's memory.
        inference_time: Seconds of one batch in ``validate``, ``test`` or ``predict`` that are too many.
        min_steps: Steps below which nothing is concluded.
        data_wait: Share of waiting for data.
        collate: Share of making a batch.
        disk_rate: Megabytes a second read from disks while waiting.
        net_rate: Megabytes a second received while waiting.
        transfer: Share.
        forward: Share of ``training_step``.
        forward_to_backward: From how many times the backward pass on it is out of proportion.
        small_batch: Samples up to which a batch is small.
        short_step_ms: Milliseconds up to which a step is short.
        optimizer: Share.
        communication: Share.
        straggler: Share of the time that the other ranks wait for the slowest.
        logging: Share.
        logging_ms: Milliseconds a step below which logging is not worth a word: about what a few calls cost.
        callback: Share of all callbacks together.
        validation: Share.
        checkpoint: Share.
        garbage_collection: Share.
        run_queue: Share of the time in which the training thread is runnable without a core.
        neighbour_cores: Cores that other processes use.
        leak_mb_per_step: Growth of memory by step.
        leak_mb: Growth of memory altogether.
        leak_steadiness: Smallest growth of a third of the run over the mean growth.
        major_faults: Pages read back from disk a second.
    """

    cpu_usage: float = 80
    memory_usage: float = 85
    gpu_memory_usage: float = 90
    inference_time: float = 1.0
    min_steps: int = 20
    data_wait: float = 0.25
    collate: float = 0.5
    disk_rate: float = 5.0
    net_rate: float = 5.0
    transfer: float = 0.15
    forward: float = 0.55
    forward_to_backward: float = 2.5
    small_batch: int = 8
    short_step_ms: float = 8.0
    optimizer: float = 0.45
    communication: float = 0.25
    straggler: float = 0.15
    logging: float = 0.2
    logging_ms: float = 1.0
    callback: float = 0.15
    validation: float = 0.3
    checkpoint: float = 0.15
    garbage_collection: float = 0.08
    run_queue: float = 0.2
    neighbour_cores: float = 0.4
    leak_mb_per_step: float = 0.05
    leak_mb: float = 20.0
    leak_steadiness: float = 0.4
    major_faults: float = 100.0

    @classmethod
    def of(cls, chosen: Mapping[str, Any] | None, key: str) -> Thresholds:
        """Return the defaults with some of them replaced.

        Raises:
            MisconfigurationException: If a name is unknown, or a value is no number of at least 0.
        """
        known = [field.name for field in fields(cls)]
        for name, value in (chosen or {}).items():
            if name not in known:
                raise MisconfigurationException(f"{key}.{name}={value!r}: expected one of {', '.join(known)}")
            if not is_number(value) or not value >= 0:
                raise MisconfigurationException(f"{key}.{name}={value!r}: expected a number of at least 0")
        return cls(**dict(chosen or {}))
