"""Sub-networks judged by the user's own module, data and Trainer, with the weights that they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from one_shot_searches import cells, evaluator
from torch import nn

from lightning_optcore.callbacks import SampledTraining
from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import sub_network
from lightning_optcore.nas.inherited_evaluation import _LOADED, InheritedEvaluation
from lightning_optcore.nas.once_for_all import recalibrate_batch_norm
from lightning_optcore.nas.supernet import supernet
from lightning_optcore.nas.supernet_file import TrainedSupernet, load_supernet, save_supernet
from lightning_optcore.nas.supernet_training import train_supernet

SMALL = {"width": 4, "op_1": "conv3", "op_2": "skip", "input_2": 1}
LARGE = {"width": 8, "op_1": "conv3", "op_2": "separable5", "input_2": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_supernet(evaluator(epochs=10), "sampled", SampledTraining(), folder, options={})
    return folder


def test_a_sub_network_is_worth_what_its_recalibrated_network_is(folder: Path):
    evaluate = InheritedEvaluation(evaluator(), 20, folder / "supernet.ckpt")
    found = evaluate(LARGE)
    space, trained = cells(), load_supernet(folder / "supernet.ckpt")
    whole = Classifier(supernet(space.new_model_space()))
    whole.load_state_dict(trained.state_dict)
    alone = sub_network(whole.network, LARGE)
    data = Digits()
    data.setup()
    # All of the training set: in whatever order, their mean is the same.
    recalibrate_batch_norm(alone, data.train_dataloader())
    images, labels = data.val_set.tensors
    accuracy = float((alone.eval()(images).argmax(1) == labels).float().mean())
    assert found["val/acc"] == pytest.approx(accuracy, abs=0.01)
    assert found["val/acc"] > 0.3
    assert found["params"] == sum(parameter.numel() for parameter in alone.parameters())
    assert {"latency_ms", "flops", "size_bytes"} <= found.keys()


def test_its_worth_does_not_depend_on_when_it_is_asked(folder: Path):
    evaluate = InheritedEvaluation(evaluator(), 3, folder / "supernet.ckpt")
    # The first one of a process has the supernet loaded.
    _LOADED.clear()
    first = evaluate(SMALL)
    evaluate(LARGE)
    torch.manual_seed(7)
    again = evaluate(SMALL)
    assert (again["val/acc"], again["val/loss"]) == (first["val/acc"], first["val/loss"])
    few = InheritedEvaluation(evaluator(), 1, folder / "supernet.ckpt")
    assert few(SMALL)["val/loss"] != first["val/loss"]


def test_its_module_is_the_one_that_was_judged(folder: Path):
    evaluate = InheritedEvaluation(evaluator(), 3, folder / "supernet.ckpt")
    module = evaluate.module(SMALL).eval()
    data = Digits()
    data.setup()
    images, labels = data.val_set.tensors
    accuracy = float((module(images).argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(evaluate(SMALL)["val/acc"])


class Dicts(Digits):
    """Batches are dicts, of two loaders at once for training."""

    def train_dataloader(self):
        return {"one": super().train_dataloader(), "two": super().train_dataloader()}


class Manual(LightningModule):
    """Steps its optimizer itself, and logs nothing but a running mean of its own."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.automatic_optimization = False

    def training_step(self, batch):
        self.optimizers().step()
        raise AssertionError("a training step that steps the weights is not to be judged by")

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class OfDicts(Classifier):
    def training_step(self, batch):
        return super().training_step(batch["two"], 0)


@pytest.mark.parametrize(("module", "data"), [(Manual, Digits), (OfDicts, Dicts)])
def test_any_module_and_data_are_judged_by_their_own_step(tmp_path, module, data):
    torch.manual_seed(0)
    space = cells()
    whole = module(supernet(space.new_model_space()))
    path = save_supernet(tmp_path / "supernet.ckpt", TrainedSupernet("sampled", {}, whole.state_dict(), 1.0))
    evaluate = InheritedEvaluation(evaluator(module=module, data=data), 2, path)
    judged = evaluate.module(SMALL)
    norm = next(one for one in judged.modules() if isinstance(one, nn.BatchNorm2d))
    # Computed anew, as the mean over the batches.
    assert int(norm.num_batches_tracked) == 2
    assert evaluate(SMALL)["val/acc"] >= 0


def test_a_network_without_batch_norm_needs_no_batch(tmp_path):
    class Nothing(LightningDataModule):
        def val_dataloader(self):
            data = Digits()
            data.setup()
            return data.val_dataloader()

        def train_dataloader(self):
            raise AssertionError("no training data are needed")

    from lightning_optcore.nas import spaces

    space = spaces.transformer(widths=(16,), depths=(1, 2), heads=(1,), expansions=(1,))
    whole = Classifier(supernet(space.new_model_space()))
    path = save_supernet(tmp_path / "supernet.ckpt", TrainedSupernet("sampled", {}, whole.state_dict(), 1.0))
    found = InheritedEvaluation(evaluator(space, data=Nothing), 2, path)(
        {"width": 16, "depth": 1, "heads": 1, "expansion": 1}
    )
    assert 0 <= found["val/acc"] <= 1
