from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from strangers import Plain
from torch import nn
from torch.utils.data import DataLoader

from lightning_optcore.callbacks import SynapticIntelligence
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual.synaptic_intelligence import path_importance

pytestmark = pytest.mark.filterwarnings("ignore")


class WholeBatches(LightningDataModule):
    def setup(self, stage=None):
        self.digits = Digits()
        self.digits.setup()

    def train_dataloader(self):
        return DataLoader(self.digits.train_set, len(self.digits.train_set))


def test_the_path_sums_up_to_what_the_loss_lost(make_trainer):
    """With small steps on one batch, the sum of -gradient * change over all weights is the decrease of the loss."""

    class Spy(SynapticIntelligence):
        def end_task(self, trainer, pl_module):
            self.sum = sum(float(path.sum()) for path in self._path.values())
            super().end_task(trainer, pl_module)

    torch.manual_seed(0)
    model, callback, data = Plain("sgd", 5e-2), Spy(), WholeBatches()
    data.setup()
    images, labels = data.digits.train_set.tensors
    before = float(nn.functional.cross_entropy(model.net(images), labels))
    make_trainer(callback, max_epochs=60).fit(model, datamodule=data)
    after = float(nn.functional.cross_entropy(model.net(images), labels))
    assert before - after > 0.1
    assert callback.sum == pytest.approx(before - after, rel=0.02)


def test_weights_that_did_nothing_do_not_matter():
    path = {"w": torch.tensor([4.0, -1.0, 0.0]), "v": torch.tensor([1e-9])}
    moved = {"w": torch.tensor([2.0, 1.0, 0.0]), "v": torch.tensor([1e-6])}
    found = path_importance(path, moved, damping=0.1)
    assert found["w"][0] > 0
    assert found["w"][1] == found["w"][2] == 0
    assert found["v"][0] < found["w"][0], "what hardly moved counts for little"


def test_it_differs_from_nothing_done_and_from_its_own_strength(learn):
    naive, weak, strong = learn(), learn(SynapticIntelligence(strength=30.0)), learn(SynapticIntelligence(strength=1e4))
    assert naive.forgetting > weak.forgetting + 0.02 > strong.forgetting + 0.04
    assert strong.rows[1][0] > 0.8


def test_several_optimizer_steps_before_a_checkpoint_are_in_it(make_trainer):
    callback = SynapticIntelligence()
    trainer = make_trainer(callback, max_epochs=1, accumulate_grad_batches=4)
    trainer.fit(Plain(), datamodule=Digits())
    assert trainer.global_step < len(trainer.train_dataloader)
    assert float(callback.penalty.importance["net.1.weight"].sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength=-1: expected at least 0"),
        ({"damping": 0}, "damping=0: expected more than 0"),
        ({"decay": 2}, "decay=2: expected a share"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        SynapticIntelligence(**options)
