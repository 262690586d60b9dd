"""NNI 3.0 on today's PyTorch and Lightning: each shim with the error that it mends. All of NNI is imported here."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

# What NNI imports of pytorch_lightning.
_LIGHTNING = (
    "",
    ".core",
    ".core.optimizer",
    ".strategies",
    ".trainer",
    ".trainer.states",
    ".utilities",
    ".utilities.combined_loader",
)


class NNIError(ImportError):
    """NNI is missing, or of a version that this was not written for."""


@cache
def nni_nas() -> SimpleNamespace:
    """Import NNI's architecture search and mend it.

    Returns:
        ``nni``, and of ``nni.nas``: ``nn`` (``nn.pytorch``), ``space``, ``strategy``, ``hub`` (``hub.pytorch``),
        ``oneshot`` (``oneshot.pytorch.strategy``) and ``supermodule`` (``oneshot.pytorch.supermodule``).

    Raises:
        NNIError: If NNI 3 is not installed.
    """
    try:
        nni = importlib.import_module("nni")
    except ImportError as error:
        raise NNIError(f"NNI is not installed ({error}): pip install lightning-optcore[nas]") from error
    if nni.__version__.split(".")[0] != "3":
        raise NNIError(f"nni {nni.__version__}: expected 3.0; pip install lightning-optcore[nas]")
    with warnings.catch_warnings(), lightning_as_pytorch_lightning():
        warnings.simplefilter("ignore")
        # The strategies before the one-shot part, whose classes are silently empty otherwise.
        names = {
            "nn": "nni.nas.nn.pytorch",
            "space": "nni.nas.space",
            "strategy": "nni.nas.strategy",
            "oneshot": "nni.nas.oneshot.pytorch.strategy",
            "supermodule": "nni.nas.oneshot.pytorch.supermodule",
            "operation": "nni.nas.oneshot.pytorch.supermodule.operation",
            "hub": "nni.nas.hub.pytorch",
        }
        parts = {name: importlib.import_module(module) for name, module in names.items()}
    parts.pop("operation").MixedOperation.freeze = _freeze_operation
    return SimpleNamespace(nni=nni, **parts)


@contextmanager
def lightning_as_pytorch_lightning() -> Iterator[None]:
    """Let ``pytorch_lightning`` mean ``lightning.pytorch`` while NNI is imported.

    Mends ``AssertionError: Lightning module must be an instance of ...``: modules of one package are refused by the
    other's trainer. It also spares loading the second package.
    """
    before = _loaded()
    for name in before:
        del sys.modules[name]
    for part in _LIGHTNING:
        sys.modules[f"pytorch_lightning{part}"] = importlib.import_module(f"lightning.pytorch{part}")
    try:
        yield
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> dict[str, Any]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name == "pytorch_lightning" or name.startswith("pytorch_lightning.")
    }


def _freeze_operation(self: Any, sample: Mapping[str, Any]) -> Any:
    """Return the chosen operation with its share of the supernet's weights.

    Mends ``Unexpected key(s) in state_dict: "bias"`` of layers without one.
    """
    arguments = {**self.init_arguments, **{name: one.freeze(sample) for name, one in self.mutable_arguments.items()}}
    operation = self.bound_type(**arguments)
    weights = {name: weight for name, weight in self.freeze_weight(**arguments).items() if weight is not None}
    operation.load_state_dict(weights)
    return operation
