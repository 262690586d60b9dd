from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_optcore.callbacks import (
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
    PostTrainingQuantization,
    StructuredPruning,
)
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.magnitude_pruning import (
    load_sparse,
    pack_sparse,
    prunable_weights,
    prune_magnitudes,
    save_sparse,
    sparsity,
    unpack_sparse,
)
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_smallest_weights_go_to_the_exact_count():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    with torch.no_grad():
        net[1].weight.copy_(net[1].weight.sign() * 100)
    before = [layer.weight.detach().clone() for layer in net]
    prune_magnitudes(net, 0.3)
    assert sparsity(prunable_weights(net)) == 90 / 300
    assert (net[1].weight != 0).all(), "the larger ones are all in the second layer"
    gone = net[0].weight == 0
    assert before[0].abs()[gone].max() <= before[0].abs()[~gone].min()
    prune_magnitudes(net, 0.5, scope="layer")
    assert [float((layer.weight == 0).float().mean()) for layer in net] == [0.5, 0.5]


def test_two_in_four():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(6, 3))
    whole = net[2].weight.detach().clone()
    prune_magnitudes(net, pattern="2:4")
    assert ((net[0].weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert torch.equal(net[2].weight, whole), "six inputs are no multiple of four"


def test_sparse_tensors_round_trip_and_shrink(tmp_path):
    torch.manual_seed(0)
    net = CNN(width=32, depth=1)
    prune_magnitudes(net, 0.8)
    path = save_sparse(net, tmp_path / "sparse.pt")
    torch.save(net.state_dict(), tmp_path / "dense.pt")
    assert path.stat().st_size < 0.45 * (tmp_path / "dense.pt").stat().st_size
    fresh = CNN(width=32, depth=1)
    load_sparse(fresh, path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh.state_dict().values(), strict=True))
    state = {"a": torch.tensor([[0, 3], [0, 0]], dtype=torch.int64), "b": torch.tensor(2.5), "c": torch.zeros(0)}
    again = unpack_sparse(pack_sparse(state))
    assert all(torch.equal(state[name], again[name]) for name in state)
    with pytest.raises(MisconfigurationException, match="schema_version=9"):
        unpack_sparse({"schema_version": 9})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MisconfigurationException, match=r"path=.*sparse.pt"):
        load_sparse(fresh, path)


@pytest.mark.parametrize("average", [(), (EMAWeightAveraging,)], ids=["plain", "averaged"])
def test_the_true_sparsity_is_logged_and_kept(make_trainer, tmp_path, average):
    """Lightning #13595: ModelPruning logged a sparsity that was not there."""
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    callback = MagnitudePruning(0.7, start_epoch=1, end_epoch=3)
    trainer = make_trainer(callback, *(make() for make in average), max_epochs=5)
    trainer.fit(model, Digits())
    weights = prunable_weights(model)
    counted = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    assert counted == pytest.approx(0.7, abs=1e-4)
    assert callback.sparsity == counted
    assert float(trainer.callback_metrics["train/sparsity"]) == pytest.approx(counted, abs=1e-6)
    assert callback.path == tmp_path / "sparse_weights.pt"
    assert not any("mask" in name or "orig" in name for name in model.state_dict()), "plain tensors, nothing wrapped"
    # An average over a hundred steps is hardly trained.
    assert average or float(trainer.callback_metrics["val/acc"]) > 0.8


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
@pytest.mark.parametrize(
    ("technique", "more"), [(StructuredPruning, {}), (LowRankFactorization, {"faster": False})], ids=["cut", "factored"]
)
def test_layers_that_another_technique_changes_get_zeros_again(make_trainer, technique, more, order):
    model = MLP(width=64, depth=2)
    callbacks = [technique(target_params=0.6, start_epoch=1, **more), MagnitudePruning(0.4)]
    make_trainer(*callbacks[::order], max_epochs=2).fit(model, Digits())
    assert callbacks[1].sparsity == pytest.approx(0.4, abs=1e-3)
    (step,) = [step for step in recipe_of(model).steps if step.name == "magnitude_pruning"]
    assert step.parameters["sparsity"] == pytest.approx(0.4, abs=1e-3)


def test_resuming_is_the_same_run(make_trainer, tmp_path):
    def run(folder, path=None):
        seed_everything(0, verbose=False)
        model = MLP(width=32, depth=1)
        # The structured one brings the random state along.
        callbacks = [MagnitudePruning(0.6, end_epoch=2), StructuredPruning(target_params=0.8, criterion="l2")]
        checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(*callbacks, checkpoint, max_epochs=3, enable_checkpointing=True)
        trainer.fit(model, Digits(), ckpt_path=path)
        return model.state_dict()

    whole = run(tmp_path / "a")
    for epoch in (0, 1):
        resumed = run(tmp_path / "b", str(tmp_path / "a" / f"epoch={epoch}.ckpt"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    loaded = MLP.load_from_checkpoint(tmp_path / "a" / "epoch=2.ckpt", weights_only=True)
    assert sparsity(prunable_weights(loaded)) == pytest.approx(0.6, abs=0.06)


def test_what_is_saved_after_the_fit_holds_the_recipe(make_trainer, tmp_path):
    trainer = make_trainer(MagnitudePruning(target_sparsity=0.5), max_epochs=1)
    trainer.fit(MLP(width=16), Digits())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    model = MLP.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert [step.name for step in recipe_of(model).steps] == ["magnitude_pruning"]
    assert sparsity(prunable_weights(model)) == pytest.approx(0.5, abs=0.01)


def test_all_techniques_in_one_trainer(make_trainer):
    model = CNN(width=16, depth=2)
    callbacks = [
        KnowledgeDistillation(),
        StructuredPruning(target_flops=0.6, start_epoch=1),
        MagnitudePruning(0.5, start_epoch=2),
        PostTrainingQuantization(rounds=2),
    ]
    make_trainer(*callbacks, max_epochs=4).fit(model, Digits())
    artifact = callbacks[3].artifact
    assert [step.name for step in artifact.recipe.steps] == [
        "structured_pruning",
        "magnitude_pruning",
        "post_training_quantization",
    ]
    assert sparsity(prunable_weights(model)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 1.0}, "target_sparsity=1.0: expected from 0 to below 1"),
        ({"pattern": "4:8"}, "pattern='4:8': expected one of unstructured, 2:4"),
        ({"scope": "block"}, "scope='block'"),
        ({"pattern": "2:4", "target_sparsity": 0.7}, "the pattern 2:4 makes 0.5"),
        ({"end_epoch": -1}, "end_epoch=-1"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        MagnitudePruning(**options)


def test_layers_can_be_left_out():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune_magnitudes(net, 0.5, ignore=["1"])
    assert (net[1].weight != 0).all()
    with pytest.raises(MisconfigurationException, match="ignore='9' matches no layer"):
        prune_magnitudes(net, 0.5, ignore=["9"])
