"""Limits before training: counted as the yardstick counts, relative excess, and what to do where nothing fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optcore.measurement import measure
from lightning_optcore.nas.adaptive_evolution import AdaptiveEvolution
from lightning_optcore.nas.constraints import Constraints
from lightning_optcore.search import SearchError, Space

EXAMPLE = torch.zeros(2, 3, 8, 8)


def build(architecture):
    width = architecture["width"]
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))


def test_costs_are_those_of_the_yardstick():
    measured = measure(build({"width": 4}), EXAMPLE, batch_sizes=(1,), rounds=1)
    costs = Constraints({}, build, EXAMPLE).costs({"width": 4})
    assert costs == {"params": measured.params, "flops": measured.flops, "size_bytes": measured.size_bytes}


def test_flops_need_not_be_counted():
    quick = Constraints({"params": 500}, build, EXAMPLE, count_flops=False)
    costs = Constraints({}, build, EXAMPLE).costs({"width": 4})
    assert quick.costs({"width": 4}) == {name: value for name, value in costs.items() if name != "flops"}
    with pytest.raises(SearchError, match=r"constraints.flops: nothing counts them"):
        Constraints({"flops": 500}, build, EXAMPLE, count_flops=False)


def test_the_violation_is_the_sum_of_relative_excesses():
    costs = Constraints({}, build, EXAMPLE).costs({"width": 4})
    limits = {"params": costs["params"] / 2, "flops": costs["flops"] / 1.5, "size_bytes": costs["size_bytes"]}
    constraints = Constraints(limits, build, EXAMPLE)
    assert constraints({"width": 4}) == {
        "params": (costs["params"], limits["params"]),
        "flops": (costs["flops"], limits["flops"]),
    }
    assert constraints.violation({"width": 4}) == pytest.approx(1.5)
    assert constraints.violation({"width": 1}) == 0


def test_latency_is_predicted_from_the_network():
    constraints = Constraints(
        {"latency_ms": 2.0}, build, EXAMPLE, latency=lambda network, example: float(network[0].out_channels)
    )
    assert constraints({"width": 3}) == {"latency_ms": (3.0, 2.0)}
    assert constraints.costs({"width": 3})["latency_ms"] == 3.0
    assert constraints({"width": 2}) == {}


def test_where_nothing_fits_the_smallest_is_said():
    constraints = Constraints({"params": 100}, build, EXAMPLE)
    constraints.check_met()
    for width in (4, 2, 3):
        assert constraints({"width": width})
    with pytest.raises(
        SearchError, match=r"no architecture of 3 .*params=100: the smallest found is 786 \({'width': 2"
    ):
        constraints.check_met()
    roomy = Constraints({"params": 800}, build, EXAMPLE)
    assert roomy({"width": 4}) and not roomy({"width": 2})
    roomy.check_met()


def test_a_network_is_built_once_and_leaves_the_random_numbers_alone():
    built = []

    def counting(architecture):
        built.append(architecture)
        return build(architecture)

    constraints = Constraints({"params": 100}, counting, EXAMPLE)
    state = torch.get_rng_state()
    constraints({"width": 2}), constraints.violation({"width": 2}), constraints.costs({"width": 2})
    assert built == [{"width": 2}]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_known_before_training_serves_the_search():
    constraints = Constraints({"params": 2000}, build, EXAMPLE)
    space = Space({"width": "range(1,17)"}, constraints=[lambda params: not constraints(params)])
    searcher = AdaptiveEvolution(
        space, ["maximize", "minimize"], known_costs=lambda params: {1: constraints.costs(params)["params"]}
    )
    while candidates := searcher.ask():
        width = candidates[0].params["width"]
        searcher.tell(candidates[0], [width**0.5, constraints.costs({"width": width})["params"]])
    assert sorted(trial.params["width"] for trial in searcher.trials) == [1, 2, 3, 4, 5]


def test_wrong_limits_say_what_would_be_right():
    with pytest.raises(SearchError, match=r"constraints\.macs: expected one of params, flops"):
        Constraints({"macs": 1}, build, EXAMPLE)
    for limit in (0, -1, float("nan"), True, "2"):
        with pytest.raises(SearchError, match=r"constraints\.params=.*: expected a number above 0"):
            Constraints({"params": limit}, build, EXAMPLE)
    with pytest.raises(SearchError, match=r"constraints\.latency_ms: nothing predicts it"):
        Constraints({"latency_ms": 1.0}, build, EXAMPLE)
