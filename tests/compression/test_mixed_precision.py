from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import ALL
from torch import nn

from lightning_optcore import load_from_checkpoint
from lightning_optcore.callbacks import KernelFusion, MixedPrecision, PostTrainingQuantization, StructuredPruning
from lightning_optcore.compression import kernel_fusion, mixed_precision
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.mixed_precision import faster_precisions, lower
from lightning_optcore.compression.speed_check import SpeedCheck
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def clock(monkeypatch):
    """Decides what a lower precision measures, in the place of this machine's processor."""

    def decide(cast: float, autocast: float = 1.0, training: float = 1.0) -> None:
        def check(before, after, inputs, *, batch_sizes, num_threads, rounds, saved=None):
            lowered = next((p.dtype for p in after.parameters()), None) is torch.bfloat16
            speedup = cast if lowered else autocast
            return SpeedCheck({str(n): speedup for n in batch_sizes}, {str(n): 0.02 for n in batch_sizes})

        def of(before, after):
            assert {size: len(times) for size, times in before.items()} == {1: 3}
            assert all(time > 0 for times in (*before.values(), *after.values()) for time in times)
            return SpeedCheck({"1": training}, {"1": 0.02})

        monkeypatch.setattr(mixed_precision, "check_speed", check)
        monkeypatch.setattr(kernel_fusion, "check_speed", check)
        monkeypatch.setattr(SpeedCheck, "of", of)

    return decide


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_networks_of_all_kinds_run_lowered_with_inputs_and_outputs_as_before(kind, mode):
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        expected = net(inputs)
        names = list(net.state_dict())
        lower(net, mode)
        assert list(net.state_dict()) == names
        for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            output = other(inputs)
            assert output.dtype is torch.float32
            assert not torch.equal(output, expected)
            assert nn.functional.cosine_similarity(output.flatten(), expected.flatten(), dim=0) > 0.99
    assert (next(net.parameters()).dtype is torch.bfloat16) == (mode == "cast")


def test_a_lowered_forward_has_the_signature_of_its_own():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, *, x, scale=1.0):
            return {"y": self.a(x) * scale, "n": 3}

    net = lower(Keywords(), "cast")
    assert list(inspect.signature(net.forward).parameters) == ["x", "scale"]
    out = net(x=torch.randn(4, 3), scale=2.0)
    assert out["y"].dtype is torch.float32
    assert out["n"] == 3


def test_training_of_an_autocast_module_is_in_full_precision():
    net = lower(nn.Linear(4, 2), "autocast")
    x = torch.randn(3, 4)
    assert torch.equal(net.train()(x), nn.functional.linear(x, net.weight, net.bias))


