from __future__ import annotations

import pytest

from lightning_optcore import Store

MODEL = ("model=cnn", "model.num_classes=5", "model.width=4", "model.depth=1", "trainer=cpu", "measure.rounds=2")


def test_a_training_on_tasks_is_adapted_to_one(optcore, tmp_path):
    trained = optcore(
        "train",
        *MODEL,
        "data=few_shot_digits",
        "data.num_train_tasks=8",
        "data.num_val_tasks=4",
        "data.num_test_tasks=4",
        "trainer.max_epochs=1",
        "callbacks=[default,meta_learning]",
        "callbacks.meta_learning.adaptation_steps=1",
    )
    assert trained.returncode == 0, trained.stderr
    assert "test/acc: " in trained.stdout + trained.stderr
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    adapted = optcore("adapt", f"checkpoint='{checkpoint}'", *MODEL, "callbacks.fast_adaptation.rounds=2")
    assert adapted.returncode == 0, adapted.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        run = store.runs()[0]
    assert (run.job, run.status) == ("adapt", "done")
    assert run.recipe["steps"][-1]["step"] == "fast_adaptation"
    assert run.measurements["after"].quality["val/loss"] != run.measurements["before"].quality["val/loss"]
    missing = optcore("adapt", *MODEL)
    assert missing.returncode == 1 and "checkpoint=null: name the checkpoint" in missing.stderr


@pytest.mark.parametrize("experiment", ["few_shot", "rotated"])
def test_the_examples_say_what_adaptation_gained(optcore, fashion_mnist, experiment):
    done = optcore(
        "train",
        f"experiment={experiment}",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
        "measure.rounds=2",
        "report.enabled=false",
    )
    assert done.returncode == 0, done.stderr
    assert "test/acc: " in done.stdout + done.stderr and "before adaptation, " in done.stdout + done.stderr
