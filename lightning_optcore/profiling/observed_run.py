"""One run under observation: probes and sampler from its setup on, and what can be reported at any time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from lightning.pytorch.profilers import PyTorchProfiler
from torch.utils.data import DataLoader, IterableDataset

from lightning_optcore.profiling.audit import audit
from lightning_optcore.profiling.diagnosis import diagnose
from lightning_optcore.profiling.evidence import WARM_UP_STEPS, Audited, Evidence, LoaderFacts, RankEvidence, gather
from lightning_optcore.profiling.live import LiveLine
from lightning_optcore.profiling.overrides import Overrides
from lightning_optcore.profiling.phases import BACKWARD, COMMUNICATION, PHASES
from lightning_optcore.profiling.probes import Probes
from lightning_optcore.profiling.profile_report import Finding, Phase, ProfileReport
from lightning_optcore.profiling.rank_times import (
    count_communication_often,
    exposed_communication,
    with_communication,
    without_waiting_for,
)
from lightning_optcore.profiling.recommendations import LOADER, STRATEGY, TRAINER, RunFacts, advise
from lightning_optcore.profiling.system import Sampler
from lightning_optcore.profiling.thresholds import Thresholds
from lightning_optcore.profiling.timeline import timeline
from lightning_optcore.profiling.worst_steps import WorstSteps

log = logging.getLogger(__name__)

_FIRST_LOOK_STEPS, _LOOK_EVERY_SECONDS, _LOOK_AT_STEPS = 50, 5.0, 1024


class ObservedRun:
    """One fit, validate, test or predict under observation.

    Args:
        trainer: The Trainer that runs it.
        pl_module: What it runs.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        interval: Seconds between two samples of the system.
        detailed: Take them, and the loader's clock; else phases alone.
        thresholds: Of the diagnosis.
        live: Show a line while it runs, or a ``"panel"``.
        worst_steps: Folder for a recording of the worst steps; ``None`` records none.
        on_report: Called with every report while it runs, in the sampler's thread.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        stage: str,
        *,
        interval: float,
        detailed: bool,
        thresholds: Thresholds,
        live: bool | str,
        worst_steps: Path | None,
        on_report: Callable[[ProfileReport], None],
    ) -> None:
        self.trainer = trainer
        self.thresholds = thresholds
        self.on_report = on_report
        # Lightning's stage is an enumeration of texts.
        self.stage = str(getattr(stage, "value", stage))
        self.name = "profile" if self.stage == "fit" else f"profile_{self.stage}"
        self.probes = Probes(trainer, pl_module, detailed=detailed)
        self.sampler = Sampler(interval, on_sample=self._on_sample)
        self.begun: list[int] | None = None
        self.ended: list[int] | None = None
        self.clock = [0.0, 0.0]
        self.cpu_at_begin = 0.0
        # What DDP measured: it is gone when the strategy unwraps the model.
        self.communication_ms: float | None = None
        self.ranks: list[RankEvidence] = []
        self.notes: list[str] = []
        self.audited: list[Audited] = []
        self.recorder: WorstSteps | None = None
        if worst_steps is not None and trainer.is_global_zero:
            self._watch_worst_steps(worst_steps / f"{self.name}_worst_steps.json")
        shown = live and trainer.is_global_zero
        self._line = LiveLine(trainer, panel=live == "panel") if shown else None
        self._looked = 0.0
        self._overrides: Overrides | None = None
        self._lock = threading.Lock()
        if detailed:
            self.probes.collector.sampler = self.sampler
            self.sampler.start()

    def _watch_worst_steps(self, path: Path) -> None:
        if isinstance(self.probes.collector.inner, PyTorchProfiler):
            self.notes.append("worst_steps: the Trainer's PyTorchProfiler has torch.profiler already")
            return
        self.recorder = self.probes.collector.recorder = WorstSteps(path)

    def begin(self) -> None:
        """Start the clock."""
        count_communication_often(self.trainer)
        self.audited = audit(self.trainer, self.loader())
        if self.recorder is not None and not self.sampler.running:
            # Nobody will look while it runs, and begin to record after the first verdict.
            self.recorder.start(WARM_UP_STEPS + 1)
        self.begun, self.ended = self.probes.collector.snapshot(), None
        self.clock[0], self.cpu_at_begin = perf_counter(), process_time()

    def end(self, pl_module: Any) -> None:
        """Stop the clock, and hear of the other ranks."""
        if self.probes.collector.steps:
            self.probes.collector.mark_step()
        self.ended, self.clock[1] = self.probes.collector.snapshot(), perf_counter()
        self.communication_ms = exposed_communication(self.trainer)
        if self.trainer.world_size > 1:
            seconds = self._seconds()
            cpu = process_time() - self.cpu_at_begin
            figures = [*(seconds[phase] for phase in PHASES), cpu, self.probes.collector.data_cpu / 1e9]
            table = self.trainer.strategy.all_gather(torch.tensor(figures, device=pl_module.device)).cpu().tolist()
            self.ranks = [RankEvidence(dict(zip(PHASES, row, strict=False)), *row[len(PHASES) :]) for row in table]

    def close(self) -> None:
        """Leave everything as it was."""
        self.probes.remove()
        self.sampler.close()
        if self._line is not None:
            self._line.close()

    def loader(self) -> DataLoader[Any] | None:
        """Return the loader that the run waits for, the first of several."""
        return self.probes.loaders.loaders[0] if self.probes.loaders.loaders else _first_loader(self.trainer)

    def final_report(self) -> ProfileReport:
        """Look a last time."""
        with self._lock:
            self.sampler.stop()
            if self.probes.collector.steps and self.begun is not None and self.ended is None:
                self.probes.collector.mark_step()
            if self.recorder is not None:
                self._stop_recording(self.recorder)
            return self._report(final=True)

    def _stop_recording(self, recorder: WorstSteps) -> None:
        recorder.stop(self.probes.collector.steps)
        if recorder.failure:
            self.notes.append(f"worst_steps: {recorder.failure}")
            return
        if recorder.slowest is None:
            self.notes.append("worst_steps: the run ended before one was recorded")
            return
        step, milliseconds = recorder.slowest
        self.notes.append(f"the slowest recorded step is {step}, {milliseconds:.3g} ms: {recorder.path}")
        spent = sum(self.probes.collector.recorded) / 1e9
        self.notes.append(f"worst_steps: {spent:.2f} s of steps under torch.profiler are left out of the phases")

    def _report(self, final: bool = False) -> ProfileReport:
        # To read all that is kept would drive the model out of the caches.
        last = None if final else _LOOK_AT_STEPS
        evidence = self.evidence(last)
        findings = diagnose(evidence, self.thresholds)
        wall = (self.clock[1] if self.ended is not None else perf_counter()) - self.clock[0]
        seconds = self._seconds()
        total = max(sum(seconds.values()), 1e-9)
        notes = list(self.notes)
        if self.sampler.dropped:
            notes.append(f"{self.sampler.dropped} samples of the system were dropped: the sampler got no core in time")
        notes += [f"{name}: {reason}" for name, reason in self.sampler.failures.items()]
        collector = self.probes.collector
        mean = 1e3 * evidence.seconds / evidence.steps if evidence.steps else 0.0
        return ProfileReport(
            stage=self.stage,
            phases={phase: Phase(spent, spent / total) for phase, spent in seconds.items()},
            steps=max(collector.steps - 1, 0),
            wall_seconds=wall if self.begun is not None else 0.0,
            step_ms={"mean": mean, "p50": evidence.step_ms, "p90": evidence.step_ms_p90},
            findings=tuple(self._with_advice(f, evidence) if final or i == 0 else f for i, f in enumerate(findings)),
            details=collector.by_detail(self.ended or collector.snapshot(), self.begun),
            system=_system_figures(evidence),
            ranks=tuple(dict(rank.seconds) for rank in self.ranks),
            notes=tuple(notes),
            operators=dict(self.recorder.operators) if self.recorder is not None else {},
            timeline=timeline(collector, self.sampler.table()),
        )

    def evidence(self, last: int | None = None) -> Evidence:
        """Return what is known by now, of the newest steps or of all."""
        loader = self.loader()
        facts = LoaderFacts(
            num_workers=getattr(loader, "num_workers", 0),
            batch_size=_batch_size(loader),
            torch_threads=torch.get_num_threads(),
            times=self.probes.loaders.times(),
        )
        evidence = gather(
            self.probes.collector,
            self.sampler.table(),
            facts,
            audit=self.audited,
            ranks=self.ranks,
            stage=self.stage,
            accumulate=self.trainer.accumulate_grad_batches,
            local_ranks=self.trainer.num_devices if self.trainer.world_size > 1 else 1,
            last=last,
        )
        evidence = with_communication(evidence, self._exposed_communication())
        return without_waiting_for(self.ranks, evidence, self.trainer.global_rank)

    def _exposed_communication(self) -> float:
        return self.communication_ms if self.communication_ms is not None else exposed_communication(self.trainer)

    def _seconds(self) -> dict[str, float]:
        collector = self.probes.collector
        totals = self.ended or collector.snapshot()
        totals = [total - recorded for total, recorded in zip(totals, collector.recorded, strict=True)]
        seconds = collector.by_phase(totals, self.begun)
        moved = min(self._exposed_communication() * max(collector.steps - 1, 0) / 1e3, seconds[BACKWARD])
        return {**seconds, BACKWARD: seconds[BACKWARD] - moved, COMMUNICATION: moved}

    def _with_advice(self, finding: Finding, evidence: Evidence) -> Finding:
        try:
            advice = advise(finding, evidence, _facts(self.trainer, self.loader()))
            if advice and self._overrides is None:
                self._overrides = Overrides(_objects(self.trainer, self.loader()))
            given = tuple(self._overrides.recommendation(one) for one in advice) if self._overrides else ()
            return replace(finding, recommendations=given)
        except Exception as error:
            # Advice is a service: a configuration that nobody understands must not cost the finding.
            log.debug("no advice", exc_info=True)
            self.notes.append(f"no advice for {finding.cause}: {type(error).__name__}: {error}")
            return finding

    def _on_sample(self) -> None:
        """Look at what was recorded, in the sampler's thread."""
        steps, now = self.probes.collector.steps, perf_counter()
        if self.begun is None or self.ended is not None or steps <= WARM_UP_STEPS:
            return
        due = now - self._looked >= _LOOK_EVERY_SECONDS if self._looked else self._first_is_due(steps, now)
        if not due or not self._lock.acquire(blocking=False):
            return
        try:
            if not self.sampler.running:
                return  # The last report is made: this one must not take its place.
            self._looked = now
            # The first verdict is out: no need to wake ten times a second for it any more.
            self.sampler.relax()
            if self.recorder is not None and self.recorder.steps is None:
                self.recorder.start()
            report = self._report()
            if self._line is not None:
                self._line.show(report)
            self.on_report(report)
        except Exception as error:
            log.debug("no look", exc_info=True)
            self.notes.append(f"no verdict after {steps} steps: {type(error).__name__}: {error}")
        finally:
            self._lock.release()

    def _first_is_due(self, steps: int, now: float) -> bool:
        few_seconds = now - self.clock[0] >= _LOOK_EVERY_SECONDS and steps >= self.thresholds.min_steps
        return steps >= WARM_UP_STEPS + _FIRST_LOOK_STEPS // 2 + 1 or few_seconds


