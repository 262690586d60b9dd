"""NNI's shims: each fails without what it mends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_optcore.nas import _nni_compat
from lightning_optcore.nas._nni_compat import NNIError, nni_nas

needs_nni = pytest.mark.skipif(not __import__("importlib").util.find_spec("nni"), reason="the extra nas")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)


@needs_nni
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


@needs_nni
def test_a_sub_network_without_bias_inherits_its_weights(monkeypatch):
    nas = nni_nas()

    class Space(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            width = nas.nni.choice("width", [4, 8])
            self.one = nas.nn.MutableConv2d(3, width, 3, bias=False)
            self.two = nas.nn.MutableConv2d(width, 2, 1, bias=False)

        def forward(self, x):
            return self.two(self.one(x))

    supernet = nas.oneshot.RandomOneShot().mutate_model(Space())
    network = supernet.freeze({"width": 4})
    assert network(torch.randn(1, 3, 8, 8)).shape == (1, 2, 6, 6)
    assert network.one.weight.shape == (4, 3, 3, 3)


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
