from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from nets import TOKENS, Encoder
from onnx import numpy_helper
from torch import nn

from lightning_optcore import load_artifact
from lightning_optcore.callbacks import PostTrainingQuantization
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.onnx_embeddings import embedding_nodes, with_int4_embeddings, with_int8_embeddings
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import cosine_similarity, prepared
from lightning_optcore.compression.onnx_smoothing import smoothed
from lightning_optcore.compression.quantization import post_training_quantize
from lightning_optcore.data import Digits
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.models import CNN


class Table(nn.Module):
    """A large table, a small one, and a linear layer on what they hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Embedding(1000, 64), nn.Embedding(10, 64)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, tokens, kinds):
        hidden = self.norm(self.large(tokens) + self.small(kinds))
        return self.down(nn.functional.gelu(self.up(hidden)))


INPUTS = {"tokens": torch.arange(60).reshape(6, 10), "kinds": torch.arange(60).reshape(6, 10) % 10}


def operators(model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


def test_large_tables_are_stored_in_four_bits():
    net = Table().eval()
    whole = prepared(export_onnx(net, INPUTS))
    assert len(embedding_nodes(whole)) == 1
    small = with_int4_embeddings(whole)
    assert operators(small).count("GatherBlockQuantized") == 1
    saved = 1000 * 64 * (4 - 0.5) - 1000 * 4
    assert whole.size_bytes - small.size_bytes == pytest.approx(saved, rel=0.01)
    assert cosine_similarity(net(**INPUTS), small(**INPUTS)) > 0.99


def test_tables_in_eight_bits_leave_none_in_floating_point():
    exported = export_onnx(nn.Embedding(30, 8), torch.arange(12).reshape(4, 3), tracing_first=True)
    rounded = with_int8_embeddings(exported)
    kinds = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in rounded.proto.graph.initializer}
    assert sorted(str(kind) for kind in kinds.values()) == ["float32", "int8"], kinds
    assert rounded.size_bytes < 0.8 * exported.size_bytes


def test_the_scale_of_a_block_is_better_than_that_of_its_largest_value():
    net = nn.Embedding(300, 64)
    table = net.weight.detach().numpy().reshape(300, 64)
    ids = torch.arange(300).reshape(2, 150)
    small = with_int4_embeddings(export_onnx(net, ids))
    got = small(ids).numpy().reshape(300, 64)
    scale = np.abs(table).max(1, keepdims=True) / 7
    plain = np.clip(np.round(table / scale), -8, 7) * scale
    assert np.square(got - table).mean() < 0.8 * np.square(plain - table).mean()


def test_smoothing_changes_nothing_in_floating_point():
    net = Table().eval()
    with torch.no_grad():
        net.norm.weight[3] = 50.0
    whole = prepared(export_onnx(net, INPUTS))
    smooth = smoothed(whole, [Inputs.of(INPUTS)])
    assert operators(smooth).count("Mul") == operators(whole).count("Mul") + 1
    torch.testing.assert_close(smooth(**INPUTS), whole(**INPUTS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("embedding_bits", [8, 4])
def test_a_transformer_in_few_bits(weight_bits, embedding_bits):
    net = Table().eval()
    result = post_training_quantize(
        net, [INPUTS], scheme="dynamic", weight_bits=weight_bits, embedding_bits=embedding_bits
    )
    assert cosine_similarity(net(**INPUTS), result.model(**INPUTS)) > 0.98
    assert ("GatherBlockQuantized" in operators(result.model)) == (embedding_bits == 4)
    assert ("MatMulNBits" in operators(result.model)) == (weight_bits == 4)
    assert (result.parameters.weight_bits, result.parameters.embedding_bits) == (weight_bits, embedding_bits)


def test_linear_layers_on_matrices_have_a_four_bit_form_too():
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    x = torch.randn(16, 64)
    result = post_training_quantize(net, [x], weight_bits=4)
    assert operators(result.model).count("MatMulNBits") == 2
    assert result.model.num_parameters == pytest.approx(64 * 128 + 128 * 32 + 160, rel=0.05)
    assert cosine_similarity(net(x), result.model(x)) > 0.98


def test_the_root_logger_stays_as_it_was():
    """Importing ONNX Runtime's 4-bit quantizer configures logging; it is imported anew in a process of its own."""
    code = """
import logging, torch
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.onnx_weight_only import with_int4_weights
with_int4_weights(export_onnx(torch.nn.Linear(64, 32), torch.randn(8, 64), tracing_first=True))
import onnxruntime.quantization.matmul_nbits_quantizer
print(logging.getLogger().handlers, logging.getLogger().level == logging.WARNING)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[-2] == "[] True", run.stdout
    assert "matmul_nbits_quantizer" not in run.stderr


def test_layers_can_stay_in_fp32_in_every_width():
    result = post_training_quantize(Table(), [INPUTS], scheme="dynamic", embedding_bits=4)
    nodes = result.most_sensitive_nodes()
    assert nodes
    again = result.excluding(nodes[:1])
    assert again.model.size_bytes > result.model.size_bytes
    assert again.parameters.embedding_bits == 4


# Without VNNI products of 8-bit weights saturate: that is what the default, 7 of the 8 bits, is for.
CPUINFO = Path("/proc/cpuinfo")
WITHOUT_VNNI = not CPUINFO.exists() or "vnni" not in CPUINFO.read_text()


NEEDS_VNNI = pytest.mark.skipif(WITHOUT_VNNI, reason="a processor without VNNI")


@pytest.mark.parametrize("reduce_range", [True, pytest.param(False, marks=NEEDS_VNNI)])
def test_an_encoder_layer_in_eight_bits(reduce_range):
    torch.manual_seed(0)
    net = Encoder().eval()
    result = post_training_quantize(net, [TOKENS], scheme="dynamic", reduce_range=reduce_range)
    assert cosine_similarity(net(TOKENS), result.model(TOKENS)) > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 3}, "weight_bits=3: expected one of 8, 4"),
        ({"embedding_bits": 2}, "embedding_bits=2: expected one of 8, 4"),
        ({"weight_bits": 4, "scheme": "static"}, "weight_bits=4 leaves activations in floating point"),
    ],
)
def test_wrong_widths_are_named(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        post_training_quantize(Table(), [INPUTS], **options)


def test_the_openvino_backend_makes_an_artifact_of_its_own(make_trainer, tmp_path):
    callback = PostTrainingQuantization(backend="openvino", rounds=2, max_quality_drop=0.1, monitor="val/acc")
    torch.manual_seed(0)
    make_trainer(callback, max_epochs=3).fit(CNN(width=16, depth=1), Digits())
    assert callback.error is None
    assert callback.after.size_bytes < 0.6 * callback.before.size_bytes
    artifact = load_artifact(tmp_path / "artifact", num_threads=1)
    assert artifact.model.runtime == "openvino"
    images = torch.rand(3, 1, 8, 8)
    first = artifact(images)
    kept = first.clone()
    artifact(torch.rand(3, 1, 8, 8))
    assert torch.equal(first, kept), "a result is not overwritten by the next call"
    assert cosine_similarity(callback.artifact(images), first) > 0.999


def test_layers_can_stay_in_fp32_with_openvino():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    result = post_training_quantize(net, [torch.randn(16, 1, 8, 8)], backend="openvino")
    fewer = result.excluding(result.most_sensitive_nodes()[:1])
    assert operators(fewer.model).count("DequantizeLinear") < operators(result.model).count("DequantizeLinear")


def test_a_missing_openvino_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "nncf" else find(name, *a))
    with pytest.raises(MisconfigurationException, match=r"needs nncf: pip install .lightning-optcore\[openvino\]"):
        PostTrainingQuantization(backend="openvino")
    with pytest.raises(MisconfigurationException, match="backend='openvino': has scheme static with weights of 8 bits"):
        PostTrainingQuantization(backend="openvino", weight_bits=4)


@pytest.mark.parametrize("embedding_bits", [8, 4])
def test_a_transformer_with_a_loud_channel_stays_itself_with_openvino(embedding_bits):
    """One channel fifty times as loud as the others, as trained transformers have them."""
    net = Table().eval()
    with torch.no_grad():
        net.norm.weight[3] = 50.0
        net.up.weight[:, 3] /= 50
    result = post_training_quantize(net, [INPUTS], backend="openvino", embedding_bits=embedding_bits)
    assert cosine_similarity(net(**INPUTS), result.model(**INPUTS)) > 0.98
    assert result.parameters.embedding_bits == embedding_bits
    assert ("BitwiseAnd" in operators(result.model)) == (embedding_bits == 4)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_standard_operators_look_up_the_rows_of_four_bits(shape):
    """In blocks half as long, hence closer than the rows of ONNX Runtime's own operator."""
    net = nn.Embedding(300, 64)
    ids = torch.randint(0, 300, shape)
    exported = export_onnx(net, ids)
    standard = with_int4_embeddings(exported, standard_operators=True)
    assert all(node.domain == "" for node in standard.proto.graph.node)

    def error(model):
        return (model(ids) - net(ids)).square().mean()

    assert standard(ids).shape == net(ids).shape
    assert standard.num_parameters == exported.num_parameters == 300 * 64
    assert error(standard) < error(with_int4_embeddings(exported)) < 0.02


