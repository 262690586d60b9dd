"""Training the weights of a supernet: which architecture a batch has, and what an interruption leaves."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from oneshot_spaces import Classifier, Layers, StopAfter, Widths, equal, loader
from torch import nn

from lightning_optcore.callbacks import DifferentiableSearch, SampledTraining
from lightning_optcore.nas import sampled_training
from lightning_optcore.nas.supernet import best_architecture, choose, largest, smallest, sub_network, supernet


def drawn(make_trainer, monkeypatch, epochs=2, **options):
    seen = []
    monkeypatch.setattr(sampled_training, "choose", lambda net, arch: (seen.append(arch), choose(net, arch)))
    torch.manual_seed(0)
    module = Classifier(supernet(Widths()))
    make_trainer(SampledTraining(**options), max_epochs=epochs).fit(module, loader())
    return seen, module


def test_sampled_training_draws_another_architecture_every_batch(make_trainer, monkeypatch):
    seen, _ = drawn(make_trainer, monkeypatch)
    assert len(seen) == 16
    assert len({str(one) for one in seen}) > 4
    assert drawn(make_trainer, monkeypatch)[0] == seen
    assert drawn(make_trainer, monkeypatch, seed=1)[0] != seen


def test_the_sandwich(make_trainer, monkeypatch):
    seen, module = drawn(make_trainer, monkeypatch, rule="sandwich", num_random=1)
    assert seen[0::3] == [largest(module.network)] * 6
    assert seen[1::3] == [smallest(module.network)] * 5
    assert len({str(one) for one in seen[2::3]}) > 1


def test_sampled_training_trains_and_is_validated_with_the_largest(make_trainer):
    torch.manual_seed(0)
    module = Classifier(supernet(Widths()))
    trainer = make_trainer(SampledTraining(rule="sandwich"), max_epochs=15, accumulate_grad_batches=4)
    before = trainer.validate(module, loader(), verbose=False)[0]["val/loss"]
    trainer.fit(module, loader())
    after = trainer.validate(module, loader(), verbose=False)[0]["val/loss"]
    assert after < before
    # Smaller ones were trained as well.
    choose(module.network.eval(), smallest(module.network))
    images, labels = loader().dataset.tensors
    assert nn.functional.cross_entropy(module.network(images), labels) < before


@pytest.mark.parametrize(("kind", "callback"), [("sampled", SampledTraining), ("proxyless", DifferentiableSearch)])
def test_a_supernet_can_be_tested_and_so_can_what_was_found(make_trainer, kind, callback):
    class Tested(Classifier):
        def test_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    network = supernet(Layers(), kind)
    architecture = largest(network) if kind == "sampled" else best_architecture(network)
    trainer = make_trainer(callback())
    whole, alone = (
        trainer.test(Tested(one), loader(shuffle=False), verbose=False)[0]["loss"]
        for one in (network, sub_network(network, architecture))
    )
    assert whole == pytest.approx(alone)


def test_a_resumed_sampled_training_ends_as_an_uninterrupted_one(make_trainer, tmp_path):
    def run(stop, seed, ckpt_path=None):
        torch.manual_seed(0)
        module = Classifier(supernet(Widths()))
        torch.manual_seed(seed)
        keep = ModelCheckpoint(tmp_path / f"{stop} {seed}", save_last=True)
        callbacks = [SampledTraining(), StopAfter(stop), keep]
        trainer = make_trainer(*callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, keep.last_model_path

    whole, _ = run(4, 1)
    _, checkpoint = run(2, 1)
    resumed, _ = run(4, 99, checkpoint)
    assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(("options", "message"), [({"rule": "all"}, "rule='all'"), ({"num_random": -1}, "num_random")])
def test_options_of_sampled_training_that_cannot_be(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        SampledTraining(**options)
