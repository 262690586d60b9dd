from __future__ import annotations

import pytest
import torch
from strangers import Plain

from lightning_optcore.callbacks import AveragedGEM
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import PermutedTask
from lightning_optcore.meta.continual.averaged_gem import project_
from lightning_optcore.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore")


def test_what_opposes_the_reference_is_taken_out():
    gradients, references = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    if sum(float((g * r).sum()) for g, r in zip(gradients, references, strict=True)) > 0:
        references = [-r for r in references]
    before = [g.clone() for g in gradients]
    assert project_(gradients, references)
    assert sum(float((g * r).sum()) for g, r in zip(gradients, references, strict=True)) == pytest.approx(0, abs=1e-5)
    moved = torch.cat([(g - b).flatten() for g, b in zip(gradients, before, strict=True)])
    along = torch.cat([r.flatten() for r in references])
    assert float(torch.nn.functional.cosine_similarity(moved, along, dim=0)) == pytest.approx(1, abs=1e-5)


def test_what_agrees_stays():
    gradient = torch.tensor([1.0, 2.0])
    assert not project_([gradient], [torch.tensor([1.0, 0.0])])
    assert not project_([gradient], [torch.zeros(2)])
    assert gradient.tolist() == [1.0, 2.0]


def test_steps_are_projected_from_the_second_task_on(make_trainer):
    callback, model = AveragedGEM(size=60), Plain()
    make_trainer(callback).fit(model, datamodule=PermutedTask(Digits(), None))
    assert callback.num_projected == 0
    make_trainer(callback).fit(model, datamodule=PermutedTask(Digits(), 1))
    assert 0 < callback.num_projected <= 20


def test_earlier_samples_are_neither_logged_nor_counted(make_trainer):
    """The metric of the training counts the new task's samples, as without the callback."""
    counted = []

    class Counting(MLP):
        def on_train_epoch_end(self):
            counted.append(int((self.train_acc.tp + self.train_acc.fn).sum()))

    callback, model = AveragedGEM(size=60), Counting(width=16, depth=1)
    for seed in (None, 1):
        trainer = make_trainer(callback, limit_train_batches=4)
        trainer.fit(model, datamodule=PermutedTask(Digits(batch_size=32), seed))
    assert counted == [4 * 32, 4 * 32]
    assert "train/loss" in trainer.callback_metrics
