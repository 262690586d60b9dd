from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from nets import ALL, BertLike, Encoder
from torch import nn

from lightning_optcore import Recipe, load_from_checkpoint, measure, rebuild
from lightning_optcore.callbacks import (
    KnowledgeDistillation,
    LowRankFactorization,
    PostTrainingQuantization,
    StructuredPruning,
)
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.layer_latency import LayerLatency
from lightning_optcore.compression.low_rank import factorize
from lightning_optcore.compression.low_rank_layers import Basis, LowRank, factored
from lightning_optcore.compression.training_state import replace_parameter
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One table of layers for the session's process, none of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


LAYERS = {
    "linear": (nn.Linear(12, 10), torch.randn(3, 12)),
    "linear without bias": (nn.Linear(12, 10, bias=False), torch.randn(3, 5, 12)),
    "1x1": (nn.Conv2d(12, 10, 1, stride=2), torch.randn(3, 12, 5, 5)),
    "3x3": (nn.Conv2d(12, 10, 3, stride=2, padding=1, dilation=2), torch.randn(3, 12, 9, 9)),
    "circular": (nn.Conv2d(12, 10, 3, padding="same", padding_mode="circular"), torch.randn(3, 12, 7, 7)),
    "1d": (nn.Conv1d(12, 10, 3, padding=1), torch.randn(3, 12, 9)),
    "3d": (nn.Conv3d(12, 10, 3, padding=1), torch.randn(2, 12, 4, 4, 4)),
    "embedding": (nn.Embedding(30, 10, padding_idx=0), torch.tensor([[0, 4, 29]])),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_all_directions_together_are_the_layer(kind):
    layer, x = LAYERS[kind]
    full = torch.linalg.qr(torch.randn(10, 10)).Q
    narrow = torch.linalg.qr(torch.randn(12, 12)).Q
    inputs = (narrow, narrow.T) if layer.weight[0].numel() > 12 else None
    product = factored(layer, Basis(full, full.T, inputs))
    torch.testing.assert_close(product(x), layer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product.weight, layer.weight, rtol=1e-4, atol=1e-5)
    assert isinstance(layer, nn.Embedding) or product.bias is layer.bias


def test_a_weight_of_low_rank_is_found():
    """Sixteen inputs of which three directions matter: rank 3 (here 4, a multiple of 2) loses nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(24, 3) @ torch.randn(3, 16) / 8)
    x = torch.randn(100, 16)
    expected = net(x)
    done = factorize(net, [x], energy=0.9999, ignore=["2"])
    assert done.ranks == {"0": [4]}
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)


def test_directions_that_the_data_does_not_have_are_given_up_first():
    """Plain singular values keep the large weights, which are of inputs that hardly vary."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    scale = torch.cat([torch.full((16,), 0.01), torch.ones(16)])
    with torch.no_grad():
        layers[0].weight[:, :16] *= 10
    x, unseen = (torch.randn(200, 32) * scale + 3 for _ in range(2))

    def error(aware: bool) -> float:
        net = copy.deepcopy(layers)
        factorize(net, [x], target_params=0.8, ignore=["2"], aware=aware)
        with torch.no_grad():
            return float((net(unseen) - layers(unseen)).square().mean() / layers(unseen).var())

    assert error(aware=True) < 0.2 * error(aware=False)


@pytest.mark.parametrize("kind", ALL)
def test_networks_of_all_kinds_get_smaller(kind):
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = make()
    whole = measure(net, inputs, batch_sizes=(1,), rounds=1)
    training = {name: p.requires_grad for name, p in net.named_parameters()}
    net.train()
    target = 0.96 if kind in ("lstm", "gru") else 0.8
    done = factorize(net, [inputs], target_params=target)
    taken = measure(net, inputs, batch_sizes=(1,), rounds=1)
    assert taken.params / whole.params == pytest.approx(done.left["params"])
    assert done.left["params"] <= target
    assert net.training
    assert all(training.values())
    assert all(p.grad is None for p in net.parameters())
    fresh = rebuild(make(), Recipe.from_json(Recipe((done.step,)).to_json()))
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh.eval()(inputs), net.eval()(inputs))


