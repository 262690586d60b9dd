from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from nets import ALL, PADDED, MaskedEncoder, mobilenet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore import load_from_checkpoint, measure
from lightning_optcore.callbacks import KnowledgeDistillation, PostTrainingQuantization, StructuredPruning
from lightning_optcore.compression.channel_groups import Cut, apply_cut, find_channel_groups, plan_cut
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.layer_latency import LayerLatency, layer_shapes
from lightning_optcore.compression.structure import Structure
from lightning_optcore.compression.structured_pruning import prune_channels
from lightning_optcore.compression.training_state import cut_optimizer
from lightning_optcore.data import Digits
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")
KILLED = Path(__file__).parent / "killed_run.py"
RANKS = Path(__file__).parent / "two_ranks.py"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One table of layers for the session's process, none of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("criterion", ["reconstruction", "l2", "random"])
def test_networks_of_all_kinds_reach_the_target(kind, criterion):
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = make()
    whole = measure(net, inputs, batch_sizes=(1,), rounds=1)
    target = 0.93 if kind in ("lstm", "gru") else 0.7
    pruning = prune_channels(net, inputs, target_params=target, criterion=criterion)
    taken = measure(net, inputs, batch_sizes=(1,), rounds=1)
    assert taken.params <= target * whole.params
    assert pruning.left["params"] == pytest.approx(taken.params / whole.params)
    assert pruning.left["flops"] == pytest.approx(taken.flops / whole.flops, rel=0.02)
    assert net(inputs).shape == make()(inputs).shape


@pytest.mark.parametrize("by_a_callback", [False, True])
def test_linear_and_conv_layers_of_a_lightning_module_become_small(make_trainer, tmp_path, by_a_callback):
    """microsoft/nni #5104: masks were found for a LightningModule, but it could not be traced to make it smaller."""
    torch.manual_seed(0)
    model = CNN(width=16, depth=1, lr=0.01)
    x = torch.randn(2, 1, 8, 8)

    def weights(kind):
        return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, kind))

    whole = {kind: weights(kind) for kind in (nn.Conv2d, nn.Linear)}
    if by_a_callback:
        make_trainer(StructuredPruning(target_params=0.5), max_epochs=1).fit(model, Digits())
    else:
        # In the hands of a Trainer once, of none now.
        make_trainer(max_epochs=1).fit(model, Digits())
        model._trainer = None
        prune_channels(model, x, target_params=0.5)
    assert all(weights(kind) < 0.8 * before for kind, before in whole.items())
    assert params(model) < 0.5 * params(CNN(width=16, depth=1))
    assert model(x).shape == (2, 10)
    again = make_trainer(max_epochs=5, enable_checkpointing=False)
    again.fit(model, Digits())
    assert again.validate(model, Digits(), verbose=False)[0]["val/acc"] > 0.5


def test_the_channels_that_stay_make_up_for_copies():
    """Half of the hidden units are copies of the other half: without them nothing is lost."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        net[0].weight[8:] = net[0].weight[:8]
        net[0].bias[8:] = net[0].bias[:8]
    x = torch.randn(200, 8)
    expected = net(x)
    prune_channels(net, x, target_params=0.55)
    assert net[0].out_features == 8
    assert float((net(x) - expected).square().mean() / expected.square().mean()) < 1e-3


class Counted(LayerLatency):
    """Takes a layer's multiplications for its latency, so that no noise decides a test; small ones cost alike."""

    def _at(self, shape, batch_size):
        return max(500.0, float(np.prod(shape.weight) * np.prod(shape.places))) * batch_size


def test_a_target_by_latency_is_met():
    net, x = CNN(width=16, depth=2), torch.randn(2, 1, 8, 8)
    pruning = prune_channels(net, x, target_latency=0.4, latency=Counted("torch"))
    assert pruning.left["latency"] <= 0.4
    assert pruning.left["flops"] == pytest.approx(pruning.left["latency"], abs=0.05)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "onnxruntime-int8"])
def test_layers_are_timed_once_and_kept_in_the_store(backend, tmp_path, monkeypatch):
    store, inputs = tmp_path / "optcore.db", Inputs.of(torch.randn(2, 1, 8, 8))
    shapes = layer_shapes(nn.Sequential(mobilenet()), inputs)
    assert len(shapes) == 5
    first = LayerLatency(backend, batch_sizes=(1, 2), store=store)
    taken = {name: first(shape) for name, shape in shapes.items()}
    first.save()
    assert min(taken.values()) > 0

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("lightning_optcore.compression.layer_latency.fastest_burst", fail)
    again = LayerLatency(backend, batch_sizes=(1, 2), store=store)
    assert {name: again(shape) for name, shape in shapes.items()} == taken


