"""How a module is run: compiled, or in another precision, while it and its weights' names stay the same."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_optcore.measurement.inputs import map_tensors, tensors_in
from lightning_optcore.measurement.modes import fused_attention_off

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Execution:
    """Stands in a module's ``forward``; copies and pickles of the module run likewise, each by itself.

    Args:
        module: The module that it runs.

    Attributes:
        compiled: Compile the forward for inference; training runs it as it is.
        failure: Why it could not be compiled here, or ``None``.
        autocast: Run inference in autocast to this type, or ``None``.
        cast: The weights are of this type: inputs come to it, outputs return; or ``None``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = module.__dict__.get("forward")
        self._compiled: Callable[..., Any] | None = None
        self.compiled = False
        self.failure: str | None = None
        self.autocast: torch.dtype | None = None
        self.cast: torch.dtype | None = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that it runs, whose signature it has."""
        own = self._own
        return own if own is not None else MethodType(type(self._module).forward, self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        lower = self.cast or self.autocast
        if lower is None:
            return self._run(*args, **kwargs)
        floats = (t.dtype for t in tensors_in([args, kwargs]) if t.is_floating_point() and t.dtype is not lower)
        wanted = next(floats, torch.float32)
        if self.cast is not None:
            args, kwargs = map_tensors(lambda t: _to(t, self.cast), (args, kwargs))
            output = self._run(*args, **kwargs)
        elif self._module.training:
            return self._run(*args, **kwargs)
        else:
            device = next((p.device.type for p in self._module.parameters()), "cpu")
            with fused_attention_off(), torch.autocast(device, self.autocast):
                output = self._run(*args, **kwargs)
        return map_tensors(lambda t: t.to(wanted) if t.dtype is lower else t, output)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.compiled or self._module.training or torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(self.__wrapped__)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.compiled, self._compiled = False, None
            self.failure = first_line(error)
            rank_zero_warn(f"torch.compile fails here, the module runs as it is: {self.failure}")
            return self.__wrapped__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle takes: all but the compiled code."""
        return {**self.__dict__, "_compiled": None}


def execution_of(module: nn.Module) -> Execution:
    """Return the execution of a module, a new one if it has none."""
    present = module.__dict__.get("forward")
    if not isinstance(present, Execution):
        present = Execution(module)
        module.forward = present
    return present


def tidy(module: nn.Module) -> None:
    """Take off an execution that changes nothing."""
    present = module.__dict__.get("forward")
    if isinstance(present, Execution) and not present.compiled and present.autocast is None and present.cast is None:
        _take_off(module, present)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring floating weights to a type; inputs and outputs of the module stay as they were."""
    module.to(dtype)
    execution_of(module).cast = dtype


def run_plainly(module: nn.Module) -> None:
    """Let a module and its submodules run as they are, with weights in single precision."""
    for child in module.modules():
        present = child.__dict__.get("forward")
        if isinstance(present, Execution):
            if present.cast is not None:
                child.to(torch.float32)
            _take_off(child, present)


def _take_off(module: nn.Module, present: Execution) -> None:
    del module.__dict__["forward"]
    if present._own is not None:
        module.forward = present._own


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
