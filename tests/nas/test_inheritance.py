"""Weights of a parent: what is kept, and that wider networks compute the same."""

from __future__ import annotations

import pytest
import torch
from oneshot_spaces import Widths
from torch import nn

from lightning_optcore.nas.inheritance import inherit
from lightning_optcore.nas.supernet import sub_network, supernet


def cnn(width=4, kernel=3, depth=1, pool=True, seed=0):
    torch.manual_seed(seed)
    blocks = [
        layer
        for _ in range(depth)
        for layer in (nn.Conv2d(width, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU())
    ]
    end = [nn.AdaptiveAvgPool2d(1)] if pool else []
    features = width if pool else width * 36
    network = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *blocks, *end, nn.Flatten(), nn.Linear(features, 3))
    for _ in range(3):
        network(torch.randn(8, 1, 6, 6))
    return network.eval()


X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "wider",
    [{"width": 4}, {"width": 9}, {"kernel": 5}, {"width": 7, "kernel": 5}, {"width": 6, "pool": False}],
    ids=str,
)
def test_a_network_that_is_nowhere_narrower_computes_what_its_parent_does(wider):
    parent = cnn(pool=wider.get("pool", True), seed=1)
    network = cnn(**wider)
    child = inherit(network, parent)
    torch.testing.assert_close(child.network(X), parent(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(X), parent(X), atol=1e-3)
    assert child.new == ()


def test_new_units_learn():
    child = inherit(cnn(8), cnn(4, seed=1)).network.train()
    before = child[0].weight.detach().clone()
    optimizer = torch.optim.SGD(child.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        child(X).square().sum().backward()
        optimizer.step()
    assert (child[0].weight - before)[4:].abs().sum() > 0
    assert child[-1].weight[:, 4:].abs().sum() > 0


def test_neither_network_nor_parent_changes():
    network, parent = cnn(8), cnn(4, seed=1)
    states = [{n: t.clone() for n, t in one.state_dict().items()} for one in (network, parent)]
    child = inherit(network, parent).network
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(1)
    for one, state in zip((network, parent), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_a_narrower_network_has_the_first_channels_and_the_middle_of_kernels():
    parent = cnn(8, 5, seed=1)
    child = inherit(cnn(4, 3), parent).network
    assert torch.equal(child[0].weight, parent[0].weight[:4])
    assert torch.equal(child[1].weight, parent[1].weight[:4, :4, 1:4, 1:4])
    assert torch.equal(child[2].running_mean, parent[2].running_mean[:4])


def test_what_fits_nowhere_begins_anew():
    network = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(1, 1, 3, stride=2), nn.Linear(3, 1))
    parent = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv2d(1, 1, 3))
    child = inherit(network, parent)
    assert child.new == ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    assert child.share == 0
    assert all(torch.equal(a, b) for a, b in zip(child.network.parameters(), network.parameters(), strict=True))


def test_the_share_counts_numbers():
    child = inherit(nn.Linear(4, 1, bias=False), nn.Linear(3, 2, bias=False))
    assert child.share == 0.75
    assert child.partly == ("weight",)


def test_depthwise_layers_of_other_widths_are_the_same_kind():
    wide, narrow = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(4, 4, 3, groups=4)
    child = inherit(wide, narrow)
    assert torch.equal(child.network.weight[:4], narrow.weight)
    assert inherit(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4)).share == 0


def test_a_network_of_a_space_inherits_from_a_smaller_one_and_from_a_supernet():
    space = Widths()
    small = space.freeze({"width": 4, "kernel": 3, "depth": 1}).eval()
    large = space.freeze({"width": 8, "kernel": 5, "depth": 1}).eval()
    torch.testing.assert_close(inherit(large, small).network(X), small(X), rtol=1e-4, atol=1e-5)
    part = sub_network(supernet(space), {"width": 4, "kernel": 3, "depth": 1}).eval()
    torch.testing.assert_close(inherit(small, part).network(X), part(X))
