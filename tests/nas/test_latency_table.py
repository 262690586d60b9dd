"""The table of parts: what is one part, what is measured anew, what is kept, and how it adds up."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.nas import latency_table
from lightning_optcore.nas.latency_table import LatencyTable, parts_of, quiet_latencies

X = torch.randn(2, 3, 8, 8)


class Cell(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))
        self.third = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return torch.cat([self.second(x) + x, self.third(x)], dim=1).mean((2, 3))


class Functional(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.stride = stride

    def forward(self, x):
        return torch.relu(nn.functional.conv2d(x, self.weight, stride=self.stride))


@pytest.fixture
def by_hand(monkeypatch):
    """Every part takes 1 ms; the list says how many were timed at each time."""
    asked = []

    def quiet_times(calls, rounds, clock):
        for call in calls:
            call()
        asked.append(len(calls))
        return [1.0] * len(calls)

    monkeypatch.setattr(latency_table, "_quiet_times", quiet_times)
    monkeypatch.setattr(latency_table.time, "sleep", lambda seconds: None)
    return asked


def names(parts):
    return sorted(
        (key.get("module", key.get("function")).split("(")[0], count)
        for key, count in ((json.loads(key), count) for key, count in parts.counts.items())
    )


def test_parts_are_leaf_modules_and_the_functions_between_them():
    parts = parts_of(Cell(), Inputs.of(X))
    # The second and the third convolution are the same part.
    assert names(parts) == [
        ("Conv2d", 1),
        ("Conv2d", 2),
        ("ReLU", 1),
        ("torch.Tensor.add", 1),
        ("torch.Tensor.mean", 1),
        ("torch.cat", 1),
        ("torch.relu", 1),
    ]
    assert parts.containers == 2


def test_a_module_that_calls_no_other_is_one_part_by_all_that_it_depends_on():
    parts = parts_of(nn.Sequential(Functional(1), nn.ReLU()), Inputs.of(X))
    assert names(parts) == [("Functional", 1), ("ReLU", 1)]
    keys = {next(iter(parts_of(Functional(stride), Inputs.of(X)).counts)) for stride in (1, 2)}
    assert len(keys) == 2
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    tokens = {name: torch.randn(1, 5, 8) for name in ("query", "key", "value")}
    assert names(parts_of(attention, Inputs.of(tokens))) == [("MultiheadAttention", 1)]


def test_the_prediction_is_the_scaled_sum_and_an_overhead_for_each_container(by_hand, monkeypatch):
    table = LatencyTable()
    assert table.predict(Cell(), X) == 8.0
    assert by_hand == [7] * 3
    # A second network of the same parts measures nothing; of another width, whatever is another, beside the first ones.
    table.predict(Cell(), X)
    assert by_hand == [7] * 3
    table.predict(Cell(8), X)
    assert by_hand[3:] == [14] and len(table) == 14

    def whole(networks, inputs, **_):
        return [3 * parts_of(one, inputs).counts.total() + 10 * parts_of(one, inputs).containers for one in networks]

    monkeypatch.setattr(latency_table, "quiet_latencies", whole)
    deep = nn.Sequential(*(nn.ReLU() for _ in range(20)))
    table.fit([Cell(), deep, nn.Sequential(deep)], X)
    assert table.factors(X) == (pytest.approx(3.0), pytest.approx(10.0))
    assert table.predict(Cell(), X) == pytest.approx(44.0)
    # Inputs of another shape are another matter.
    assert table.factors(torch.randn(1, 3, 8, 8)) == (1.0, 0.0)


class Machine:
    """Times every call by how fast it is at that sitting: what was timed first, and what is new."""

    def __init__(self, monkeypatch, *sittings):
        self.sittings = list(sittings)
        self.paused = []
        monkeypatch.setattr(latency_table, "_quiet_times", self.quiet_times)
        monkeypatch.setattr(latency_table.time, "sleep", self.paused.append)

    def quiet_times(self, calls, rounds, clock):
        first, new = self.sittings.pop(0) if len(self.sittings) > 1 else self.sittings[0]
        return [first] * len(calls) if new is None else [new] * (len(calls) - 1) + [first]


def test_while_the_machine_is_slow_new_parts_are_timed_again(monkeypatch):
    machine = Machine(monkeypatch, (2.0, None), (1.0, None), (1.5, None), (1.4, 9.0), (1.2, 6.0), (1.05, 7.0))
    table = LatencyTable()
    one, other = nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())
    # Of three sittings the fastest; then until the first part is fast again.
    assert table.predict(one, X) == 1.0
    assert table.predict(other, X) == 6.0
    assert len(machine.paused) == 4
    assert table.predict(one, X) == 1.0


def test_a_machine_that_stays_slow_is_waited_for_only_so_long(monkeypatch):
    machine = Machine(monkeypatch, (1.0, None), (1.0, None), (1.0, None), (2.0, 8.0))
    table = LatencyTable()
    table.predict(nn.Sequential(nn.ReLU()), X)
    assert table.predict(nn.Sequential(nn.Tanh()), X) == 8.0
    assert sum(machine.paused) == pytest.approx(8.0, abs=0.5)
    waited = len(machine.paused)
    assert table.predict(nn.Sequential(nn.Sigmoid()), X) == 8.0
    assert len(machine.paused) == waited


def test_a_table_that_has_timed_goes_to_another_process(by_hand):
    table = LatencyTable()
    table.predict(Cell(), X)
    other = pickle.loads(pickle.dumps(table))
    assert other.predict(Cell(), X) == table.predict(Cell(), X)
    assert by_hand == [7] * 3
    assert other.predict(Cell(8), X) == table.predict(Cell(8), X)


def test_the_store_keeps_parts_and_factors(by_hand, tmp_path, monkeypatch):
    store = tmp_path / "store.db"
    table = LatencyTable(store)
    table.fit([Cell()], X)
    monkeypatch.setattr(latency_table, "_quiet_times", lambda calls, rounds, clock: pytest.fail() if calls else [])
    again = LatencyTable(store)
    assert len(again) == 7 and again.factors(X) == table.factors(X)
    assert again.predict(Cell(), X) == table.predict(Cell(), X)
    assert len(LatencyTable(store, num_threads=2)) == 7
    with pytest.raises(pytest.fail.Exception):
        LatencyTable(store, num_threads=2).predict(Cell(), X)


def test_networks_stay_as_they_were():
    network = nn.Sequential(Cell(), nn.BatchNorm1d(8)).train()
    network[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    LatencyTable(rounds=2).fit([network], X)
    assert network.training and network[1].training and not network[0].first.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in network.modules())
    network(X).sum().backward()


def test_it_ranks_networks_as_measurement_does():
    torch.manual_seed(0)
    networks = [nn.Sequential(*(nn.Linear(width, width) for _ in range(3))) for width in (16, 400, 1600)]
    table, measured = LatencyTable(rounds=5), []
    for network in networks:
        example = torch.randn(8, network[0].in_features)
        measured.append((quiet_latencies([network], example, rounds=5)[0], table.predict(network, example)))
    assert np.all(np.diff(np.array(measured), axis=0) > 0)


def test_wrong_use_says_what_would_be_right():
    with pytest.raises(ValueError, match="rounds=0: expected a whole number of at least 1"):
        LatencyTable(rounds=0)
    with pytest.raises(ValueError, match=r"networks=.*e\.g\. eight"):
        LatencyTable().fit([], X)
    with pytest.raises(ValueError, match="measured has 2 times: expected one for each of 1 networks"):
        LatencyTable().fit([Cell()], X, [1.0, 2.0])