def test_layers_of_a_transformer_that_is_told_of_padding_are_seen():
    shapes = layer_shapes(MaskedEncoder(), Inputs.of(PADDED))
    assert shapes["encoder.layers.1.linear1"].weight == (64, 32)
    assert shapes["encoder.layers.1.linear1"].places == (PADDED.shape[1],)


def test_an_unreachable_target_names_the_floor_and_its_layers():
    message = r"target_flops=0.001 cannot be reached: at least 0\.\d+ .*features"
    with pytest.raises(MisconfigurationException, match=message):
        prune_channels(CNN(width=16, depth=2), torch.randn(2, 1, 8, 8), target_flops=0.001)


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_the_optimizers_state_is_cut_like_the_weights(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = make(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    before = {
        id(p): {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for p in net.parameters()
    }
    x = torch.randn(2, 4)
    cut = plan_cut(net, x, {"0": [1, 4]}, find_channel_groups(net, x))
    assert cut_optimizer(optimizer, net, cut) == []
    apply_cut(net, cut)
    kept = torch.tensor([0, 2, 3, 5])
    by_hand = {net[0].weight: lambda t: t[kept], net[0].bias: lambda t: t[kept], net[2].weight: lambda t: t[:, kept]}
    for parameter, sliced in by_hand.items():
        for key, value in optimizer.state[parameter].items():
            old = before[id(parameter)][key]
            if isinstance(value, torch.Tensor) and value.dim():
                torch.testing.assert_close(value, sliced(old))
            else:
                assert value == old
    optimizer.step()


def test_state_of_another_shape_is_dropped_and_named():
    net = nn.Linear(4, 6)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[net.weight] = {"row": torch.zeros(6)}
    cut = Cut({"weight": torch.arange(8).reshape(2, 4)}, Structure({"weight": [2, 4]}))
    assert cut_optimizer(optimizer, net, cut) == ["weight"]
    assert not optimizer.state[net.weight]


def test_pruning_inside_a_fit(make_trainer):
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    whole, ids = params(model), [id(p) for p in model.parameters()]
    callback = StructuredPruning(target_flops=0.5, start_epoch=2)
    trainer = make_trainer(callback, max_epochs=8)
    trainer.fit(model, Digits())
    assert callback.left["flops"] <= 0.5
    assert params(model) < 0.8 * whole
    assert [id(p) for p in model.parameters()] == ids
    assert float(trainer.callback_metrics["val/acc"]) > 0.85
    assert trainer.optimizers[0].param_groups[0]["lr"] < 2e-4, "the schedule went on to its end"
    assert model.on_save_checkpoint.__func__ is LightningModule.on_save_checkpoint, "the hooks are as they were"


def test_a_fit_that_ends_inside_the_first_epoch_is_pruned_too(make_trainer):
    for options in ({"start_epoch": 3}, {"start_epoch": 0, "end_epoch": 4}, {}):
        callback = StructuredPruning(target_params=0.6, criterion="l2", **options)
        make_trainer(callback, max_epochs=-1, max_steps=9).fit(CNN(width=16, depth=1), Digits())
        assert callback.left["params"] <= 0.6


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_no_layer_is_watched_after_the_fit(make_trainer, start_epoch):
    model = MLP(width=32, depth=1)
    callback = StructuredPruning(target_params=0.6, criterion="l2", start_epoch=start_epoch)
    make_trainer(callback, max_epochs=2).fit(model, Digits())
    assert [name for name, child in model.named_modules() if "forward" in child.__dict__] == []


def test_taylor_and_callables_see_gradients(make_trainer):
    seen = []

    def criterion(name, weight, gradient):
        seen.append(gradient is not None)
        return weight.abs()

    for chosen in ("taylor", criterion):
        callback = StructuredPruning(target_params=0.7, criterion=chosen)
        make_trainer(callback).fit(CNN(width=16, depth=1), Digits())
        assert callback.left["params"] <= 0.7
    assert seen and all(seen)


def run(make_trainer, folder: Path, path: str | None = None, *extra) -> CNN:
    seed_everything(1 if path else 0, verbose=False)
    model = CNN(width=16, depth=2)
    callbacks = [
        KnowledgeDistillation(alpha=0.4, features=["features.5"]),
        StructuredPruning(target_flops=0.5, criterion="taylor", start_epoch=1, end_epoch=2.5),
        ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"),
    ]
    trainer = make_trainer(*callbacks, *(make() for make in extra), max_epochs=4, enable_checkpointing=True)
    trainer.fit(model, Digits(), ckpt_path=path)
    return model


@pytest.mark.parametrize("extra", [(), (EMAWeightAveraging,)], ids=["plain", "averaged"])
def test_resuming_from_before_and_after_the_cuts_is_the_same_run(make_trainer, tmp_path, extra):
    whole = run(make_trainer, tmp_path / "first", None, *extra)
    for epoch in (0, 1, 2):
        resumed = run(make_trainer, tmp_path / f"from{epoch}", str(tmp_path / "first" / f"epoch={epoch}.ckpt"), *extra)
        assert recipe_of(resumed) == recipe_of(whole)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name} after resuming from epoch {epoch}"


def test_checkpoints_of_every_shape_load_everywhere(make_trainer, tmp_path):
    """Lightning #12896 and #6457: a changed model broke trainer.test(ckpt_path) and load_from_checkpoint."""
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, save_top_k=-1, filename="{epoch}", monitor="val/acc", mode="max", save_weights_only=False
    )
    pruning = StructuredPruning(target_flops=0.5, start_epoch=1, end_epoch=3)
    trainer = make_trainer(pruning, checkpoint, max_epochs=4, enable_checkpointing=True)
    trainer.fit(model, Digits())
    sizes = []
    for epoch in (3, 0, 2, 1, 3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert torch.load(path, weights_only=True)["state_dict"]
        (metrics,) = trainer.test(model, Digits(), ckpt_path=str(path), verbose=False)
        theirs = CNN.load_from_checkpoint(path, weights_only=True)
        ours = load_from_checkpoint(CNN, path)
        sizes.append(params(model))
        for other in (theirs, ours):
            assert params(other) == params(model)
            assert other.hparams["width"] == 16
            (again,) = make_trainer().test(other, Digits(), verbose=False)
            assert again == metrics
    assert sizes[0] == sizes[4] < sizes[3] < sizes[1]
    trainer.test(model, Digits(), ckpt_path="best", verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert params(CNN.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)) == params(model)


class TwoOptimizers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images.flatten(1)), labels)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self.net(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[0].parameters()), torch.optim.SGD(self.net[2:].parameters(), 0.1, momentum=0.9)


