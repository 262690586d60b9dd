"""Zero-cost proxies against values by hand, and the network that they leave as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_optcore.nas.proxies import gradient_norm, naswot, synflow


def linear(weights, bias=None):
    layer = nn.Linear(len(weights[0]), len(weights), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def test_gradient_norm_is_that_of_the_loss_by_hand():
    # Cross-entropy of two equal logits: the gradient of the logits is (-1/2, 1/2), that of the weights its product
    # with the input (3, 4), of norm 5 * sqrt(1/2); that of the bias sqrt(1/2).
    network = linear([[0.0, 0.0], [0.0, 0.0]], bias=[0.0, 0.0])
    batch = (torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    assert gradient_norm(network, batch) == pytest.approx(6 * math.sqrt(0.5))
    doubled = gradient_norm(network, batch, loss=lambda y, t: 2 * nn.functional.cross_entropy(y, t))
    assert doubled == pytest.approx(12 * math.sqrt(0.5))


def test_synflow_sums_the_paths_whatever_the_signs():
    # Paths: 1*4, 2*4, 3*5 (of absolute values); two layers see each of them.
    network = nn.Sequential(linear([[1.0, -2.0], [3.0, 0.0]]), nn.ReLU(), linear([[-4.0, 5.0]]))
    assert synflow(network, torch.randn(7, 2)) == pytest.approx(math.log(2 * (4 + 8 + 15)))


def test_synflow_leaves_batch_norm_out_and_knows_when_nothing_flows():
    layers = [linear([[1.0, -2.0]]), linear([[3.0]])]
    plain, normal = nn.Sequential(*layers), nn.Sequential(layers[0], nn.BatchNorm1d(1), layers[1])
    assert synflow(normal, torch.randn(2, 2)) == pytest.approx(synflow(plain, torch.randn(2, 2)))
    assert synflow(nn.Sequential(layers[0], linear([[0.0]])), torch.randn(2, 2)) == -math.inf


def test_synflow_of_a_deep_network_does_not_overflow():
    network = nn.Sequential(*(linear([[1e4]]) for _ in range(60)))
    assert synflow(network, torch.ones(1, 1)) == pytest.approx(math.log(60) + 240 * math.log(10))


def test_naswot_counts_the_units_that_agree():
    # Units on: sample 1 (x=1): +, +, -; sample 2 (x=-1): -, -, +; sample 3 (x=0.2) with biases: +, -, +.
    network = nn.Sequential(linear([[1.0], [1.0], [-1.0]], bias=[0.0, -0.5, 0.5]), nn.ReLU())
    inputs = torch.tensor([[1.0], [-1.0], [0.2]])
    kernel = torch.tensor([[3.0, 0.0, 1.0], [0.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert naswot(network, inputs) == pytest.approx(math.log(torch.linalg.det(kernel).item()), rel=1e-5)
    assert naswot(network, torch.tensor([[1.0], [1.0]])) == -math.inf


def test_naswot_needs_activations():
    with pytest.raises(ValueError, match="Linear calls no activation that is a module: expected one of ReLU"):
        naswot(nn.Linear(2, 2), torch.randn(4, 2))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_and_the_random_numbers_are_left_as_they_were(training):
    network = convolutional().train(training)
    network[0].weight.requires_grad_(False)
    network[6].bias.grad = torch.ones(5)
    before = copy.deepcopy(network.state_dict())
    x, y = torch.randn(8, 3, 6, 6), torch.randint(5, (8,))
    inputs = x.clone()
    state = torch.get_rng_state()
    first = [gradient_norm(network, (x, y)), synflow(network, x), naswot(network, x)]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, inputs)
    assert [gradient_norm(network, (x, y)), synflow(network, x), naswot(network, x)] == first
    assert all(math.isfinite(value) for value in first)
    assert all(module.training == training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, True, True, True, True, True]
    assert network[0].bias.grad is None and torch.equal(network[6].bias.grad, torch.ones(5))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_networks_take_keyword_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear([[1.0, 2.0]])
            self.relu = nn.ReLU()

        def forward(self, *, left, right):
            return {"logits": self.relu(self.layer(left + right))}

    inputs = {"left": torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), "right": torch.zeros(2, 2)}
    assert synflow(Sum(), inputs) == pytest.approx(math.log(6))
    assert naswot(Sum(), inputs) == pytest.approx(0.0)
    assert gradient_norm(Sum(), (inputs, torch.tensor([[3.0], [0.0]]))) == pytest.approx(0.0)
