from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_optcore.callbacks import KnowledgeDistillation, StructuredPruning
from lightning_optcore.compression.distillation import attention_loss, distillation_loss
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_loss_is_that_of_the_paper():
    student, teacher, t = torch.randn(6, 5), torch.randn(6, 5), 3.0
    p, q = torch.softmax(teacher / t, 1), torch.softmax(student / t, 1)
    expected = t**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=t), expected)
    torch.testing.assert_close(
        distillation_loss(student, teacher, loss="mse"), nn.functional.mse_loss(student, teacher)
    )


def test_attention_needs_no_equal_number_of_channels():
    features = torch.randn(2, 8, 4, 4)
    copies = features.repeat(1, 3, 1, 1)
    assert float(attention_loss(features, copies)) == pytest.approx(0, abs=1e-6)
    assert float(attention_loss(features, torch.randn(2, 3, 4, 4))) > 0
    with pytest.raises(ValueError, match="features are"):
        attention_loss(features, torch.randn(2, 8, 5, 5))


class Noise(LightningModule):
    """Its own loss knows nothing: what it learns, it learns from the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return {"loss": self.net(batch[0].flatten(1)).sum() * 0.0, "other": 1}

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self.net(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def taught() -> MLP:
    from lightning.pytorch import Trainer

    seed_everything(0, verbose=False)
    model = MLP(width=64, depth=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_epochs=6, enable_model_summary=False, **options).fit(model, Digits())
    return model


def test_any_module_teaches(make_trainer, taught):
    seed_everything(0, verbose=False)
    student = Noise()
    trainer = make_trainer(KnowledgeDistillation(teacher=taught, alpha=0.9), max_epochs=40)
    trainer.fit(student, Digits())
    assert float(trainer.callback_metrics["acc"]) > 0.9
    assert student.training_step.__func__ is Noise.training_step, "the step is as it was"
    assert all(p.grad is None for p in taught.parameters())


def test_a_checkpoint_teaches(make_trainer, tmp_path):
    seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    pruning = StructuredPruning(target_params=0.7, criterion="l2")
    make_trainer(pruning, checkpoint, enable_checkpointing=True).fit(CNN(width=8, depth=1), Digits())
    callback = KnowledgeDistillation(teacher=checkpoint.last_model_path)
    trainer = make_trainer(callback)
    trainer.fit(CNN(width=8, depth=1), Digits())
    assert float(trainer.callback_metrics["train/distillation"]) > 0


def test_the_initial_model_teaches_what_pruning_took(make_trainer, taught):
    def pruned(*callbacks) -> float:
        seed_everything(1, verbose=False)
        model = MLP(width=64, depth=1)
        model.load_state_dict(taught.state_dict())
        pruning = StructuredPruning(target_params=0.25, criterion="random", compensated=False)
        trainer = make_trainer(*callbacks, pruning, max_epochs=2)
        trainer.fit(model, Digits())
        return float(trainer.callback_metrics["val/loss"])

    assert pruned(KnowledgeDistillation(alpha=0.5, temperature=2.0)) < 1.2 * pruned()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5: expected a share"),
        ({"temperature": 0}, "temperature=0: expected more than 0"),
        ({"loss": "l1"}, "loss='l1': expected one of kl, mse"),
        ({"teacher": "nowhere.ckpt"}, "teacher=nowhere.ckpt: no such file"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        KnowledgeDistillation(**options)


def test_a_teacher_of_another_shape_is_named(make_trainer):
    callback = KnowledgeDistillation(teacher=MLP(width=8, depth=1, num_classes=7))
    with pytest.raises(MisconfigurationException, match=r"the student gives \(64, 10\), the teacher \(64, 7\)"):
        make_trainer(callback).fit(MLP(width=8), Digits())


def test_a_feature_that_matches_nothing_is_named(make_trainer):
    with pytest.raises(MisconfigurationException, match="features='layer9' matches no layer"):
        make_trainer(KnowledgeDistillation(features=["layer9"])).fit(CNN(width=4, depth=1), Digits())
