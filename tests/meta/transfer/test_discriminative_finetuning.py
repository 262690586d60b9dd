from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_optcore.callbacks import DiscriminativeFinetuning
from lightning_optcore.models import CNN

sys.path.insert(0, str(Path(__file__).parent))
from finetuning_run import Network, digits, trainer_in

FEW = {"classes": range(5, 10), "train_size": 128}


def fit(folder, callback, module, ckpt_path=None, **options):
    trainer = trainer_in(folder, callback, **options)
    trainer.fit(module, *digits(**FEW), ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Watch(Callback):
    """Writes down what learns in every epoch, the statistics of batch norm, and the rates of the steps."""

    def __init__(self):
        self.learning, self.statistics, self.rates = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.learning.append({name for name, p in pl_module.named_parameters() if p.requires_grad})
        self.statistics.append([pl_module.backbone[i].num_batches_tracked.item() for i in (1, 4)])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        of = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        self.rates.append({name: of[parameter] for name, parameter in pl_module.named_parameters()})


@pytest.mark.parametrize(
    ("schedule", "optimizer"),
    [("none", "adam"), ("lambda", "sgd"), ("cosine", "adam"), ("one_cycle", "adam"), ("one_cycle", "sgd")],
)
def test_a_resumed_fine_tuning_ends_with_the_weights_of_the_uninterrupted_one(tmp_path, schedule, optimizer):
    seed_everything(0, verbose=False)
    whole = fit(tmp_path, DiscriminativeFinetuning(), Network(schedule, optimizer))
    seed_everything(5, verbose=False)
    resumed = fit(
        tmp_path / "2", DiscriminativeFinetuning(), Network(schedule, optimizer), ckpt_path=tmp_path / "epoch=1.ckpt"
    )
    assert same(whole, resumed)
    assert not same(whole, torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"])


def test_a_training_resumes_in_a_process_of_its_own_without_the_pretrained_weights(tmp_path):
    seed_everything(0, verbose=False)
    torch.save(Network().state_dict(), tmp_path / "pretrained.pt")
    whole = fit(tmp_path, DiscriminativeFinetuning(tmp_path / "pretrained.pt"), Network())
    script = Path(__file__).parent / "finetuning_run.py"
    warm.run([sys.executable, script, tmp_path, "resume"], check=True, cwd=tmp_path)
    assert same(whole, torch.load(tmp_path / "resumed.pt", weights_only=True))


def test_it_resumes_in_the_middle_of_an_epoch(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    seed_everything(0, verbose=False)
    trainer_in(tmp_path, DiscriminativeFinetuning(), Stop(), max_epochs=3).fit(Network(), *digits(**FEW))
    watch = Watch()
    trainer_in(tmp_path / "2", DiscriminativeFinetuning(), watch, max_epochs=3).fit(
        Network(), *digits(**FEW), ckpt_path=tmp_path / "middle.ckpt"
    )
    # Two of four steps of the third epoch are left, in which three groups learn.
    assert len(watch.rates) == 2
    assert "backbone.3.weight" in watch.learning[0] and "backbone.0.weight" not in watch.learning[0]


def test_lightnings_backbone_finetuning_stays_frozen_after_a_resume_and_this_does_not(tmp_path):
    class HeadFirst(Network):
        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def moved(make, module_class):
        folder = tmp_path / module_class.__name__
        seed_everything(0, verbose=False)
        whole = fit(folder, make(), module_class(), max_epochs=3)
        resumed = fit(folder / "2", make(), module_class(), folder / "epoch=1.ckpt", max_epochs=3)
        before = torch.load(folder / "epoch=1.ckpt", weights_only=True)["state_dict"]
        name = "backbone.8.weight"
        return [not torch.equal(after[name], before[name]) for after in (whole, resumed)], same(whole, resumed)

    assert moved(lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1), HeadFirst) == ([True, False], False)
    assert moved(DiscriminativeFinetuning, Network) == ([True, True], True)


def test_groups_are_unfrozen_from_the_head_down_each_at_its_rate(tmp_path):
    watch, module = Watch(), Network("none")
    callback = DiscriminativeFinetuning(decay=2.0)
    trainer_in(tmp_path, callback, watch).fit(module, *digits(**FEW))
    assert [group.name for group in callback.layer_groups] == [
        "backbone.0+backbone.1",
        "backbone.3+backbone.4",
        "backbone.8",
        "head",
    ]
    assert [len(learning) for learning in watch.learning] == [2, 4, 7, 10]
    for epoch, learning in enumerate(watch.learning):
        assert learning == {name for group in callback.layer_groups[3 - epoch :] for name in group.parameters}
    assert watch.learning[0] == {"head.weight", "head.bias"}
    # Four steps an epoch; the second normalization learns in two epochs, the first in one.
    assert watch.statistics == [[0, 0], [0, 0], [0, 4], [4, 8]]
    rates = watch.rates[0]
    assert rates["head.bias"] == 1e-2 and rates["backbone.8.weight"] == 5e-3
    assert rates["backbone.4.bias"] == 2.5e-3 and rates["backbone.1.weight"] == 1.25e-3
    assert all(parameter.requires_grad for parameter in module.parameters())
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]] == [1e-2]


def test_a_decay_of_one_from_the_first_epoch_on_is_ordinary_training(tmp_path):
    seed_everything(0, verbose=False)
    module = Network("cosine", "sgd")
    plain = fit(tmp_path, Callback(), copy.deepcopy(module))
    seed_everything(0, verbose=False)
    Network("cosine", "sgd")
    assert same(plain, fit(tmp_path / "2", DiscriminativeFinetuning(decay=1, start="all"), module))


