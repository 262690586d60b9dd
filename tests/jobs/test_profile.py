from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightning_optcore import Store
from lightning_optcore.profiling.profile_report import ProfileReport

SLOW = """
import time
from torch.utils.data import Dataset
from lightning_optcore.data import Digits

class Delayed(Dataset):
    def __init__(self, inner):
        self.inner = inner
    def __len__(self):
        return 40 * len(self.inner)
    def __getitem__(self, index):
        time.sleep(0.0004)
        return self.inner[index % len(self.inner)]

class SlowDigits(Digits):
    def setup(self, stage=None):
        super().setup(stage)
        self.train_set = Delayed(self.train_set)
"""


def test_it_stops_after_its_steps_and_keeps_what_it_saw(optcore, tmp_path):
    done = optcore("profile", "steps=60", "model.width=8", "model.depth=1")
    assert done.returncode == 0, done.stderr
    assert "Profile of fit: 60 steps" in done.stdout
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        run = store.runs()[0]
        assert (run.job, run.status) == ("profile", "done")
        assert store.profiles(run.id)["fit"]["steps"] == 60
    folder = Path(run.directory)
    report = ProfileReport.from_json((folder / "profile.json").read_text())
    assert report.steps == 60
    page = (folder / "report.html").read_text()
    assert "Profile of fit" in page
    assert "share of the time in percent" in page
    assert "by phase" in page


def test_the_override_that_it_proposes_is_found_composed_applied_and_measured(optcore, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ("data._target_=slow.SlowDigits", "data.num_workers=0", "steps=60", "apply=true")
    done = optcore("profile", "model.width=8", "model.depth=1", *arguments)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"applied (data\.num_workers=\d+): predicted ([\d.]+)x to ([\d.]+)x, measured ([\d.]+)x", done.stdout
    )
    assert found, done.stdout
    assert float(found[4]) > 1.2
    applied = next((tmp_path / "outputs").rglob("applied/profile.json"))
    first = applied.parents[1] / "profile.json"
    causes = [json.loads(path.read_text())["findings"][0]["cause"] for path in (first, applied)]
    assert causes[0] == "data.latency"
    recommendation = json.loads(first.read_text())["findings"][0]["recommendations"][0]
    assert recommendation["applies"]
    assert recommendation["override"] == found[1]


def test_an_override_reaches_a_class_of_the_users_own(optcore, tmp_path):
    # What the command line does not name is dropped with the class it belonged to: not so what is applied.
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ("data._target_=slow.SlowDigits", "steps=60", "apply=true")
    done = optcore("profile", "model.width=8", "model.depth=1", *arguments)
    found = re.search(r"applied data\.num_workers=\d+: .* measured ([\d.]+)x", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 1.2


def test_an_argument_that_the_configuration_lacks_is_added(optcore, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    done = optcore("profile", "model.width=4", "model.depth=1", "data._target_=slow.SlowDigits", "data.batch_size=64",
                   "steps=50", "~data.num_workers")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "+data.num_workers=" in done.stdout


def test_a_slow_callback_is_taken_out_by_its_key(optcore, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nfrom lightning.pytorch import Callback\n\n"
        "class Slow(Callback):\n    def on_train_batch_end(self, *_):\n        time.sleep(0.02)\n"
    )
    done = optcore(
        "profile", "model.width=4", "model.depth=1", "steps=50", "+callbacks.slow._target_=mine.Slow", "apply=true"
    )
    assert done.returncode == 0, done.stderr
    assert "applied ~callbacks.slow: predicted" in done.stdout


def test_a_train_run_keeps_its_profile_too(optcore, tmp_path):
    done = optcore("train", "callbacks=profiler", "trainer.max_epochs=2", "model.width=4", "model.depth=1")
    assert done.returncode == 0, done.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        run = store.runs()[0]
        assert set(store.profiles(run.id)) == {"fit", "test"}
    assert "Profile of test" in (Path(run.directory) / "report.html").read_text()


def test_an_interrupted_run_says_what_it_saw(tmp_path):
    command = [sys.executable, "-m", "lightning_optcore.cli", "profile", "steps=1000000", "seconds=100"]
    running = subprocess.Popen(
        [*command, "model.width=4", "model.depth=1"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = tmp_path / "outputs" / "optcore.db"
    try:
        for _ in range(300):
            time.sleep(0.2)
            if path.exists():
                with Store(path) as store:
                    if store.runs() and store.profiles(store.runs()[0].id):
                        break
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "Profile of fit:" in output
    with Store(path) as store:
        run = store.runs()[0]
        kept = store.profiles(run.id)["fit"]["steps"]
    assert run.status == "interrupted"
    assert json.loads((Path(run.directory) / "profile.json").read_text())["steps"] == kept


def test_wrong_lengths_are_named(optcore):
    done = optcore("profile", "steps=0")
    assert done.returncode == 1
    assert "steps=0: expected a number of at least 1" in done.stderr


def test_the_same_configuration_twice_has_a_history(optcore, tmp_path):
    for _ in range(2):
        done = optcore("profile", "steps=30", "model.width=4", "model.depth=1")
        assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "outputs").rglob("report.html"))
    assert "ms a step in past runs" not in pages[0].read_text()
    assert "ms a step in past runs" in pages[1].read_text()
    done = optcore("report", "compare=[1,2]")
    assert done.returncode == 0, done.stderr
    assert "run 1" in done.stdout
    assert "forward" in done.stdout
    done = optcore("report", "compare=[1]")
    assert "compare=[1]: expected the numbers of two runs" in done.stderr
