"""NNI 3.0 on today's PyTorch and Lightning: each shim with the error that it mends. All of NNI is imported here."""

from __future__ import annotations

import importlib
import logging
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
        ``oneshot`` (``oneshot.pytorch.strategy``) and ``supermodule`` (``oneshot.pytorch.supermodule``); besides
        ``mutable`` (``nni.mutable``), ``profiler`` (``nni.nas.profiler.pytorch.flops``) and ``expressions``.

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
            "sampling": "nni.nas.oneshot.pytorch.supermodule.sampling",
            "expressions": "nni.nas.oneshot.pytorch.supermodule._expression_utils",
            "hub": "nni.nas.hub.pytorch",
            "profiler": "nni.nas.profiler.pytorch.flops",
            "mutable": "nni.mutable",
        }
        parts = {name: importlib.import_module(module) for name, module in names.items()}
        for part in ("base", "differentiable", "proxyless"):
            importlib.import_module(f"{names['supermodule']}.{part}")
    parts.pop("operation").MixedOperation.freeze = _freeze_operation
    # It logs every weight of a cell whenever an architecture is asked for.
    logging.getLogger("nni.nas.oneshot").setLevel(logging.WARNING)
    _mend_weighted_sum(parts["expressions"])
    _mend_cells(parts.pop("sampling").PathSamplingCell)
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


@contextmanager
def inheriting_weights() -> Iterator[None]:
    """Let layers without a choice keep their weights when a network is frozen.

    Mends that ``ParametrizedModule.freeze`` (``MutableConv2d(1, 8, 3)``) makes new ones, so that a sub-network of a
    proxyless supernet is partly untrained. Not for good: a network that is built alone has to begin anew.
    """
    base = nni_nas().nn.ParametrizedModule
    theirs = base.freeze

    def freeze(self: Any, sample: Mapping[str, Any]) -> Any:
        frozen = theirs(self, sample)
        if not self.simplify():
            frozen.load_state_dict(self.state_dict())
        return frozen

    base.freeze = freeze
    try:
        yield
    finally:
        base.freeze = theirs


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


def _mend_weighted_sum(expressions: Any) -> None:
    """Let the expected FLOPs of layers be computed where some have none.

    Mends ``TypeError: Expect type <class 'float'> but found <class 'int'>`` where Identity or pooling is a choice.
    """
    theirs = expressions.weighted_sum

    def weighted_sum(items: Any, weights: Any = None) -> Any:
        if all(isinstance(item, (int, float)) for item in items):
            items = [float(item) for item in items]
        return theirs(items, weights)

    expressions.weighted_sum = weighted_sum


def _mend_cells(cell: Any) -> None:
    """Let a supernet's cell become a cell of its own with its share of the weights.

    Mends ``NotImplementedError: PathSamplingCell does not support freeze.``
    """
    theirs = cell.mutate.__func__

    def mutate(cls: Any, module: Any, name: str, memo: Any, mutate_kwargs: Any) -> Any:
        made = theirs(cls, module, name, memo, mutate_kwargs)
        if made is not None:
            # Not as a submodule: its weights are not the supernet's.
            made.__dict__["_replaced"] = module
        return made

    cell.mutate = classmethod(mutate)
    cell.freeze = _freeze_cell


def _freeze_cell(self: Any, sample: Mapping[str, Any]) -> Any:
    replaced = self.__dict__["_replaced"]
    if replaced.merge_op != "all":
        raise NotImplementedError(
            f"cell {self.label}: merge_op={replaced.merge_op} has other outputs alone than within a supernet, so that "
            "no weights can be inherited; build it anew"
        )
    cell = replaced.freeze(sample)
    cell.preprocessor, cell.postprocessor = self.preprocessor, self.postprocessor
    for i, operations in enumerate(cell.ops, start=self.num_predecessors):
        for k, operation in enumerate(operations):
            source = sample[f"{self.label}/input_{i}_{k}"][0]
            weights = self.ops[i - self.num_predecessors][source][sample[f"{self.label}/op_{i}_{k}"]]
            operation.load_state_dict(weights.state_dict())
    return cell
