"""What each option costs, from networks that were counted whole."""

from __future__ import annotations

import pytest
from oneshot_spaces import Cells, Layers, Widths, nas

from lightning_optcore.nas.cost_table import fitted_cost_table
from lightning_optcore.nas.differentiable_search import expected_cost_of_table
from lightning_optcore.nas.supernet import SupernetError, best_architecture, largest, probabilities, smallest, supernet


def of(table, architecture):
    return sum(costs[str(architecture[label])] for label, costs in table.costs.items())


@pytest.mark.parametrize("kind", ["darts", "proxyless"])
def test_costs_that_add_up_are_found_exactly(kind):
    network = supernet(Layers(), kind)
    prices = {"a": {0: 5.0, 1: 2.0, 2: 0.0}, "depth": {1: 1.0, 2: 3.0, 3: 10.0}}

    def cost(architecture):
        return 100.0 + sum(prices[label][option] for label, option in architecture.items())

    table = fitted_cost_table(network, cost)
    assert table.explained == pytest.approx(1.0)
    assert table.networks == 4 * 6
    for architecture in ({"a": 0, "depth": 3}, {"a": 2, "depth": 1}):
        assert of(table, architecture) == pytest.approx(cost(architecture))
    # As a search uses it: the expectation over what is probable.
    odds = probabilities(network)
    expected = sum(float(odds[label][one]) * price for label, costs in prices.items() for one, price in costs.items())
    assert float(expected_cost_of_table(table.costs, odds)) == pytest.approx(100.0 + expected, rel=1e-5)


def test_costs_that_do_not_add_up_are_nearly_found():
    """Parameters grow with the square of the width, times what else is chosen."""
    space = Widths()
    network = supernet(space, "darts")

    def parameters(architecture):
        return float(sum(one.numel() for one in space.freeze(architecture).parameters()))

    table = fitted_cost_table(network, parameters)
    assert 0.8 < table.explained < 1.0
    low, high = parameters(smallest(network)), parameters(largest(network))
    assert of(table, largest(network)) == pytest.approx(high, rel=0.3)
    assert of(table, largest(network)) > of(table, smallest(network))
    assert high > 3 * low


def test_options_that_make_no_difference_cost_the_same():
    table = fitted_cost_table(supernet(Layers(), "darts"), lambda _: 7.0)
    assert table.explained == 1.0
    assert {round(cost, 6) for costs in table.costs.values() for cost in costs.values()} == {3.5}


def test_an_input_and_a_size_are_named_as_the_supernet_names_them():
    class Space(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            self.pick = nas.nn.InputChoice(3, n_chosen=1, label="pick")
            self.conv = nas.nn.MutableConv2d(1, 1, nas.nni.choice("kernel", [(1, 3), (3, 3)]))

        def forward(self, x):
            return self.conv(self.pick([x, x, x]))

    network = supernet(Space(), "darts")
    table = fitted_cost_table(network, lambda one: 10.0 * one["pick"] + one["kernel"])
    assert set(table.costs["pick"]) == {"0", "1", "2"}
    assert set(table.costs["kernel"]) == {"(1, 3)", "(3, 3)"}
    assert table.explained == pytest.approx(1.0)
    assert table.costs["pick"]["2"] - table.costs["pick"]["0"] == pytest.approx(20.0)
    expected_cost_of_table(table.costs, probabilities(network))
    assert best_architecture(network).keys() == table.costs.keys()


def test_cells_have_no_cost_of_their_choices():
    with pytest.raises(SupernetError, match="weighs edges of cells rather than choices"):
        fitted_cost_table(supernet(Cells(), "darts"), lambda _: 1.0)
