"""The examples run as a user runs them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import warm

from lightning_optcore import load_artifact

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path):
    """Run Python in a copy of an example's folder."""

    def start(folder: Path, *arguments: str) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("outputs", "__pycache__", "artifact"))
        done = warm.run([sys.executable, *arguments], cwd=copy, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return start


def test_plain_trainer(run, tmp_path):
    output = run(EXAMPLES, "plain_trainer.py")
    assert "latency_ms/1" in output
    assert "the artifact says" in output
    assert load_artifact(tmp_path / "copy" / "artifact").measurement.quality["val/acc"] > 0.9


def test_queue_of_jobs(run):
    lines = [line for line in run(EXAMPLES, "queue_of_jobs.py").splitlines() if line.startswith("width")]
    assert [line.split(":")[0] for line in lines] == ["width 8", "width 32", "width 128"]
    assert float(lines[-1].split()[3]) > 0.85


@pytest.mark.parametrize("line", ["optcore train model=spiral_net", "optcore train model._target_"])
def test_own_module_with_hydra(run, tmp_path, line):
    readme = (EXAMPLES / "hydra_own_module" / "README.md").read_text()
    (command,) = [found for found in readme.splitlines() if found.startswith(line)]
    run(EXAMPLES / "hydra_own_module", "-m", "lightning_optcore.cli", *command.split()[1:])
    reports = list((tmp_path / "copy" / "outputs").rglob("report.html"))
    assert len(reports) == 1


def test_a_foreign_project_needs_only_the_search_path(run, tmp_path):
    run(
        EXAMPLES / "foreign_project",
        "train.py",
        "hydra.searchpath=[pkg://lightning_optcore.conf]",
        "callbacks=[default,post_training_quantization]",
    )
    (artifact,) = (tmp_path / "copy" / "outputs").rglob("artifact")
    assert load_artifact(artifact).measurement.quality["val/acc"] > 0.8
    assert list((tmp_path / "copy" / "outputs").rglob("checkpoints/*.ckpt")), "their own callback ran too"
