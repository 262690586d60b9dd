from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightning_optcore import Store

OPTCORE = Path(sys.executable).parent / "optcore"
SMALL = (
    "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1", "measure.rounds=2", "report.enabled=false",
    "strategy=optcore_ddp",
)  # fmt: skip


def test_each_job_of_a_multirun_has_ranks_of_its_own(tmp_path):
    done = subprocess.run(
        [OPTCORE, "train", "-m", *SMALL, "model.width=4,8", "strategy.communication=bf16"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        runs = sorted(store.runs(), key=lambda run: run.id)
    assert [run.config["model"]["width"] for run in runs] == [4, 8]
    assert all(one.quality["optcore/bytes_sent_per_step"] > 0 for run in runs for one in run.measurements.values())
    # A rank that ran the sweep again would have made folders of its own.
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 1
