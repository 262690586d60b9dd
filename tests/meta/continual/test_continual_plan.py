from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import killed_plan
import pytest
import torch
import warm
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from strangers import DictData, Plain, Stranger
from torch import nn

from lightning_optcore.callbacks import ElasticWeightConsolidation, ExperienceReplay
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import ClassTask, ContinualPlan, PermutedTask, permuted_tasks

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent


def test_a_plan_that_was_killed_comes_to_the_same_matrix(tmp_path, monkeypatch):
    """Killed in its first task, and then in its second, with all five techniques, whose states go on."""
    broken = tmp_path / "broken"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for fit, done in ((1, 0), (2, 1)):
        command = [sys.executable, str(HERE / "killed_plan.py"), str(broken), str(fit)]
        ended = warm.run(command, env=environment)
        assert ended.returncode == -9, ended.stderr[-2000:]
        assert len(json.loads((broken / "continual.json").read_text())["rows"]) == done
    assert killed_plan.run(broken, fit=0) == killed_plan.run(tmp_path / "whole", fit=0)
    assert sorted(file.name for file in broken.iterdir()) == ["continual.json", "task_3.ckpt"]


def test_a_plan_through_one_trainer_is_as_a_trainer_a_task(make_trainer):
    tasks = permuted_tasks(Digits(), num_tasks=2)
    seed_everything(0, verbose=False)
    model = Plain()
    matrix = ContinualPlan(tasks, seed=3).run(make_trainer(max_epochs=2), model)
    seed_everything(0, verbose=False)
    other = Plain()
    for number, task in enumerate(tasks):
        seed_everything(3 + number, verbose=False)
        trainer = make_trainer(max_epochs=2)
        trainer.fit(other, datamodule=task)
        trainer.validate(other, datamodule=tasks[0], verbose=False)
        assert matrix.rows[number][0] == float(trainer.callback_metrics["val/acc"])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_schedules_epochs_and_callbacks_begin_anew(make_trainer):
    seen = []

    class Scheduled(Plain):
        def on_train_epoch_start(self):
            seen.append((self.trainer.current_epoch, self.optimizers().param_groups[0]["lr"]))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    stopping = EarlyStopping("val/acc", mode="max", patience=0, min_delta=2.0)
    plan = ContinualPlan(permuted_tasks(Digits(), num_tasks=2))
    plan.run(make_trainer(stopping, max_epochs=5), Scheduled())
    assert seen == [(0, 0.1), (1, 0.05), (0, 0.1), (1, 0.05)]


def test_a_continued_plan_runs_nothing_that_is_done(make_trainer, tmp_path):
    def plan(**options) -> ContinualPlan:
        return ContinualPlan(permuted_tasks(Digits(), num_tasks=2), folder=tmp_path, **options)

    first = plan().run(make_trainer(ExperienceReplay(size=20)), Plain())
    rows = []
    trainer, model = make_trainer(ExperienceReplay(size=20)), Plain()
    again = plan(on_task_end=rows.append).run(trainer, model)
    assert again == first
    assert rows == []
    trainer.validate(model, datamodule=permuted_tasks(Digits(), num_tasks=2)[0], verbose=False)
    assert float(trainer.callback_metrics["val/acc"]) == first.rows[1][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "is of another plan \\(seed 0, not 1\\)"),
        ({"metric": "val/loss"}, "is of another plan"),
        ({"model": lambda: MiniPlain(5)}, "the model is another one: .*size mismatch"),
        ({"callbacks": lambda: [ExperienceReplay(size=20)]}, r"was made with the callbacks \[\], here are"),
    ],
)
def test_the_state_of_another_plan_is_refused(make_trainer, tmp_path, change, message):
    tasks = permuted_tasks(Digits(), num_tasks=1)
    ContinualPlan(tasks, folder=tmp_path).run(make_trainer(limit_train_batches=1), Plain())
    model = change.pop("model", Plain)()
    callbacks = change.pop("callbacks", list)()
    with pytest.raises(MisconfigurationException, match=message):
        ContinualPlan(tasks, folder=tmp_path, **change).run(make_trainer(*callbacks), model)


def test_a_damaged_state_is_named(make_trainer, tmp_path):
    (tmp_path / "continual.json").write_text('{"version": 1')
    with pytest.raises(MisconfigurationException, match=r"continual.json: no state of a plan"):
        ContinualPlan(permuted_tasks(Digits(), 1), folder=tmp_path).run(make_trainer(), Plain())


