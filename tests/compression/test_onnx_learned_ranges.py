from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime as ort
import pytest
import torch
from nets import ALL
from torch import nn

from lightning_optcore.compression.fake_quantization import remove_fake_quantization
from lightning_optcore.compression.onnx_quantization import weight_bytes
from lightning_optcore.compression.quantization import post_training_quantize
from lightning_optcore.compression.quantization_aware_training import export_quantized, prepare_quantization_aware
from lightning_optcore.models import CNN

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(net: nn.Module, x: torch.Tensor, steps: int = 10, **options) -> nn.Module:
    """Prepared, and trained towards the outputs that it had."""
    with torch.no_grad():
        wanted = net.eval()(x)
    prepare_quantization_aware(net, **options)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), wanted).backward()
        optimizer.step()
    return net.eval()


def operators_that_run(model, path) -> Counter:
    """What ONNX Runtime makes of the graph on this machine."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(model.content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("kind", ALL)
def test_networks_of_all_kinds_compute_what_they_learned(kind):
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = trained(make(), inputs)
    model = export_quantized(net, [inputs])
    with torch.no_grad():
        assert difference(model(inputs), net(inputs)) < 0.1
    whole, small = weight_bytes(model)
    if kind not in ("lstm", "gru"):
        assert small > 0.95 * whole, "recurrent layers stay in floating point, all others do not"


@pytest.mark.parametrize("reduce_range", [True, False])
def test_a_chain_of_linear_layers_is_exact(reduce_range):
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)]
    x = torch.randn(64, 32)
    net = trained(nn.Sequential(*layers), x, reduce_range=reduce_range)
    with torch.no_grad():
        assert difference(export_quantized(net, [x])(x), net(x)) < 2e-3


def test_the_learned_ranges_are_taken_not_measured_again():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(256, 16)
    trained(net, x)
    with torch.no_grad():
        expected = net(20 * x)
    # Calibrated on these, the ranges would be twenty times wider.
    model = export_quantized(net, [20 * x])
    assert difference(model(20 * x), expected) < 1e-3
    assert float(expected.abs().max()) < 3 * float(net(x).abs().max()), "what is beyond a range is cut off"


def test_between_convolutions_all_is_integer(tmp_path):
    make, _ = ALL["resnet"]
    torch.manual_seed(0)
    x = torch.randn(32, 1, 12, 12)
    found = operators_that_run(export_quantized(trained(make(), x), [x]), tmp_path / "optimized.onnx")
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (7, 2, 1)
    assert not {"Conv", "Add", "Relu", "Gemm", "MatMul"} & set(found)


def test_the_linear_layers_of_a_transformer_are_integer_and_nothing_else_is(tmp_path):
    make, tokens = ALL["bert"]
    torch.manual_seed(0)
    found = operators_that_run(export_quantized(trained(make(), tokens), [tokens]), tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] + found["QGemm"] == 7
    assert not {"QLinearAdd", "QLinearMatMul", "QLinearSoftmax"} & set(found)


def test_the_file_is_as_small_as_that_of_onnx_runtimes_own_quantizer():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    net = trained(CNN(width=32, depth=2), x, steps=2)
    learned = export_quantized(net, [x])
    remove_fake_quantization(net)
    plain = post_training_quantize(net, [x], scheme="static").model
    assert learned.size_bytes < 1.01 * plain.size_bytes


class Twice(nn.Module):
    """One layer is called twice, and two layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.third(torch.tanh(self.first(x)) + self.first(x.flip(1))) + self.second(x)


def test_layers_and_tensors_may_share():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    net = trained(Twice(), x)
    with torch.no_grad():
        assert difference(export_quantized(net, [x])(x), net(x)) < 1e-3


def test_keyword_inputs_and_dicts():
    """Lightning #15862: what prepares a model must pass keyword arguments on."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, *, x, scale=1.0):
            return {"logits": self.layer(input=x) * scale}

    net = Keywords()
    prepare_quantization_aware(net)
    x = torch.randn(16, 8)
    expected = net(x=x, scale=2.0)["logits"].detach()
    model = export_quantized(net, [{"x": x, "scale": 2.0}])
    torch.testing.assert_close(model(x=x, scale=2.0)["logits"], expected, rtol=1e-3, atol=1e-4)


def test_openvino_runs_the_same_graph():
    torch.manual_seed(0)
    x = torch.rand(32, 1, 8, 8)
    net = trained(CNN(width=8, depth=1), x)
    model = export_quantized(net, [x], backend="openvino")
    assert model.runtime == "openvino"
    with torch.no_grad():
        assert difference(model(x), net(x)) < 0.05


def test_a_module_that_was_not_prepared_is_refused():
    with pytest.raises(ValueError, match="prepare_quantization_aware"):
        export_quantized(nn.Linear(4, 2), [torch.randn(2, 4)])
