from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import ALL
from torch import nn

from lightning_optcore.compression import onnx_quantization
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.fake_quantization import (
    RANGE,
    FakeQuantization,
    add_fake_quantization,
    fitting_layers,
    in_floating_point,
    ranges_of,
    remove_fake_quantization,
    settings_of,
)
from lightning_optcore.compression.onnx_quantization import Widths
from lightning_optcore.compression.rounding import rounded_activation, rounded_channels, rounded_weight_blocks
from lightning_optcore.measurement.inputs import Inputs

pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(net: nn.Module, scheme: str = "int8", **settings) -> nn.Module:
    add_fake_quantization(net, fitting_layers(net, scheme), FakeQuantization(scheme, **{"learning": True, **settings}))
    return net


SCHEMES = ("int8", "int8_dynamic_int4", "int4_weight_only")


# A U-Net has convolutions alone, which the schemes of 4 bits leave as they are.
@pytest.mark.parametrize(("kind", "scheme"), [(k, s) for k in ALL for s in SCHEMES if k != "unet" or s == "int8"])
def test_names_and_identity_of_parameters_stay(kind, scheme):
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = make().train()
    parameters = dict(net.named_parameters())
    types = [type(child) for child in net.modules()]
    with torch.no_grad():
        exact = net(inputs)
    prepared(net, scheme)
    rounded = net(inputs)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.5
    rounded.square().mean().backward()
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] and p.grad is not None for name, p in net.named_parameters())
    assert [type(child) for child in net.modules()] == types
    assert all("weight" not in child.__dict__ for child in net.modules())
    assert {name.rpartition(".")[2] for name in net.state_dict().keys() - parameters.keys()} <= {
        RANGE, "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    remove_fake_quantization(net)
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), exact)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_rounds_and_is_taken_off_by_itself(copied):
    net, x = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))), torch.randn(16, 8)
    rounded = net(x)
    twin = copied(net).eval()
    torch.testing.assert_close(twin(x), rounded)
    remove_fake_quantization(twin)
    assert settings_of(twin) is None and settings_of(net) is not None
    assert not torch.equal(twin(x), rounded)
    assert not twin[0]._forward_pre_hooks and not twin[0]._forward_hooks


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (100, 30), (7, 5)])
def test_four_bits_are_those_of_onnx_runtime(inputs, outputs):
    """The artifact multiplies 8-bit activations with 4-bit weights, in blocks: the training does, to the last bit."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(inputs, outputs)), torch.randn(33, inputs) * torch.rand(inputs)
    exact = net(x).detach()
    graph = onnx_quantization.prepared(export_onnx(net, x))
    artifact = onnx_quantization.quantized(graph, "dynamic", [Inputs.of(x)], widths=Widths(4, 4))
    expected = artifact(x)
    prepared(net, "int8_dynamic_int4")
    assert float((net(x) - expected).norm() / exact.norm()) < 1e-6
    remove_fake_quantization(net)
    prepared(net, "int4_weight_only")
    difference = float((net(x) - expected).norm() / exact.norm())
    assert difference < 0.01, "but for the 8 bits of the activations"
    assert float((expected - exact).norm() / exact.norm()) > 3 * difference


def test_four_bit_embeddings_are_those_of_onnx_runtime():
    torch.manual_seed(0)
    net, ids = nn.Sequential(nn.Embedding(300, 48)), torch.randint(0, 300, (5, 7))
    graph = onnx_quantization.prepared(export_onnx(net, ids))
    expected = onnx_quantization.quantized(graph, "dynamic", [Inputs.of(ids)], widths=Widths(4, 4))(ids)
    torch.testing.assert_close(prepared(net, "int4_weight_only")(ids).detach(), expected)


@pytest.mark.parametrize("reduce_range", [True, False])
def test_a_batch_norm_needs_no_folding(reduce_range):
    """Lightning #12890: rounding per channel commutes with the scale that a batch norm gives each channel."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
        norm.running_var.copy_(torch.rand(8) + 0.1)
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    folded = rounded_channels(convolution.weight * factor, 0, reduce_range=reduce_range)
    torch.testing.assert_close(rounded_channels(convolution.weight, 0, reduce_range=reduce_range) * factor, folded)


def test_gradients_pass_the_rounding_and_stop_at_the_ends_of_a_range():
    weight = torch.randn(4, 70, requires_grad=True)
    for rounded in (rounded_channels(weight, 0), rounded_weight_blocks(weight)):
        (gradient,) = torch.autograd.grad(rounded.sum(), weight)
        assert torch.equal(gradient, torch.ones_like(weight))
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 3.0], requires_grad=True)
    rounded = rounded_activation(x, torch.tensor(-1.0), torch.tensor(1.0))
    rounded.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert float(rounded[2]) == 0, "zero is one of the steps"


def test_ranges_follow_training_and_nothing_else():
    net = prepared(nn.Sequential(nn.Linear(4, 4)))
    x = torch.rand(8, 4) + 1
    net(x)
    first = ranges_of(net)["0"].clone()
    torch.testing.assert_close(first, torch.stack(torch.aminmax(x)).reshape(1, 2))
    net(10 * x)
    second = ranges_of(net)["0"].clone()
    assert first[0, 1] < second[0, 1] < 9 * first[0, 1], "a running average"
    net(x)
    assert second[0, 1] > ranges_of(net)["0"][0, 1] > 0.8 * second[0, 1], "which shrinks slowly"
    second = ranges_of(net)["0"].clone()
    net(torch.full((2, 4), float("nan")))
    with torch.no_grad():
        net(100 * x)
    net.eval()(100 * x)
    settings_of(net).learning = False
    net.train()(100 * x)
    assert torch.equal(ranges_of(net)["0"], second)


def test_inside_the_context_nothing_is_rounded():
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    exact = net(x)
    prepared(net)
    with in_floating_point(net):
        assert torch.equal(net(x), exact)
    assert not torch.equal(net(x), exact)


def test_an_error_in_a_forward_leaves_the_parameters():
    net = prepared(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(RuntimeError, match="shapes"):
        net(torch.randn(4, 7))
    assert "weight" not in net[0].__dict__
    assert net[0].weight is net[0]._parameters["weight"]


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only"])
def test_a_transformer_with_padding_is_evaluated(scheme):
    """PyTorch's fused path and its nested tensors would go round the layers."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 1)
    x, padding = torch.randn(4, 6, 32), torch.zeros(4, 6, dtype=torch.bool)
    padding[:, 4:] = True
    prepared(encoder, scheme).train()
    trained = encoder(x, src_key_padding_mask=padding)[:, :4]
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)[:, :4]
    torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no layer 5 that int8 rounds"):
        add_fake_quantization(nn.Sequential(nn.Linear(2, 2)), ["5"], FakeQuantization("int8"))
