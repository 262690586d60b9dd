"""The evaluation that trains: fresh every time, on the yardstick, with the user's callbacks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_optcore.callbacks import PostTrainingQuantization, StructuredPruning, TrialPruning
from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import LightningEvaluator, factory_space, search
from lightning_optcore.nas.latency_table import LatencyTable
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
MEASURE = {"batch_sizes": (1,), "rounds": 2}


def net(width, broken=0):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(width * 4 + broken, 10),
    )


SPACE = factory_space(net, {"width": "choice(8,16)", "broken": "choice(0,1)"})


def evaluator(epochs=1, **changed):
    trainer = partial(Trainer, max_epochs=epochs, **QUIET, **changed.pop("limits", {}))
    return LightningEvaluator(SPACE, Classifier, Digits, trainer=trainer, measure=MEASURE, **changed)


def test_it_trains_the_same_every_time_and_reports_the_yardstick():
    evaluate = evaluator(test=True)
    torch.manual_seed(5)
    first = evaluate({"width": 8, "broken": 0})
    second = evaluate({"width": 8, "broken": 0})
    assert first["val/acc"] == second["val/acc"] > 0.15
    assert {"val/loss", "test/acc", "latency_ms", "flops", "size_bytes", "params"} <= first.keys()
    before = evaluate.estimate({"width": 8, "broken": 0})
    assert {name: first[name] for name in before} == before
    assert set(before) == {"params", "flops", "size_bytes"}


def test_what_is_measured_is_the_artifact(tmp_path):
    plain = evaluator(2)({"width": 16, "broken": 0})

    def callbacks():
        return [
            StructuredPruning(target_flops=0.5, batch_sizes=(1,)),
            PostTrainingQuantization(output_dir=str(tmp_path / "artifact"), batch_sizes=(1,), rounds=2),
        ]

    smaller = evaluator(2, callbacks=callbacks)
    made = smaller({"width": 16, "broken": 0})
    assert made["flops"] < 0.6 * plain["flops"]
    assert (tmp_path / "artifact").is_dir()
    # What a trial makes of a network is not known before it.
    assert smaller.estimate({"width": 16, "broken": 0}) == {}


def test_a_network_that_does_not_fit_the_data_is_a_failed_trial(tmp_path):
    found = search(
        SPACE,
        evaluator(limits={"limit_train_batches": 2, "limit_val_batches": 1}),
        objectives=["val/acc"],
        strategy="grid",
        max_trials=4,
        store=tmp_path / "optcore.db",
        show=False,
    )
    failures = {(trial.architecture["width"], trial.architecture["broken"]): trial.failure for trial in found.history}
    assert failures[8, 0] is failures[16, 0] is None
    assert all("mat1 and mat2 shapes cannot be multiplied" in failures[width, 1] for width in (8, 16))
    with Store(tmp_path / "optcore.db") as store:
        runs = store.runs()
        assert [run.job for run in runs] == ["nas", "nas"]
        assert {run.config["architecture"]["width"] for run in runs} == {8, 16}
        assert all(run.objectives["latency_ms"] > 0 for run in runs)


def test_ctrl_c_ends_the_search_and_fails_no_trial(tmp_path):
    pressed = []

    class Pressed(Callback):
        def on_train_batch_start(self, *_):
            if not pressed:
                pressed.append(True)
                raise KeyboardInterrupt

    evaluate = evaluator(limits={"limit_train_batches": 1, "limit_val_batches": 1}, callbacks=lambda: [Pressed()])
    options = {"objectives": "val/acc", "strategy": "grid", "max_trials": 1, "store": tmp_path / "optcore.db"}
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, evaluate, **options, show=False)
    found = search(SPACE, evaluate, **options, show=False)
    assert found.sweep_id == 1
    assert found.history[0].failure is None


class Explodes(Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        with torch.no_grad():
            next(pl_module.parameters()).fill_(float("nan"))


def test_a_loss_that_is_no_number_is_a_failure():
    with pytest.raises(RuntimeError, match="loss is nan"):
        evaluator(callbacks=lambda: [Explodes()])({"width": 8, "broken": 0})


def test_a_bad_trial_is_ended_early(tmp_path):
    class Worse(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            narrow = pl_module.network[0].out_channels == 8
            trainer.callback_metrics["score"] = torch.tensor(0.0 if narrow else 1.0)
            pl_module.log("score", 0.0 if narrow else 1.0)

    def callbacks():
        return [Worse(), TrialPruning(monitor="score", mode="max", min_trials=1)]

    limits = {"limit_train_batches": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    found = search(
        factory_space(net, {"width": "choice(16,8)"}),
        LightningEvaluator(
            factory_space(net, {"width": "choice(16,8)"}),
            Classifier,
            Digits,
            trainer=partial(Trainer, max_epochs=3, **QUIET, **limits),
            callbacks=callbacks,
            measure=MEASURE,
        ),
        objectives=["val/acc"],
        strategy="grid",
        max_trials=2,
        store=tmp_path / "optcore.db",
        show=False,
    )
    assert found.history[0].failure is None
    assert found.history[1].failure.startswith("pruned after epoch 1: score 0 is worse than 1")
    with Store(tmp_path / "optcore.db") as store:
        assert [trial.status for trial in Journal(store).trials(1)] == ["done", "pruned"]
        assert Journal(store).intermediate_values(1) == {0: {1: 1.0, 2: 1.0, 3: 1.0}, 1: {1: 0.0}}


def test_a_limit_on_the_latency_is_predicted_before_a_training():
    space = factory_space(net, {"width": "choice(4,8,64,96)"})
    evaluate = LightningEvaluator(
        space,
        Classifier,
        Digits,
        trainer=partial(Trainer, max_epochs=1, limit_train_batches=1, limit_val_batches=1, **QUIET),
        measure=MEASURE,
        latency=LatencyTable(rounds=5),
    )
    predicted = {width: evaluate.estimate({"width": width})["latency_ms"] for width in (4, 96)}
    assert predicted[96] > 1.5 * predicted[4]
    limit = (predicted[4] * predicted[96]) ** 0.5
    found = search(
        space, evaluate, objectives=["val/acc"], strategy="grid", constraints={"latency_ms": limit}, max_trials=4,
        show=False,
    )  # fmt: skip
    evaluated = {trial.architecture["width"]: trial.evaluated for trial in found.history}
    assert evaluated[4]
    assert not evaluated[96]
