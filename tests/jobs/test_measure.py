from __future__ import annotations

from pathlib import Path

import pytest

from lightning_optcore import Store

SMALL = ("model.width=4", "model.depth=1")
MODEL = ("model=cnn", "data=digits", *SMALL, "measure.rounds=2")
TRAIN = (
    "train",
    *SMALL,
    "trainer=cpu",
    "trainer.max_epochs=1",
    "callbacks=[default,post_training_quantization]",
    "callbacks.post_training_quantization.rounds=2",
)


@pytest.fixture
def trained(optcore, tmp_path) -> Path:
    done = optcore(*TRAIN)
    assert done.returncode == 0, done.stderr
    return Path(newest(tmp_path).directory)


def newest(folder: Path):
    with Store(folder / "outputs" / "optcore.db") as store:
        return store.runs()[0]


def test_an_artifact_alone_is_measured(optcore, tmp_path, trained):
    done = optcore("measure", f"artifact={trained}/artifact", "measure.rounds=2", "measure.batch_sizes=[4]")
    assert done.returncode == 0, done.stderr
    run = newest(tmp_path)
    assert (run.job, run.status) == ("measure", "done")
    assert set(run.measurements["after"].latency_ms) == {4}
    assert run.recipe["steps"][0]["step"] == "post_training_quantization"
    assert "latency_ms/4" in done.stdout


def test_its_quality_comes_from_the_models_validation(optcore, tmp_path, trained):
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        expected = store.runs()[0].measurements["after"].quality
    done = optcore("measure", f"artifact={trained}/artifact", *MODEL)
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path).measurements["after"].quality == pytest.approx(expected)


def test_a_checkpoint_is_measured(optcore, tmp_path, trained):
    (checkpoint,) = trained.rglob("last.ckpt")
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        expected = store.runs()[0].measurements["before"].quality
    done = optcore("measure", f"ckpt_path='{checkpoint}'", *MODEL)
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path).measurements["before"].quality == pytest.approx(expected)


def test_a_corrupted_artifact_is_named_and_recorded(optcore, tmp_path, trained):
    path = trained / "artifact" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = optcore("measure", f"artifact={trained}/artifact")
    assert done.returncode == 1
    assert "model.onnx is not the file that was written (SHA-256 differs)" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest(tmp_path).status == "failed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "artifact=null: give artifact=<folder>, or model=<option> data=<option>"),
        (["model=cnn"], "artifact=null: give artifact=<folder>"),
        (["artifact=nowhere"], "artifact=nowhere: no manifest.json there"),
        (["model=cnn", "data=digits", "ckpt_path=wrong"], "ckpt_path=wrong: no checkpoint"),
    ],
)
def test_bad_input_gives_one_clear_line(optcore, tmp_path, overrides, message):
    (tmp_path / "wrong").write_text("no checkpoint")
    done = optcore("measure", *overrides)
    assert done.returncode == 1
    assert f"optcore measure: {message}" in done.stderr
    assert "Traceback" not in done.stderr
