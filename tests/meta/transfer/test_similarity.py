from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_optcore.data import Digits
from lightning_optcore.meta.transfer import TransferError, layer_groups, layer_similarity, linear_cka, stable_groups
from lightning_optcore.models import CNN


def kernel_form(x, y):
    """The definition of Kornblith et al. (2019), by centered Gram matrices."""
    n = len(x)
    center = torch.eye(n, dtype=x.dtype) - 1 / n
    k, other = center @ x @ x.T @ center, center @ y @ y.T @ center
    return float((k * other).sum() / (k.norm() * other.norm()))


@pytest.mark.parametrize(("samples", "features"), [(60, 8), (20, 50)])
def test_it_is_the_definition_for_few_and_for_many_features(samples, features):
    torch.manual_seed(0)
    x = torch.randn(samples, features, dtype=torch.float64)
    y = x[:, :6] @ torch.randn(6, 5, dtype=torch.float64) + torch.randn(samples, 5, dtype=torch.float64)
    assert linear_cka(x, y) == pytest.approx(kernel_form(x, y), abs=1e-10)


def test_it_ignores_rotation_scale_and_shift_but_not_more():
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert linear_cka(x, 3 * x @ rotation - 2) == pytest.approx(1)
    assert linear_cka(x, torch.randn(200, 8, dtype=torch.float64)) < 0.15
    assert linear_cka(x, x * torch.tensor([10.0] + [0.1] * 7)) < 0.7


def batches(count=4, size=64):
    data = Digits(batch_size=size)
    data.setup()
    images = data.train_set.tensors[0]
    return [images[i * size : (i + 1) * size] for i in range(count)]


def test_layers_that_changed_more_are_less_alike():
    torch.manual_seed(0)
    one = CNN(8, 2).train()
    other = copy.deepcopy(one)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith("features.9"):
                parameter.copy_(torch.randn_like(parameter))
    found = layer_similarity(one, other, batches())
    assert found["features.0"] == pytest.approx(1) and found["features.6"] == pytest.approx(1)
    assert found["features.9"] < 0.97
    assert one.training and other.training and not one.features[0]._forward_hooks
    assert stable_groups(found, layer_groups(one), threshold=0.99) == [
        "features.0+features.1",
        "features.3+features.4",
        "features.6+features.7",
    ]


def test_batches_estimate_what_all_samples_together_give():
    torch.manual_seed(0)
    one, other = CNN(8, 2), CNN(8, 2)
    split, whole = (layer_similarity(one, other, inputs) for inputs in (batches(8, 64), [torch.cat(batches(8, 64))]))
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, abs=0.05), name


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Bilinear(4, 4, 3)

    def forward(self, one, other):
        return self.net(one, other)


def test_inputs_may_be_arguments_or_named():
    net = TwoInputs()
    one, other = torch.randn(2, 16, 4)
    assert layer_similarity(net, net, [(one, other), {"one": one, "other": other}]) == {"net": pytest.approx(1)}


@pytest.mark.parametrize(
    ("inputs", "layers", "message"),
    [
        ([], None, "inputs: no batch"),
        ([torch.zeros(3, 1, 8, 8)], None, "a batch of 3, expected at least 4"),
        ([torch.zeros(8, 1, 8, 8)], ["stem"], "layers: stem not in a CNN"),
    ],
)
def test_what_cannot_be_compared_is_refused(inputs, layers, message):
    with pytest.raises(TransferError, match=message):
        layer_similarity(CNN(8, 2), CNN(8, 2), inputs, layers)


def test_representations_of_other_samples_are_refused():
    with pytest.raises(TransferError, match="8 and 9 samples"):
        linear_cka(torch.zeros(8, 2), torch.zeros(9, 2))
