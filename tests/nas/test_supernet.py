"""Supernets: which are refused, and that a sub-network is what the supernet forwards."""

from __future__ import annotations

import json
import logging
import random

import pytest
import torch
from oneshot_spaces import Cells, Layers, Widths, nas
from torch import nn

from lightning_optcore.nas.supernet import (
    SupernetError,
    alphas,
    best_architecture,
    choices,
    choose,
    collect,
    find_supernet,
    largest,
    probabilities,
    random_architecture,
    sample_of,
    smallest,
    sub_network,
    supernet,
)

X = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("space", [Layers, Widths], ids=lambda space: space.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_a_sub_network_equals_the_supernet_with_its_choice(space, seed):
    network = supernet(space())
    choose(network, largest(network))
    network(X)
    network.eval()
    architecture = json.loads(json.dumps(random_architecture(network, random.Random(seed))))
    alone = sub_network(network, architecture)
    choose(network, architecture)
    torch.testing.assert_close(alone(X), network(X))
    assert not choices(alone)
    assert not {p.data_ptr() for p in alone.parameters()} & {p.data_ptr() for p in network.parameters()}
    built = space().freeze(architecture)
    assert {k: v.shape for k, v in alone.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}


def test_a_sub_network_of_a_proxyless_supernet_equals_it_too():
    network = supernet(Layers(), "proxyless").eval()
    for architecture in ({"a": 0, "depth": 1}, {"a": 2, "depth": 3}, {"a": 1, "depth": 2}):
        choose(network, architecture)
        torch.testing.assert_close(sub_network(network, architecture)(X), network(X))


def test_a_sub_network_of_darts_is_what_its_alphas_favour():
    network = supernet(Layers(), "darts").eval()
    with torch.no_grad():
        alphas(network)["a"][1] = 100.0
        alphas(network)["depth"][2] = 100.0
    architecture = best_architecture(network)
    assert architecture == {"a": 1, "depth": 3}
    torch.testing.assert_close(sub_network(network, architecture)(X), network(X), rtol=1e-4, atol=1e-5)


def test_a_cell_keeps_its_weights():
    network = supernet(Cells()).eval()
    x = torch.randn(2, 3, 4, 4)
    for seed in range(4):
        architecture = random_architecture(network, random.Random(seed))
        choose(network, architecture)
        torch.testing.assert_close(sub_network(network, architecture)(x), network(x))


def test_several_inputs_are_named_by_a_number():
    class Inputs(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            self.pick = nas.nn.InputChoice(3, n_chosen=2, label="pick")
            self.size = nas.nn.MutableConv2d(1, 1, nas.nni.choice("kernel", [(1, 3), (3, 3)]))

        def forward(self, x):
            return self.pick([x, 10 * x, 100 * x])

    network = supernet(Inputs())
    expected = {0: 11.0, 1: 101.0, 2: 110.0}
    for number, total in expected.items():
        architecture = {"pick": number, "kernel": 1}
        choose(network, architecture)
        assert float(network(torch.ones(1))) == float(sub_network(network, architecture)(torch.ones(1))) == total
    assert sample_of(network, {"pick": 1, "kernel": 0}) == {"pick": [0, 2], "kernel": (1, 3)}
    assert set(random_architecture(network, random.Random(0)).values()) <= {0, 1, 2}
    with pytest.raises(SupernetError, match=r"pick=3: expected 0 to 2, for \[\[0, 1\]"):
        sample_of(network, {"pick": 3, "kernel": 0})
    darts = supernet(Cells(), "darts")
    assert all(isinstance(value, int) for label, value in best_architecture(darts).items() if "input" in label)
    sub_network(darts, best_architecture(darts))


def test_what_is_favoured_in_cells_is_found_quietly():
    seen = []
    logger = logging.getLogger(nas.supermodule.differentiable.__name__)
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    try:
        assert best_architecture(supernet(Cells(), "darts"))
    finally:
        logger.removeHandler(handler)
    assert not seen


def test_the_space_itself_stays_a_space():
    space = Layers()
    before = {name: value.clone() for name, value in space.state_dict().items()}
    supernet(space, "darts")
    assert not choices(space)
    assert all(torch.equal(value, before[name]) for name, value in space.state_dict().items())


@pytest.mark.parametrize("kind", ["darts", "gumbel_darts", "proxyless"])
def test_export_is_repeatable_by_seed(kind):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        network = supernet(Layers(), kind)
        found.append(best_architecture(network))
        # Not drawn, nor noisy.
        assert all(best_architecture(network) == found[-1] for _ in range(5))
        sample_of(network, found[-1])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["darts", "gumbel_darts", "proxyless"])
def test_probabilities_sum_to_one_and_have_a_gradient(kind):
    network = supernet(Layers(), kind)
    odds = probabilities(network)
    assert set(odds["a"]) == {0, 1, 2}
    assert set(odds["depth"]) == {1, 2, 3}
    for label in ("a", "depth"):
        torch.testing.assert_close(sum(odds[label].values()), torch.tensor(1.0))
    (odds["a"][0] + odds["depth"][3]).backward()
    assert any(alpha.grad is not None and alpha.grad.abs().sum() > 0 for alpha in alphas(network).values())


def test_random_architectures_follow_their_generator():
    network = supernet(Widths())
    assert random_architecture(network, random.Random(5)) == random_architecture(network, random.Random(5))
    assert len({str(random_architecture(network, random.Random(i))) for i in range(40)}) == 8


def test_the_largest_and_the_smallest():
    assert largest(supernet(Widths())) == {"width": 8, "kernel": 5, "depth": 2}
    assert smallest(supernet(Widths())) == {"width": 4, "kernel": 3, "depth": 1}
    # Of layers by their parameters: the first has the most, the last none.
    assert largest(supernet(Layers())) == {"a": 0, "depth": 3}
    assert smallest(supernet(Layers())) == {"a": 2, "depth": 1}


def test_collect_draws_every_label_once():
    network = supernet(Widths())
    drawn = collect(network, "resample")
    sample_of(network, drawn)
    network(X)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"a": 0}, "without depth"),
        ({"a": 0, "depth": 1, "b": 2}, "unknown: b"),
        ({"a": 7, "depth": 1}, r"a=7: expected one of \[0, 1, 2\]"),
    ],
)
def test_what_is_no_architecture_of_it(architecture, message):
    network = supernet(Layers())
    for use in (sub_network, choose):
        with pytest.raises(SupernetError, match=message):
            use(network, architecture)


