"""Under two gloo ranks: those without random numbers do what one process does, the others end with equal weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_of_continual_tasks import ALIKE, OWN_SAMPLES
from torch.utils._pytree import tree_leaves

SCRIPT = Path(__file__).parent / "ranks_of_continual_tasks.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process and each of two ranks end with."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in ("1", "2"):
        done = subprocess.run(
            ["timeout", "-s", "KILL", "200", sys.executable, str(SCRIPT), str(folder), ranks],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1")}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", [*ALIKE, *OWN_SAMPLES])
def test_ranks_end_with_the_same_weights_and_forget_less(found, name):
    first, second = found["2_0"], found["2_1"]
    for key, value in first[name]["weights"].items():
        assert torch.equal(value, second[name]["weights"][key]), key
    if name != "nothing":
        assert first[name]["accuracy"] > first["nothing"]["accuracy"] + 0.05


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ALIKE)
def test_ranks_do_what_one_process_does(found, name):
    for rank in ("2_0", "2_1"):
        pairs = zip(tree_leaves(found["1_0"][name]), tree_leaves(found[rank][name]), strict=True)
        for one, two in pairs:
            if isinstance(one, torch.Tensor):
                assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)
            else:
                assert one == pytest.approx(two, abs=0.02)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", OWN_SAMPLES)
def test_each_rank_keeps_samples_of_its_own(found, name):
    one, two = (found[rank][name]["callbacks"][0]["buffer"] for rank in ("2_0", "2_1"))
    assert len(one["keys"]) == len(two["keys"]) == 100
    assert not torch.equal(one["values"][0], two["values"][0])
