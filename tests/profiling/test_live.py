"""What is shown while a run goes on."""

import io
from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.profiling.live import LiveLine
from lightning_optcore.profiling.profile_report import Finding, Phase, ProfileReport, Recommendation

ADVICE = Recommendation("data.num_workers=4", (1.9, 2.4), "more workers", applies=True)
FINDING = Finding("data.workers", "data_wait", 0.6, "high", 0.9, ("data wait is 62% of the step",), (ADVICE,))
REPORT = ProfileReport(
    "fit",
    {"data_wait": Phase(6.2, 0.62), "forward": Phase(3.8, 0.38), "logging": Phase(0.0, 0.0)},
    steps=100,
    wall_seconds=10.0,
    step_ms={"p50": 100.0},
    findings=(FINDING,),
)


def shown(panel):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    live = LiveLine(SimpleNamespace(progress_bar_callback=None), panel=panel, console=console)
    live.show(REPORT)
    text = console.file.getvalue()
    live.close()
    return text


def test_a_panel_shows_the_phases_and_the_override():
    text = shown(panel=True)
    assert "fit: 100 steps, 100 ms each" in text
    assert "data_wait" in text and "62.0%" in text and "62 ms" in text
    assert "logging" not in text, "what takes no time takes no line"
    assert "data.num_workers=4: data wait is 62% of the step; expected 1.9x to 2.4x" in text


def test_a_line_is_one_line():
    text = shown(panel=False)
    assert "100 ms a step: data_wait 62%, forward 38%" in text
    assert "data.num_workers" not in text


def test_a_live_that_does_not_exist_is_refused():
    with pytest.raises(MisconfigurationException, match="live='window': expected true, false or panel"):
        PerformanceProfiler(live="window")
