from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from nets import PADDED, MaskedEncoder, Residual, RowsClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore import load_artifact, load_from_checkpoint, rebuild
from lightning_optcore.callbacks import (
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    StructuredPruning,
)
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.fake_quantization import quantized_layers, ranges_of, settings_of
from lightning_optcore.compression.quantization_aware_training import export_quantized, prepare_quantization_aware
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN, MLP, Classifier

pytestmark = pytest.mark.filterwarnings("ignore")
KILLED = Path(__file__).parent / "killed_run.py"
RANKS = Path(__file__).parent / "two_ranks.py"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One table of layers for the session's process, none of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def quick(scheme: str = "int8", **options) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(scheme, **{"rounds": 2, "batch_sizes": (1, 8), **options})


def residual() -> Classifier:
    blocks = [nn.Conv2d(1, 16, 3), nn.ReLU(), Residual(16, 4), Residual(16, 1)]
    return Classifier(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), lr=1e-2)


def accuracy(artifact, data: Digits) -> float:
    images, labels = data.val_set.tensors
    return float((artifact(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize(
    ("make", "scheme", "share"),
    [
        (lambda: CNN(width=16, depth=2), "int8", 0.4),
        (lambda: MLP(width=64, depth=2), "int8_dynamic_int4", 0.3),
        (lambda: MLP(width=64, depth=2), "int4_weight_only", 0.3),
        (RowsClassifier, "int8", 0.9),
        (residual, "int8", 0.9),
    ],
    ids=["cnn", "dynamic", "weight_only", "transformer", "residual"],
)
def test_the_artifact_is_as_good_as_the_model_that_was_trained(make_trainer, tmp_path, make, scheme, share):
    seed_everything(0, verbose=False)
    callback, data, model = quick(scheme, start_epoch=2), Digits(), make()
    make_trainer(callback, max_epochs=5).fit(model, data)
    assert callback.error is None
    assert {p.name for p in (tmp_path / "artifact").iterdir()} == {
        "model.onnx", "recipe.json", "measurement.json", "manifest.json"
    }  # fmt: skip
    before, after = callback.before, callback.after
    assert before.quality["val/acc"] > 0.75
    # One image of 270; sums between convolutions are rounded in the artifact alone.
    images = 4 if make is residual else 1
    assert after.quality["val/acc"] == pytest.approx(before.quality["val/acc"], abs=0.0038 * images)
    assert after.quality["val/loss"] == pytest.approx(before.quality["val/loss"], abs=2e-3 * images)
    assert after.size_bytes < share * before.size_bytes
    (step,) = load_artifact(tmp_path / "artifact").recipe.steps
    assert (step.name, step.parameters["scheme"]) == ("quantization_aware_training", scheme)
    assert accuracy(callback.artifact, data) == pytest.approx(after.quality["val/acc"])
    assert settings_of(model).learning is False
    assert model.on_save_checkpoint.__func__ is LightningModule.on_save_checkpoint, "the hooks are as they were"


def test_training_with_rounding_wins_back_what_rounding_takes(make_trainer):
    """With 4 bits, on a narrow net trained to the end: rounding afterwards costs more than rounding along."""
    costs = {}
    for name, callback in (
        ("after", PostTrainingQuantization(weight_bits=4, rounds=1, batch_sizes=(1,))),
        ("along", quick("int4_weight_only", start_epoch=4)),
    ):
        seed_everything(1, verbose=False)
        make_trainer(callback, max_epochs=8).fit(MLP(width=16, depth=3, lr=1e-2), Digits(batch_size=128))
        costs[name] = callback.after.quality["val/loss"]
    assert costs["along"] < costs["after"]


def test_nothing_is_rounded_before_the_start_and_ranges_freeze_before_the_end(make_trainer):
    seen = []

    class Watched(CNN):
        def on_train_batch_end(self, *_):
            rows = [r.clone() for r in ranges_of(self).values()]
            seen.append((self.current_epoch, len(quantized_layers(self)), torch.cat(rows) if rows else None))

    make_trainer(quick(start_epoch=1, freeze_epoch=2), max_epochs=3).fit(Watched(width=8, depth=1), Digits())
    assert {count for epoch, count, _ in seen if epoch == 0} == {0}
    assert {count for epoch, count, _ in seen if epoch > 0} == {3}
    learned = [ranges for epoch, _, ranges in seen if epoch == 1]
    assert not torch.equal(learned[0], learned[-1])
    assert all(torch.equal(ranges, learned[-1]) for epoch, _, ranges in seen if epoch == 2)


def run(make_trainer, folder: Path, path: str | None = None, *extra) -> CNN:
    seed_everything(1 if path else 0, verbose=False)
    model = CNN(width=8, depth=1)
    checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    callbacks = [quick(start_epoch=1), checkpoint, *(make() for make in extra)]
    make_trainer(*callbacks, max_epochs=4, enable_checkpointing=True).fit(model, Digits(), ckpt_path=path)
    return model


@pytest.mark.parametrize("extra", [(), (EMAWeightAveraging,)], ids=["plain", "averaged"])
def test_resuming_from_before_and_after_the_start_is_the_same_run(make_trainer, tmp_path, extra):
    whole = run(make_trainer, tmp_path / "first", None, *extra)
    for epoch in (0, 1, 2):
        resumed = run(make_trainer, tmp_path / f"from{epoch}", str(tmp_path / "first" / f"epoch={epoch}.ckpt"), *extra)
        assert recipe_of(resumed) == recipe_of(whole)
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name} after resuming from epoch {epoch}"


def test_checkpoints_from_before_and_after_the_start_load_everywhere(make_trainer, tmp_path):
    """Lightning #12896 and #6457: a converted model broke trainer.test(ckpt_path) and load_from_checkpoint."""
    seed_everything(0, verbose=False)
    model = CNN(width=8, depth=1)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}", monitor="val/acc", mode="max")
    trainer = make_trainer(quick(start_epoch=1), checkpoint, max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, Digits())
    for epoch, count in ((2, 3), (0, 0), (1, 3), (2, 3)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert torch.load(path, weights_only=True)["state_dict"]
        (metrics,) = trainer.test(model, Digits(), ckpt_path=str(path), verbose=False)
        assert len(quantized_layers(model)) == count
        for other in (CNN.load_from_checkpoint(path, weights_only=True), load_from_checkpoint(CNN, path)):
            assert len(quantized_layers(other)) == count
            assert other.hparams["width"] == 8
            (again,) = make_trainer().test(other, Digits(), verbose=False)
            assert again == metrics
    trainer.test(model, Digits(), ckpt_path="best", verbose=False)


def test_a_checkpoint_of_another_model_is_named(make_trainer, tmp_path):
    trainer = make_trainer(quick(), max_epochs=1)
    trainer.fit(CNN(width=8, depth=1), Digits())
    trainer.save_checkpoint(tmp_path / "cnn.ckpt")
    reason = r"recipe \(quantization_aware_training\) does not fit MLP: .*; give a checkpoint of this model"
    with pytest.raises(MisconfigurationException, match=reason):
        make_trainer(quick(), max_epochs=2).fit(MLP(width=8), Digits(), ckpt_path=tmp_path / "cnn.ckpt")
    with pytest.raises(MisconfigurationException, match=f"cnn.ckpt: does not fit MLP: .*{reason}"):
        load_from_checkpoint(MLP, tmp_path / "cnn.ckpt")


def test_what_is_saved_after_the_fit_loads(make_trainer, tmp_path):
    model, data = MLP(width=16), Digits()
    trainer = make_trainer(quick("int4_weight_only", start_epoch=1), max_epochs=2)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    images = data.val_set.tensors[0]
    loaded = MLP.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert settings_of(loaded).scheme == "int4_weight_only"
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))