def test_manual_optimization_with_two_optimizers(make_trainer):
    model = TwoOptimizers()
    callbacks = [KnowledgeDistillation(), StructuredPruning(target_params=0.5, start_epoch=1)]
    trainer = make_trainer(*callbacks, EarlyStopping("acc", mode="max"), max_epochs=4)
    trainer.fit(model, Digits())
    assert callbacks[1].left["params"] <= 0.5
    assert "train/distillation" in trainer.callback_metrics


def test_accumulation_and_clipping(make_trainer):
    callback = StructuredPruning(target_params=0.6, start_epoch=0.5)
    make_trainer(callback, accumulate_grad_batches=3, gradient_clip_val=0.5).fit(CNN(width=16, depth=1), Digits())
    assert callback.left["params"] <= 0.6


class Keywords(LightningModule):
    """Lightning #15862: what wraps a model must pass keyword arguments on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, *, images, scale=1.0):
        return {"logits": self.b(torch.relu(self.a(images.flatten(1)))) * scale}

    def training_step(self, batch, batch_idx):
        return {"loss": nn.functional.cross_entropy(self(images=batch["x"], scale=2.0)["logits"], batch["y"])}

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Dicts(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


def test_prune_distil_and_quantize_in_one_trainer_with_dicts_and_keywords(make_trainer):
    """Lightning #11047: pruning and quantization in one run."""
    data = Digits()
    data.setup()
    loader = DataLoader(Dicts(*data.train_set.tensors), 64)
    callbacks = [KnowledgeDistillation(), StructuredPruning(target_params=0.5), PostTrainingQuantization(rounds=2)]
    make_trainer(*callbacks, max_epochs=2).fit(Keywords(), loader, loader)
    artifact = callbacks[2].artifact
    assert [step.name for step in artifact.recipe.steps] == ["structured_pruning", "post_training_quantization"]
    assert artifact(images=torch.randn(3, 1, 8, 8), scale=2.0)["logits"].shape == (3, 10)