class MiniPlain(Plain):
    """Has as many outputs as it is told."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net[3] = nn.Linear(48, outputs)


class OtherMetric(MiniPlain):
    """Does not mind in its evaluation that outputs are missing."""


@pytest.mark.parametrize("outputs", [3, 9])
def test_heads_that_do_not_match_fail_before_anything_is_learned(make_trainer, outputs):
    fits = []

    class Watched(MiniPlain):
        def training_step(self, batch, batch_idx):
            fits.append(int(batch[1].max()))
            return super().training_step(batch, batch_idx)

    tasks = [ClassTask(Digits(), classes) for classes in ([0, 1], [2, 3], [8, 9])]
    message = (
        rf"plan.tasks\[.\] \(classes .*its labels go up to [39], but net has {outputs} outputs: give the model a head"
    )
    with pytest.raises(MisconfigurationException, match=message):
        ContinualPlan(tasks).run(make_trainer(), Watched(outputs))
    assert max(fits) in (3, 9), "only the rehearsal ran"


def test_inputs_that_do_not_match_are_named(make_trainer):
    tasks = [PermutedTask(Digits(), None), PermutedTask(Digits(image_size=10), None, "larger")]
    with pytest.raises(MisconfigurationException, match=r"plan.tasks\[1\] \(larger\): the model cannot be evaluated"):
        ContinualPlan(tasks).run(make_trainer(), Plain())


def test_a_rehearsal_that_goes_well_changes_nothing(make_trainer):
    """A module with labels and other numbers in its batches, whose largest layer is not its head."""
    matrix = ContinualPlan(permuted_tasks(DictData(), 2)).run(make_trainer(ElasticWeightConsolidation()), Stranger())
    seed_everything(0, verbose=False)
    assert len(matrix.rows) == 2


def test_a_metric_that_is_not_logged_lists_those_that_are(make_trainer):
    with pytest.raises(MisconfigurationException, match=r"plan.metric=acc: the model's validate step logs val/acc"):
        ContinualPlan(permuted_tasks(Digits(), 1), metric="acc").run(make_trainer(), Plain())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "plan.tasks: there is none"),
        ({"tasks": [3]}, r"plan.tasks\[0\]: a int; expected a LightningDataModule"),
        ({"tasks": [Digits()], "stage": "fit"}, "plan.stage='fit': expected one of validate, test"),
        ({"tasks": [Digits()], "direction": "up"}, "plan.direction='up': expected maximize, minimize"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        ContinualPlan(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_epochs": 2}, "trainer.max_epochs=1, not 2"),
        ({"strength": 5.0}, "strength=100.0, not 5.0"),
        ({"lr": 0.3}, "lr"),
    ],
)
def test_a_plan_is_not_continued_with_other_options(make_trainer, tmp_path, change, message):
    class Own(Plain):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

    def run(max_epochs=1, strength=100.0, lr=0.1):
        trainer = make_trainer(ElasticWeightConsolidation(strength=strength), max_epochs=max_epochs)
        return ContinualPlan(permuted_tasks(Digits(), num_tasks=2), folder=tmp_path).run(trainer, Own(lr))

    matrix = run()
    assert run().rows == matrix.rows
    with pytest.raises(MisconfigurationException, match=rf"was begun with .*{message}"):
        run(**change)


def test_a_complete_plan_says_so_and_other_data_are_noticed(make_trainer, tmp_path, caplog):
    def run(first_seed):
        tasks = [PermutedTask(Digits(), seed) for seed in (first_seed, first_seed + 1)]
        for task in tasks:
            task.name = "digits"
        ContinualPlan(tasks, folder=tmp_path).run(make_trainer(max_epochs=4), Plain())

    run(0)
    with caplog.at_level("INFO"):
        run(0)
    assert "the plan is complete, and nothing is run" in caplog.text
    with pytest.warns(UserWarning, match="the same model has .* data or evaluation are others"):
        run(7)


def test_a_trainer_that_has_fitted_is_refused(make_trainer):
    trainer, model = make_trainer(max_epochs=1), Plain()
    trainer.fit(model, datamodule=Digits())
    with pytest.raises(MisconfigurationException, match=r"the Trainer has made \d+ steps before"):
        ContinualPlan(permuted_tasks(Digits(), num_tasks=2)).run(trainer, model)