def test_the_recipe_makes_a_fresh_module_take_the_weights(make_trainer):
    model = MLP(width=16, depth=1)
    callback = quick()
    make_trainer(callback).fit(model, Digits())
    fresh = rebuild(MLP(width=16, depth=1), callback.artifact.recipe)
    fresh.load_state_dict(model.state_dict())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("starts", [(0, 1, 2), (2, 0, 1)], ids=["prune first", "round first"])
@pytest.mark.parametrize("make", [lambda: CNN(width=16, depth=2), RowsClassifier], ids=["cnn", "transformer"])
def test_prune_factor_distil_and_round_in_one_fit(make_trainer, tmp_path, make, starts):
    """Lightning #11047: pruning and quantization-aware training in one run."""
    seed_everything(0, verbose=False)
    model, data = make(), Digits()
    whole = sum(p.numel() for p in model.parameters())
    callbacks = [
        KnowledgeDistillation(alpha=0.3),
        StructuredPruning(target_params=0.6, start_epoch=starts[0]),
        LowRankFactorization(target_params=0.8, start_epoch=starts[1], faster=False),
        quick(start_epoch=starts[2]),
    ]
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    trainer = make_trainer(*callbacks, checkpoint, max_epochs=5, enable_checkpointing=True)
    trainer.fit(model, data)
    quantization = callbacks[3]
    assert quantization.error is None
    assert sum(p.numel() for p in model.parameters()) <= 0.8 * 0.6 * whole
    names = {step.name for step in quantization.artifact.recipe.steps}
    assert names == {"structured_pruning", "low_rank_factorization", "quantization_aware_training"}
    assert quantization.after.quality["val/acc"] == pytest.approx(quantization.before.quality["val/acc"], abs=0.012)
    (metrics,) = trainer.test(model, data, ckpt_path=checkpoint.last_model_path, verbose=False)
    for other in (
        type(model).load_from_checkpoint(checkpoint.last_model_path, weights_only=True),
        load_from_checkpoint(type(model), checkpoint.last_model_path),
    ):
        assert make_trainer().test(other, data, verbose=False) == [metrics]


