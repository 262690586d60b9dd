from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_optcore import Store, load_artifact

SMALL = ("model.width=4", "model.depth=1", "trainer=cpu", "trainer.max_epochs=1", "measure.rounds=2")

OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Data(LightningDataModule):
    def __init__(self, points=64):
        super().__init__()
        self.points = points

    def train_dataloader(self):
        x = torch.randn(self.points, 6)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 16)

    val_dataloader = train_dataloader

class LitModel(LightningModule):
    def __init__(self, hidden=12):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 2))

    def training_step(self, batch, batch_idx):
        if self.hparams.get("fail") or BROKEN:
            raise ValueError("the step\\nis broken")
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

BROKEN = False
"""


def runs(folder: Path):
    with Store(folder / "outputs" / "optcore.db") as store:
        return store.runs()


def only_run(folder: Path):
    (run,) = runs(folder)
    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_one_command_trains_quantizes_measures_records_and_reports(optcore, tmp_path):
    done = optcore(
        "train",
        "model.width=8",
        "trainer=cpu",
        "trainer.max_epochs=2",
        "callbacks=[default,post_training_quantization]",
        "callbacks.post_training_quantization.rounds=2",
    )
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert run.status == "done"
    assert run.measurements["after"].size_bytes < 0.5 * run.measurements["before"].size_bytes
    assert run.recipe["steps"][0]["step"] == "post_training_quantization"
    assert run.model_fingerprint and run.data_fingerprint and run.hardware_fingerprint
    assert run.seed == 0
    folder = Path(run.directory)
    assert {"report.html", "manifest.json", "last.ckpt", "metrics.csv"} <= files(folder)
    artifact = load_artifact(folder / "artifact")
    assert artifact(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    for place in (folder, folder / "report.html", folder / "artifact", "outputs/optcore.db"):
        assert str(place) in done.stdout
    assert "latency_ms/1" in done.stdout
    assert done.stderr == "", "nothing but the result in a pipe"
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        curves = store.curves(run.id)
    assert len(curves["val/acc"]) == 2


def test_without_a_technique_the_model_is_measured(optcore, tmp_path):
    done = optcore(*SMALL)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert set(run.measurements) == {"before"}
    assert {"val/acc", "test/acc"} <= set(run.measurements["before"].quality)


def test_own_classes_take_their_own_defaults(optcore, tmp_path):
    (tmp_path / "my_pkg.py").write_text(OWN)
    done = optcore(
        "train",
        "model._target_=my_pkg.LitModel",
        "data._target_=my_pkg.Data",
        "+data.points=48",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "measure.rounds=2",
    )
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert run.config["model"] == {"_target_": "my_pkg.LitModel"}
    assert run.config["data"] == {"_target_": "my_pkg.Data", "points": 48}


def test_a_failing_run_is_recorded_with_its_error(optcore, tmp_path):
    (tmp_path / "my_pkg.py").write_text(OWN.replace("BROKEN = False", "BROKEN = True"))
    done = optcore("model._target_=my_pkg.LitModel", "data._target_=my_pkg.Data", "trainer=cpu")
    assert done.returncode == 1
    assert "the step" in done.stderr
    run = only_run(tmp_path)
    assert (run.status, run.error) == ("failed", "ValueError: the step\nis broken")
    assert run.finished_at is not None


SPY = """
from hydra.experimental.callback import Callback

class Spy(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        print("RETURNED", len(job_return.return_value))
"""


def test_a_sweep_gets_the_objective_and_every_run_is_recorded(optcore, tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    done = optcore(
        "train",
        "-m",
        *SMALL,
        "model.width=2,3",
        "objective={latency_ms: minimize, val/acc: maximize}",
        "+hydra.callbacks.spy._target_=spy.Spy",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RETURNED 2") == 2
    assert [run.config["model"]["width"] for run in runs(tmp_path)] == [3, 2]
    assert {run.status for run in runs(tmp_path)} == {"done"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=[val/f1]"], "objective='val/f1' was never logged or measured: expected one of flops"),
        (["objective={val/acc: up}"], "objective.val/acc='up': expected minimize or maximize"),
        (["data=fashion_mnist", "data.root=/nowhere"], "data.root=/nowhere: train-images-idx3"),
        (["trainer.max_epochs=abc"], "trainer.max_epochs=abc: expected int or null"),
        (["model.lr=fast"], "model.lr=fast: expected float"),
        (["model.width=0"], "model.width=0, model.depth=1: expected at least 1 each"),
        (["model._target_=nope.Net"], "model._target_=nope.Net: no such class"),
        (["seed=x"], "seed='x': expected a whole number"),
        (["ckpt_path=nope.ckpt"], "ckpt_path=nope.ckpt: no such file"),
        (["trainer.accelerator=abacus"], "trainer: You selected an invalid accelerator name"),
        (["store.path=/dev/null/x.db"], "store.path=/dev/null/x.db: "),
        (["paths.output_root=/dev/null/x"], "hydra.run.dir=/dev/null/x/train/"),
        (
            [
                "callbacks=post_training_quantization",
                "callbacks.post_training_quantization.monitor=val/f1",
                "callbacks.post_training_quantization.max_quality_drop=0.1",
            ],
            "post_training_quantization.monitor='val/f1' was never logged in validation",
        ),
        (
            ["callbacks=post_training_quantization", "callbacks.post_training_quantization.scheme=int8"],
            "callbacks.post_training_quantization.scheme='int8': expected one of auto, static, dynamic",
        ),
        (["callbacks=meta_learning", "data=few_shot_digits", "data.n_way=9"], "n_way=9: 10 classes do not make"),
    ],
)
def test_bad_input_gives_one_clear_line(optcore, overrides, message):
    done = optcore("train", *SMALL, *overrides)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith(("optcore train: ", "optcore: "))]
    assert len(ours) == 1
    assert message in ours[0]
    assert "Traceback" not in done.stderr


def test_a_store_of_a_newer_schema_is_left_alone(optcore, tmp_path):
    import sqlite3

    assert optcore(*SMALL).returncode == 0
    path = tmp_path / "outputs" / "optcore.db"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    done = optcore(*SMALL)
    assert done.returncode == 1
    assert "schema is version 99" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_was_done_and_it_can_be_resumed(optcore, tmp_path):
    command = [sys.executable, "-m", "lightning_optcore.cli", *SMALL, "trainer.max_epochs=10000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for_a_curve(tmp_path, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "optcore: interrupted; what was done is in" in stderr
    run = only_run(tmp_path)
    assert run.status == "interrupted"
    checkpoint = Path(run.directory) / "interrupted.ckpt"
    epochs = torch.load(checkpoint, weights_only=True)["epoch"]
    done = optcore(*SMALL, f"trainer.max_epochs={epochs + 2}", f"ckpt_path='{checkpoint}'")
    assert done.returncode == 0, done.stderr
    assert runs(tmp_path)[0].status == "done"


def _wait_for_a_curve(folder: Path, process: subprocess.Popen[str]) -> None:
    path = folder / "outputs" / "optcore.db"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None
        if path.exists():
            with Store(path) as store:
                started = store.runs()
                if started and store.curves(started[0].id):
                    return
        time.sleep(0.1)
    raise AssertionError("the training did not begin")
