"""A module's own step as a loss that leaves no trace, and what it would have logged.

Inside the transforms of ``torch.func`` a step may neither log nor count: what it hands to ``self.log`` and to
torchmetrics goes out beside the loss, and is logged and counted afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torchmetrics import Metric, MetricCollection

from lightning_optcore.measurement.steps import Step, call_step
from lightning_optcore.meta.tasks import MetaLearningError, part

_Metric = Metric | MetricCollection


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands among those that went out."""

    index: int


@dataclass(frozen=True)
class _Counted:
    """A call of a metric."""

    metric: _Metric
    leaves: Sequence[Any]
    structure: TreeSpec
    only_update: bool


@dataclass(frozen=True)
class _Result:
    """The result of a call of a metric, and its name where the metric gives several."""

    call: int
    name: str | None


@dataclass(frozen=True)
class _Logged:
    name: str
    value: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass
class _Record:
    tensors: list[Tensor] = field(default_factory=list)
    counted: list[_Counted] = field(default_factory=list)
    logged: list[_Logged] = field(default_factory=list)
    results: dict[int, _Result] = field(default_factory=dict)
    # Their identities are keys: they must not be collected.
    stand_ins: list[Tensor] = field(default_factory=list)


class RecordedStep:
    """A step of a LightningModule as a function of a batch, which logs nothing by itself.

    Args:
        pl_module: The module.
        step: Its ``training_step``, ``validation_step`` or the like, bound.

    Attributes:
        batch_idx: What the step is told.
        dataloader_idx: What the step is told.
    """

    def __init__(self, pl_module: LightningModule, step: Step) -> None:
        self._pl_module = pl_module
        self._step = step
        self._record = _Record()
        self.batch_idx = 0
        self.dataloader_idx = 0

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss of a batch and, beside it, what is to be logged: a ``loss_fn`` that ``has_aux``.

        Raises:
            MetaLearningError: If the step returns no loss.
        """
        output, tensors = self.output(module, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise MetaLearningError(f"training_step returned {type(output).__name__}: expected the loss")
        return loss, tensors

    def output(self, module: nn.Module, batch: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Return what the step returns and, beside it, what is to be logged."""
        self._record = _Record()
        with _recorded(self._pl_module, self._record):
            output = call_step(self._step, batch, self.batch_idx, self.dataloader_idx)
        return output, tuple(self._record.tensors)

    def log(self, aux: Any, count: int, prefix: str = "", *, keep_metrics: bool = True) -> None:
        """Log, as means over tasks, what the step wanted to log, and count what its metrics were given.

        Args:
            aux: What went out beside the losses: tensors with the tasks along the first axis, or a list.
            count: How many tasks there are.
            prefix: Stands before all names.
            keep_metrics: Whether the metrics count it; else each task is measured alone.
        """
        record = self._record
        tasks = [part(aux, i) for i in range(count)] if aux else [()] * count
        tasks = [task for task in tasks if len(task) == len(record.tensors)]
        results = [[_measured(call, task, keep_metrics) for task in tasks] for call in record.counted]
        for logged in record.logged:
            value = logged.value
            if isinstance(value, _Place):
                value = torch.stack([task[value.index].float() for task in tasks]).mean()
            elif isinstance(value, _Result):
                value = _mean_result(results[value.call], value.name)
            elif isinstance(value, (Metric, MetricCollection)) and not keep_metrics:
                calls = [i for i, call in enumerate(record.counted) if call.metric is value]
                value = _mean_result(results[calls[-1]], None) if calls else None
            if value is not None:
                options = {"batch_size": len(tasks), **logged.options}
                self._pl_module.log(f"{prefix}{logged.name}", value, *logged.arguments, **options)


@contextmanager
def _recorded(pl_module: LightningModule, record: _Record) -> Iterator[None]:
    def log(name: str, value: Any, *arguments: Any, **options: Any) -> None:
        if id(value) in record.results:
            value = record.results[id(value)]
        elif isinstance(value, Tensor):
            record.tensors.append(value)
            value = _Place(len(record.tensors) - 1)
        record.logged.append(_Logged(name, value, arguments, options))

    def counting(metric: _Metric, only_update: bool) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            places: list[Any] = []
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    record.tensors.append(leaf)
                places.append(_Place(len(record.tensors) - 1) if isinstance(leaf, Tensor) else leaf)
            record.counted.append(_Counted(metric, places, structure, only_update))
            return None if only_update else _stand_in(metric, record)

        return count

    replacements: list[tuple[Any, str, Any]] = [(pl_module, "log", log)]
    for metric in _outermost_metrics(pl_module):
        replacements += [(metric, "forward", counting(metric, False)), (metric, "update", counting(metric, True))]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(replaced(owner, name, replacement))
        yield


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Let an object have another attribute for a while."""
    missing = object()
    earlier = owner.__dict__.get(name, missing)
    owner.__dict__[name] = replacement
    try:
        yield
    finally:
        if earlier is missing:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = earlier


def _outermost_metrics(module: nn.Module) -> list[_Metric]:
    if isinstance(module, (Metric, MetricCollection)):
        return [module]
    return [metric for child in module.children() for metric in _outermost_metrics(child)]


def _stand_in(metric: _Metric, record: _Record) -> Any:
    """Return what takes the place of a metric's result until that is known: it may be logged, not computed with."""
    call = len(record.counted) - 1

    def one(name: str | None) -> Tensor:
        tensor = torch.full((), torch.nan)
        record.stand_ins.append(tensor)
        record.results[id(tensor)] = _Result(call, name)
        return tensor

    return {str(name): one(str(name)) for name in metric} if isinstance(metric, MetricCollection) else one(None)


def _measured(call: _Counted, task: Sequence[Tensor], keep: bool) -> Any:
    leaves = [task[leaf.index] if isinstance(leaf, _Place) else leaf for leaf in call.leaves]
    args, kwargs = tree_unflatten(leaves, call.structure)
    metric = call.metric
    if not keep:
        metric = metric.clone()
        metric.reset()
    elif call.only_update:
        metric.update(*args, **kwargs)
        return None
    return metric(*args, **kwargs)


def _mean_result(results: Sequence[Any], name: str | None) -> Any:
    found = [result[name] if name is not None else result for result in results]
    if not found or not all(isinstance(one, Tensor) and one.numel() == 1 for one in found):
        return None
    return torch.stack([one.detach().float().reshape(()) for one in found]).mean()