def test_the_fused_kernel_of_transformer_layers_does_not_miss_the_thin_layers():
    """nn.TransformerEncoderLayer reads linear1.weight; nn.MultiheadAttention reads out_proj.weight."""
    torch.manual_seed(0)
    net, tokens = Encoder(), torch.randint(1, 50, (4, 7))
    done = factorize(net, [tokens], target_params=0.8)
    assert "encoder.layers.1.linear1" in done.ranks
    assert "reads its weight without calling it" in done.skipped["encoder.layers.0.self_attn.out_proj"]
    calls = []
    net.encoder.layers[1].linear1.register_forward_hook(lambda *_: calls.append(1))
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[:, 5:] = True
    with torch.no_grad():
        net.eval()(tokens)
        masked = net.encoder(net.embedding(tokens), src_key_padding_mask=mask)
    assert len(calls) == 2
    torch.testing.assert_close(masked, net.encoder(net.embedding(tokens), src_key_padding_mask=mask))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.read = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.linear(self.middle(self.embedding(tokens)), self.read.weight)
        return self.head(hidden)


def test_what_stays_whole_is_named_with_the_reason():
    net = Tied()
    done = factorize(net, [torch.randint(0, 50, (4, 3))], energy=0.5, embeddings=True)
    assert done.skipped["head"] == "its weight is shared: embedding.weight"
    assert done.skipped["embedding"] == "its weight is shared: head.weight"
    assert done.skipped["read"] == "its forward is not called"
    assert list(done.ranks) == ["middle"]


def test_embeddings_on_demand():
    net, tokens = BertLike(), torch.randint(0, 50, (8, 7))
    done = factorize(net, [tokens], energy=0.6, embeddings=True, ignore=[nn.Linear])
    assert list(done.ranks) == ["embedding"]
    assert net.embedding.weight.shape == (50, 32)


class Counted(LayerLatency):
    """Takes a layer's multiplications, and a constant for its call, for its latency, so that no noise decides."""

    def _at(self, shape, batch_size):
        return 3000.0 + shape.weight[0] * shape.weight[1] * batch_size


def test_only_what_is_no_slower_is_factored():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))
    done = factorize(net, [torch.randn(64, 32)], energy=0.3, latency=Counted())
    assert "no rank of it is faster in torch" in done.skipped["0"]
    assert list(done.ranks) == ["2"]
    assert done.left["latency"] < 1


def test_a_target_out_of_reach_of_speed_names_the_layers():
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(MisconfigurationException, match=r"no rank makes 0, 2 faster; faster=False factors"):
        factorize(net, [torch.randn(64, 32)], target_params=0.5, latency=Counted())


def test_an_optimizer_goes_on_with_the_thin_layers():
    net = nn.Linear(8, 6)
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([{"params": [other]}, {"params": net.parameters(), "lr": 0.5}])
    (net(torch.randn(4, 8)).sum() + other.sum()).backward()
    optimizer.step()
    old, bias = net.weight, net.bias
    moment = optimizer.state[bias]["exp_avg"].clone()
    product = factored(net, Basis(torch.eye(6)[:, :3], torch.eye(6)[:3]))
    replace_parameter(optimizer, old, [layer.weight for layer in product])
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in product.parameters()]
    assert old not in optimizer.state
    assert product[0].weight not in optimizer.state, "its moments begin anew"
    torch.testing.assert_close(optimizer.state[bias]["exp_avg"], moment)
    product(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert product[1].weight in optimizer.state


def test_factorization_inside_a_fit(make_trainer):
    seed_everything(0, verbose=False)
    model = MLP(width=128, depth=2)
    whole = params(model)
    callback = LowRankFactorization(target_params=0.5, start_epoch=3, faster=False)
    trainer = make_trainer(callback, max_epochs=8)
    trainer.fit(model, Digits())
    assert params(model) == round(callback.left["params"] * whole) <= 0.5 * whole
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in model.parameters()}
    assert all(trainer.optimizers[0].state[p] for p in model.parameters())
    assert float(trainer.callback_metrics["val/acc"]) > 0.9
    assert model.on_save_checkpoint.__func__ is LightningModule.on_save_checkpoint, "the hooks are as they were"


def run(make_trainer, folder, path=None, *extra):
    seed_everything(1 if path else 0, verbose=False)
    model = CNN(width=16, depth=2)
    callbacks = [
        KnowledgeDistillation(alpha=0.4),
        LowRankFactorization(target_params=0.6, start_epoch=1, faster=False),
        StructuredPruning(target_params=0.4, start_epoch=2, criterion="l2"),
        ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"),
    ]
    trainer = make_trainer(*callbacks, *(make() for make in extra), max_epochs=4, enable_checkpointing=True)
    trainer.fit(model, Digits(), ckpt_path=path)
    return model


