from __future__ import annotations

import copy

import pytest
import torch
from nets import ALL, IMAGES, TOKENS, BertLike, Encoder, Recurrent, resnet
from torch import nn

from lightning_optcore.compression.channel_groups import apply_cut, find_channel_groups, plan_cut
from lightning_optcore.compression.structure import Structure, named_tensors, resize


@pytest.fixture(autouse=True)
def no_fused_attention():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("kind", ALL)
def test_cutting_units_is_the_same_as_zeroing_them(kind):
    """The proof that the right slices go: what is left computes what the whole did without those units."""
    make, inputs = ALL[kind]
    torch.manual_seed(0)
    net = make().eval()
    found = find_channel_groups(net, inputs)
    removed = {name: list(range(group.units // 2)) for name, group in found.groups.items()}
    zeroed = copy.deepcopy(net)
    tensors = named_tensors(zeroed)
    for name, group in found.groups.items():
        for member in group.members:
            gone = member.index[torch.isin(member.unit, torch.tensor(removed[name]))]
            tensors[member.tensor].data.index_fill_(member.axis, gone, 0)
    whole = sum(p.numel() for p in net.parameters())
    apply_cut(net, plan_cut(net, inputs, removed, found))
    assert sum(p.numel() for p in net.parameters()) < 0.9 * whole
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), zeroed(inputs))


def test_heads_and_neurons_of_transformers_are_found():
    groups = find_channel_groups(Encoder(), TOKENS).groups
    assert {name: group.units for name, group in groups.items()} == {
        "encoder.layers.0.linear1": 64,
        "encoder.layers.1.linear1": 64,
        "encoder.layers.0.self_attn": 4,
        "encoder.layers.1.self_attn": 4,
    }
    groups = find_channel_groups(BertLike(), TOKENS).groups
    assert {name: group.units for name, group in groups.items()} == {"attention.value": 4, "up": 64}


def test_heads_are_counted_after_a_cut():
    net = BertLike()
    found = find_channel_groups(net, TOKENS)
    apply_cut(net, plan_cut(net, TOKENS, {"attention.value": [1, 2]}, found))
    assert (net.attention.num_attention_heads, net.attention.all_head_size) == (2, 16)
    assert net.dense.in_features == 16


def test_what_cannot_be_pruned_is_said():
    found = find_channel_groups(Recurrent(nn.GRU), torch.randn(2, 7, 8))
    assert set(found.groups) == {"after"}
    assert found.skipped["head"] == "the output keeps its channels"
    assert found.skipped["before"].startswith("its channels cannot be followed")


def test_layers_are_ignored_by_name_and_by_type():
    assert "1.c1" not in find_channel_groups(resnet(), IMAGES, ignore=["1.*"]).groups
    found = find_channel_groups(Encoder(), TOKENS, ignore=[nn.MultiheadAttention])
    assert set(found.groups) == {"encoder.layers.0.linear1", "encoder.layers.1.linear1"}
    with pytest.raises(ValueError, match=r"ignore='layer9' matches no layer: expected one of 0, 1"):
        find_channel_groups(resnet(), IMAGES, ignore=["layer9"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def test_shared_weights_stay_whole():
    found = find_channel_groups(Tied(), torch.randn(2, 8))
    assert found.groups == {}
    assert found.skipped["first"] == found.skipped["second"] == "its weight is shared with another layer"


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.b(self.a(x).reshape(-1, 12))))


def test_a_layer_whose_size_is_written_into_forward_stays_whole():
    found = find_channel_groups(Stubborn(), torch.randn(2, 8))
    assert set(found.groups) == {"b"}
    assert "shape '[-1, 12]' is invalid" in found.skipped["a"]


class Untraceable(nn.Module):
    def forward(self, x):
        raise RuntimeError("no\nway")


def test_a_module_that_cannot_run_is_named():
    with pytest.raises(ValueError, match="Untraceable cannot be traced for pruning: RuntimeError: no way"):
        find_channel_groups(Untraceable(), torch.randn(2, 8))


def test_gradients_are_cut_and_parameters_keep_their_identity():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    net(torch.randn(3, 4)).sum().backward()
    weight, gradient = net[0].weight, net[0].weight.grad.clone()
    x = torch.randn(2, 4)
    found = find_channel_groups(net, x)
    apply_cut(net, plan_cut(net, x, {"0": [0, 5]}, found))
    assert net[0].weight is weight
    torch.testing.assert_close(weight.grad, gradient[1:5])
    net(x).sum().backward()


def test_a_structure_brings_a_fresh_module_to_the_shape_and_back():
    net, fresh = resnet(), resnet()
    original = Structure.of(net)
    found = find_channel_groups(net, IMAGES)
    apply_cut(net, plan_cut(net, IMAGES, {name: [0] for name in found.groups}, found))
    resize(fresh, original.changed_to(Structure.of(net)))
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh.eval()(IMAGES), net.eval()(IMAGES))
    resize(fresh, original)
    fresh.load_state_dict(resnet().state_dict())


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure({"nothing": [1]}), "no tensor nothing"),
        (Structure({}, {"5": {"forward": 1}}), "no size 5.forward"),
        (Structure({}, {"5": {"in_features": "os.system"}}), "no size 5.in_features"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(structure, message):
    with pytest.raises(ValueError, match=message):
        resize(resnet(), structure)
