"""The callback that watches a run and says what it waits for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optcore.files import write_atomically
from lightning_optcore.option_values import is_number
from lightning_optcore.profiling.observed_run import ObservedRun
from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.profiling.summary import summary_text
from lightning_optcore.profiling.thresholds import Thresholds
from lightning_optcore.profiling.trace import chrome_trace

log = logging.getLogger(__name__)

KEY = "performance_profiler"
MODES = ("comprehensive", "light")


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
        if not is_number(interval) or not 0.01 <= interval <= 60:
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
        self._run: ObservedRun | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place of the Trainer's profiler and begin to sample."""
        if any(isinstance(other, PerformanceProfiler) and other is not self for other in trainer.callbacks):
            raise MisconfigurationException(f"{KEY}: the Trainer has two of these callbacks; remove one")
        if self._run is not None:
            self._run.close()
        self.report = None
        self._run = ObservedRun(
            trainer,
            pl_module,
            stage,
            interval=self.interval,
            detailed=self.mode == "comprehensive",
            thresholds=self.thresholds,
            live=self.live,
            worst_steps=self.folder(trainer) if self.worst_steps else None,
            on_report=self._take,
        )

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

    def _take(self, report: ProfileReport) -> None:
        self.report = report
        self.announce(report)

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

    def _write(self, trainer: Any, run: ObservedRun) -> None:
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


def _to_loggers(trainer: Any, report: ProfileReport) -> None:
    """Write the shares to whatever loggers the Trainer has; a logger's failure is not the run's."""
    values = {f"profile/{phase}": figures.share for phase, figures in report.phases.items()}
    values["profile/step_ms"] = report.step_ms.get("p50", 0.0)
    for logger in trainer.loggers:
        try:
            logger.log_metrics(values, step=trainer.global_step)
        except Exception as error:
            print(f"{KEY}: {type(logger).__name__} took no figures ({error})", file=sys.stderr)
