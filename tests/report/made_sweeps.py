"""Sweeps that were written as the sweeper writes them, but for the jobs."""

from __future__ import annotations

import json
import math
import re

from lightning_optcore.jobs.sweep_reporting import sweep_page
from lightning_optcore.report.sweep_html import write_sweep_report

SPACE = {"width": "choice(8,16,32)", "lr": "tag(log, interval(1e-4, 1e-1))", "act": "choice(relu,gelu)"}
NAMES = ("val/acc", "size_bytes", "latency_ms")
DIRECTIONS = ("maximize", "minimize", "minimize")


def worth(params, count):
    loss = abs(math.log10(params.get("lr", 1e-3)) + 3)
    return [-loss + params.get("width", 8) / 32, params.get("width", 8) ** 2.0, loss + params.get("width", 8)][:count]


def ended(candidate, objectives):
    """Return what the journal has of a trial: some failed, were pruned, or were answered from the store."""
    if candidate.id == 5:
        return {"status": "failed", "failure": "ValueError: <i>no</i> room\nTraceback"}
    if candidate.id == 6:
        return {"status": "pruned", "failure": "pruned after epoch 2: val/acc was low"}
    source = "trial 1 of sweep 9" if candidate.id == 7 else None
    return {"status": "done", "objectives": json.dumps(worth(candidate.params, objectives)), "cached_from": source}


def figures(text):
    """Return the traces of every figure of a page."""
    decode = json.JSONDecoder().raw_decode
    return [decode(text, match.end())[0] for match in re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*', text)]


def written(journal, sweep, tmp_path):
    return write_sweep_report(sweep_page(journal, sweep), tmp_path / "page.html").read_text()
