"""The callback that watches a run and says what it waits for."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_optcore.files import write_atomically
from lightning_optcore.profiling.audit import audit
from lightning_optcore.profiling.diagnosis import diagnose
from lightning_optcore.profiling.evidence import WARM_UP_STEPS, Audited, Evidence, LoaderFacts, RankEvidence, gather
from lightning_optcore.profiling.live import LiveLine
from lightning_optcore.profiling.overrides import Overrides
from lightning_optcore.profiling.phases import BACKWARD, COMMUNICATION, FORWARD, PHASES
from lightning_optcore.profiling.probes import Probes
from lightning_optcore.profiling.profile_report import Finding, Phase, ProfileReport
from lightning_optcore.profiling.recommendations import LOADER, STRATEGY, TRAINER, RunFacts, advise
from lightning_optcore.profiling.summary import summary_text
from lightning_optcore.profiling.system import Sampler
from lightning_optcore.profiling.thresholds import Thresholds
from lightning_optcore.profiling.timeline import timeline
from lightning_optcore.profiling.trace import chrome_trace
from lightning_optcore.profiling.worst_steps import WorstSteps

log = logging.getLogger(__name__)

KEY = "performance_profiler"
MODES = ("comprehensive", "light")
_FIRST_LOOK_STEPS, _LOOK_EVERY_SECONDS, _LOOK_AT_STEPS = 50, 5.0, 1024


class PerformanceProfiler(Callback):
    """Name the bottleneck of a run, show the evidence, and say which setting mends it.

    Works with ``fit``, ``validate``, ``test`` and ``predict``, beside whatever profiler the Trainer has. What it
    measures is the exclusive time of each phase of a step, taken where Lightning itself reports its actions, and
    what the operating system knows of the process, its workers and the machine.

    Args:
        interval: Seconds between two samples of the system.
        mode: ``"comprehensive"``; or ``"light"``: phases alone, without the sampler and the loader's clock.
        thresholds: Some of :class:`~lightning_optcore.profiling.thresholds.Thresholds`, by name.
        output_dir: Folder of ``profile.json`` (``profile_test.json`` and so on); that of the logger, else
            ``default_root_dir``, by default.
        live: Show the step time, the largest phases and the verdict while it runs, in one line; ``"panel"`` shows all
            phases in a panel, in a terminal without a progress bar.
        trace: Write ``profile_trace.json`` too, a Chrome trace of the last 8,192 steps.
        worst_steps: Record 100 steps with ``torch.profiler`` after the first verdict, and write the ten around the
            slowest of them to ``profile_worst_steps.json``, a Chrome trace. It slows those steps down; they are left
            out of the verdict.

    Attributes:
        report: The :class:`~lightning_optcore.profiling.profile_report.ProfileReport`, during the run and after it.
        reports: The last report of each of ``fit``, ``validate``, ``test`` and ``predict``.
        listeners: Functions that are called with every report: in the sampler's thread while it runs, and at the end.

    Raises:
        MisconfigurationException: If an option makes no sense, or there are two of these callbacks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PerformanceProfiler(live=False)], logger=False)
    """

    def __init__(
        self,
        interval: float = 0.1,
        mode: str = "comprehensive",
        thresholds: Mapping[str, float] | None = None,
        output_dir: str | None = None,
        live: bool | str = True,
        trace: bool = False,
        worst_steps: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(interval, bool) or not isinstance(interval, (int, float)) or not 0.01 <= interval <= 60:
            raise MisconfigurationException(f"{KEY}.interval={interval!r}: expected seconds from 0.01 to 60")
        if mode not in MODES:
            raise MisconfigurationException(f"{KEY}.mode={mode!r}: expected one of {', '.join(MODES)}")
        if live not in (True, False, "panel"):
            raise MisconfigurationException(f"{KEY}.live={live!r}: expected true, false or panel")
        self.interval = interval
        self.mode = mode
        self.thresholds = Thresholds.of(thresholds, f"{KEY}.thresholds")
        self.output_dir = output_dir
        self.live = live
        self.trace = trace
        self.worst_steps = worst_steps
        self.report: ProfileReport | None = None
        self.reports: dict[str, ProfileReport] = {}
        # Called with every report: in the sampler's thread while it runs, and with the last one.
        self.listeners: list[Callable[[ProfileReport], None]] = []
        self._run: _Run | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place of the Trainer's profiler and begin to sample."""
        if any(isinstance(other, PerformanceProfiler) and other is not self for other in trainer.callbacks):
            raise MisconfigurationException(f"{KEY}: the Trainer has two of these callbacks; remove one")
        if self._run is not None:
            self._run.close()
        self.report = None
        self._run = _Run(self, trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The clock starts here: what came before happens once."""
        self._begin()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The clock ends here."""
        self._end(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A validation on its own has its own clock."""
        if self._run is not None and self._run.stage == "validate":
            self._begin()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A validation on its own ends here."""
        if self._run is not None and self._run.stage == "validate":
            self._end(pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """The clock starts."""
        self._begin()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """The clock ends."""
        self._end(pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """The clock starts."""
        self._begin()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """The clock ends."""
        self._end(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the profiler back, and report."""
        self._finish(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Report what was seen, whatever broke the run off."""
        self._finish(trainer)

    def _begin(self) -> None:
        if self._run is not None:
            self._run.begin()

    def _end(self, pl_module: Any) -> None:
        if self._run is not None:
            self._run.end(pl_module)

    def _finish(self, trainer: Any) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            self.report = run.final_report()
        except Exception as error:
            # The run is worth more than what can be said about it.
            log.debug("no profile", exc_info=True)
            rank_zero_warn(f"{KEY}: no report. {type(error).__name__}: {error}")
        finally:
            run.close()
        if self.report is None:
            return
        self.reports[run.stage] = self.report
        if not trainer.is_global_zero:
            return
        self.announce(self.report)
        self._write(trainer, run)
        _to_loggers(trainer, self.report)
        rank_zero_info(summary_text(self.report))

    def announce(self, report: ProfileReport) -> None:
        """Give a report to the listeners; the failure of one is not the run's."""
        for listener in self.listeners:
            try:
                listener(report)
            except Exception as error:
                log.warning("%s: a listener took no report (%s: %s)", KEY, type(error).__name__, error)

    def folder(self, trainer: Any) -> Path:
        """Return where the files go."""
        return Path(self.output_dir or trainer.log_dir or trainer.default_root_dir)

    def _write(self, trainer: Any, run: _Run) -> None:
        assert self.report is not None
        folder, name = self.folder(trainer), run.name
        files = {f"{name}.json": self.report.to_json()}
        if self.trace:
            files[f"{name}_trace.json"] = chrome_trace(run.probes.collector, run.sampler.table())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                write_atomically(folder / file, text)
        except OSError as error:
            rank_zero_warn(f"{KEY}.output_dir={folder}: {error.strerror}; the report is in callback.report alone")


# Lightning passes over a hook that cannot be called; to call an empty one costs as much as all that is measured here.
# A subclass may have one of its own.
for _hook in (
    *(f"on_{stage}_batch_{edge}" for stage in ("train", "validation", "test", "predict") for edge in ("start", "end")),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
):
    setattr(PerformanceProfiler, _hook, None)


class _Run:
    """One fit, validate, test or predict under observation."""

    def __init__(self, options: PerformanceProfiler, trainer: Any, pl_module: Any, stage: str) -> None:
        self.options = options
        self.trainer = trainer
        # Lightning's stage is an enumeration of texts.
        self.stage = str(getattr(stage, "value", stage))
        self.name = "profile" if self.stage == "fit" else f"profile_{self.stage}"
        detailed = options.mode == "comprehensive"
        self.probes = Probes(trainer, pl_module, detailed=detailed)
        self.sampler = Sampler(options.interval, on_sample=self._on_sample)
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
        if options.worst_steps and trainer.is_global_zero:
            self._watch_worst_steps()
        live = options.live and trainer.is_global_zero
        self._line = LiveLine(trainer, panel=options.live == "panel") if live else None
        self._looked = 0.0
        self._overrides: Overrides | None = None
        self._lock = threading.Lock()
        if detailed:
            self.probes.collector.sampler = self.sampler
            self.sampler.start()

    def _watch_worst_steps(self) -> None:
        if isinstance(self.probes.collector.inner, PyTorchProfiler):
            self.notes.append("worst_steps: the Trainer's PyTorchProfiler has torch.profiler already")
            return
        path = self.options.folder(self.trainer) / f"{self.name}_worst_steps.json"
        self.recorder = self.probes.collector.recorder = WorstSteps(path)

    def begin(self) -> None:
        """Start the clock."""
        _count_ddp_often(self.trainer)
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
        self.communication_ms = _exposed_communication(self.trainer)
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
        findings = diagnose(evidence, self.options.thresholds)
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
        evidence = _with_communication(evidence, self._exposed_communication())
        return _without_waiting_for(self.ranks, evidence, self.trainer.global_rank)

    def _exposed_communication(self) -> float:
        return self.communication_ms if self.communication_ms is not None else _exposed_communication(self.trainer)

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
            self.options.report = self._report()
            if self._line is not None:
                self._line.show(self.options.report)
            self.options.announce(self.options.report)
        except Exception as error:
            log.debug("no look", exc_info=True)
            self.notes.append(f"no verdict after {steps} steps: {type(error).__name__}: {error}")
        finally:
            self._lock.release()

    def _first_is_due(self, steps: int, now: float) -> bool:
        few_seconds = now - self.clock[0] >= _LOOK_EVERY_SECONDS and steps >= self.options.thresholds.min_steps
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


def _count_ddp_often(trainer: Any) -> None:
    """Let DDP time its communication every tenth step, not every hundredth."""
    often = getattr(trainer.strategy.model, "_set_ddp_runtime_logging_sample_rate", None)
    if often is not None:
        with suppress(RuntimeError):
            often(10)


def _exposed_communication(trainer: Any) -> float:
    """Return the milliseconds a step of communication that the backward pass does not hide, as DDP measures it."""
    read = getattr(trainer.strategy.model, "_get_ddp_logging_data", None)
    if read is None:
        return 0.0
    with suppress(RuntimeError):
        figures = read()
        hidden = figures.get("avg_backward_compute_comm_overlap_time", 0)
        return max(figures.get("avg_backward_comm_time", 0) - hidden, 0) / 1e6
    return 0.0


def _with_communication(evidence: Evidence, exposed_ms: float) -> Evidence:
    """Take the exposed communication out of the backward pass, in which it happens."""
    if not evidence.steps or not exposed_ms:
        return evidence
    share = min(exposed_ms * evidence.steps / evidence.seconds / 1e3, evidence.share[BACKWARD])
    shares = {**evidence.share, BACKWARD: evidence.share[BACKWARD] - share, COMMUNICATION: share}
    return replace(evidence, share=shares, p50_ms={**evidence.p50_ms, COMMUNICATION: exposed_ms})


def _without_waiting_for(ranks: list[RankEvidence], evidence: Evidence, rank: int) -> Evidence:
    """Take the waiting for the slowest rank out of the phases in which it happens: it is the straggler's doing."""
    if len(ranks) < 2:
        return evidence
    slowest = max(ranks, key=lambda one: one.working_seconds)
    if ranks[rank] is slowest:
        return evidence
    total = sum(ranks[rank].seconds.values())
    shares = dict(evidence.share)
    for phase in (FORWARD, BACKWARD):
        waited = max(ranks[rank].seconds[phase] - slowest.seconds[phase], 0.0) / total
        shares[phase] = max(shares[phase] - waited, 0.0)
    return replace(evidence, share=shares)


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


def _to_loggers(trainer: Any, report: ProfileReport) -> None:
    """Write the shares to whatever loggers the Trainer has; a logger's failure is not the run's."""
    values = {f"profile/{phase}": figures.share for phase, figures in report.phases.items()}
    values["profile/step_ms"] = report.step_ms.get("p50", 0.0)
    for logger in trainer.loggers:
        try:
            logger.log_metrics(values, step=trainer.global_step)
        except Exception as error:
            print(f"{KEY}: {type(logger).__name__} took no figures ({error})", file=sys.stderr)