@pytest.mark.parametrize("extra", [(), (EMAWeightAveraging,)], ids=["plain", "averaged"])
def test_resuming_from_before_and_after_is_the_same_run(make_trainer, tmp_path, extra):
    """Distilled, factored and then pruned."""
    whole = run(make_trainer, tmp_path / "first", None, *extra)
    assert [step.name for step in recipe_of(whole).steps] == ["low_rank_factorization", "structured_pruning"]
    for epoch in (0, 1, 2):
        resumed = run(make_trainer, tmp_path / f"from{epoch}", str(tmp_path / "first" / f"epoch={epoch}.ckpt"), *extra)
        assert recipe_of(resumed) == recipe_of(whole)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name} after resuming from epoch {epoch}"


def test_checkpoints_of_every_shape_load_everywhere(make_trainer, tmp_path):
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}", monitor="val/acc", mode="max")
    pruning = StructuredPruning(target_params=0.6, start_epoch=1, end_epoch=3, criterion="l2")
    factors = LowRankFactorization(target_params=0.8, start_epoch=2, faster=False)
    trainer = make_trainer(pruning, factors, checkpoint, max_epochs=4, enable_checkpointing=True)
    trainer.fit(model, Digits())
    after = tmp_path / "after.ckpt"
    trainer.save_checkpoint(after)
    sizes = []
    for path in [*(tmp_path / f"epoch={epoch}.ckpt" for epoch in (3, 0, 2, 1)), after]:
        (metrics,) = trainer.test(model, Digits(), ckpt_path=str(path), verbose=False)
        theirs = CNN.load_from_checkpoint(path, weights_only=True)
        ours = load_from_checkpoint(CNN, path)
        sizes.append(params(model))
        for other in (theirs, ours):
            assert params(other) == params(model)
            (again,) = make_trainer().test(other, Digits(), verbose=False)
            assert again == metrics
    assert sizes[0] == sizes[4] <= sizes[2] < sizes[3] < sizes[1]
    trainer.test(model, Digits(), ckpt_path="best", verbose=False)


def test_the_artifact_of_a_factored_model_is_smaller(make_trainer):
    def size(*callbacks) -> int:
        quantization = PostTrainingQuantization(rounds=1, scheme="dynamic")
        seed_everything(0, verbose=False)
        make_trainer(*callbacks, quantization, max_epochs=2).fit(MLP(width=256, depth=2), Digits())
        assert quantization.artifact is not None, quantization.error
        names = [step.name for step in quantization.artifact.recipe.steps]
        assert names == ["low_rank_factorization"] * len(callbacks) + ["post_training_quantization"]
        return quantization.artifact.size_bytes

    assert size(LowRankFactorization(target_params=0.4, start_epoch=1, faster=False)) < 0.6 * size()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 1.5}, r"energy=1.5: expected a share"),
        ({"target_params": 0}, r"target_params=0: expected a share"),
        ({"energy": 0.9, "target_params": 0.5}, r"give one of them"),
        ({"energy": 0.9, "start_epoch": -1}, r"start_epoch=-1"),
        ({"energy": 0.9, "samples": 0}, r"samples=0: expected a whole number"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        LowRankFactorization(**options)


def test_a_missing_target_fails_in_setup(make_trainer):
    with pytest.raises(MisconfigurationException, match="give energy or target_params"):
        make_trainer(LowRankFactorization()).fit(MLP(width=8), Digits())


def test_an_unreachable_target_names_the_floor(make_trainer):
    callback = LowRankFactorization(target_params=0.01, faster=False)
    with pytest.raises(MisconfigurationException, match=r"target_params=0.01 cannot be reached: at least 0\.\d+"):
        make_trainer(callback).fit(MLP(width=64), Digits())


def test_a_layer_name_that_matches_nothing_is_named(make_trainer):
    callback = LowRankFactorization(energy=0.9, ignore=["net.99"], faster=False)
    with pytest.raises(MisconfigurationException, match=r"ignore='net.99' matches no layer"):
        make_trainer(callback).fit(MLP(width=64), Digits())


def test_a_factored_layer_survives_a_copy():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    factorize(net, [torch.randn(64, 64)], target_params=0.7)
    copied = copy.deepcopy(net)
    assert isinstance(copied[0], LowRank)
    x = torch.randn(3, 64)
    torch.testing.assert_close(copied(x), net(x))


@pytest.mark.xdist_group("ranks")
def test_two_ranks_factor_fuse_and_lower_the_same(tmp_path):
    done = subprocess.run(
        [
            "timeout",
            "-s",
            "KILL",
            "250",
            sys.executable,
            str(Path(__file__).parent / "two_ranks_low_rank.py"),
            tmp_path,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["recipe"] == second["recipe"]
    names = [step.name for step in Recipe.from_json(first["recipe"]).steps]
    assert names == ["low_rank_factorization", "kernel_fusion", "mixed_precision"]
    same = [name for name in first["weights"] if "acc" not in name]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in same)
