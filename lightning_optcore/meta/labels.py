"""Labels of any labelled data set, without knowing how it keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset


def labels_of(dataset: Any, label: str | int | None = None) -> Tensor:
    """Return the class labels (samples,) of a data set.

    Args:
        dataset: Any. Its ``targets``, ``labels`` or ``tensors`` are asked where it has these; else it is gone through
            once.
        label: Key or index of the label in a sample; ``None``: the last integer of it.

    Raises:
        MisconfigurationException: If a sample has no such integer.

    Example:
        >>> labels_of(TensorDataset(torch.zeros(3, 2), torch.tensor([1, 0, 1]))).tolist()
        [1, 0, 1]
        >>> labels_of([{"x": torch.zeros(2), "y": 3}], label="y").tolist()
        [3]
    """
    if label is None:
        if isinstance(dataset, TensorDataset):
            found = [t for t in dataset.tensors if t.dim() == 1 and not t.is_floating_point()]
            if found:
                return found[-1]
        for name in ("targets", "labels"):
            if (kept := getattr(dataset, name, None)) is not None:
                return torch.as_tensor(kept)
    return torch.tensor([_label_of(dataset[i], label) for i in range(len(dataset))])


def _label_of(sample: Any, label: str | int | None) -> int:
    if label is not None:
        try:
            return int(sample[label])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise MisconfigurationException(f"tasks.label={label!r}: a sample has no integer there") from error
    values = list(sample.values()) if isinstance(sample, Mapping) else list(sample)
    for value in reversed(values):
        if isinstance(value, int) or (isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()):
            return int(value)
    raise MisconfigurationException("tasks.data: a sample has no integer that could be its label; name it: tasks.label")
