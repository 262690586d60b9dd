from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_optcore.profiling.profile_report import ProfileReport

RANKS = Path(__file__).parent / "two_profiled_ranks.py"


def reports_of(kind: str, folder: Path) -> list[ProfileReport]:
    done = subprocess.run(
        ["timeout", "-s", "KILL", "200", sys.executable, str(RANKS), str(folder), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [ProfileReport.from_json((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.xdist_group("ranks")
def test_the_slow_rank_is_named_by_every_rank(tmp_path):
    reports = reports_of("straggler", tmp_path)
    assert reports[0].primary.cause == "straggler"
    for report in reports:
        assert len(report.ranks) == 2
        finding = next(finding for finding in report.findings if finding.cause == "straggler")
        assert "rank 1" in finding.evidence[0]
        assert finding.phase == "data_wait"
    assert reports[0].ranks == reports[1].ranks
    assert ProfileReport.from_json((tmp_path / "profile.json").read_text()).ranks == reports[0].ranks


@pytest.mark.xdist_group("ranks")
def test_communication_that_nothing_hides_is_a_phase_of_its_own(tmp_path):
    for report in reports_of("communication", tmp_path):
        assert report.phases["communication"].share > 0.2
        finding = next(finding for finding in report.findings if finding.cause == "communication")
        assert finding.recommendations[0].override == "Trainer(accumulate_grad_batches=4)"