def test_what_is_no_supernet():
    with pytest.raises(SupernetError, match="kind='enas': expected one of sampled"):
        supernet(Layers(), "enas")
    with pytest.raises(SupernetError, match="a Linear is no ModelSpace"):
        supernet(nn.Linear(1, 1))
    with pytest.raises(SupernetError, match="a Linear is no supernet"):
        sub_network(nn.Linear(1, 1), {})
    with pytest.raises(SupernetError, match=r"holds 0 supernets \(none\): expected one"):
        find_supernet(nn.Linear(1, 1))
    with pytest.raises(SupernetError, match="holds 2 supernets"):
        find_supernet(nn.ModuleList([supernet(Layers()), supernet(Layers())]))
    with pytest.raises(SupernetError, match="kind=darts forwards the average"):
        choose(supernet(Layers(), "darts"), {"a": 0, "depth": 1})
    with pytest.raises(SupernetError, match="kind=sampled learns no architecture"):
        best_architecture(supernet(Layers()))


def test_a_width_is_refused_by_proxyless_with_its_name_and_what_serves():
    with pytest.raises(SupernetError, match=r"kind=proxyless: `stem` .* chooses a size \(width\).*kind=darts"):
        supernet(Widths(), "proxyless")
    with pytest.raises(SupernetError, match=r"kind=proxyless: `cell` \(Cell\) is a cell; kind=darts"):
        supernet(Cells(), "proxyless")


def test_inputs_without_a_number_or_joined_are_refused():
    class Inputs(nas.nn.ModelSpace):
        def __init__(self, **options):
            super().__init__()
            self.pick = nas.nn.InputChoice(2, label="pick", **options)

        def forward(self, x):
            return self.pick([x, x])

    with pytest.raises(SupernetError, match=r"`pick` .* may choose any number of inputs"):
        supernet(Inputs(n_chosen=None))
    with pytest.raises(SupernetError, match="joins its inputs by concat; kind=sampled serves"):
        supernet(Inputs(n_chosen=1, reduction="concat"), "darts")
    assert supernet(Inputs(n_chosen=1, reduction="concat"), "sampled") is not None


def test_one_label_with_two_choices_is_refused():
    class Twice(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            self.a = nas.nn.MutableLinear(2, nas.nni.choice("w", [2, 4]))
            self.b = nas.nn.MutableLinear(2, nas.nni.choice("w", [2, 8]))

        def forward(self, x):
            return self.a(x), self.b(x)

    with pytest.raises(SupernetError, match=r"Twice: .*same label"):
        supernet(Twice())