def test_a_pruned_state_dict_is_smaller_and_plain(tmp_path):
    """nni and Torch-Pruning need masks or pickled modules; here a file of tensors and a recipe of numbers will do."""
    net = CNN(width=16, depth=1)
    pruning = prune_channels(net, torch.randn(4, 1, 8, 8), target_params=0.4)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.save(CNN(width=16, depth=1).state_dict(), tmp_path / "whole.pt")
    assert (tmp_path / "weights.pt").stat().st_size < 0.8 * (tmp_path / "whole.pt").stat().st_size
    from lightning_optcore import Recipe, rebuild

    recipe = Recipe.from_json(Recipe((pruning.step,)).to_json())
    fresh = rebuild(CNN(width=16, depth=1), recipe)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fresh.eval()(x), net.eval()(x))


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(name: str, *more: str) -> list[str]:
        return [sys.executable, str(KILLED), str(tmp_path / name), *more]

    warm.run(command("whole"), env=environment, check=True)
    killed = warm.Running(command("killed", "--slow"), env=environment)
    last = tmp_path / "killed" / "last.ckpt"
    end = time.monotonic() + 120
    while not (tmp_path / "killed" / "epoch=1.ckpt").exists():
        assert killed.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "final.pt").exists()
    warm.run(command("killed", "--resume", str(last)), env=environment, check=True)
    whole, resumed = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_prune_the_same_and_resume(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for more in ((), ("--resume", str(tmp_path / "epoch=1.ckpt"))):
        done = subprocess.run(
            ["timeout", "-s", "KILL", "200", sys.executable, str(RANKS), str(tmp_path), *more],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    first, second, resumed, _ = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole0", "whole1", "resumed0", "resumed1")
    )
    # Which layers lose channels depends on latencies measured there and then; the total does not.
    positions = {"features.0": 64, "features.3": 64, "features.6": 16, "features.9": 16}
    macs = sum(first[f"{name}.weight"].numel() * outputs for name, outputs in positions.items())
    whole = 9 * (64 * (1 * 16 + 16 * 16) + 16 * (16 * 32 + 32 * 32))
    assert macs <= 0.5 * whole
    for other in (second, resumed):
        assert all(torch.equal(first[name], other[name]) for name in first if "acc" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_flops": 0}, r"target_flops=0: expected the fraction"),
        ({"target_params": 1.5}, r"target_params=1.5"),
        ({"target_flops": 0.5, "criterion": "l1"}, r"criterion='l1': expected one of reconstruction, taylor"),
        ({"target_flops": 0.5, "start_epoch": -1}, r"start_epoch=-1"),
        ({"target_flops": 0.5, "end_epoch": "4"}, r"end_epoch='4': expected a number of at least 0"),
        ({"target_flops": 0.5, "start_epoch": 2, "end_epoch": 1}, r"end_epoch=1: expected at least start_epoch=2"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        StructuredPruning(**options)


def test_a_missing_target_fails_in_setup(make_trainer):
    with pytest.raises(MisconfigurationException, match="give target_flops, target_params or target_latency"):
        make_trainer(StructuredPruning()).fit(CNN(width=4, depth=1), Digits())


def test_a_layer_name_that_matches_nothing_is_named(make_trainer):
    callback = StructuredPruning(target_flops=0.5, criterion="l2", ignore=["head.9"])
    with pytest.raises(MisconfigurationException, match=r"ignore='head.9' matches no layer"):
        make_trainer(callback).fit(CNN(width=4, depth=1), Digits())


class Diverging(MLP):
    """Good for an epoch, then its loss is NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.current_epoch > 1 else loss


def test_training_that_diverges_ends_with_the_last_good_weights(make_trainer):
    seed_everything(0, verbose=False)
    model = Diverging(width=128, depth=1)
    trainer = make_trainer(StructuredPruning(target_params=0.8, criterion="l2"), max_epochs=9)
    with pytest.warns(UserWarning, match="not finite after the fit .* those of the last good epoch are back"):
        trainer.fit(model, Digits())
    assert trainer.current_epoch <= 4
    assert all(torch.isfinite(p).all() for p in model.parameters())
    (metrics,) = trainer.validate(model, Digits(), verbose=False)
    assert metrics["val/acc"] > 0.5, "trained for two epochs, not lost"
