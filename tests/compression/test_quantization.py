from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from nets import PADDED, MaskedEncoder
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MaxMetric

from lightning_optcore import load_artifact
from lightning_optcore.callbacks import PostTrainingQuantization
from lightning_optcore.compression import onnx_quantization
from lightning_optcore.compression.export import ExportError, export_onnx
from lightning_optcore.compression.quantization import _fewest, post_training_quantize
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN, MLP

pytestmark = pytest.mark.filterwarnings("ignore")


def quick(**options) -> PostTrainingQuantization:
    return PostTrainingQuantization(**{"rounds": 2, "batch_sizes": (1, 8), **options})


def test_a_cnn_becomes_a_small_artifact_that_is_as_good(make_trainer, tmp_path):
    torch.manual_seed(0)
    callback = quick(scheme="static")
    model = CNN(width=16, depth=2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(callback, max_epochs=6)
    trainer.fit(model, Digits())
    assert callback.error is None
    before, after = callback.before, callback.after
    assert callback.artifact.path == tmp_path / "artifact"
    assert {p.name for p in callback.artifact.path.iterdir()} == {
        "model.onnx",
        "recipe.json",
        "measurement.json",
        "manifest.json",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"], "no temporary file is left"
    assert after.size_bytes == (tmp_path / "artifact" / "model.onnx").stat().st_size
    assert after.size_bytes < 0.45 * before.size_bytes
    assert after.flops == before.flops
    assert before.quality["val/acc"] > 0.9
    assert abs(after.quality["val/acc"] - before.quality["val/acc"]) < 0.02
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.__dict__


def test_the_artifact_speaks_numpy_and_torch_and_is_close_to_the_model(make_trainer, tmp_path):
    callback = quick(scheme="static")
    model = CNN(width=8, depth=1)
    make_trainer(callback, max_epochs=2).fit(model, Digits())
    artifact = load_artifact(tmp_path / "artifact", num_threads=1)
    images = torch.rand(7, 1, 8, 8)
    from_torch, from_numpy = artifact(images), artifact(images=images.numpy().astype(np.float64))
    assert isinstance(from_torch, torch.Tensor)
    assert isinstance(from_numpy, np.ndarray)
    np.testing.assert_allclose(from_torch.numpy(), from_numpy)
    expected = model.eval()(images).detach()
    assert torch.nn.functional.cosine_similarity(from_torch, expected).min() > 0.95
    assert artifact.recipe == callback.artifact.recipe
    assert artifact.recipe.steps[0].parameters["scheme"] == "static"
    assert artifact.measurement == callback.after
    assert artifact.before == callback.before


@pytest.mark.parametrize("image_batches", [1797 // 3, 64])
def test_an_uneven_last_batch_calibrates(make_trainer, image_batches):
    callback = quick(scheme="static", calibration_samples=1200)
    make_trainer(callback).fit(CNN(width=4, depth=1), Digits(batch_size=image_batches))
    assert callback.error is None


def test_the_child_that_validation_calls_is_replaced(make_trainer, child_caller):
    """Replacing ``forward`` of the module would never be called here, and prove nothing."""
    callback = quick()
    make_trainer(callback, max_epochs=3).fit(child_caller, Digits())
    assert callback.error is None
    assert set(callback.after.quality) == {"val/loss", "val/acc"}
    assert callback.after.quality["val/loss"] != callback.before.quality["val/loss"]
    assert callback.after.params == 64 * 48 + 48 + 48 * 10 + 10


class Tokens(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int):
        tokens = torch.arange(index, index + 35) % 100
        return tokens, tokens.roll(-1)


class OfflineTransformer(LightningTransformer):
    def prepare_data(self) -> None: ...

    def train_dataloader(self):
        return DataLoader(Tokens(), batch_size=8)


class OfflineLSTM(LightningLSTM):
    def __init__(self) -> None:
        super().__init__(100)
        self.model = SimpleLSTM(100, ninp=32, nhid=32, nlayers=2)

    def prepare_data(self) -> None: ...

    def train_dataloader(self):
        return DataLoader(Tokens(), batch_size=8)


class DictDataset(Dataset):
    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        return {"a": torch.randn(8, generator=generator), "b": torch.randn(4), "y": torch.tensor(index % 3)}


class KeywordOnly(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, *, a, b):
        return {"logits": self.layers(torch.cat([a, b], dim=1)), "input": a}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(a=batch["a"], b=batch["b"])["logits"], batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self):
        return DataLoader(DictDataset(), batch_size=16)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("make_model", "metric"),
    [
        (BoringModel, "output_cosine"),
        (ManualOptimBoringModel, "output_cosine"),
        (lambda: OfflineTransformer(100), "output_cosine"),
        (OfflineLSTM, "output_cosine"),
        (KeywordOnly, "loss"),
    ],
    ids=["boring", "manual", "transformer", "lstm", "dict"],
)
def test_modules_that_nobody_here_wrote(make_trainer, make_model, metric):
    torch.manual_seed(0)
    callback = quick()
    model = make_model()
    trainer = make_trainer(callback)
    trainer.fit(model)
    assert trainer.state.finished
    assert callback.error is None
    assert list(callback.after.quality) == [metric]
    if metric == "output_cosine":
        assert 0.95 < callback.after.quality[metric] <= 1.0 + 1e-9
    example = callback.artifact.example_inputs().resized(3)
    called = model.model if isinstance(model, OfflineLSTM) else model
    expected = example.call(called.eval())
    got = example.call(load_artifact(callback.artifact.path))
    assert type(got) is type(expected)


class Random(BoringModel):
    def forward(self, x):
        output = self.layer(x)
        return output + torch.randn(1) * output.abs().max()


class Unexportable(BoringModel):
    def forward(self, x):
        rows = [self.layer(row) for row in x if float(row.sum()) > -1e9]
        return torch.stack([torch.tensor(np.sort(row.detach().numpy())) for row in rows]) * self.layer(x)


def test_padding_that_counts_in_training_alone_is_named():
    """In evaluation the encoder's outputs for padding are 0; a graph has them as they were in training."""

    class Unmasked(MaskedEncoder):
        def forward(self, tokens):
            return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0).mean(1))

    torch.manual_seed(0)
    with pytest.raises(ExportError, match=r"for padding to 0, in evaluation alone: .*enable_nested_tensor=False"):
        export_onnx(Unmasked(), PADDED, tracing_first=True)
    assert export_onnx(MaskedEncoder(), PADDED, tracing_first=True)