def _first_loader(trainer: Any) -> DataLoader[Any] | None:
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    loaders = combined.flattened if combined is not None else []
    return next((loader for loader in loaders if isinstance(loader, DataLoader)), None)


def _batch_size(loader: Any) -> int:
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return int(size) if size else 0


def _facts(trainer: Any, loader: Any) -> RunFacts:
    every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return RunFacts(
        iterable=isinstance(getattr(loader, "dataset", None), IterableDataset),
        log_every_n_steps=trainer.log_every_n_steps,
        checkpoint_every=min((steps for steps in every if steps), default=0),
        val_check_interval=trainer.val_check_interval,
        check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        batches_per_epoch=inf if getattr(loader, "persistent_workers", False) else trainer.num_training_batches,
        communication=getattr(trainer.strategy, "communication", None),
    )


def _objects(trainer: Any, loader: Any) -> dict[str, list[Any]]:
    makers = [maker for maker in (trainer.datamodule, loader, trainer.lightning_module) if maker is not None]
    callbacks: dict[str, list[Any]] = {}
    for callback in trainer.callbacks:
        callbacks.setdefault(type(callback).__name__, []).append(callback)
    return {**callbacks, TRAINER: [trainer], LOADER: makers, STRATEGY: [trainer.strategy]}


def _system_figures(evidence: Evidence) -> dict[str, float]:
    cpu, memory, data = evidence.cpu, evidence.memory, evidence.data
    return {
        "cores": float(cpu.cores),
        "cores_used": cpu.own,
        "cores_used_by_others": max(cpu.machine - cpu.own, 0.0),
        "waiting_for_a_core": cpu.waiting,
        "memory_used": memory.used,
        "memory_mb_per_step": memory.mb_per_step,
        "data_demand": data.cpu,
        "disk_mb_per_second": data.read_rate,
        "network_mb_per_second": data.net_rate,
        "gpu_busy_percent": cpu.gpu_busy,
        "gpu_memory_used": memory.gpu_used,
    }
