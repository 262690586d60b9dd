"""The report of a run, from what the store has of it."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from lightning_optcore.jobs.recording import Recording
from lightning_optcore.report.html import write_run_report

log = logging.getLogger(__name__)


def report_of(config: DictConfig, recording: Recording, output_dir: Path) -> Path | None:
    """Write ``report.html``; without a store, an extra, or the wish for it, there is none."""
    stored = recording.read_back()
    if not config.report.enabled or stored is None:
        return None
    try:
        return write_run_report(
            stored.run,
            stored.curves,
            output_dir / "report.html",
            profiles=stored.profiles,
            history=stored.history,
            assets_dir=Path(config.paths.output_root),
            self_contained=config.report.self_contained,
        )
    except ModuleNotFoundError as error:
        log.warning("no report: %s", error)
        return None
