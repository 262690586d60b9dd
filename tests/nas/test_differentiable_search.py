"""Learning an architecture: who moves what, on which data, and that an interruption changes nothing."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from oneshot_spaces import Classifier, Layers, StopAfter, Widths, equal, loader
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_optcore.callbacks import DifferentiableSearch, SampledTraining
from lightning_optcore.nas import differentiable_search
from lightning_optcore.nas.differentiable_search import expected_cost, expected_cost_of_table
from lightning_optcore.nas.supernet import SupernetError, alphas, largest, probabilities, smallest, supernet

SPACES = {"darts": Widths, "gumbel_darts": Widths, "proxyless": Layers}
KINDS = list(SPACES)


def searched(kind="darts", seed=0, space=None):
    torch.manual_seed(seed)
    return Classifier(supernet((space or SPACES[kind])(), kind))


def weights_of(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if "_arch_alpha" not in n}


def alphas_of(module):
    return {label: alpha.detach().clone() for label, alpha in alphas(module.network).items()}


class Watch(DifferentiableSearch):
    """Looks at what changes in either step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.alphas_moved, self.weights_moved = 0, 0
        self.after_step = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.after_step is not None:
            # What came between was the step of the weights.
            assert equal(self.after_step[1], alphas_of(pl_module)), "alphas moved in the step of the weights"
            self.weights_moved += not equal(self.after_step[0], weights_of(pl_module))
        weights, arch = weights_of(pl_module), alphas_of(pl_module)
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()}
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert equal(weights, weights_of(pl_module)), "weights moved in the step of the architecture"
        assert equal(buffers, dict(pl_module.named_buffers())), "batch norm saw the architecture's batch"
        for name, parameter in pl_module.named_parameters():
            before = grads[name]
            assert (parameter.grad is None) == (before is None) and (
                before is None or torch.equal(parameter.grad, before)
            )
        self.alphas_moved += not equal(arch, alphas_of(pl_module))
        self.after_step = (weights_of(pl_module), alphas_of(pl_module))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_moves_its_own_only(make_trainer, kind, accumulate):
    watch = Watch(learning_rate=0.05)
    trainer = make_trainer(watch, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=0.1)
    module = searched(kind)
    trainer.fit(module, loader())
    # Half of 64 samples: 4 batches of 8, in 2 epochs.
    assert watch.alphas_moved == 8 // accumulate
    assert watch.weights_moved >= 8 // accumulate - 1
    assert trainer.global_step == 8 // accumulate
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert set(watch.architecture) == set(module.network.supernet_choices)


