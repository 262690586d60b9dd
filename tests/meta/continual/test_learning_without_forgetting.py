from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from strangers import Plain
from torch import nn

from lightning_optcore.callbacks import ExperienceReplay, LearningWithoutForgetting
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import PermutedTask
from lightning_optcore.meta.continual.learning_without_forgetting import retention_loss

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_loss_is_that_of_soft_labels_over_the_former_classes():
    present, former, t = torch.randn(6, 5), torch.randn(6, 3), 2.0
    p, q = torch.softmax(former / t, 1), torch.softmax(present[:, :3] / t, 1)
    expected = t**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(retention_loss(present, former, t), expected)
    with pytest.raises(ValueError, match="the student gives"):
        retention_loss(former, present)


def test_the_loss_is_logged_once_there_is_a_former_model(make_trainer):
    callback, model = LearningWithoutForgetting(), Plain()
    first = make_trainer(callback, limit_train_batches=3)
    first.fit(model, datamodule=Digits())
    assert "train/retention" not in first.callback_metrics
    second = make_trainer(callback, limit_train_batches=3)
    second.fit(model, datamodule=PermutedTask(Digits(), 1))
    assert float(second.callback_metrics["train/retention"]) > 0


@pytest.mark.parametrize("first", [True, False])
def test_samples_that_replay_adds_do_not_confuse_it(make_trainer, first):
    callbacks = [LearningWithoutForgetting(), ExperienceReplay(size=30)]
    model = Plain()
    for seed in (None, 1):
        trainer = make_trainer(*(callbacks if first else callbacks[::-1]), limit_train_batches=3)
        trainer.fit(model, datamodule=PermutedTask(Digits(), seed))
    assert float(trainer.callback_metrics["train/retention"]) > 0


@pytest.mark.parametrize("strength", [100.0, 1e4])
def test_no_strength_makes_steps_that_diverge(make_trainer, strength):
    torch.manual_seed(0)

    class Quick(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    callback, model = LearningWithoutForgetting(strength), Quick()
    digits = Digits()
    make_trainer(callback, max_epochs=8).fit(model, datamodule=digits)
    images = next(iter(digits.val_dataloader()))[0]
    before = model.net(images).argmax(1)
    make_trainer(callback, max_epochs=3).fit(model, datamodule=PermutedTask(Digits(), 1))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert float((model.net(images).argmax(1) == before).float().mean()) > 0.5


def test_a_head_may_grow_between_tasks(make_trainer):
    callback, model = LearningWithoutForgetting(), Plain()
    make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())
    model.net[3] = nn.Linear(48, 14)
    trainer = make_trainer(callback, limit_train_batches=2)
    trainer.fit(model, datamodule=Digits())
    assert float(trainer.callback_metrics["train/retention"]) > 0


def test_a_model_without_logits_is_named(make_trainer):
    class Regressor(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Linear(48, 1)

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

    callback, model = LearningWithoutForgetting(), Regressor()
    make_trainer(callback, limit_train_batches=2, limit_val_batches=0).fit(model, datamodule=Digits())
    with pytest.raises(MisconfigurationException, match=r"net gives \[\(64, 1\)\]; expected logits"):
        make_trainer(callback, limit_train_batches=2, limit_val_batches=0).fit(model, datamodule=Digits())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": -1}, "strength=-1: expected at least 0"), ({"temperature": 0}, "temperature=0: expected more")],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        LearningWithoutForgetting(**options)


class TwoNetworks(Plain):
    """A classifier, and a decoder of outputs of the same width that is called after it."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.decoder = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss + 0.01 * self.decoder(batch[0].flatten(1)).square().mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.manual_backward(self.decoder(batch[0].flatten(1)).square().mean())
        optimizer.step()
        return None


@pytest.mark.parametrize("manual", [False, True])
def test_the_network_whose_outputs_are_kept_can_be_named(make_trainer, manual):
    torch.manual_seed(0)
    callback, model = LearningWithoutForgetting(strength=1e4, network="net"), TwoNetworks(manual)
    make_trainer(callback, max_epochs=5).fit(model, datamodule=Digits())
    digits = Digits()
    digits.setup()
    images = next(iter(digits.val_dataloader()))[0]
    before = model.net(images).argmax(1)
    make_trainer(callback, max_epochs=2).fit(model, datamodule=PermutedTask(Digits(), 1))
    assert float((model.net(images).argmax(1) == before).float().mean()) > 0.7


def test_outputs_that_may_be_the_logits_are_told(make_trainer):
    callback, model = LearningWithoutForgetting(), TwoNetworks()
    make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())
    with pytest.warns(UserWarning, match="calls net and decoder, whose outputs are of one shape.*network=... names"):
        make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())


def test_a_network_that_is_not_called_is_told(make_trainer):
    callback, model = LearningWithoutForgetting(network="net.1"), Plain()
    make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())
    with pytest.raises(MisconfigurationException, match="training_step does not call net"):
        make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())


@pytest.mark.parametrize("technique", [LearningWithoutForgetting, ExperienceReplay])
def test_a_network_that_is_not_there_is_told_before_the_first_task(make_trainer, technique):
    trainer = make_trainer(technique(network="nett"), limit_train_batches=2)
    with pytest.raises(MisconfigurationException, match="network=nett: no such submodule; expected one of net"):
        trainer.fit(Plain(), datamodule=Digits())
