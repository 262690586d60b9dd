from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import run_ranks
from torch import nn

from lightning_optcore.distributed.peers import check_peers, describe, difference


def heard(widths: list[int], versions: list[str]) -> str:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world_size, is_master=rank == 0)
    torch.__version__ = versions[rank]
    model = nn.Sequential()
    model.add_module("body", nn.Linear(64, widths[rank]))
    model.add_module("head", nn.Linear(widths[rank], 10))
    said = "equal"
    try:
        check_peers(model, store, rank, world_size)
    except MisconfigurationException as error:
        said = str(error)
    # Rank 0 serves the store.
    store.set(f"done/{rank}", "")
    if rank == 0:
        store.wait([f"done/{i}" for i in range(world_size)])
    return said


def test_all_ranks_name_the_ranks_and_the_first_parameter_that_differ():
    ranks = run_ranks(heard, [128, 64, 128], ["2.13"] * 3, world_size=3)
    assert set(ranks) == {
        "the ranks do not run the same: rank 1 has body.weight (64, 64) float32 where rank 0 has (128, 64) float32"
    }


def test_all_ranks_name_versions_that_differ():
    ranks = run_ranks(heard, [64, 64], ["2.13", "2.12"])
    assert set(ranks) == {"the ranks do not run the same: rank 1 has torch 2.12 where rank 0 has 2.13"}


def test_equal_ranks_are_content():
    assert run_ranks(heard, [64, 64], ["2.13"] * 2) == ["equal", "equal"]


@pytest.mark.parametrize(
    ("zero", "other", "expected"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2).double(), "has weight (2, 2) float64 where rank 0 has (2, 2) float32"),
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), "has no bias, which rank 0 has"),
        (nn.Linear(2, 2, bias=False), nn.Linear(2, 2), "has bias, which rank 0 has not"),
        (nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), "has no running_mean, which rank 0 has"),
        (nn.LazyLinear(2), nn.Linear(2, 2), "has weight (2, 2) float32 where rank 0 has (uninitialized) float32"),
        (
            nn.ModuleDict({"a": nn.ReLU(), "b": nn.Linear(1, 1, bias=False), "c": nn.Linear(1, 1, bias=False)}),
            nn.ModuleDict({"a": nn.ReLU(), "c": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}),
            "has its parameters in another order than rank 0",
        ),
    ],
)
def test_what_differs_first_is_said(zero, other, expected):
    assert difference(describe(zero), describe(other)) == expected


def test_classes_of_optimizers_are_compared():
    model = nn.Linear(2, 2)
    adam, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    said = difference(describe(model, [adam]), describe(model, [sgd]))
    assert said == "has optimizers ['torch.optim.sgd.SGD'] where rank 0 has ['torch.optim.adam.Adam']"