@pytest.mark.parametrize("make_model", [Random, Unexportable])
def test_a_model_that_cannot_be_exported_says_why_and_the_fit_succeeds(make_trainer, tmp_path, make_model):
    callback = quick()
    trainer = make_trainer(callback)
    with pytest.warns(UserWarning, match="post_training_quantization: no artifact"):
        trainer.fit(make_model())
    assert trainer.state.finished
    assert callback.artifact is callback.after is None
    assert "cannot be exported to ONNX" in callback.error
    assert list(tmp_path.iterdir()) == []


class Outlier(CNN):
    """One channel of the input dwarfs the rest, which 8 bits cannot hold."""

    def __init__(self) -> None:
        super().__init__(width=8, depth=1)
        self.shrink = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.shrink.weight.copy_(torch.tensor([1e4, 1.0]).reshape(2, 1, 1, 1))
            self.shrink.bias.zero_()
        self.shrink.requires_grad_(False)

    def forward(self, images):
        both = self.shrink(images)
        return super().forward(both[:, 1:] + 1e-9 * both[:, :1])


def test_sensitive_layers_stay_in_fp32_where_quality_would_drop(make_trainer):
    torch.manual_seed(0)
    callback = quick(scheme="static", max_quality_drop=0.01, monitor="val/acc")
    make_trainer(callback, max_epochs=8).fit(Outlier(), Digits())
    free = quick(scheme="static")
    make_trainer(free, max_epochs=8).fit(Outlier(), Digits())
    assert free.before.quality["val/acc"] - free.after.quality["val/acc"] > 0.01
    assert callback.error is None
    excluded = callback.artifact.recipe.steps[0].parameters["excluded_nodes"]
    assert excluded
    assert callback.after.quality["val/acc"] >= callback.before.quality["val/acc"] - 0.01


