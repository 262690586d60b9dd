"""The inputs of a forward pass as data: nested structures, batches of another size, other devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in nested dicts, lists and tuples; other leaves stay.

    Example:
        >>> map_tensors(lambda t: t.shape, {"x": [torch.zeros(2, 3)], "flag": True})
        {'x': [torch.Size([2, 3])], 'flag': True}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested structure, depth first, in the order of its containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _batch_axis(tensor: Tensor, batch_size: int) -> int | None:
    """Return the first axis of ``batch_size``: 0 nearly always, 1 for the state of a recurrent net."""
    return next((axis for axis, size in enumerate(tensor.shape) if size == batch_size), None)


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one call of a model.

    Args:
        args: Positional arguments; may nest dicts, lists and tuples.
        kwargs: Keyword arguments; may nest likewise.

    Example:
        >>> inputs = Inputs.of({"ids": torch.arange(6).reshape(2, 3), "scale": 2.0})
        >>> inputs.batch_size, inputs.resized(5).kwargs["ids"].shape
        (2, torch.Size([5, 3]))
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """Read ``Inputs``, a dict of keyword arguments, a tuple of positional ones, or a tensor."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Mapping):
            return cls(kwargs=dict(example))
        if isinstance(example, (tuple, list)):
            return cls(args=tuple(example))
        return cls(args=(example,))

    def tensors(self) -> list[Tensor]:
        """Return the tensors, positional first."""
        return [*tensors_in(self.args), *tensors_in(self.kwargs)]

    @property
    def batch_size(self) -> int:
        """Size of axis 0 of the first tensor that has one.

        Raises:
            ValueError: If no tensor has an axis.
        """
        for tensor in self.tensors():
            if tensor.ndim:
                return tensor.shape[0]
        raise ValueError("example_inputs hold no torch tensor with a batch axis; pass what forward() takes, as tensors")

    def batch_axes(self) -> list[int | None]:
        """Return the batch axis of each tensor, ``None`` where it has none (a mask, a scalar)."""
        size = self.batch_size
        return [_batch_axis(tensor, size) for tensor in self.tensors()]

    def map(self, function: Callable[[Tensor], Any]) -> Inputs:
        """Return the same structure with ``function`` applied to every tensor."""
        return Inputs(map_tensors(function, self.args), map_tensors(function, self.kwargs))

    def resized(self, batch_size: int) -> Inputs:
        """Return a batch of ``batch_size`` samples, repeating samples in order where there are too few."""
        present = self.batch_size

        def resize(tensor: Tensor) -> Tensor:
            axis = _batch_axis(tensor, present)
            if axis is None:
                return tensor
            index = torch.arange(batch_size, device=tensor.device) % present
            return tensor.index_select(axis, index)

        return self.map(resize)

    def samples(self, start: int, stop: int) -> Inputs:
        """Return the samples from ``start`` up to ``stop``."""
        size = self.batch_size

        def cut(tensor: Tensor) -> Tensor:
            axis = _batch_axis(tensor, size)
            return tensor if axis is None else tensor.narrow(axis, start, stop - start)

        return self.map(cut)

    def to(self, device: torch.device | str) -> Inputs:
        """Return the inputs on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def detached_cpu(self) -> Inputs:
        """Return copies that share nothing with the running training."""
        return self.map(lambda tensor: tensor.detach().to("cpu", copy=True))

    def call(self, function: Callable[..., Any]) -> Any:
        """Call ``function`` with these arguments."""
        return function(*self.args, **self.kwargs)


def joined(batches: Sequence[Inputs]) -> Inputs:
    """Concatenate batches of one structure along their batch axes (an uneven last batch included).

    Raises:
        ValueError: If there is no batch.
    """
    if not batches:
        raise ValueError("no batch to join")
    first = batches[0]
    axes = first.batch_axes()
    columns = zip(*(batch.tensors() for batch in batches), strict=True)
    merged = iter(
        [column[0] if axis is None else torch.cat(column, dim=axis) for axis, column in zip(axes, columns, strict=True)]
    )
    return first.map(lambda _: next(merged))
