from __future__ import annotations

import copy
import pickle
import re
import time

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import ALL, IMAGES
from torch import nn

from lightning_optcore import Recipe, load_from_checkpoint, rebuild
from lightning_optcore.callbacks import (
    KernelFusion,
    LowRankFactorization,
    PostTrainingQuantization,
    StructuredPruning,
)
from lightning_optcore.compression import kernel_fusion, speed_check
from lightning_optcore.compression.batch_norm_folding import fold, foldable_pairs
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.kernel_fusion import fuse
from lightning_optcore.compression.speed_check import SpeedCheck, same_outputs
from lightning_optcore.data import Digits
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One table of layers for the session's process, none of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


FAST = {"batch_sizes": (1, 4), "rounds": 3}


@pytest.fixture
def clock(monkeypatch):
    """Decides what a change of the model measures, in the place of this machine's noise."""

    def decide(speedup: float) -> None:
        def check(before, after, inputs, *, batch_sizes, num_threads, rounds, saved=None):
            if saved is not None:
                saved += [1e-3 * (speedup - 1)] * len(batch_sizes)
            return SpeedCheck({str(n): speedup for n in batch_sizes}, {str(n): 0.02 for n in batch_sizes})

        monkeypatch.setattr(kernel_fusion, "check_speed", check)

    return decide


