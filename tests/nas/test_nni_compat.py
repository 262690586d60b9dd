"""NNI's shims: what each mends fails without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_optcore.nas import _nni_compat
from lightning_optcore.nas._nni_compat import NNIError, nni_nas


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)


def test_nni_takes_modules_of_lightning():
    told = run(
        "import sys; from lightning_optcore.nas._nni_compat import nni_nas; nni_nas()\n"
        "from nni.nas.evaluator.pytorch import LightningModule; from lightning.pytorch import LightningModule as ours\n"
        "print(issubclass(LightningModule, ours), 'pytorch_lightning' in sys.modules)"
    )
    assert told.stdout.split() == ["True", "False"], told.stderr
    without = run(
        "import nni.nas.strategy\nfrom nni.nas.evaluator.pytorch import LightningModule\n"
        "from lightning.pytorch import LightningModule as ours\nprint(issubclass(LightningModule, ours))"
    )
    assert without.stdout.split() != ["True"]


# What goes wrong without our shims: each prints its error, and then its result with them.
BROKEN = """
import sys, torch
from torch import nn
from lightning_optcore.nas._nni_compat import inheriting_weights, lightning_as_pytorch_lightning, nni_nas
with lightning_as_pytorch_lightning():
    import nni, nni.nas.nn.pytorch as nas, nni.nas.strategy
    import nni.nas.oneshot.pytorch.strategy as oneshot
    from nni.nas.profiler.pytorch.flops import FlopsProfiler
    from nni.nas.oneshot.pytorch.supermodule import _expression_utils

class Bias(nas.ModelSpace):
    def __init__(self):
        super().__init__()
        width = nni.choice("width", [4, 8])
        self.one = nas.MutableConv2d(3, width, 3, bias=False)
        self.two = nas.MutableConv2d(width, 2, 1, bias=False)
    def forward(self, x):
        return self.two(self.one(x))

class Skip(nas.ModelSpace):
    def __init__(self):
        super().__init__()
        self.pick = nas.LayerChoice([nn.Conv2d(2, 2, 1), nn.Identity()], label="pick")
        self.fixed = nas.MutableConv2d(2, 2, 1)
    def forward(self, x):
        return self.fixed(self.pick(x))

class Cells(nas.ModelSpace):
    def __init__(self):
        super().__init__()
        self.cell = nas.Cell({"skip": lambda node, op, source: nn.Conv2d(2, 2, 1)}, num_nodes=1, label="cell")
    def forward(self, x):
        return self.cell([x])

def bias():
    network = oneshot.RandomOneShot().mutate_model(Bias())
    alone = network.freeze({"width": 4})
    return torch.equal(alone.one.weight, network.one.weight[:4])

def weighted_sum():
    cost = FlopsProfiler(Skip(), torch.zeros(1, 2, 4, 4)).expression
    return float(_expression_utils.expression_expectation(cost, {"pick": {0: 0.5, 1: 0.5}})) > 0

def cells():
    network = oneshot.RandomOneShot().mutate_model(Cells())
    alone = network.freeze({"cell/op_1_0": "skip", "cell/input_1_0": [0]})
    return torch.equal(alone.cell.ops[0][0].weight, network.cell.ops[0][0]["skip"].weight)

def kept():
    network = oneshot.Proxyless().mutate_model(Skip())
    return torch.equal(network.freeze({"pick": 0}).fixed.weight, network.fixed.weight)

def tell(check):
    try:
        print(check.__name__, check())
    except Exception as error:
        print(check.__name__, type(error).__name__, " ".join(str(error).split())[:300])

for check in (bias, weighted_sum, cells, kept):
    tell(check)
nni_nas()
print("mended")
for check in (bias, weighted_sum, cells):
    tell(check)
with inheriting_weights():
    tell(kept)
tell(kept)
"""


def test_what_a_shim_mends_fails_without_it():
    told = run(BROKEN)
    before, _, after = told.stdout.partition("mended\n")
    # NNI logs among it.
    lines = [line for line in before.splitlines() if not line.startswith("[")]
    assert len(lines) == 4, told.stderr
    assert lines[0].startswith("bias RuntimeError") and 'Unexpected key(s) in state_dict: "bias"' in lines[0]
    assert lines[1].startswith("weighted_sum ValueError Error when summing items")
    assert lines[2] == "cells NotImplementedError PathSamplingCell does not support freeze."
    assert lines[3] == "kept False"
    # The last is mended within its context only.
    lines = [line for line in after.splitlines() if not line.startswith("[")]
    assert lines == ["bias True", "weighted_sum True", "cells True", "kept True", "kept False"], told.stderr


def test_nni_that_is_missing_or_another_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", None)
    nni_nas.cache_clear()
    try:
        with pytest.raises(NNIError, match=r"pip install lightning-optcore\[nas\]"):
            nni_nas()
        monkeypatch.setitem(sys.modules, "nni", type(sys)("nni"))
        monkeypatch.setattr(sys.modules["nni"], "__version__", "2.10", raising=False)
        with pytest.raises(NNIError, match=r"nni 2\.10: expected 3\.0"):
            _nni_compat.nni_nas()
    finally:
        nni_nas.cache_clear()
