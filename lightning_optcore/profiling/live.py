"""One line that follows a run, in a terminal or in a log."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.profiling.summary import live_text


class LiveLine:
    """Shows the newest report: in place in a terminal of its own; where a progress bar or a log is, if it changed.

    Args:
        trainer: The Trainer, whose progress bar has the terminal if it has one.
    """

    def __init__(self, trainer: Any) -> None:
        self._bar = trainer.progress_bar_callback
        self._live: Live | None = None
        self._said: str | None = None
        self._terminal = sys.stderr.isatty()

    def show(self, report: ProfileReport) -> None:
        """Show a report."""
        text = live_text(report)
        if self._terminal and self._bar is None:
            if self._live is None:
                self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif report.primary.cause != self._said:
            self._said = report.primary.cause
            if self._bar is not None:
                self._bar.print(text)
            else:
                rank_zero_info(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None