def used(module: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Give batch norms statistics that are not those of a fresh one."""
    module.train()
    for _ in range(5):
        module(inputs * 3 + 1)
    return module.eval()


class Forked(nn.Module):
    """A convolution whose output is read by a norm and by somebody else; another one, read by its norm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        return self.nb(self.b(torch.relu(self.na(first)))) + first


class Repeated(nn.Module):
    """One convolution, called twice, before two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


PAIRS = {
    "cnn": (lambda: CNN(width=4, depth=2), 4),
    "residual": (ALL["resnet"][0], 2),
    "forked": (Forked, 1),
    "repeated": (Repeated, 0),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.BatchNorm2d(4)), 1),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU()), 1),
    "in place": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), 0),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)), 1),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_batch_norms_are_folded_where_nobody_notices(kind):
    make, count = PAIRS[kind]
    torch.manual_seed(0)
    net = used(make(), IMAGES)
    expected = net(IMAGES)
    pairs = foldable_pairs(net, Inputs.of(IMAGES))
    assert len(pairs) == count
    fold(net, pairs)
    torch.testing.assert_close(net(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(child, nn.Identity) for child in net.modules()) == count


def test_noise_is_of_the_rounds_not_of_the_machine():
    slow_moments = [1.0, 5.0, 1.0, 9.0, 1.0, 2.0, 7.0, 1.0]
    steady = SpeedCheck.of({1: slow_moments}, {1: [t / 1.2 for t in slow_moments]})
    assert steady.speedup["1"] == pytest.approx(1.2)
    assert steady.faster
    assert not steady.slower
    wild = SpeedCheck.of({1: slow_moments}, {1: list(reversed(slow_moments))})
    assert not wild.faster
    assert not wild.slower
    hardly_measured = SpeedCheck({"1": 0.11}, {"1": 1.2})
    assert hardly_measured.slower
    mixed = SpeedCheck({"1": 2.0, "32": 0.9}, {"1": 0.02, "32": 0.02})
    assert mixed.slower
    assert not mixed.faster


def test_the_outputs_are_compared_as_a_whole():
    x = torch.randn(3, 4)
    assert same_outputs([x], [x + 1e-6])
    assert not same_outputs([x], [x + 0.1])
    assert not same_outputs([x], [x, x])


@pytest.mark.parametrize("kind", ALL)
def test_networks_of_all_kinds_give_the_same_afterwards(kind):
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = make()
    expected = net.eval()(inputs)
    fusion = fuse(net, inputs, **FAST)
    torch.testing.assert_close(net(inputs), expected, rtol=1e-3, atol=1e-3)
    assert set(fusion.decisions) == {"fold", "channels_last"}
    fresh = rebuild(make(), Recipe.from_json(Recipe((fusion.step,)).to_json()))
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh.eval()(inputs), expected, rtol=1e-3, atol=1e-3)


def test_what_is_slower_is_left_out_and_said(clock):
    clock(0.8)
    net = used(CNN(width=4, depth=1), IMAGES)
    names = list(net.state_dict())
    fusion = fuse(net, IMAGES, compile=False)
    assert fusion.decisions["fold"] == "left out: x0.80 (noise 2%) at batch 1, x0.80 (noise 2%) at batch 32"
    assert fusion.decisions["channels_last"].startswith("left out: x0.80")
    assert list(net.state_dict()) == names
    assert fusion.speed is None


def test_all_is_taken_back_where_the_whole_is_slower(monkeypatch):
    net = used(CNN(width=4, depth=1), IMAGES)
    names, expected = list(net.state_dict()), net(IMAGES)
    speeds = iter([1.5, 1.5, 0.7])

    def check(*_, batch_sizes, **__):
        return SpeedCheck(dict.fromkeys(map(str, batch_sizes), next(speeds)), dict.fromkeys(map(str, batch_sizes), 0.0))

    monkeypatch.setattr(kernel_fusion, "check_speed", check)
    fusion = fuse(net, IMAGES)
    assert all("all together x0.70" in decision for decision in fusion.decisions.values())
    assert list(net.state_dict()) == names
    assert torch.equal(net.eval()(IMAGES), expected)


class Viewing(nn.Module):
    """view() needs contiguous tensors, which channels last does not give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(288, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def test_a_forward_that_needs_contiguous_tensors_keeps_them(clock):
    clock(2.0)
    net = Viewing()
    fusion = fuse(net, IMAGES)
    assert "forward fails: RuntimeError: view size is not compatible" in fusion.decisions["channels_last"]
    assert net(IMAGES).shape == (4, 3)
    assert fusion.decisions["fold"] == "left out: no batch norm follows a convolution or linear layer directly"


def test_compiled_for_inference_with_names_and_copies_as_before(clock):
    clock(2.0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    names, x = list(net.state_dict()), torch.randn(3, 6)
    expected = net(x)
    fusion = fuse(net, x, compile=True, **FAST)
    assert fusion.decisions["compile"].startswith("kept, compiled in "), fusion.decisions
    assert fusion.step.parameters["compiled"]
    assert list(net.state_dict()) == names
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.inference_mode():
            torch.testing.assert_close(other.eval()(x), expected)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied[2].weight.zero_()
        copied[2].bias.zero_()
        assert not copied(x).any(), "a copy runs its own weights"
    loss = net.train()(x).sum()
    loss.backward()
    assert net[0].weight.grad is not None, "training runs as it did"
    fresh = rebuild(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), Recipe((fusion.step,)))
    fresh.load_state_dict(net.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(fresh.eval()(x), expected)


def broken(*_, **__):
    def call(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    return call


def slow(forward, **_):
    def call(*args):
        time.sleep(0.05)
        return forward(*args)

    return call


@pytest.mark.parametrize(
    ("compiler", "options", "speed", "reason"),
    [
        (broken, {}, 2.0, "left out: torch.compile fails: TorchDynamoException: no compiler"),
        (slow, {"max_compile_seconds": 0.01}, 2.0, r"more than max_compile_seconds=0.01"),
        (slow, {"repay_calls": 10}, 1.5, r"which \d+ calls repay, more than repay_calls=10"),
        (slow, {}, 1.01, r"left out: x1.01"),
    ],
)
def test_a_compilation_that_does_not_pay_is_left_out_with_the_reason(
    monkeypatch, clock, compiler, options, speed, reason
):
    clock(speed)
    monkeypatch.setattr(torch, "compile", compiler)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), torch.randn(3, 6)
    expected = net(x)
    fusion = fuse(net, x, compile=True, **FAST, **options)
    assert re.search(reason, fusion.decisions["compile"]), fusion.decisions
    assert "forward" not in net.__dict__
    torch.testing.assert_close(net(x), expected)


def test_a_module_that_cannot_be_compiled_where_it_is_loaded_still_runs(monkeypatch):
    from lightning_optcore.compression.execution import execution_of

    monkeypatch.setattr(torch, "compile", broken)
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = net(x)
    execution_of(net).compiled = True
    with torch.inference_mode(), pytest.warns(UserWarning, match="torch.compile fails here"):
        assert torch.equal(net.eval()(x), expected)


def test_fused_at_the_end_of_a_fit_with_checkpoints_of_both_forms(make_trainer, tmp_path, clock):
    clock(1.5)
    seed_everything(0, verbose=False)
    model = CNN(width=8, depth=2)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="trained", monitor="val/acc", mode="max")
    callback = KernelFusion()
    trainer = make_trainer(callback, checkpoint, max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, Digits())
    (step,) = recipe_of(model).steps
    assert len(step.parameters["folded"]) == 4
    assert step.parameters["channels_last"]
    assert step.parameters["speedup"] == {"1": 1.5, "32": 1.5}
    assert callback.decisions == step.parameters["decisions"]
    assert model.on_save_checkpoint.__func__ is LightningModule.on_save_checkpoint, "the hooks are as they were"
    (fused,) = trainer.test(model, Digits(), verbose=False)
    trainer.save_checkpoint(tmp_path / "fused.ckpt")
    for path, norms in ((checkpoint.best_model_path, 4), (tmp_path / "fused.ckpt", 0)):
        (metrics,) = trainer.test(model, Digits(), ckpt_path=str(path), verbose=False)
        assert sum(isinstance(child, nn.BatchNorm2d) for child in model.modules()) == norms
        theirs = CNN.load_from_checkpoint(path, weights_only=True)
        for other in (theirs, load_from_checkpoint(CNN, path)):
            assert sum(isinstance(child, nn.BatchNorm2d) for child in other.modules()) == norms
            (again,) = make_trainer().test(other, Digits(), verbose=False)
            assert again == pytest.approx(metrics, rel=1e-4)
    assert metrics == pytest.approx(fused, rel=1e-4)
    make_trainer(KernelFusion(fold=False), max_epochs=3).fit(model, Digits(), ckpt_path=checkpoint.best_model_path)
    assert sum(isinstance(child, nn.BatchNorm2d) for child in model.modules()) == 4


def test_after_low_rank_and_pruning(make_trainer, tmp_path, clock):
    clock(1.5)
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=2)
    callbacks = [
        LowRankFactorization(target_params=0.7, faster=False),
        StructuredPruning(target_params=0.5, start_epoch=1, criterion="l2"),
        KernelFusion(channels_last=False),
    ]
    trainer = make_trainer(*callbacks, max_epochs=2)
    trainer.fit(model, Digits())
    names = [step.name for step in recipe_of(model).steps]
    assert names == ["low_rank_factorization", "structured_pruning", "kernel_fusion"]
    (metrics,) = trainer.test(model, Digits(), verbose=False)
    trainer.save_checkpoint(tmp_path / "fused.ckpt")
    loaded = CNN.load_from_checkpoint(tmp_path / "fused.ckpt", weights_only=True)
    (again,) = make_trainer().test(loaded, Digits(), verbose=False)
    assert again == pytest.approx(metrics, rel=1e-4)


def test_nothing_is_done_before_an_artifact(make_trainer):
    callbacks = [KernelFusion(), PostTrainingQuantization(rounds=1)]
    model = CNN(width=4, depth=1)
    make_trainer(*callbacks).fit(model, Digits())
    assert callbacks[0].decisions == {"all": "left out: a later callback deploys to onnxruntime-int8"}
    assert any(isinstance(child, nn.BatchNorm2d) for child in model.modules())
    assert callbacks[1].artifact is not None


def test_a_child_that_the_steps_call_is_fused_itself(make_trainer, child_caller, clock):
    clock(1.5)
    data = Digits()
    child_caller.net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))
    make_trainer(KernelFusion()).fit(child_caller, data)
    (step,) = recipe_of(child_caller).steps
    assert step.parameters["target"] == "net"
    assert step.parameters["folded"] == [["0", "1"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_compile_seconds": 0}, "kernel_fusion.max_compile_seconds=0: expected a number"),
        ({"repay_calls": -1}, "kernel_fusion.repay_calls=-1"),
        ({"batch_sizes": []}, r"kernel_fusion.batch_sizes=\[\]"),
        ({"rounds": 0}, "kernel_fusion.rounds=0"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        KernelFusion(**options)


def test_real_clocks_tell_a_slow_module_from_a_fast_one():
    narrow, wide = MLP(width=16, depth=1), MLP(width=2048, depth=2)
    inputs = Inputs.of(torch.randn(4, 1, 8, 8))
    options = {"batch_sizes": (1, 32), "num_threads": 1, "rounds": 5}
    assert speed_check.check_speed(wide, narrow, inputs, **options).faster
    assert speed_check.check_speed(narrow, wide, inputs, **options).slower
