"""What follows a run, in a terminal or in a log: one line, or a panel."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.profiling.summary import live_text, verdict


class LiveLine:
    """Shows the newest report: in place in a terminal of its own; where a progress bar or a log is, if it changed.

    Args:
        trainer: The Trainer, whose progress bar has the terminal if it has one.
        panel: In a terminal of its own, show a panel with all phases and not one line.
        console: Where to; the standard error by default.
    """

    def __init__(self, trainer: Any, panel: bool = False, console: Console | None = None) -> None:
        self._bar = trainer.progress_bar_callback
        self._panel = panel
        self._console = console if console is not None else Console(stderr=True)
        self._live: Live | None = None
        self._said: str | None = None
        self._terminal = sys.stderr.isatty() if console is None else console.is_terminal

    def show(self, report: ProfileReport) -> None:
        """Show a report."""
        if self._terminal and self._bar is None:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            line = Text(live_text(report), no_wrap=True, overflow="ellipsis")
            self._live.update(panel_of(report) if self._panel else line, refresh=True)
        elif report.primary.cause != self._said:
            self._said = report.primary.cause
            if self._bar is not None:
                self._bar.print(live_text(report))
            else:
                rank_zero_info(live_text(report))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def panel_of(report: ProfileReport) -> RenderableType:
    """Return all phases with their share of the step, and the findings, as a panel."""
    step_ms = report.step_ms.get("p50", 0.0)
    phases = Table.grid(padding=(0, 1))
    phases.add_column(no_wrap=True)
    phases.add_column(width=30)
    phases.add_column(justify="right", no_wrap=True)
    phases.add_column(justify="right", no_wrap=True)
    for phase, figures in sorted(report.phases.items(), key=lambda item: -item[1].share):
        if figures.share >= 0.001:
            each = f"{1e3 * figures.seconds / max(report.steps, 1):.3g} ms"
            phases.add_row(phase, Bar(1.0, 0.0, figures.share, color="cyan"), f"{figures.share:.1%}", each)
    findings = (Text(verdict(finding)) for finding in report.findings)
    title = f"{report.stage}: {report.steps} steps, {step_ms:.3g} ms each"
    return Panel(Group(phases, Text(), *findings), title=title, title_align="left")
