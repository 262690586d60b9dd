from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_optcore.profiling.profile_report import ProfileReport

SLOW_RANK = Path(__file__).parent / "slow_rank.py"


@pytest.mark.xdist_group("ranks")
def test_the_slow_rank_is_named_by_every_rank(tmp_path):
    done = subprocess.run(
        ["timeout", "-s", "KILL", "200", sys.executable, str(SLOW_RANK), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [ProfileReport.from_json((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0].primary.cause == "straggler"
    for report in reports:
        assert len(report.ranks) == 2
        finding = next(finding for finding in report.findings if finding.cause == "straggler")
        assert "rank 1" in finding.evidence[0]
        assert finding.phase == "data_wait"
    assert reports[0].ranks == reports[1].ranks
    assert ProfileReport.from_json((tmp_path / "profile.json").read_text()).ranks == reports[0].ranks
