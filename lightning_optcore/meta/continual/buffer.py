"""Samples of earlier tasks: which of a stream stay, in memory or on disk, and how they join a batch."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.option_values import is_number, is_whole

BALANCES = ("none", "task", "class")


def survivors(keys: Tensor, strata: Tensor, size: int) -> Tensor:
    """Return the positions of the samples that stay: as many of each stratum as can be, of these a uniform sample.

    With one random key a sample and one stratum, the ``size`` smallest keys are what reservoir sampling (Vitter, 1985)
    leaves of the stream; whatever comes later, those that are left out would not have come back.

    Args:
        keys: (samples,) random numbers, drawn once.
        strata: (samples,) integers.
        size: How many may stay.

    Example:
        >>> survivors(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0, 0, 0, 1]), 2).tolist()
        [0, 3]
    """
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(strata[order], stable=True)]
    sorted_strata = strata[order]
    first = torch.searchsorted(sorted_strata, sorted_strata)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first
    by_key = torch.argsort(keys, stable=True)
    return by_key[torch.argsort(rank[by_key], stable=True)][:size].sort().values


class SampleBuffer:
    """A bounded memory of a stream of batches, each of them any nesting of tensors.

    Args:
        size: Samples that it may hold.
        balance: ``"none"``: a uniform sample of the stream. ``"task"``: as many of each task. ``"class"``: as many of
            each class of each task.
        label: Key or index of the class labels (samples,) in a batch; by default the last tensor of integers that has
            one number a sample.
        seed: Of what is kept and drawn.
        max_memory: Bytes beyond which it is a file; by default half of the memory that is free.
        folder: Where the file goes; by default the system's folder of temporary files. It is gone with the process.
        owner: Name of the technique, in messages.

    Example:
        >>> buffer = SampleBuffer(3)
        >>> buffer.add((torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 0, 1])), task=0)
        >>> len(buffer), buffer.draw(2)[0].shape
        (3, torch.Size([2, 2]))
    """

    def __init__(
        self,
        size: int,
        balance: str = "none",
        label: str | int | None = None,
        seed: int = 0,
        max_memory: int | None = None,
        folder: str | None = None,
        owner: str = "buffer",
    ) -> None:
        if not is_whole(size, least=1):
            raise MisconfigurationException(f"{owner}.size={size!r}: expected at least 1, a whole number")
        if balance not in BALANCES:
            raise MisconfigurationException(f"{owner}.balance={balance!r}: expected one of {', '.join(BALANCES)}")
        if max_memory is not None and not (is_number(max_memory) and max_memory >= 0):
            raise MisconfigurationException(f"{owner}.max_memory={max_memory!r}: expected at least 0 bytes")
        if folder is not None and not Path(folder).is_dir():
            raise MisconfigurationException(f"{owner}.folder={folder}: no such folder; make it, or leave it out")
        self.size = size
        self.balance = balance
        self.label = label
        self.max_memory = max_memory
        self.folder = folder
        self.owner = owner
        self.on_disk = False
        self._structure: Any = None
        self._values: list[Tensor] = []
        self._file: tempfile.TemporaryDirectory[str] | None = None
        self._keys = torch.empty(0, dtype=torch.float64)
        self._strata = torch.empty(0, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, batch: Any) -> None:
        """Check, with the first batch, that there is room, and that its samples can be kept.

        Raises:
            MisconfigurationException: If they cannot.
        """
        if self._values:
            return
        if self.balance == "class":
            self._labels(batch, Inputs((batch,)).batch_size)
        self._make_room(self._batched(batch))

    def _make_room(self, samples: Sequence[Tensor]) -> None:
        bytes_each = sum(tensor[0].numel() * tensor.element_size() for tensor in samples)
        needed = bytes_each * self.size
        limit = psutil.virtual_memory().available // 2 if self.max_memory is None else self.max_memory
        self.on_disk = needed > limit
        if self.on_disk:
            folder = self.folder or tempfile.gettempdir()
            free = shutil.disk_usage(folder).free
            if needed > 0.9 * free:
                raise MisconfigurationException(
                    f"{self.owner}.size={self.size}: {self.size} samples of {bytes_each:,} bytes are more than the "
                    f"memory ({limit:,} bytes) and the disk of {folder} ({free:,} bytes free) hold; at most "
                    f"{int(0.9 * max(limit, free)) // bytes_each:,} fit, or set {self.owner}.folder to a larger disk"
                )
            self._file = tempfile.TemporaryDirectory(
                prefix="optcore-replay-", dir=self.folder, ignore_cleanup_errors=True
            )
        self._values = [self._room(i, tensor) for i, tensor in enumerate(samples)]

    def _room(self, number: int, like: Tensor) -> Tensor:
        shape = (self.size, *like.shape[1:])
        if self._file is None:
            return torch.empty(shape, dtype=like.dtype)
        path = str(Path(self._file.name) / str(number))
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)

    def _batched(self, batch: Any) -> list[Tensor]:
        """Return the tensors that hold samples, with the samples along axis 0."""
        inputs = Inputs((batch,))
        pairs = zip(inputs.tensors(), inputs.batch_axes(), strict=True)
        return [tensor.movedim(axis, 0) for tensor, axis in pairs if axis is not None]

    def _labels(self, batch: Any, size: int) -> Tensor:
        if self.label is not None:
            try:
                found = [batch[self.label]]
            except (KeyError, IndexError, TypeError):
                found = []
        else:
            found = [t for t in tensors_in(batch) if not t.is_floating_point() and t.shape == (size,)]
        if not found or not isinstance(found[-1], Tensor) or found[-1].shape != (size,):
            raise MisconfigurationException(
                f"{self.owner}.label={self.label!r}: the batch has no class labels (samples,) there; "
                f"name their key or index, or set {self.owner}.balance to none or task"
            )
        return found[-1]

    def add(self, batch: Any, task: int, more: Sequence[Tensor] = ()) -> None:
        """Offer the samples of a batch of a task.

        Args:
            batch: Any nesting of tensors.
            task: Its number.
            more: Tensors (samples, ...) that are kept beside them, and come last when they are drawn.

        Raises:
            MisconfigurationException: If they have another shape than those before, or are more than there is room for.
        """
        self.check(batch)
        samples = [*self._batched(batch), *more]
        self._values += [self._room(i, tensor) for i, tensor in enumerate(samples) if i >= len(self._values)]
        if [t.shape[1:] for t in samples] != [t.shape[1:] for t in self._values]:
            raise MisconfigurationException(
                f"{self.owner}: samples of {[tuple(t.shape[1:]) for t in samples]} do not go with those of "
                f"{[tuple(t.shape[1:]) for t in self._values]}; let the loader pad all of them to one shape"
            )
        count = len(samples[0])
        strata = torch.full((count,), task, dtype=torch.int64)
        if self.balance == "class":
            strata = strata * 2**32 + self._labels(batch, count).cpu()
        if self.balance == "none":
            strata = torch.zeros_like(strata)
        keys = torch.cat([self._keys, torch.rand(count, generator=self._generator, dtype=torch.float64)])
        strata = torch.cat([self._strata, strata])
        present = len(self)
        kept = survivors(keys, strata, self.size)
        old, new = kept[kept < present], kept[kept >= present]
        freed = torch.ones(max(present, min(self.size, len(keys))), dtype=torch.bool)
        freed[old] = False
        places = freed.nonzero()[:, 0][: len(new)]
        for stored, values in zip(self._values, samples, strict=True):
            stored[places] = values.detach().cpu()[new - present]
        slots = torch.arange(len(freed))
        slots[places] = new
        self._keys, self._strata = keys[slots], strata[slots]

    def draw(self, number: int) -> list[Tensor]:
        """Return random samples, without repetition: a tensor (number, ...) for each that a batch has."""
        chosen = torch.randperm(len(self), generator=self._generator)[:number]
        return self.samples(chosen)

    def samples(self, index: Tensor) -> list[Tensor]:
        """Return the samples at some positions."""
        return [stored[index] for stored in self._values]

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors; those of a file too."""
        values = [stored[: len(self)].clone() for stored in self._values]
        return {
            "values": values,
            "keys": self._keys,
            "strata": self._strata,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            MisconfigurationException: If it holds more samples than there is room for.
        """
        if len(state["keys"]) > self.size:
            raise MisconfigurationException(
                f"{self.owner}.size={self.size}: the checkpoint holds {len(state['keys'])} samples; give as much room"
            )
        self._values, self._keys, self._strata = [], state["keys"], state["strata"]
        self._generator.set_state(state["generator"].cpu())
        # Of a checkpoint from before the first sample: there is room once one comes.
        if len(state["keys"]):
            self._make_room(state["values"])
            for stored, values in zip(self._values, state["values"], strict=True):
                stored[: len(values)] = values


def with_samples(batch: Any, samples: Sequence[Tensor]) -> Any:
    """Return a batch with more samples after its own; what is no tensor of samples stays the batch's.

    Args:
        batch: Any nesting of tensors.
        samples: One tensor (samples, ...) for each of its tensors that has samples, as :meth:`SampleBuffer.draw` gives.

    Example:
        >>> with_samples({"x": torch.zeros(2, 3), "scale": 2.0}, [torch.ones(1, 3)])["x"].shape
        torch.Size([3, 3])
    """
    inputs = Inputs((batch,))
    axes, more = iter(inputs.batch_axes()), iter(samples)

    def joined(tensor: Tensor) -> Tensor:
        axis = next(axes)
        return tensor if axis is None else torch.cat([tensor, next(more).to(tensor).movedim(0, axis)], dim=axis)

    return inputs.map(joined).args[0]


def as_batch(like: Any, samples: Sequence[Tensor]) -> Any:
    """Return a batch of nothing but the samples, in the structure and on the device of another batch.

    Example:
        >>> as_batch((torch.zeros(4, 2), torch.zeros(4)), [torch.ones(1, 2), torch.ones(1)])
        (tensor([[1., 1.]]), tensor([1.]))
    """
    inputs = Inputs((like,))
    axes, values = iter(inputs.batch_axes()), iter(samples)

    def replaced(tensor: Tensor) -> Tensor:
        axis = next(axes)
        return tensor if axis is None else next(values).to(tensor).movedim(0, axis)

    return inputs.map(replaced).args[0]
