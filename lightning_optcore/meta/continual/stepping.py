"""The user's own training step: joined by what a technique adds, or run aside without leaving a trace."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_optcore.measurement.forward_calls import replaced_forward
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.steps import Step, call_step

_OF_A_METRIC = ("_update_count", "_computed", "_forward_cache")
_INERT = ("log", "log_dict", "optimizers", "lr_schedulers", "manual_backward", "toggle_optimizer", "untoggle_optimizer")


def join_step(pl_module: Any, wrap: Callable[[Step], Step]) -> None:
    """Let ``wrap(step)`` stand in for the training step; several techniques join one after the other."""
    own = pl_module.training_step
    joined = wrap(own)
    # Lightning asks the signature of what is wrapped whether it takes batch_idx.
    joined.__wrapped__ = inspect.unwrap(own)  # type: ignore[attr-defined]
    pl_module.training_step = joined


def join_loss(
    pl_module: Any,
    added: Callable[[Any, list[Call]], Tensor],
    prepare: Callable[[Any], Any] = lambda batch: batch,
    own_weight: float = 1.0,
) -> None:
    """Add to the loss of every training step; with manual optimization to what is first handed to ``manual_backward``.

    Args:
        pl_module: The LightningModule.
        added: Of the batch and the calls that the step made, what is added.
        prepare: Of a batch, the one that the step gets.
        own_weight: Of the step's own loss.
    """
    own_backward = pl_module.manual_backward
    pending: list[tuple[Any, list[Call]]] = []

    def wrap(step: Step) -> Step:
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            batch = prepare(batch)
            with calls_recorded(pl_module) as calls:
                pending[:] = [(batch, calls)]
                output = step(batch, *args, **kwargs)
            if not pl_module.automatic_optimization or output is None:
                return output
            if isinstance(output, Mapping):
                return {**output, "loss": own_weight * output["loss"] + added(batch, calls)}
            return own_weight * output + added(batch, calls)

        return training_step

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        own_backward(own_weight * loss + added(*pending.pop()) if pending else loss, *args, **kwargs)

    join_step(pl_module, wrap)
    if not pl_module.automatic_optimization:
        pl_module.manual_backward = manual_backward


def leave_step(pl_module: Any) -> None:
    """Leave the training step as the class has it."""
    for name in ("training_step", "manual_backward"):
        pl_module.__dict__.pop(name, None)


class _InertOptimizer:
    """Stands in for an optimizer, or a scheduler, of a step that must change nothing."""

    def __init__(self, stands_for: Any) -> None:
        self._stands_for = stands_for

    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    @contextmanager
    def toggle_model(self, *_: Any, **__: Any) -> Iterator[None]:
        """Do nothing."""
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stands_for, name)


def _inert(found: Any) -> Any:
    if isinstance(found, list):
        return [_InertOptimizer(one) for one in found]
    return None if found is None else _InertOptimizer(found)


@contextmanager
def _without_trace(pl_module: Any) -> Iterator[list[Tensor]]:
    """Mute logs, still optimizers, and keep buffers and metrics; yields the losses of ``manual_backward``."""
    losses: list[Tensor] = []
    optimizers, schedulers = pl_module.optimizers, pl_module.lr_schedulers
    before = {name: pl_module.__dict__[name] for name in _INERT if name in pl_module.__dict__}
    # Another tensor takes a buffer's place: a graph that goes through the aside may still need the one it saw.
    buffers = [(child, dict(child._buffers)) for child in pl_module.modules()]
    for child, own in buffers:
        child._buffers.update({name: None if value is None else value.clone() for name, value in own.items()})
    metrics = [
        (metric, {name: copy.deepcopy(metric.__dict__.get(name)) for name in [*metric._defaults, *_OF_A_METRIC]})
        for metric in pl_module.modules()
        if isinstance(metric, Metric)
    ]
    stand_ins: dict[str, Callable[..., Any]] = {
        **{name: lambda *_, **__: None for name in _INERT},
        "optimizers": lambda *args, **kwargs: _inert(optimizers(*args, **kwargs)),
        "lr_schedulers": lambda: _inert(schedulers()),
        "manual_backward": lambda loss, *_, **__: losses.append(loss),
    }
    pl_module.__dict__.update(stand_ins)
    try:
        yield losses
    finally:
        for name in _INERT:
            del pl_module.__dict__[name]
        pl_module.__dict__.update(before)
        for child, own in buffers:
            child._buffers.update(own)
        for metric, state in metrics:
            metric.__dict__.update(state)


def loss_aside(pl_module: Any, batch: Any) -> Tensor | None:
    """Return the loss of the class's own training step on a batch; nothing is logged, counted or changed.

    Args:
        pl_module: A LightningModule with a Trainer.
        batch: On its device.

    Returns:
        The loss; of a step with manual optimization the sum of what it hands to ``manual_backward``; ``None`` if the
        step skips the batch.
    """
    step = type(pl_module).training_step.__get__(pl_module)
    with _without_trace(pl_module) as losses, pl_module.trainer.precision_plugin.train_step_context():
        output = call_step(step, batch, 0)
        if not pl_module.automatic_optimization:
            return torch.stack(losses).sum() if losses else None
        return output["loss"] if isinstance(output, dict) else output


def training_batches(trainer: Any, pl_module: Any) -> Iterator[Any]:
    """Yield the training batches once more, on the device; random numbers go on as if nobody had asked.

    Batches that the training's ``limit_train_batches`` leaves out are left out here too.
    """
    with isolate_rng():
        loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
        loader.limits = trainer.fit_loop._combined_loader.limits
        for batch, _, _ in loader:
            yield trainer.strategy.batch_to_device(batch, pl_module.device)


def batch_size_of(batch: Any) -> int:
    """Return the number of samples: the size of axis 0 of the first tensor that has one."""
    return Inputs((batch,)).batch_size


@dataclass
class Call:
    """One call, by a step, of a module with parameters that no other such module called."""

    name: str
    inputs: Inputs
    output: Any


@contextmanager
def calls_recorded(pl_module: nn.Module) -> Iterator[list[Call]]:
    """Record the outermost calls inside the context, in their order; they end in every form in ``forward``."""
    made: list[Call] = []
    depth = 0

    def recording(name: str, original: Step) -> Step:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                output = original(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                made.append(Call(name, Inputs(args, kwargs), output))
            return output

        return forward

    with ExitStack() as stack:
        for name, module in pl_module.named_modules():
            if next(module.parameters(), None) is not None:
                stack.enter_context(replaced_forward(module, recording(name, module.forward)))
        yield made


def check_network(pl_module: nn.Module, network: str | None, owner: str) -> None:
    """Check, before the first task is learned, that there is a submodule of this name.

    Raises:
        MisconfigurationException: If there is none.
    """
    if network is not None and network not in dict(pl_module.named_modules()):
        names = ", ".join(name for name, _ in pl_module.named_children())
        raise MisconfigurationException(f"{owner}.network={network}: no such submodule; expected one of {names}")


def last_call(calls: list[Call], network: str | None = None) -> Call:
    """Return the last call of a network, or of the last one that a step calls: the head's, where there are several.

    Raises:
        ValueError: If there is none.
    """
    if network is not None:
        calls = [call for call in calls if call.name == network]
    if not calls:
        raise ValueError(f"training_step does not call {network or 'a module with parameters'}")
    return calls[-1]


def last_logits(calls: list[Call], network: str | None = None) -> Tensor:
    """Return what :func:`last_call` gives; warn where another network, which may be meant, gives as much.

    Raises:
        ValueError: If that is no logits.
    """
    call = last_call(calls, network)
    found = logits_of(call.output)
    if found is None:
        shapes = [tuple(tensor.shape) for tensor in tensors_in(call.output)]
        raise ValueError(f"{call.name or 'the model'} gives {shapes}; expected logits (samples, classes)")
    others = {one.name: logits_of(one.output) for one in calls if one.name != call.name}
    rivals = [name for name, given in others.items() if given is not None and given.shape == found.shape]
    if network is None and rivals:
        rank_zero_warn(
            f"training_step calls {', '.join(sorted(rivals))} and {call.name}, whose outputs are of one shape: those "
            f"of {call.name}, the last one, are taken for the logits; network=... names another"
        )
    return found


def logits_of(output: Any) -> Tensor | None:
    """Return the logits (samples, classes, ...) of an output; ``None`` if it does not look like any."""
    if isinstance(output, dict):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    fits = isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and output.shape[1] > 1
    return output if fits else None
