"""Spaces of architectures: of NNI's ModelSpaces, of plain factories, and of labels alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_optcore.nas import search
from lightning_optcore.nas._nni_compat import nni_nas
from lightning_optcore.nas.space import ArchitectureError, architecture_space, factory_space
from lightning_optcore.nas.supernet import find_supernet, supernet
from lightning_optcore.search import Space


@pytest.fixture(scope="module")
def nas():
    return nni_nas()


@pytest.fixture(scope="module")
def model_space(nas):
    class Net(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            width = nas.nni.choice("width", [4, 8])
            self.stem = nas.nn.MutableConv2d(1, width, nas.nni.choice("kernel", [(1, 1), (3, 3)]))
            self.op = nas.nn.LayerChoice([nn.ReLU(), nn.Tanh()], label="op")
            self.heads = nn.ModuleList([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(1)])
            self.inputs = nas.nn.InputChoice(n_candidates=3, n_chosen=2, label="inputs")
            self.last = nas.nn.MutableLinear(width, 2)

        def forward(self, x):
            x = self.op(self.stem(x))
            return self.last(self.inputs([head(x) for head in self.heads]).flatten(1))

    return Net()


def test_a_model_space_becomes_choices_of_json_values(model_space):
    space = architecture_space(model_space)
    rng = np.random.default_rng(0)
    assert space.choices.size == 2 * 2 * 2 * 3
    assert space.choices.parameters["kernel"].values == (0, 1)
    for _ in range(10):
        architecture = json.loads(json.dumps(space.choices.sample(rng)))
        network = space.build(architecture)
        assert network.stem.out_channels == architecture["width"]
        assert network.stem.kernel_size == [(1, 1), (3, 3)][architecture["kernel"]]
        assert isinstance(network.op, [nn.ReLU, nn.Tanh][architecture["op"]])
        assert network(torch.randn(2, 1, 8, 8)).shape == (2, 2)


def test_networks_share_no_weights_with_each_other(nas):
    class Net(nas.nn.ModelSpace):
        def __init__(self, features):
            super().__init__()
            self.fixed = nn.Linear(features, 4)
            self.op = nas.nn.LayerChoice([nn.ReLU(), nn.Tanh()], label="op")

        def forward(self, x):
            return self.op(self.fixed(x))

    class Own(Net):
        def freeze(self, sample):
            return super().freeze(sample)

    for kind in (Net, Own):
        space = architecture_space(kind(features=3))
        one, two = space.build({"op": 0}), space.build({"op": 1})
        with torch.no_grad():
            one.fixed.weight.zero_()
        assert two.fixed.weight.abs().sum() > 0
        assert space.build({"op": 0}).fixed.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width=9: expected one of 4, 8"),
        ({"extra": 1}, "extra: no label of the space; there are width, kernel, op, inputs"),
        ({"op": None}, "op: missing from the architecture"),
        ({"inputs": [0, 1]}, r"inputs=\[0, 1\]: expected one of 0, 1, 2"),
    ],
)
def test_an_architecture_of_another_space_is_refused(model_space, change, message):
    architecture = {"width": 4, "kernel": 0, "op": 1, "inputs": 2} | change
    architecture = {label: value for label, value in architecture.items() if value is not None}
    with pytest.raises(ArchitectureError, match=message):
        architecture_space(model_space).build(architecture)


def test_a_label_of_two_choices_is_named_with_both(nas):
    class Net(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            self.a = nas.nn.MutableLinear(4, nas.nni.choice("width", [4, 8]))
            self.b = nas.nn.MutableLinear(4, nas.nni.choice("width", [4, 8, 16]))

    with pytest.raises(ArchitectureError, match=r"label width: stands for two choices, \[4, 8\] and \[4, 8, 16\]"):
        architecture_space(Net())


def test_a_constraint_of_nni_makes_points_infeasible(nas):
    from nni.mutable import ExpressionConstraint

    class Net(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            a, b = nas.nni.choice("a", [1, 2, 3]), nas.nni.choice("b", [1, 2, 3])
            self.one, self.two = nas.nn.MutableLinear(2, a), nas.nn.MutableLinear(2, b)
            self.add_mutable(ExpressionConstraint(a + b <= 4, label="narrow"))

    space = architecture_space(Net())
    assert space.choices.size == 6
    with pytest.raises(ArchitectureError, match="narrow"):
        space.validate({"a": 3, "b": 3})


def test_a_factory_is_searched_by_its_arguments():
    def net(depth, width, second=0):
        return nn.Sequential(*[nn.Linear(4, width if i == 0 else second) for i in range(depth)])

    space = factory_space(
        net,
        {"depth": "range(1,3)", "width": [4, 8], "second": "choice(4,8)"},
        constraints=["width <= 4 * depth"],
        conditions={"second": "depth > 1"},
    )
    # Depth 1 mutes the second width: 1 of it, and 2 * 2 of depth 2.
    assert space.choices.size == 5
    assert len(space.build({"depth": 2, "width": 8, "second": 4})) == 2
    with pytest.raises(ArchitectureError, match=r"second: superfluous in .*second is there if depth > 1"):
        space.build({"depth": 1, "width": 4, "second": 4})
    with pytest.raises(ArchitectureError, match=r"second: missing .*one of 4, 8"):
        space.build({"depth": 2, "width": 4})


def test_choices_alone_build_nothing():
    for space in (architecture_space({"a": [1, 2]}), architecture_space(Space({"a": "choice(1,2)"}))):
        space.validate({"a": 2})
        with pytest.raises(ArchitectureError, match="choices only"):
            space.build({"a": 1})
    with pytest.raises(ArchitectureError, match="factory_space"):
        architecture_space(nn.Linear(1, 1))
    with pytest.raises(ArchitectureError, match=r"a: .* no JSON value"):
        architecture_space({"a": [nn.ReLU]})


def test_networks_that_are_the_same_share_a_key():
    from lightning_optcore.nas.space import ArchitectureSpace

    space = ArchitectureSpace(Space({"a": "choice(1,2)", "b": "choice(1,2)"}), canonical=lambda one: dict(sorted(
        zip(one, sorted(one.values()), strict=True))))  # fmt: skip
    assert space.key({"a": 2, "b": 1}) == space.key({"a": 1, "b": 2}) != space.key({"a": 1, "b": 1})


def test_a_choice_of_a_layer_that_is_not_built_makes_no_other_network(nas):
    class Deep(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            self.layers = nas.nn.Repeat(
                lambda i: nas.nn.LayerChoice([nn.ReLU(), nn.Tanh()], label=f"kind{i}"), nas.nni.choice("depth", [1, 2])
            )
            shared, own = nas.nni.choice("shared", [2, 4]), nas.nni.choice("own", [1, 3])
            hidden = nas.nn.MutableLinear(4, shared), nas.nn.MutableLinear(shared, 4), nas.nn.MutableLinear(4, own)
            candidates = {"skip": nn.Identity(), "hidden": nn.Sequential(*hidden)}
            self.branch = nas.nn.LayerChoice(candidates, label="branch")
            self.width = nas.nn.MutableLinear(4, shared)

    space = architecture_space(Deep())
    one = {"depth": 1, "kind0": 0, "kind1": 0, "branch": "skip", "shared": 2, "own": 1}
    for mute in ({"kind1": 1}, {"own": 3}, {"kind1": 1, "own": 3}):
        assert space.key(one) == space.key(one | mute)
    for heard in ({"depth": 2}, {"kind0": 1}, {"branch": "hidden"}, {"shared": 4}):
        assert space.key(one) != space.key(one | heard)
    deep = one | {"depth": 2, "branch": "hidden"}
    assert space.key(deep) != space.key(deep | {"kind1": 1}) != space.key(deep | {"own": 3})
    assert space.choices.size == 64
    paid = search(
        space, lambda architecture: {"acc": 1.0}, objectives="acc", strategy="grid", max_trials=64, show=False
    )
    # Twice what is shared, times two first layers alone or four of two, times what the branch has of its own.
    assert sum(trial.evaluated for trial in paid.history) == 2 * (2 + 4) * (1 + 2)


def test_networks_within_others_and_supernets_too(model_space):
    inner = architecture_space(model_space)
    space = inner.within(lambda network: nn.Sequential(nn.Conv2d(3, 1, 1), network)).within(
        lambda network: nn.Sequential(nn.ReLU(), network)
    )
    assert space.to_dict() == inner.to_dict()
    network = space.build({"width": 4, "kernel": 0, "op": 1, "inputs": 2})
    assert [type(part) for part in (network[0], network[1][0], network[1][1])] == [
        nn.ReLU,
        nn.Conv2d,
        type(model_space),
    ]
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 2)
    # What was put around the one space is not around the other.
    assert type(inner.build({"width": 4, "kernel": 0, "op": 1, "inputs": 2})) is type(model_space)
    assert space.model_space is model_space
    made = [space.new_model_space() for _ in range(2)]
    assert all(type(one) is type(model_space) and one is not model_space for one in made)
    whole = space.complete(supernet(made[0]))
    assert find_supernet(whole)[0] == "1.1"
    assert factory_space(nn.Linear, {"in_features": [1], "out_features": [1]}).model_space is None
