"""Find out which module a LightningModule's steps really call, with what, and call another in its place.

A step may call ``self(x)``, ``self.forward(x)`` or ``self.net(x)``. All of them end in the instance's
``forward``, so an instance attribute of that name sees every call; hooks would miss the second form.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_optcore.measurement.inputs import Inputs

# Marks a forward of ours; its value is the instance's own forward that it stands in for, ``None`` for the class's.
_PREVIOUS = "_optcore_previous_forward"


def unwrap_forwards(copied: nn.Module) -> None:
    """Take off, from a copy of a module, what was put around the forwards of the original.

    A copy shares these functions with its original, and would call the original's layers.
    """
    for child in copied.modules():
        while hasattr(child.__dict__.get("forward"), _PREVIOUS):
            previous = getattr(child.__dict__.pop("forward"), _PREVIOUS)
            if previous is not None:
                child.__dict__["forward"] = previous


def detached_copy(module: nn.Module) -> nn.Module:
    """Return a copy that shares nothing with its original but, of a LightningModule, the Trainer."""
    trainer = module.__dict__.get("_trainer")
    copied = copy.deepcopy(module, {id(trainer): trainer} if trainer is not None else {})
    unwrap_forwards(copied)
    if "_metric_attributes" in copied.__dict__:
        # Lightning finds a logged metric's name by its identity, which is another in the copy.
        copied.__dict__["_metric_attributes"] = None
    return copied


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let every call of ``module`` run ``forward`` inside the context."""
    had_own = "forward" in module.__dict__
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = previous  # type: ignore[assignment]
        else:
            module.__dict__.pop("forward", None)


@dataclass
class ForwardRecorder:
    """Records the outermost calls of a module and of its submodules that hold parameters.

    Args:
        root: The LightningModule. Its name is ``""``.
        max_samples: Stop recording a module's inputs after this many samples.

    Attributes:
        inputs: Recorded inputs (on the CPU) per name of the called module.
        calls: Number of outermost calls per name.
    """

    root: nn.Module
    max_samples: int = 1
    inputs: dict[str, list[Inputs]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _wrapped: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)
    _depth: int = 0

    def attach(self) -> None:
        """Start to record."""
        for name, module in self.root.named_modules():
            if next(module.parameters(), None) is not None:
                self._wrap(name, module)

    def detach(self) -> None:
        """Stop to record and leave the modules as they were; recorders may end in any order."""
        for module, forward in self._wrapped:
            _unlink(module, forward)
        self._wrapped.clear()
        self._depth = 0

    def __enter__(self) -> ForwardRecorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def samples(self) -> int:
        """Number of samples recorded of the most recorded module."""
        return max((sum(i.batch_size for i in inputs) for inputs in self.inputs.values()), default=0)

    def target(self) -> str | None:
        """Return the name of the called module with the most parameters; ``None`` if none was called."""
        modules = dict(self.root.named_modules())
        recorded = [name for name, inputs in self.inputs.items() if inputs]
        return max(recorded, key=lambda name: _num_parameters(modules[name]), default=None)

    def _wrap(self, name: str, module: nn.Module) -> None:
        kind, original, first = type(module), module.forward, "forward" not in module.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self._record(name, Inputs(args, kwargs))
            self._depth += 1
            try:
                previous = getattr(forward, _PREVIOUS)
                if previous is not None:
                    return previous(*args, **kwargs)
                # A technique may have given the module another class since.
                own = original if first and type(module) is kind else functools.partial(type(module).forward, module)
                return own(*args, **kwargs)
            finally:
                self._depth -= 1

        setattr(forward, _PREVIOUS, module.__dict__.get("forward"))
        module.forward = forward
        self._wrapped.append((module, forward))

    def _record(self, name: str, inputs: Inputs) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        kept = self.inputs.setdefault(name, [])
        if not any(tensor.ndim for tensor in inputs.tensors()):
            return
        if sum(batch.batch_size for batch in kept) < self.max_samples:
            kept.append(inputs.detached_cpu())


def _unlink(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Take a forward of ours out of the chain of those of a module."""
    above, current = None, module.__dict__.get("forward")
    while current is not None and current is not forward:
        above, current = current, getattr(current, _PREVIOUS, None)
    if current is None:
        return
    previous = getattr(forward, _PREVIOUS)
    if above is not None:
        setattr(above, _PREVIOUS, previous)
    elif previous is not None:
        module.forward = previous
    else:
        del module.__dict__["forward"]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def submodule(root: nn.Module, name: str) -> nn.Module:
    """Return the submodule called ``name``; ``""`` is the root itself."""
    return root.get_submodule(name) if name else root


@dataclass
class CallCounter:
    """How often a replacement was called."""

    calls: int = 0


@contextmanager
def counted_replacement(root: nn.Module, name: str, replacement: Callable[..., Any]) -> Iterator[CallCounter]:
    """Run ``replacement`` in place of the submodule ``name`` of ``root``; yields the count of its calls."""
    counter = CallCounter()

    def forward(*args: Any, **kwargs: Any) -> Any:
        counter.calls += 1
        return replacement(*args, **kwargs)

    with replaced_forward(submodule(root, name), forward):
        yield counter