def test_the_architecture_learns_what_is_better(make_trainer):
    """Where skipping leaves noise that the head cannot read, and one operation removes it, that is found."""

    class Noisy(nn.Module):
        def forward(self, x):
            return torch.randn_like(x) if self.training else x

    from oneshot_spaces import nas

    class Space(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            self.pick = nas.nn.LayerChoice([Noisy(), nn.Identity(), Noisy()], label="pick")
            self.head = nn.Linear(36, 4)

        def forward(self, x):
            return self.head(self.pick(x).flatten(1))

    for kind in KINDS:
        search = DifferentiableSearch(learning_rate=0.1)
        make_trainer(search, max_epochs=15).fit(searched(kind, space=Space), loader(512, size=32))
        assert search.architecture == {"pick": 1}, kind


def test_warmup_leaves_the_architecture_alone(make_trainer):
    module, watch = searched(), Watch(learning_rate=0.05, warmup_epochs=1)
    make_trainer(watch, max_epochs=2).fit(module, loader())
    assert watch.alphas_moved == 4


def test_the_log_and_metrics_are_those_of_the_weights(make_trainer):
    class Counting(Classifier):
        def __init__(self, network):
            super().__init__(network)
            self.accuracy = MulticlassAccuracy(4)
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.accuracy(self.network(batch[0]), batch[1])
            self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
            return {"loss": super().training_step(batch, batch_idx)}

        def on_train_epoch_end(self):
            self.seen.append(int((self.accuracy.tp + self.accuracy.fn).sum()))

    torch.manual_seed(0)
    module = Counting(supernet(Layers(), "darts"))
    make_trainer(DifferentiableSearch(), max_epochs=2).fit(module, loader())
    assert module.seen == [32, 32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_validation", [True, False])
def test_a_resumed_search_ends_as_an_uninterrupted_one(make_trainer, tmp_path, kind, with_validation):
    validation = loader(16) if with_validation else None

    def run(epochs, seed, ckpt_path=None):
        module = searched(kind)
        torch.manual_seed(seed)
        keep = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        callbacks = [DifferentiableSearch(learning_rate=0.05), StopAfter(epochs), keep]
        trainer = make_trainer(*callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, loader(), validation, ckpt_path=ckpt_path, weights_only=True)
        return module, keep.last_model_path

    whole, _ = run(4, 1)
    _, checkpoint = run(2, 1)
    resumed, _ = run(4, 99, checkpoint)
    assert equal(weights_of(whole), weights_of(resumed))
    assert equal(alphas_of(whole), alphas_of(resumed))
    assert equal(dict(whole.named_buffers()), dict(resumed.named_buffers()))


def test_another_seed_is_another_search(make_trainer):
    found = []
    for seed in (0, 0, 1):
        module = searched()
        torch.manual_seed(0)
        make_trainer(DifferentiableSearch(seed=seed), max_epochs=1).fit(module, loader())
        found.append(alphas_of(module))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_the_temperature_falls(make_trainer):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(next(m.tau for m in pl_module.modules() if hasattr(m, "tau")))

    search = DifferentiableSearch(temperature=(2.0, 1.0))
    make_trainer(search, Look(), max_epochs=2).fit(searched("gumbel_darts"), loader())
    assert sorted(set(seen), reverse=True) == [2.0, 1.5]


def test_the_cost_has_a_gradient_and_draws_the_search(make_trainer):
    table = {"width": {"4": 1.0, "8": 10.0}}
    found = {}
    for weight in (0.0, 100.0):
        module = searched()
        search = DifferentiableSearch(learning_rate=0.05, cost=table, cost_weight=weight)
        make_trainer(search, max_epochs=6).fit(module, loader())
        found[weight] = float(probabilities(module.network)["width"][4])
    assert found[100.0] > max(0.6, found[0.0])


@pytest.mark.parametrize(("limits", "width"), [((None, 2.0), 4), ((9.0, None), 8)])
def test_limits_of_the_cost(make_trainer, limits, width):
    module = searched()
    search = DifferentiableSearch(
        learning_rate=0.1, cost={"width": {4: 1.0, 8: 10.0}}, cost_weight=100.0, cost_limits=limits
    )
    make_trainer(search, max_epochs=8).fit(module, loader())
    assert search.architecture["width"] == width


@pytest.mark.parametrize("space", [Layers, Widths])
def test_the_expected_parameters_are_those_of_the_networks(space):
    model_space = space()
    network = supernet(model_space, "darts")
    cost = expected_cost(model_space, torch.zeros(1, 1, 6, 6), "parameters")
    for architecture in (largest(network), smallest(network)):
        odds = {
            label: {option: torch.tensor(float(option == architecture[label])) for option in options}
            for label, options in probabilities(network).items()
        }
        alone = model_space.freeze(architecture)
        assert float(cost(odds)) == sum(parameter.numel() for parameter in alone.parameters())
    flops = expected_cost(model_space, torch.zeros(1, 1, 6, 6), "flops")(probabilities(network))
    flops.backward()
    assert all(alpha.grad is not None and alpha.grad.abs().sum() > 0 for alpha in alphas(network).values())


def test_a_table_of_costs_that_does_not_fit():
    odds = {"width": {8: torch.tensor(1.0)}}
    with pytest.raises(SupernetError, match=r"cost\.depth: the supernet weighs width"):
        expected_cost_of_table({"depth": {1: 1.0}}, odds)
    with pytest.raises(SupernetError, match=r"cost\.width: has 16, but not 8"):
        expected_cost_of_table({"width": {16: 1.0}}, odds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate=0: expected a positive"),
        ({"weight_decay": -1}, "weight_decay=-1: expected 0 or more"),
        ({"validation_fraction": 1}, "validation_fraction=1: expected 0 < fraction < 1"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"temperature": (1.0,)}, "temperature=.*two positive numbers"),
        ({"cost_limits": (1, 2)}, "without cost"),
        ({"cost": {"a": {}}, "cost_limits": (2, 1)}, r"cost_limits=\(2, 1\): expected the least and the greatest"),
        ({"cost": {"a": {}}, "cost_limits": (None, None)}, "cost_limits"),
    ],
)
def test_options_of_the_search_that_cannot_be(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        DifferentiableSearch(**options)


def test_what_cannot_be_searched_is_refused_with_its_reason(make_trainer, monkeypatch):
    def refused(module, message, callback=None, data=None, **options):
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(callback or DifferentiableSearch(), max_epochs=1, **options).fit(module, data or loader())

    manual = searched()
    manual.automatic_optimization = False
    refused(manual, r"Classifier\.automatic_optimization=False: its training_step steps the weights itself")
    refused(Classifier(nn.Linear(1, 1)), r"Classifier holds 0 supernets \(none\): expected one")
    refused(Classifier(supernet(Layers())), "network is a supernet of kind=sampled: .*SampledTraining trains it")
    refused(searched(), "network is a supernet of kind=darts: .*DifferentiableSearch trains it", SampledTraining())
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    refused(searched(), r"trainer\.devices: 2 processes")
    refused(Classifier(supernet(Layers())), r"trainer\.devices: 2 processes", SampledTraining())


def test_a_loss_scaler_is_refused(make_trainer):
    class Scaled(differentiable_search.MixedPrecision):
        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    with pytest.raises(MisconfigurationException, match="its loss scaler follows the gradients of the weights only"):
        make_trainer(DifferentiableSearch(), max_epochs=1, plugins=[Scaled()]).fit(searched(), loader())


def test_bfloat16_is_not(make_trainer):
    search = DifferentiableSearch(learning_rate=0.05)
    make_trainer(search, max_epochs=1, precision="bf16-mixed").fit(searched(), loader())
    assert search.architecture


def test_nothing_is_found_before_the_training():
    with pytest.raises(SupernetError, match="no architecture yet"):
        _ = DifferentiableSearch().architecture