class Overflowing(nn.Module):
    """bfloat16 has 8 bits: a difference of large numbers is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) + 1e4) - 1e4


def test_outputs_that_are_no_longer_close_are_refused(clock):
    clock(cast=2.0, autocast=1.5)
    ways, found = faster_precisions(Overflowing(), torch.randn(4, 8))
    assert ways == []
    assert all("cosine similarity" in text for text in found.values())


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) @ torch.eye(8)


def test_a_forward_that_fails_lowered_is_left_alone(clock):
    clock(cast=2.0)
    ways, found = faster_precisions(Doubles(), torch.randn(4, 8))
    assert ways == []
    assert found["cast"].startswith("forward fails: RuntimeError")


def test_the_fastest_way_comes_first_and_slower_ones_not_at_all(clock):
    clock(cast=1.2, autocast=1.5)
    assert [way.mode for way in faster_precisions(nn.Linear(8, 8), torch.randn(4, 8))[0]] == ["autocast", "cast"]
    clock(cast=0.7, autocast=1.01)
    ways, found = faster_precisions(nn.Linear(8, 8), torch.randn(4, 8))
    assert ways == []
    assert found["cast"].startswith("x0.70")


class Seen(Callback):
    """Notes in which precision the training steps ran."""

    def __init__(self) -> None:
        self.autocast: list[bool] = []

    def watch(self, module: nn.Module) -> Seen:
        module.register_forward_pre_hook(self._note)
        return self

    def _note(self, module: nn.Module, args: object) -> None:
        if module.training:
            self.autocast.append(torch.is_autocast_enabled("cpu"))


@pytest.mark.parametrize(("training", "kept"), [(1.3, True), (0.8, False)])
def test_training_takes_turns_and_keeps_the_faster(make_trainer, clock, training, kept):
    clock(cast=1.0, training=training)
    model = MLP(width=16, depth=1)
    seen = Seen().watch(model.net)
    callback = MixedPrecision(measured_steps=3)
    trainer = make_trainer(callback)
    trainer.fit(model, Digits())
    assert sum(seen.autocast[:8]) == 4
    assert seen.autocast[:8] != [True, False] * 4
    assert set(seen.autocast[8:]) == {kept}
    assert trainer.precision == "32-true", "the Trainer is left as it was"
    (step,) = recipe_of(model).steps
    assert step.parameters["training"] is kept
    assert step.parameters["training_speedup"] == {"step": training}
    assert f"x{training:.2f}" in step.parameters["decisions"]["training"]
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_a_resumed_run_keeps_what_was_decided(make_trainer, tmp_path, clock):
    clock(cast=1.0, training=1.3)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    options = {"enable_checkpointing": True}
    make_trainer(MixedPrecision(measured_steps=3), checkpoint, **options).fit(MLP(width=16, depth=1), Digits())
    assert torch.load(checkpoint.last_model_path, weights_only=True)
    clock(cast=1.0, training=0.5)
    model = MLP(width=16, depth=1)
    seen = Seen().watch(model.net)
    again = MixedPrecision(measured_steps=3)
    make_trainer(again, max_epochs=2).fit(model, Digits(), ckpt_path=checkpoint.last_model_path)
    assert all(seen.autocast)
    assert again.decisions["training"].startswith("bf16: bf16 measured x1.30")


def test_a_fit_too_short_to_decide_says_so(make_trainer):
    callback = MixedPrecision(measured_steps=50, inference=False)
    make_trainer(callback, max_steps=3).fit(MLP(width=16, depth=1), Digits())
    assert callback.decisions["training"] == "full precision: the fit ended before both were measured"
    assert callback.decisions["inference"] == "full precision: inference=false"


def test_unasked_from_the_first_step(make_trainer):
    model = MLP(width=16, depth=1)
    seen = Seen().watch(model.net)
    make_trainer(MixedPrecision(measured_steps=0, inference=False)).fit(model, Digits())
    assert all(seen.autocast)


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_lowered_at_the_end_of_a_fit_with_checkpoints_of_both_forms(make_trainer, tmp_path, clock, mode):
    clock(cast=1.5 if mode == "cast" else 0.9, autocast=1.4)
    seed_everything(0, verbose=False)
    model = CNN(width=8, depth=1)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="trained", monitor="val/acc", mode="max")
    callback = MixedPrecision(training=False, max_quality_drop=0.05)
    trainer = make_trainer(callback, checkpoint, max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, Digits())
    dtype = torch.bfloat16 if mode == "cast" else torch.float32
    assert next(model.parameters()).dtype is dtype
    (step,) = recipe_of(model).steps
    assert step.parameters["inference"] == mode
    assert set(step.parameters["quality_after"]) == set(step.parameters["quality_before"]) >= {"val/acc"}
    trainer.save_checkpoint(tmp_path / "lowered.ckpt")
    for path, wanted in ((checkpoint.best_model_path, torch.float32), (tmp_path / "lowered.ckpt", dtype)):
        (metrics,) = trainer.test(model, Digits(), ckpt_path=str(path), verbose=False)
        assert next(model.parameters()).dtype is wanted
        for other in (CNN.load_from_checkpoint(path, weights_only=True), load_from_checkpoint(CNN, path)):
            assert next(other.parameters()).dtype is wanted
            (again,) = make_trainer().test(other, Digits(), verbose=False)
            assert again == metrics
    assert model.on_save_checkpoint.__func__ is LightningModule.on_save_checkpoint
    make_trainer(MixedPrecision(training=False, inference=False), max_epochs=1).fit(model, Digits())
    assert all(p.dtype is torch.float32 for p in model.parameters()), "trained in full precision again"
    assert [step.parameters["inference"] for step in recipe_of(model).steps] == ["full"]


def test_a_loss_of_quality_beyond_the_limit_is_refused(make_trainer, clock, monkeypatch):
    clock(cast=1.5, autocast=1.4)
    monkeypatch.setattr(mixed_precision, "quality_drop", lambda *_: 0.02)
    model = CNN(width=8, depth=1)
    callback = MixedPrecision(training=False, max_quality_drop=0.01, monitor="val/acc")
    make_trainer(callback).fit(model, Digits())
    assert "cast: val/acc dropped by 0.02, more than 0.01" in callback.decisions["inference"]
    assert callback.decisions["inference"].startswith("full precision")
    assert next(model.parameters()).dtype is torch.float32
    missing = MixedPrecision(training=False, max_quality_drop=0.01, monitor="val/nothing")
    make_trainer(missing).fit(CNN(width=8, depth=1), Digits())
    assert "monitor='val/nothing' was never logged" in missing.decisions["inference"]


def test_pruned_fused_and_lowered_in_one_trainer(make_trainer, tmp_path, tmp_path_factory, clock, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    clock(cast=1.5)
    monkeypatch.setattr(kernel_fusion, "check_speed", lambda *_, **__: SpeedCheck({"1": 1.2}, {"1": 0.02}))
    seed_everything(0, verbose=False)
    model = CNN(width=8, depth=2)
    callbacks = [
        StructuredPruning(target_params=0.6, criterion="l2"),
        KernelFusion(),
        MixedPrecision(measured_steps=3),
    ]
    trainer = make_trainer(*callbacks, max_epochs=2)
    trainer.fit(model, Digits())
    names = [step.name for step in recipe_of(model).steps]
    assert names == ["structured_pruning", "kernel_fusion", "mixed_precision"]
    assert not any(isinstance(child, nn.BatchNorm2d) for child in model.modules())
    (metrics,) = trainer.test(model, Digits(), verbose=False)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    loaded = CNN.load_from_checkpoint(tmp_path / "all.ckpt", weights_only=True)
    assert next(loaded.parameters()).dtype is torch.bfloat16
    (again,) = make_trainer().test(loaded, Digits(), verbose=False)
    assert again == metrics


def test_nothing_is_lowered_before_an_artifact(make_trainer, clock):
    clock(cast=2.0)
    callbacks = [MixedPrecision(training=False), PostTrainingQuantization(rounds=1)]
    model = MLP(width=16, depth=1)
    make_trainer(*callbacks).fit(model, Digits())
    assert callbacks[0].decisions["inference"] == "full precision: a later callback deploys to onnxruntime-int8"
    assert callbacks[1].artifact is not None, callbacks[1].error


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_trainer_with_a_precision_of_its_own_is_refused(make_trainer, precision):
    with pytest.raises(MisconfigurationException, match=f"precision='{precision}' .* already; leave that at 32-true"):
        make_trainer(MixedPrecision(), precision=precision).fit(MLP(width=16, depth=1), Digits())


def test_fp16_does_not_train_on_a_cpu(make_trainer):
    with pytest.raises(MisconfigurationException, match="dtype='fp16': not for training on a CPU; set dtype=bf16"):
        make_trainer(MixedPrecision("fp16")).fit(MLP(width=16, depth=1), Digits())
    callback = MixedPrecision("fp16", training=False, rounds=3)
    make_trainer(callback).fit(MLP(width=16, depth=1), Digits())
    assert set(callback.decisions) == {"training", "inference"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': expected one of bf16, fp16"),
        ({"measured_steps": -1}, "measured_steps=-1: expected a number"),
        ({"max_quality_drop": -0.1}, "max_quality_drop=-0.1"),
        ({"mode": "up"}, "mode='up': expected one of min, max"),
        ({"rounds": 0}, "mixed_precision.rounds=0"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        MixedPrecision(**options)
