from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optcore.meta.transfer import TransferError, layer_groups, replace_head
from lightning_optcore.models import CNN, MLP


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(16, 8))
        self.embedding = nn.Embedding(30, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 30, bias=False)


def names_of(groups):
    return [group.name for group in groups]


@pytest.mark.parametrize("module", [CNN(8, 2), MLP(16, 3), Transformer()])
def test_every_parameter_is_in_one_group(module):
    groups = layer_groups(module)
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    assert len(groups) >= 4


def test_containers_are_opened_and_normalization_stays_with_its_layer():
    found = names_of(layer_groups(Transformer()))
    assert found == ["embedding", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2+norm", "out"]
    assert "position" in layer_groups(Transformer())[0].parameters
    groups = layer_groups(CNN(8, 2))
    assert names_of(groups)[0] == "features.0+features.1" and names_of(groups)[-1] == "head"
    assert groups[0].normalizations == ("features.1",)


def test_normalization_without_parameters_has_a_group_too():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(8, 2))
    assert layer_groups(net)[0].normalizations == ("1",)


def test_a_single_child_is_opened():
    assert names_of(layer_groups(nn.ModuleDict({"network": Transformer()})))[-1] == "network"
    assert names_of(layer_groups(nn.ModuleDict({"network": CNN(8, 2)})))[-1] == "network.head"


def test_a_head_that_is_defined_first_comes_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    assert names_of(layer_groups(Backwards(), head="head")) == ["one", "two", "head"]


def test_shared_parameters_are_in_the_first_group_that_has_them():
    net = Transformer()
    net.out.weight = net.embedding.weight
    groups = layer_groups(net)
    assert "embedding.weight" in groups[0].parameters and "out" not in names_of(groups)


def test_patterns_take_parameters_in_their_order():
    groups = layer_groups(CNN(8, 2), [["features.0", "features.1"], "features.*", "head"])
    assert groups[0].parameters == ("features.0.weight", "features.1.weight", "features.1.bias")
    assert groups[0].normalizations == ("features.1",)
    assert groups[1].normalizations == ("features.4", "features.7", "features.10")


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4, bias=False), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.Conv1d(6, 4, 1)]
)
def test_a_new_head_is_like_the_old_one(layer):
    net = nn.Sequential(nn.Flatten(0), nn.Sequential(nn.ReLU(), layer.double())).eval()
    assert replace_head(net, 6) == "1.1"
    new = net[1][1]
    assert type(new) is type(layer) and new.weight.dtype == torch.float64 and not new.training
    assert new.weight.shape == (6, *layer.weight.shape[1:]) and (new.bias is None) == (layer.bias is None)


def test_the_hyperparameters_say_the_new_number_of_classes():
    module = CNN(8, 2, num_classes=10)
    replace_head(module, 3)
    assert module.hparams["num_classes"] == 3
    assert CNN(**module.hparams)(torch.zeros(1, 1, 8, 8)).shape == module(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: expected at least 1"),
        ({"num_classes": 2, "head": "fc"}, "head='fc': expected one of features"),
        ({"num_classes": 2, "head": "features.1"}, r"head=features\.1: is a BatchNorm2d, expected a linear layer"),
    ],
)
def test_what_is_no_head_is_refused(options, message):
    with pytest.raises(TransferError, match=message):
        replace_head(CNN(8, 2), **options)


def test_a_module_without_parameters_has_no_groups():
    with pytest.raises(TransferError, match="no parameters"):
        layer_groups(nn.ReLU())
