from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything

from lightning_optcore import load_artifact
from lightning_optcore.callbacks import FastAdaptation, MetaLearning
from lightning_optcore.data import Digits
from lightning_optcore.meta import EpisodicDataModule, TaskDataModule
from lightning_optcore.models import CNN

QUICK = {"batch_sizes": [1], "rounds": 2}


def network():
    seed_everything(0, verbose=False)
    return CNN(width=4, depth=2, num_classes=5)


def episodes(**options):
    return EpisodicDataModule(Digits(), k_shot=5, num_query=5, num_train_tasks=120, num_val_tasks=4, **options)


@pytest.fixture
def checkpoint(make_trainer, tmp_path) -> Path:
    """Of a training with MetaLearning."""
    trainer = make_trainer(MetaLearning("fomaml", adaptation_steps=3, inner_lr=0.1))
    trainer.fit(network(), datamodule=episodes())
    trainer.save_checkpoint(tmp_path / "meta.ckpt")
    return tmp_path / "meta.ckpt"


def test_a_start_and_one_batch_become_a_deployed_model(make_trainer, checkpoint, tmp_path):
    model, task = network(), TaskDataModule(episodes(), index=2)
    adaptation = FastAdaptation(str(checkpoint), 3, 0.1, output_dir=str(tmp_path / "adapted"), **QUICK)
    trainer = make_trainer(adaptation)
    trainer.fit(model, datamodule=task)
    assert adaptation.error is None and trainer.global_step == 0
    before, after = adaptation.before.quality, adaptation.after.quality
    assert after["val/acc"] > before["val/acc"] + 0.1
    trainer.validate(model, datamodule=task, verbose=False)
    assert float(trainer.callback_metrics["val/acc"]) == pytest.approx(after["val/acc"], abs=1e-6)
    artifact = load_artifact(tmp_path / "adapted")
    step = artifact.recipe.steps[-1]
    assert (step.name, step.parameters["num_inner_steps"], step.parameters["inner_lr"]) == ("fast_adaptation", 3, 0.1)
    (images, _), *_ = task.val_dataloader()
    with torch.no_grad():
        assert torch.allclose(artifact(images), model.eval()(images), atol=1e-4)


def test_it_is_the_adaptation_of_meta_learning(make_trainer, checkpoint, tmp_path):
    data = episodes(tasks_per_batch=1, num_test_tasks=1)
    start = network()
    trainer = make_trainer(MetaLearning("fomaml", adaptation_steps=3, inner_lr=0.1))
    trained_for = trainer.test(start, datamodule=data, ckpt_path=checkpoint, verbose=False)[0]["test/loss"]
    adaptation = FastAdaptation(str(checkpoint), 3, 0.1, output_dir=str(tmp_path / "adapted"), **QUICK)
    make_trainer(adaptation).fit(network(), datamodule=TaskDataModule(episodes(), index=0))
    assert adaptation.after.quality["val/loss"] == pytest.approx(trained_for, rel=1e-3)


@pytest.mark.parametrize("rates_per_step", [False, True])
def test_learned_rates_come_with_the_checkpoint(make_trainer, tmp_path, rates_per_step):
    callback = MetaLearning("meta_sgd", adaptation_steps=1, inner_lr=0.1, rates_per_step=rates_per_step)
    trainer = make_trainer(callback, limit_train_batches=2)
    trainer.fit(network(), datamodule=episodes())
    trainer.save_checkpoint(tmp_path / "meta.ckpt")
    adaptation = FastAdaptation(str(tmp_path / "meta.ckpt"), 2, output_dir=str(tmp_path / "adapted"), **QUICK)
    make_trainer(adaptation).fit(network(), datamodule=TaskDataModule(episodes()))
    assert adaptation.artifact.recipe.steps[-1].parameters["inner_lr"] is None
    assert adaptation.after.quality["val/loss"] < adaptation.before.quality["val/loss"]


def test_only_the_head_is_adapted(make_trainer, tmp_path):
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    last = [name for name, _ in model.named_modules() if isinstance(_, torch.nn.Linear)][-1]
    adaptation = FastAdaptation(head=last, num_batches=3, output_dir=str(tmp_path / "adapted"), **QUICK)
    make_trainer(adaptation).fit(model, datamodule=TaskDataModule(episodes()))
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {f"{last}.weight", f"{last}.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inner_steps": 0}, "fast_adaptation.num_inner_steps=0: expected at least 1"),
        ({"num_batches": True}, "fast_adaptation.num_batches=True: expected at least 1, a whole number"),
        ({"inner_lr": 0.0}, "fast_adaptation.inner_lr=0.0: expected more than 0"),
        ({"checkpoint": "nowhere.ckpt"}, "fast_adaptation.checkpoint=nowhere.ckpt: no such file"),
        ({"head": "classifier"}, r"fast_adaptation.head=\['classifier'\]: matches none of"),
    ],
)
def test_wrong_options_are_named(make_trainer, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(FastAdaptation(**options)).fit(network(), datamodule=TaskDataModule(episodes()))


def test_a_checkpoint_of_another_module_is_named(make_trainer, checkpoint):
    with pytest.raises(MisconfigurationException, match="is of another module"):
        make_trainer(FastAdaptation(str(checkpoint))).fit(CNN(width=8, depth=1), datamodule=TaskDataModule(episodes()))


def test_what_anil_adapted_comes_with_its_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(MetaLearning("anil", adaptation_steps=2, inner_lr=0.1), limit_train_batches=2)
    trainer.fit(network(), datamodule=episodes())
    trainer.save_checkpoint(tmp_path / "anil.ckpt")
    adaptation = FastAdaptation(str(tmp_path / "anil.ckpt"), 2, 0.1, output_dir=str(tmp_path / "adapted"), **QUICK)
    make_trainer(adaptation).fit(network(), datamodule=TaskDataModule(episodes()))
    adapted = load_artifact(tmp_path / "adapted").recipe.steps[-1].parameters["adapted"]
    head = trainer.callbacks[0].state_dict()["head"]
    assert f"{head}.weight" in adapted
    assert "features.0.weight" not in adapted


def test_a_checkpoint_of_prototypes_is_told(make_trainer, tmp_path):
    trainer = make_trainer(MetaLearning("protonet"), limit_train_batches=2)
    trainer.fit(network(), datamodule=episodes())
    trainer.save_checkpoint(tmp_path / "proto.ckpt")
    adaptation = FastAdaptation(str(tmp_path / "proto.ckpt"), 2, output_dir=str(tmp_path / "adapted"), **QUICK)
    with pytest.warns(UserWarning, match="was trained with algorithm=protonet, for no gradient steps"):
        make_trainer(adaptation).fit(network(), datamodule=TaskDataModule(episodes()))