def test_zeros_stay_zeros(make_trainer):
    callbacks = [MagnitudePruning(0.5), quick()]
    model = MLP(width=32, depth=1)
    make_trainer(*callbacks, max_epochs=2).fit(model, Digits())
    assert callbacks[1].error is None
    assert callbacks[0].sparsity == pytest.approx(0.5, abs=0.01)
    weights = [t for t in callbacks[1].artifact.model.proto.graph.initializer if t.name.endswith("weight_quantized")]
    numbers = torch.cat([torch.frombuffer(bytearray(t.raw_data), dtype=torch.int8) for t in weights])
    assert float((numbers == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("net", ["cnn", "transformer"])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_artifact(tmp_path, net):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(name: str, *more: str) -> list[str]:
        return [sys.executable, str(KILLED), str(tmp_path / name), "--net", net, "--quantize", *more]

    warm.run(command("whole"), env=environment, check=True)
    killed = warm.Running(command("killed", "--slow"), env=environment)
    last = tmp_path / "killed" / "last.ckpt"
    end = time.monotonic() + 120
    while not (tmp_path / "killed" / "epoch=2.ckpt").exists():
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
    first, second = (load_artifact(tmp_path / name / "artifact") for name in ("whole", "killed"))
    assert first.recipe == second.recipe
    images = torch.rand(16, 1, 8, 8)
    torch.testing.assert_close(first(images), second(images), rtol=0.02, atol=0.05)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_agree_on_the_ranges(tmp_path):
    done = subprocess.run(
        ["timeout", "-s", "KILL", "200", sys.executable, str(RANKS), str(tmp_path), "--quantize"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"whole{rank}.pt", weights_only=True) for rank in (0, 1))
    assert sum(name.endswith("fake_quantization_range") for name in first) == 5
    assert all(torch.equal(first[name], second[name]) for name in first if "acc" not in name)
    assert load_artifact(tmp_path / "artifact").measurement.quality["val/acc"] > 0.8


class Keywords(LightningModule):
    """Lightning #15862: what prepares a model must pass keyword arguments on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, *, images, scale=1.0):
        return {"logits": self.b(input=torch.relu(self.a(images.flatten(1)))) * scale}

    def training_step(self, batch, batch_idx):
        return {"loss": nn.functional.cross_entropy(self(images=batch["x"], scale=2.0)["logits"], batch["y"])}

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx)["loss"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Dicts(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


def test_dicts_and_keywords(make_trainer):
    data = Digits()
    data.setup()
    loader = DataLoader(Dicts(*data.train_set.tensors), 64)
    callback = quick()
    make_trainer(callback, max_epochs=2).fit(Keywords(), loader, loader)
    assert callback.error is None
    assert callback.artifact(images=torch.randn(3, 1, 8, 8), scale=2.0)["logits"].shape == (3, 10)
    assert callback.after.quality["loss"] == pytest.approx(callback.before.quality["loss"], abs=1e-3)


@pytest.mark.parametrize("make", [BoringModel, ManualOptimBoringModel])
@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic_int4"])
def test_modules_that_nobody_here_wrote(make_trainer, make, scheme):
    callback = quick(scheme)
    make_trainer(callback).fit(make())
    assert callback.error is None
    assert callback.after.quality["output_cosine"] > 0.99


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic_int4"])
def test_a_transformer_that_is_told_of_padding_is_exported_as_trained(scheme):
    torch.manual_seed(0)
    net = MaskedEncoder()
    prepare_quantization_aware(net, scheme=scheme)
    net(PADDED).square().sum().backward()
    settings_of(net).learning = False
    artifact = export_quantized(net, [PADDED])
    with torch.no_grad():
        torch.testing.assert_close(artifact(PADDED), net.eval()(PADDED), rtol=0.05, atol=0.02)


def test_the_child_that_the_steps_call_is_rounded(make_trainer, child_caller):
    child_caller.other = nn.Linear(4, 4)
    callback = quick()
    make_trainer(callback, max_epochs=2).fit(child_caller, Digits())
    assert set(quantized_layers(child_caller)) == {"net.0", "net.2"}
    assert callback.after.quality["val/acc"] == pytest.approx(callback.before.quality["val/acc"], abs=0.004)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(make_trainer, child_caller, precision):
    callback = quick()
    make_trainer(callback, precision=precision, max_epochs=2).fit(child_caller, Digits())
    assert callback.error is None
    assert callback.after.quality["val/acc"] == pytest.approx(callback.before.quality["val/acc"], abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int2"}, "scheme='int2': expected one of int8, int8_dynamic_int4, int4_weight_only"),
        ({"start_epoch": -1}, "start_epoch=-1: expected a number of at least 0"),
        ({"start_epoch": float("nan")}, "start_epoch=nan"),
        ({"start_epoch": "2"}, "start_epoch='2'"),
        ({"start_epoch": 3, "freeze_epoch": 2}, "freeze_epoch=2: expected at least start_epoch=3"),
        ({"backend": "tensorrt"}, "backend='tensorrt': expected one of onnxruntime, openvino"),
        ({"backend": "openvino", "scheme": "int4_weight_only"}, "scheme='int4_weight_only': backend='openvino' runs"),
        ({"rounds": 0}, "quantization_aware_training.rounds=0"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"output_dir": 5}, "output_dir=5: expected text"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        QuantizationAwareTraining(**options)


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 40}])
def test_a_start_beyond_the_end_is_an_error(make_trainer, limits):
    with pytest.raises(MisconfigurationException, match=r"start_epoch=2: the fit ends after (2|2\.0) epochs"):
        make_trainer(quick(start_epoch=2), **limits).fit(MLP(width=8, depth=1), Digits())


def test_a_fit_that_is_stopped_before_the_start_has_no_artifact(make_trainer):
    class Stops(MLP):
        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    callback = quick(start_epoch=2)
    make_trainer(callback, max_epochs=5).fit(Stops(width=8, depth=1), Digits())
    assert "the fit ended before quantization_aware_training.start_epoch=2" in callback.error


@pytest.mark.parametrize("first", [True, False])
def test_two_that_quantize_are_refused(make_trainer, first):
    pair = [quick(output_dir="here"), PostTrainingQuantization(output_dir="elsewhere")]
    with pytest.raises(MisconfigurationException, match="quantization_aware_training: it makes the artifact itself"):
        make_trainer(*(pair if first else pair[::-1])).fit(MLP(width=8, depth=1), Digits())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `QuantizationAwareTraining`"):
        make_trainer(quick(output_dir="here"), quick("int4_weight_only"))


def test_a_model_without_a_layer_that_fits_is_refused(make_trainer):
    class Convolutions(CNN):
        def __init__(self) -> None:
            super().__init__(width=4, depth=1)
            self.head = nn.Sequential(nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    with pytest.raises(MisconfigurationException, match="Convolutions has no linear or attention layer"):
        make_trainer(quick("int4_weight_only")).fit(Convolutions(), Digits())


def test_a_model_that_is_quantized_already_is_refused():
    quantized = torch.ao.nn.quantized.Linear(4, 4)
    with pytest.raises(MisconfigurationException, match="the layer 0 is quantized already"):
        prepare_quantization_aware(nn.Sequential(quantized))
    from torch.ao.nn import qat
    from torch.ao.quantization import get_default_qat_qconfig

    half = nn.Sequential(qat.Linear(4, 4, qconfig=get_default_qat_qconfig("x86")))
    with pytest.raises(MisconfigurationException, match="the layer 0 is quantized already"):
        prepare_quantization_aware(half)


def test_another_scheme_on_the_same_model_is_refused_and_the_same_goes_on(make_trainer):
    model = MLP(width=16, depth=1)
    make_trainer(quick()).fit(model, Digits())
    before = ranges_of(model)["net.3"].clone()
    again = quick()
    make_trainer(again).fit(model, Digits())
    assert again.error is None
    assert not torch.equal(ranges_of(model)["net.3"], before)
    with pytest.raises(MisconfigurationException, match="is being trained with 'int8' already"):
        make_trainer(quick("int4_weight_only")).fit(model, Digits())


def test_what_the_function_prepared_goes_on_in_a_fit(make_trainer):
    model = MLP(width=16, depth=1)
    prepare_quantization_aware(model.net, scheme="int8")
    callback = quick()
    make_trainer(callback).fit(model, Digits())
    assert callback.error is None
    assert callback.artifact.recipe.steps[0].parameters["layers"] == ["net.1", "net.3"]
    with pytest.raises(MisconfigurationException, match="the model computes with rounding already"):
        make_trainer(PostTrainingQuantization()).fit(model, Digits())


class Diverging(MLP):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


def test_training_that_diverges_has_no_artifact(make_trainer, tmp_path):
    callback = quick()
    make_trainer(callback).fit(Diverging(width=8, depth=1), Digits())
    assert "the weights are not finite" in callback.error
    assert not (tmp_path / "artifact").exists()