def test_frozen_groups_never_learn(tmp_path):
    module = Network()
    before = copy.deepcopy(module.state_dict())
    name = "backbone.0+backbone.1"
    after = fit(tmp_path, DiscriminativeFinetuning(start="all", frozen=[name]), module)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key in after if not key.startswith(("backbone.0.", "backbone.1."))}


def test_two_ranks_learn_as_one_does(tmp_path):
    script = Path(__file__).parent / "finetuning_run.py"
    for devices in ("1", "2"):
        subprocess.run([sys.executable, script, tmp_path, devices], check=True, timeout=200, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0, atol=1e-5), name


def test_an_error_in_the_middle_of_a_step_leaves_the_optimizer_and_the_module_as_they_were(tmp_path):
    class Fails(Network):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 2:
                raise RuntimeError("in the closure")

    module = Fails()
    trainer = trainer_in(tmp_path, DiscriminativeFinetuning())
    with pytest.raises(RuntimeError, match="in the closure"):
        trainer.fit(module, *digits(**FEW))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_few_samples_suffice_after_pretraining(tmp_path):
    """Digits 0 to 4 are learned first; of 5 to 9 there are twenty images."""
    scratch, tuned = [], []
    for seed in range(3):
        seed_everything(seed, verbose=False)
        pretrained = CNN(16, 2, num_classes=5, lr=0.01)
        trainer_in(tmp_path / "pre", max_epochs=16).fit(pretrained, digits(range(5), 600)[0])
        finetuning = DiscriminativeFinetuning(pretrained, decay=1.5, start="all")
        for accuracies, callbacks in ((scratch, ()), (tuned, (finetuning,))):
            seed_everything(100 + seed, verbose=False)
            trainer = trainer_in(tmp_path / "few", *callbacks, max_epochs=8)
            trainer.fit(CNN(16, 2, num_classes=5, lr=0.03), *digits(range(5, 10), 20, batch_size=5))
            accuracies.append(trainer.callback_metrics["val/acc"].item())
    assert sum(tuned) / 3 > sum(scratch) / 3 + 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 0.5}, r"discriminative_finetuning\.decay=0\.5: expected at least 1"),
        ({"decay": float("nan")}, r"discriminative_finetuning\.decay=nan"),
        ({"unfreeze_every": 0}, r"discriminative_finetuning\.unfreeze_every=0: expected at least 1"),
        ({"start": "tail"}, r"discriminative_finetuning\.start='tail': expected one of head, all"),
        ({"groups": "backbone"}, r"discriminative_finetuning\.groups='backbone': expected a list"),
        ({"frozen": "head"}, r"discriminative_finetuning\.frozen='head': expected a list"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        DiscriminativeFinetuning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": ["encoder", "head"]}, r"discriminative_finetuning\.groups: 'encoder' matches none of backbone\.0"),
        ({"groups": ["backbone"]}, r"groups: no pattern matches head\.weight, head\.bias"),
        ({"groups": ["backbone", "backbone.0", "head"]}, r"all that \['backbone\.0'\] match is in groups before"),
        ({"head": "fc"}, r"discriminative_finetuning\.head='fc': expected one of backbone, .*head"),
        ({"frozen": ["fc"]}, r"discriminative_finetuning\.frozen=\['fc'\]: no such group, expected some of"),
        ({"groups": ["*"], "frozen": ["*"]}, r"leaves no group to train"),
        ({"checkpoint": nn.Linear(3, 3)}, r"holds nothing for a Network: it has weight, bias; expected backbone\.0"),
        ({"checkpoint": "nowhere.ckpt"}, r"discriminative_finetuning\.checkpoint=nowhere\.ckpt: no such file"),
    ],
)
def test_what_does_not_fit_the_module_is_refused(tmp_path, arguments, message):
    trainer = trainer_in(tmp_path, DiscriminativeFinetuning(**arguments))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Network(), *digits(**FEW))


def test_optimizers_that_have_no_groups_of_parameters_are_refused(tmp_path):
    class Other(Network):
        def __init__(self, make):
            super().__init__("none")
            self.make = make

        def configure_optimizers(self):
            return self.make(self)

    class SumsRates(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["sum"] = group.get("sum", 0.0) + group["lr"]
            return loss

    for make, message in (
        (lambda module: torch.optim.LBFGS(module.parameters()), "LBFGS has one rate for all parameters"),
        (lambda module: torch.optim.SGD(module.head.parameters(), lr=1e-2), r"the optimizer lacks backbone\.0\.weight"),
        (lambda module: SumsRates(module.parameters(), lr=1e-2), "SumsRates keeps sum in its groups, which differs by"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            trainer_in(tmp_path, DiscriminativeFinetuning()).fit(Other(make), *digits(**FEW))


def test_an_optimizer_that_counts_in_its_groups_goes_on_counting(tmp_path):
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return loss

    class Other(Network):
        def configure_optimizers(self):
            return Counts(self.parameters(), lr=1e-2)

    trainer = trainer_in(tmp_path, DiscriminativeFinetuning())
    trainer.fit(Other(), *digits(**FEW))
    assert [group["k"] for group in trainer.optimizers[0].param_groups] == [16]


def test_a_training_that_ends_before_all_is_unfrozen_says_so(tmp_path, caplog):
    fit(tmp_path, DiscriminativeFinetuning(unfreeze_every=2), Network(), max_epochs=1)
    assert "max_epochs=1 ends before group 'backbone.0+backbone.1' is unfrozen, in epoch 6" in caplog.text
