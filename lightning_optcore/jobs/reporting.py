"""The report of a run, from what the store has of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_optcore.jobs.recording import Recording
from lightning_optcore.report.html import write_run_report

log = logging.getLogger(__name__)


def report_of(
    config: DictConfig, recording: Recording, output_dir: Path, *, matrix: Mapping[str, Any] | None = None
) -> Path | None:
    """Write ``report.html``; without a store, an extra, or the wish for it, there is none.

    Args:
        config: The composed configuration.
        recording: The run.
        output_dir: Where the report goes.
        matrix: What every task of a sequence came to.
    """
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
            matrix=matrix,
            assets_dir=Path(config.paths.output_root),
            self_contained=config.report.self_contained,
        )
    except ModuleNotFoundError as error:
        log.warning("no report: %s", error)
        return None
