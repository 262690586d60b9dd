"""The figures that the rules judge by, worked out from what the probes recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.loader_clock import LoaderTimes
from lightning_optcore.profiling.phases import BACKWARD, COMMUNICATION, DATA_WAIT, FORWARD, PHASES
from lightning_optcore.profiling.slots import DATA_CPU, HEAD, ON_DEVICE, STEP, TIME, UNSPLIT
from lightning_optcore.profiling.system_readers import TIME_OF


@dataclass(frozen=True)
class DataEvidence:
    """How batches come to be.

    Args:
        num_workers: Worker processes of the training loader.
        batch_size: Samples in a batch; 0 if unknown.
        cpu: Share of the wait (without workers), or of the workers' time, that is spent on a core.
        collate: Share of the time of making a batch that is the collate function's.
        seconds_per_batch: Seconds of work that one batch takes one worker, waiting included; 0 if unknown.
        cpu_per_batch: CPU seconds of them.
        read_rate: Megabytes a second from disks while waiting.
        file_rate: Megabytes a second by read(), from disks or their cache, while waiting.
        net_rate: Megabytes a second from the network while waiting.
        starved: Share of the workers' time in which they were runnable without a core.
    """

    num_workers: int = 0
    batch_size: int = 0
    cpu: float = 0.0
    collate: float = 0.0
    seconds_per_batch: float = 0.0
    cpu_per_batch: float = 0.0
    read_rate: float = 0.0
    file_rate: float = 0.0
    net_rate: float = 0.0
    starved: float = 0.0


@dataclass(frozen=True)
class MemoryEvidence:
    """How much memory there is, and how it grows.

    Args:
        mb_per_step: Growth of resident memory after the warm-up.
        steadiness: Smallest of the growths of the run's thirds, over the mean growth: about 1 for a leak.
        total_mb: Growth over the interval.
        used: Share of the limit (of the cgroup or the machine) that is used.
        major_faults_per_second: Pages that had to be read back from a disk.
        pressure: Share of the time in which some task waited for memory.
        gpu_used: Share of the fullest GPU's memory.
    """

    mb_per_step: float = 0.0
    steadiness: float = 0.0
    total_mb: float = 0.0
    used: float = 0.0
    major_faults_per_second: float = 0.0
    pressure: float = 0.0
    gpu_used: float = 0.0


@dataclass(frozen=True)
class CpuEvidence:
    """Who has the cores.

    Args:
        cores: Cores that this process may use.
        own: Cores that this process and its workers used, and other ranks on this machine, which are taken to be alike.
        waiting: Share of the time in which the training thread was runnable without a core.
        machine: Cores that were busy, whoever used them.
        torch_threads: Threads of one operation in torch.
        switches_per_step: Voluntary context switches of this process.
        throttled: Share of the time in which a quota kept the process off its cores.
        gpu_busy: Mean percent of the busiest GPU; 0 without one.
        device_share: Share of the time in which the device had work of these steps; ``None`` without a queue.
    """

    cores: int = 1
    own: float = 0.0
    waiting: float = 0.0
    machine: float = 0.0
    torch_threads: int = 1
    switches_per_step: float = 0.0
    throttled: float = 0.0
    gpu_busy: float = 0.0
    device_share: float | None = None


@dataclass(frozen=True)
class Audited:
    """One setting that costs time whatever the clock says.

    Args:
        key: Argument that sets it.
        value: Its value.
        better: What it should be.
        owner: Who takes the argument: ``"trainer"``, ``"loader"`` or a callback's class name.
        costs: Lowest and highest speed-up without it, as far as known.
        why: One sentence.
        sure: It costs time in every run, not only in some.
    """

    key: str
    value: str
    better: str
    owner: str
    costs: tuple[float, float]
    why: str
    sure: bool = False


# Where ranks wait for each other: gradients in the backward pass, buffers in the forward pass.
COLLECTIVE = (FORWARD, BACKWARD, COMMUNICATION)


@dataclass(frozen=True)
class RankEvidence:
    """What one rank did.

    Args:
        seconds: Its seconds by phase.
        cpu: CPU seconds of its process.
        data_cpu: CPU seconds of them in waiting for data.
    """

    seconds: Mapping[str, float]
    cpu: float = 0.0
    data_cpu: float = 0.0

    @property
    def working_seconds(self) -> float:
        """Return the seconds in which it did not wait for other ranks: those wait without using a core."""
        alone = sum(value for phase, value in self.seconds.items() if phase not in COLLECTIVE)
        together = sum(self.seconds.get(phase, 0.0) for phase in COLLECTIVE)
        elsewhere = alone - self.seconds.get(DATA_WAIT, 0.0) + self.data_cpu
        return alone + min(max(self.cpu - elsewhere, 0.0), together)


@dataclass(frozen=True)
class Evidence:
    """All that the rules know.

    Args:
        interval: First and last step looked at.
        steps: Steps looked at, warm-up excluded.
        seconds: Their length.
        step_ms: p50 of a step in milliseconds.
        step_ms_p90: p90.
        share: Share of the time by phase.
        p50_ms: Median milliseconds of a step by phase.
        details: Share of the time by named part, e.g. callback.
        data: Of the loader.
        memory: Of the memory.
        cpu: Of the cores.
        audit: Settings that stand out.
        ranks: What every rank did.
        stage: What the Trainer does.
        accumulate: Batches to an optimizer step.
    """

    interval: tuple[int, int] = (0, 0)
    steps: int = 0
    seconds: float = 0.0
    step_ms: float = 0.0
    step_ms_p90: float = 0.0
    share: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    p50_ms: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    details: Mapping[str, float] = field(default_factory=dict)
    data: DataEvidence = DataEvidence()
    memory: MemoryEvidence = MemoryEvidence()
    cpu: CpuEvidence = CpuEvidence()
    audit: Sequence[Audited] = ()
    ranks: Sequence[RankEvidence] = ()
    stage: str = "fit"
    accumulate: int = 1


# The first steps pay for allocations, caches and the start of workers.
WARM_UP_STEPS = 5
# A look at the newest steps alone takes the machine's figures of at least so long.
_SYSTEM_SECONDS = 15.0


@dataclass(frozen=True)
class LoaderFacts:
    """What is known of the training loader itself."""

    num_workers: int = 0
    batch_size: int = 0
    torch_threads: int = 1
    times: LoaderTimes = field(default_factory=LoaderTimes)


def gather(
    collector: Collector,
    system: Mapping[str, np.ndarray],
    loader: LoaderFacts,
    *,
    audit: Sequence[Audited] = (),
    ranks: Sequence[RankEvidence] = (),
    stage: str = "fit",
    accumulate: int = 1,
    local_ranks: int = 1,
    last: int | None = None,
) -> Evidence:
    """Work out the evidence from what was recorded so far.

    Args:
        collector: Phases by step.
        system: Columns of the sampler's table.
        loader: The training loader and its clock.
        audit: Settings that stand out.
        ranks: What every rank did.
        stage: What the Trainer does.
        accumulate: Batches to an optimizer step.
        local_ranks: Ranks on this machine.
        last: Look at so many steps at most, the newest.
    """
    rows = collector.rows(last)
    if last is not None and len(rows):
        rows = rows[rows[:, STEP] >= rows[-1, STEP] - last]
    skipped = max(0, min(int((rows[:, STEP] < WARM_UP_STEPS).sum()), len(rows) - 1))
    rows = rows[skipped:]
    interval = (int(rows[0, STEP]), int(rows[-1, STEP])) if len(rows) else (0, -1)
    if len(rows) < 2:
        return Evidence(interval, stage=stage, audit=audit, ranks=ranks)
    deltas = np.diff(rows, axis=0)
    if collector.recorder is not None and collector.recorder.steps is not None:
        deltas = _undisturbed(deltas, rows[:-1, STEP], collector.recorder.steps)
    steps, seconds = int(deltas[:, STEP].sum()), float(deltas[:, TIME].sum() / 1e9)
    phases = _phases(collector, deltas)
    # Of what was divided, and of several steps, the mean alone is known.
    detailed = (deltas[:, HEAD + UNSPLIT] == 0) & (deltas[:, STEP] == 1)
    each = detailed if detailed.any() else np.ones(len(deltas), dtype=bool)
    typical = phases[each] / deltas[each, STEP][:, None]
    lengths = deltas[each, TIME] / deltas[each, STEP] / 1e6
    details = {
        detail: float(deltas[:, HEAD + slot].sum() / 1e9 / seconds)
        for slot, (_, detail) in enumerate(collector.slots)
        if detail is not None
    }
    start, end = rows[0, TIME] / 1e9, rows[-1, TIME] / 1e9
    if last is not None:
        # The newest steps may be shorter than what lies between two looks at the machine.
        kept = max(collector.marks - collector.capacity, min(WARM_UP_STEPS, collector.marks - 1))
        oldest = collector.rows_of(np.array([kept]))[0, TIME] / 1e9
        start = max(oldest, min(start, end - _SYSTEM_SECONDS))
    window = _Window(system, start, end)
    steps_in_window = round(steps * (end - start) / seconds)
    waited = float(phases[:, PHASES.index(DATA_WAIT)].sum() / 1e9)
    return Evidence(
        interval=interval,
        steps=steps,
        seconds=seconds,
        step_ms=float(np.percentile(lengths, 50)),
        step_ms_p90=float(np.percentile(lengths, 90)),
        share={name: float(phases[:, i].sum() / 1e9 / seconds) for i, name in enumerate(PHASES)},
        p50_ms={name: float(np.percentile(typical[:, i], 50) / 1e6) for i, name in enumerate(PHASES)},
        details=details,
        data=_data(deltas, waited, seconds, window, loader),
        memory=_memory(window, steps_in_window),
        cpu=_cpu(window, steps_in_window, loader, _device_share(collector, rows), local_ranks),
        audit=audit,
        ranks=ranks,
        stage=stage,
        accumulate=accumulate,
    )


def _undisturbed(deltas: np.ndarray, steps: np.ndarray, recorded: tuple[int, int]) -> np.ndarray:
    """Leave out the steps that were recorded in depth, unless nothing else is there."""
    apart = (steps < recorded[0] - 1) | (steps > recorded[1])
    return deltas[apart] if apart.any() else deltas


def _phases(collector: Collector, deltas: np.ndarray) -> np.ndarray:
    """Return nanoseconds (steps, phases)."""
    table, grown = np.zeros((len(deltas), len(PHASES))), collector.divided(deltas[:, HEAD:])
    for slot, (phase, _) in enumerate(collector.slots):
        table[:, PHASES.index(phase)] += grown[:, slot]
    return table


class _Window:
    """The samples of an interval; figures of it are 0 where there are too few."""

    def __init__(self, system: Mapping[str, np.ndarray], start: float, end: float) -> None:
        times = system.get("time", np.zeros(0))
        inside = (times >= start) & (times <= end)
        # One sample before and one after, so that short intervals are covered too.
        inside[1:] |= inside[:-1].copy()
        inside[:-1] |= inside[1:].copy()
        self.columns = {name: values[inside] for name, values in system.items()}
        times = self.columns.get("time", np.zeros(0))
        self.seconds = float(times[-1] - times[0]) if len(times) > 1 else 0.0

    def grown(self, name: str) -> float:
        """Return by how much a running total grew."""
        values = self.columns.get(name, np.zeros(0))
        return float(max(values[-1] - values[0], 0.0)) if len(values) > 1 else 0.0

    def rate(self, name: str) -> float:
        """Return the growth of a running total a second, between its own readings."""
        seconds = self.grown(TIME_OF.get(name, "time")) or self.seconds
        return self.grown(name) / seconds if seconds else 0.0

    def over_time(self, name: str, grid: np.ndarray) -> np.ndarray:
        """Return a figure at some times; between two of its readings it is taken to move evenly."""
        values = self.columns.get(name, np.zeros(0))
        return np.interp(grid, self.readings(name), values) if len(values) else np.zeros(len(grid))

    def readings(self, name: str) -> np.ndarray:
        """Return when the values of a figure were read."""
        read = self.columns.get(TIME_OF.get(name, "time"), np.zeros(0))
        return read if read.any() else self.columns.get("time", np.zeros(0))

    def mean(self, name: str) -> float:
        """Return the mean of a figure."""
        values = self.columns.get(name, np.zeros(0))
        return float(values.mean()) if len(values) else 0.0

    def last(self, name: str) -> float:
        """Return the newest figure."""
        values = self.columns.get(name, np.zeros(0))
        return float(values[-1]) if len(values) else 0.0


def _data(deltas: np.ndarray, waited: float, seconds: float, window: _Window, loader: LoaderFacts) -> DataEvidence:
    times, workers = loader.times, loader.num_workers
    starved = 0.0
    if workers == 0:
        # The training thread makes the batches itself: its own clock over the wait says what it did.
        cpu_seconds, batches = float(deltas[:, DATA_CPU].sum() / 1e9), float(deltas[:, STEP].sum())
        per_batch, cpu_per_batch = waited / batches, cpu_seconds / batches
        cpu = cpu_seconds / waited if waited else 0.0
        # The collate function's seconds are of the whole run, hence by batch.
        collate = times.collate_wall / times.batches / per_batch if times.batches and per_batch else 0.0
    else:
        busy = times.fetch_wall + times.collate_wall
        cpu_seconds = times.fetch_cpu + times.collate_cpu
        # Wall time between two batches of a worker is work only while the queue is empty.
        per_batch = busy / times.batches if times.batches else 0.0
        cpu_per_batch = cpu_seconds / times.batches if times.batches else 0.0
        cpu = cpu_seconds / busy if busy else 0.0
        collate = times.collate_wall / busy if busy else 0.0
        starved = window.rate("worker_wait") / workers
    share = max(waited / seconds, 1e-9)
    return DataEvidence(
        num_workers=workers,
        batch_size=loader.batch_size,
        cpu=min(cpu, 1.0),
        collate=min(collate, 1.0),
        seconds_per_batch=per_batch,
        cpu_per_batch=cpu_per_batch,
        read_rate=window.rate("read_bytes") / 1e6 / share,
        file_rate=window.rate("read_chars") / 1e6 / share,
        net_rate=window.rate("net_bytes") / 1e6 / share,
        starved=starved,
    )


def _memory(window: _Window, steps: int) -> MemoryEvidence:
    growths: list[float] = []
    total = 0.0
    read = window.readings("rss")
    if len(read) >= 9 and read[-1] > read[0]:
        steps = round(steps * (read[-1] - read[0]) / window.seconds)
        grid = np.linspace(read[0], read[-1], len(read))
        # Workers are read so seldom that between two readings nothing is known of how they grew.
        resident = window.over_time("rss", grid) + np.interp(grid, window.columns["time"], window.columns["worker_rss"])
        # What grows once (optimizer states, caches) is in the first third.
        settled = resident[len(resident) // 4 :]
        edges = [float(np.median(part)) for part in np.array_split(settled, 4)]
        growths = [(b - a) / 1e6 for a, b in pairwise(edges)]
        total = edges[-1] / 1e6 - edges[0] / 1e6
    mean = sum(growths) / len(growths) if growths else 0.0
    return MemoryEvidence(
        mb_per_step=total / (0.75 * 0.75 * steps) if steps else 0.0,
        steadiness=min(growths) / mean if mean > 0 else 0.0,
        total_mb=total,
        used=window.last("memory_used"),
        major_faults_per_second=window.rate("major_faults"),
        pressure=window.rate("pressure_memory"),
        gpu_used=window.last("gpu_memory"),
    )


def _cpu(window: _Window, steps: int, loader: LoaderFacts, device_share: float | None, local_ranks: int) -> CpuEvidence:
    return CpuEvidence(
        cores=available_cores(),
        own=local_ranks * (window.rate("cpu") + window.rate("worker_cpu")),
        waiting=min(window.rate("main_wait"), 1.0),
        machine=window.rate("machine_busy"),
        torch_threads=loader.torch_threads * local_ranks,
        switches_per_step=window.rate("switches") * window.seconds / steps if steps else 0.0,
        throttled=window.rate("throttled"),
        gpu_busy=window.mean("gpu_busy"),
        device_share=device_share,
    )


def _device_share(collector: Collector, rows: np.ndarray) -> float | None:
    if collector.device is None or collector.steps < 2:
        return None
    on_device = tuple(slot for slot, (phase, _) in enumerate(collector.slots) if phase in ON_DEVICE)
    busy = sum(collector.device.milliseconds.get(slot, 0.0) for slot in on_device)
    mean_ms = (rows[-1, TIME] - rows[0, TIME]) / 1e6 / (rows[-1, STEP] - rows[0, STEP])
    return min(busy / (mean_ms * collector.steps), 1.0)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