def test_openvino_looks_up_the_same_rows_of_four_bits_at_any_shape():
    """Its BitShift rounded up for shapes that were not fixed: numbers of the second half of a row were one too high."""
    packed = with_int4_embeddings(export_onnx(nn.Embedding(300, 64), torch.arange(8)), standard_operators=True)
    opened = OnnxModel(packed.content, packed.signature, runtime="openvino")
    for count in range(2, 9):
        ids = torch.randint(0, 300, (count,))
        for _ in range(2):
            torch.testing.assert_close(opened(ids), packed(ids))


def test_openvino_is_compiled_for_the_first_shapes_and_then_for_any(monkeypatch):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    exported = export_onnx(net, torch.randn(2, 6))
    opened = OnnxModel(exported.content, exported.signature, runtime="openvino")
    compiled = []
    real = openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core, "compile_model", lambda self, model, *rest: compiled.append(model) or real(self, model, *rest)
    )
    for count in (1, 2, 1, 3, 4, 5, 6, 2, 7):
        x = torch.randn(count, 6)
        torch.testing.assert_close(opened(x), net(x).detach(), rtol=0.02, atol=0.02)
    assert [model.is_dynamic() for model in compiled] == [False] * 4 + [True]


@pytest.mark.parametrize("shape", [(1, 2, 4), (3, 6)])
def test_openvino_takes_the_shapes_alone_that_were_exported(shape):
    exported = export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), torch.randn(2, 2, 3))
    opened = OnnxModel(exported.content, exported.signature, runtime="openvino")
    with pytest.raises(ValueError, match=rf"has the shape \[{', '.join(map(str, shape))}\], expected \[\?,2,3\]"):
        opened(torch.randn(shape))
    assert opened(torch.randn(5, 2, 3)).shape == (5, 3)


def test_threads_may_share_an_artifact_of_openvino():
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
    exported = export_onnx(net, torch.randn(2, 256))
    opened = OnnxModel(exported.content, exported.signature, runtime="openvino", num_threads=1)
    inputs = [torch.randn(1 + i % 2, 256) for i in range(400)]
    alone = [opened(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(opened, inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("height", [1e-6, 1e6])
def test_scales_that_half_precision_does_not_hold_stay_in_single(height):
    net = nn.Embedding(300, 64)
    with torch.no_grad():
        net.weight *= height
    ids = torch.arange(300)
    small = with_int4_embeddings(export_onnx(net, ids), standard_operators=True)
    assert cosine_similarity(net(ids), small(ids)) > 0.99