class Drifted(LightningModule):
    """Validates on inputs far outside the range that training showed: fixed ranges of activations clip them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        wanted = torch.relu(20 * batch[0] @ self.net[0].weight.T) @ self.net[2].weight.T
        self.log("val/error", (self.net(20 * batch[0]) - wanted).norm() / wanted.norm())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(128, 16)), batch_size=32)

    val_dataloader = train_dataloader


def test_auto_takes_the_candidate_that_keeps_within_the_bound(make_trainer):
    fixed = quick(scheme="static")
    make_trainer(fixed).fit(Drifted())
    assert fixed.after.quality["val/error"] > 0.5
    callback = quick(scheme="auto", max_quality_drop=0.1, monitor="val/error")
    make_trainer(callback).fit(Drifted())
    assert callback.error is None
    step = callback.artifact.recipe.steps[0].parameters
    assert (step["scheme"], step["excluded_nodes"]) == ("dynamic", [])
    assert callback.after.quality["val/error"] < 0.1


def test_a_drop_that_nothing_mends_is_refused(make_trainer, tmp_path, monkeypatch):
    callback = quick(scheme="static", max_quality_drop=0.0, monitor="val/loss", mode="max")
    monkeypatch.setattr(
        "lightning_optcore.compression.user_validation.UserValidation.of_model", lambda _: {"val/loss": 1e9}
    )
    make_trainer(callback).fit(CNN(width=4, depth=1), Digits())
    assert "max_quality_drop=0.0: val/loss dropped by" in callback.error
    assert not (tmp_path / "artifact").exists()


def test_a_metric_that_was_never_logged_is_named(make_trainer):
    callback = quick(scheme="static", max_quality_drop=0.1, monitor="val/f1")
    make_trainer(callback).fit(CNN(width=4, depth=1), Digits())
    assert "monitor='val/f1' was never logged" in callback.error
    assert "val/acc" in callback.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, "backend='tensorrt': expected one of onnxruntime, openvino"),
        ({"scheme": "int8"}, "scheme='int8': expected one of auto, static, dynamic"),
        ({"weight_bits": 3}, "weight_bits=3: expected one of 8, 4"),
        ({"max_quality_drop": -0.1}, "max_quality_drop=-0.1"),
        ({"mode": "up"}, "mode='up'"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"batch_sizes": []}, r"batch_sizes=\[\]"),
        ({"batch_sizes": 4}, "batch_sizes=4"),
        ({"max_quality_drop": "abc"}, "max_quality_drop='abc'"),
        ({"max_quality_drop": float("nan")}, "max_quality_drop=nan"),
        ({"monitor": 5}, "monitor=5"),
        ({"rounds": 1.5}, "rounds=1.5"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        PostTrainingQuantization(**options)


class BestSoFar(CNN):
    def __init__(self) -> None:
        super().__init__(width=4, depth=1)
        self.best = MaxMetric()
        self.seen: list[str] = []

    def on_validation_epoch_end(self) -> None:
        self.best(self.val_acc.compute())
        self.seen.append(str(self.trainer.state.fn))


def test_the_check_leaves_the_module_and_the_trainer_as_they_were(make_trainer):
    class Watch(Callback):
        def on_fit_end(self, trainer, pl_module):
            assert pl_module.trainer is trainer
            self.best = float(pl_module.best.compute())
            self.training = pl_module.training

    callback = quick(scheme="static")
    before, after = Watch(), Watch()
    model = BestSoFar()
    trainer = make_trainer(before, callback, after, max_epochs=2)
    trainer.fit(model, Digits())
    assert "TrainerFn.VALIDATING" in model.seen, "the check did validate"
    assert before.best == after.best
    assert before.training == after.training
    (again,) = trainer.validate(model, Digits(), verbose=False)
    assert again["val/acc"] == callback.before.quality["val/acc"]


def test_resuming_testing_and_loading_work_after_it(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    model = CNN(width=4, depth=1)
    data = Digits()
    first = make_trainer(quick(scheme="static"), checkpoint, enable_checkpointing=True)
    first.fit(model, data)
    assert first.test(model, data, ckpt_path=checkpoint.last_model_path, verbose=False)
    resumed = quick(scheme="static")
    make_trainer(resumed, max_epochs=2).fit(CNN(width=4, depth=1), data, ckpt_path=checkpoint.last_model_path)
    assert resumed.error is None
    loaded = CNN.load_from_checkpoint(checkpoint.last_model_path, weights_only=True)
    assert loaded.hparams["width"] == 4


def test_a_finished_fit_that_is_resumed_calibrates_without_training(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    make_trainer(checkpoint, enable_checkpointing=True).fit(CNN(width=4, depth=1), Digits())
    callback = quick(scheme="static")
    make_trainer(callback).fit(CNN(width=4, depth=1), Digits(), ckpt_path=checkpoint.last_model_path)
    assert callback.error is None
    assert callback.artifact is not None


def test_the_pure_function_takes_a_plain_module():
    batches = [torch.randn(8, 16) for _ in range(2)]
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    result = post_training_quantize(net, batches, scheme="dynamic")
    assert result.parameters.scheme == "dynamic"
    assert net.training
    assert torch.nn.functional.cosine_similarity(result.model(batches[0]), net(batches[0])).min() > 0.95
    with pytest.raises(ValueError, match="calibration_inputs is empty"):
        post_training_quantize(net, [])


def test_auto_takes_static_for_convolutions(make_trainer):
    torch.manual_seed(0)
    callback = quick()
    make_trainer(callback, max_epochs=2).fit(CNN(width=32, depth=2), Digits())
    parameters = callback.artifact.recipe.steps[0].parameters
    assert parameters["scheme"] == "static"
    assert callback.after.size_bytes < 0.4 * callback.before.size_bytes


def test_layers_left_in_fp32_add_up():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    result = post_training_quantize(net, [torch.randn(16, 1, 8, 8)], scheme="static")
    (thin,) = onnx_quantization.thin_convolutions(result.prepared)
    first = result.excluding([thin])
    assert thin not in first.most_sensitive_nodes()
    rest = first.most_sensitive_nodes()
    assert first.excluding(rest[:1]).parameters.excluded_nodes == [thin, rest[0]]


@pytest.mark.parametrize("needed", range(1, 8))
def test_the_fewest_accepted_is_found(needed):
    asked = []
    found = _fewest(6, lambda count: asked.append(count) or count >= needed)
    assert found == (needed if needed <= 6 else None)
    assert len(set(asked)) == len(asked), "a question costs a validation"


def test_a_place_that_cannot_be_written_is_named_before_the_training(make_trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    callback = quick(scheme="static", output_dir=str(tmp_path / "file" / "artifact"))
    with pytest.raises(MisconfigurationException, match=f"output_dir={tmp_path}/file/artifact: {tmp_path}/file is no"):
        make_trainer(callback).fit(MLP(width=8, depth=1), Digits())


class Named(KeywordOnly):
    """A constant among the arguments differs from batch to batch."""

    def forward(self, *, a, b, name):
        return super().forward(a=a, b=b)

    def training_step(self, batch, batch_idx):
        logits = self(a=batch["a"], b=batch["b"], name=f"batch {batch_idx}")["logits"]
        return nn.functional.cross_entropy(logits, batch["y"])


def test_whatever_the_check_meets_the_fit_succeeds(make_trainer):
    callback = quick()
    trainer = make_trainer(callback)
    trainer.fit(Named())
    assert trainer.state.finished
    assert "was exported with" in callback.error


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_other_precisions_give_an_int8_artifact(make_trainer, child_caller, precision):
    callback = quick(scheme="dynamic")
    make_trainer(callback, precision=precision).fit(child_caller, Digits())
    assert callback.error is None
    assert callback.artifact.size_bytes < 8000, "64 x 48 + 48 x 10 weights of one byte"
    assert set(callback.after.quality) == {"val/loss", "val/acc"}
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "bf16-mixed": torch.float32}[precision]
    assert child_caller.net[0].weight.dtype is expected


class Recurrent(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 32, batch_first=True)

    def training_step(self, batch, batch_idx):
        return self.gru(batch[0].squeeze(1))[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_an_artifact_with_nothing_quantized_is_refused(make_trainer):
    callback = quick(scheme="dynamic")
    make_trainer(callback, limit_val_batches=0).fit(Recurrent(), Digits())
    assert "quantized nothing" in callback.error


def test_training_without_validation_reports_the_agreement(make_trainer):
    images = torch.rand(64, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.arange(64) % 10), batch_size=16)
    callback = quick(scheme="static")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback).fit(CNN(width=4, depth=1), loader)
    assert any("agreement of its outputs" in str(w.message) for w in caught)
    assert callback.before.quality == {"output_cosine": 1.0}


def test_quantizing_twice_into_one_folder_is_refused(make_trainer, tmp_path):
    with pytest.raises(MisconfigurationException, match="two callbacks quantize into one folder"):
        make_trainer(quick(), quick()).fit(CNN(width=4, depth=1), Digits())
    both = quick(scheme="static"), quick(scheme="dynamic", output_dir=str(tmp_path / "other"))
    make_trainer(*both).fit(MLP(width=16, depth=1), Digits())
    assert [callback.error for callback in both] == [None, None]
