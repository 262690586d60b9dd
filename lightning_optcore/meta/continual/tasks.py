"""Sequences of tasks made of any labelled data module: its pixels permuted, or its classes a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_optcore.measurement.inputs import map_tensors, tensors_in
from lightning_optcore.meta.labels import labels_of
from lightning_optcore.option_values import is_whole

_STAGES = "_optcore_stages"


class DerivedTask(LightningDataModule):
    """A task made of another data module, whose loaders it takes and whose samples it changes or chooses.

    Args:
        data: Any data module whose loaders are ``DataLoader`` objects over data sets with a length. It may be shared by
            several tasks, and is then prepared once.
        name: In tables and reports.
    """

    def __init__(self, data: LightningDataModule, name: str) -> None:
        super().__init__()
        self.data = data
        self.name = name

    def changed(self, dataset: Any) -> Dataset:
        """Return the task's own view of a data set."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Prepare the data."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the data, unless another task did."""
        stages = self.data.__dict__.setdefault(_STAGES, set())
        if stage not in stages:
            self.data.trainer = self.trainer
            self.data.setup(stage)  # type: ignore[arg-type]
            stages.add(stage)

    def train_dataloader(self) -> Any:
        """Training batches of the task."""
        return self._loaders(self.data.train_dataloader())

    def val_dataloader(self) -> Any:
        """Validation batches of the task."""
        return self._loaders(self.data.val_dataloader())

    def test_dataloader(self) -> Any:
        """Test batches of the task."""
        return self._loaders(self.data.test_dataloader())

    def _loaders(self, loaders: Any) -> Any:
        if isinstance(loaders, Mapping):
            return {key: self._loaders(loader) for key, loader in loaders.items()}
        if isinstance(loaders, (list, tuple)):
            return [self._loaders(loader) for loader in loaders]
        if not isinstance(loaders, DataLoader) or isinstance(loaders.dataset, IterableDataset):
            raise MisconfigurationException(
                f"tasks.data: {type(self.data).__name__} gives a {type(loaders).__name__}; expected a DataLoader over "
                "a data set with a length"
            )
        return _reloaded(loaders, self.changed(loaders.dataset))


def _reloaded(loader: DataLoader, dataset: Dataset) -> DataLoader:
    """Return a loader with the options of another one over a data set of its own."""
    options = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    if type(loader.sampler) in (RandomSampler, SequentialSampler) and loader.batch_size is not None:
        shuffle = isinstance(loader.sampler, RandomSampler)
        return DataLoader(dataset, batch_size=loader.batch_size, shuffle=shuffle, drop_last=loader.drop_last, **options)
    if len(dataset) != len(loader.dataset):  # type: ignore[arg-type]
        raise MisconfigurationException(
            f"tasks.data: its loader draws with a {type(loader.sampler).__name__}, which knows nothing of a choice of "
            "samples; give a loader with shuffle=True or False"
        )
    return DataLoader(dataset, batch_sampler=loader.batch_sampler, **options)


class _Changed(Dataset):
    def __init__(self, dataset: Any, change: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._change = change

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._change(self._dataset[index])


class PermutedTask(DerivedTask):
    """The numbers of every sample in another order (Goodfellow et al. 2013, arXiv:1312.6211).

    Args:
        data: As in :class:`DerivedTask`. Of each sample the first floating tensor is permuted.
        seed: Of the order; ``None`` leaves it as it is.
        name: In tables and reports.

    Example:
        >>> from lightning_optcore.data import Digits
        >>> task = PermutedTask(Digits(), seed=1)
        >>> task.setup("fit")
        >>> next(iter(task.train_dataloader()))[0].shape
        torch.Size([64, 1, 8, 8])
    """

    def __init__(self, data: LightningDataModule, seed: int | None, name: str | None = None) -> None:
        super().__init__(data, name or ("as it is" if seed is None else f"permuted {seed}"))
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def changed(self, dataset: Any) -> Dataset:
        """Return the data set permuted."""
        return dataset if self.seed is None else _Changed(dataset, self._permuted)

    def _permuted(self, sample: Any) -> Any:
        first = next((tensor for tensor in tensors_in(sample) if tensor.is_floating_point()), None)
        return map_tensors(lambda tensor: self._in_order(tensor) if tensor is first else tensor, sample)

    def _in_order(self, tensor: Tensor) -> Tensor:
        size = tensor.numel()
        if size not in self._orders:
            assert self.seed is not None
            self._orders[size] = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        return tensor.flatten()[self._orders[size]].view_as(tensor)


class ClassTask(DerivedTask):
    """The samples of some classes, with their labels as they are.

    Args:
        data: As in :class:`DerivedTask`.
        classes: The labels of the task.
        label: Key or index of the label in a sample; by default its last integer.
        name: In tables and reports.

    Raises:
        MisconfigurationException: If a data set has no sample of them.

    Example:
        >>> from lightning_optcore.data import Digits
        >>> task = ClassTask(Digits(), classes=[3, 4])
        >>> task.setup("fit")
        >>> sorted({int(label) for _, labels in task.val_dataloader() for label in labels})
        [3, 4]
    """

    def __init__(
        self,
        data: LightningDataModule,
        classes: Sequence[int],
        label: str | int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(data, name or f"classes {', '.join(map(str, classes))}")
        self.classes = list(classes)
        self.label = label

    def changed(self, dataset: Any) -> Dataset:
        """Return the samples of the classes."""
        index = torch.isin(labels_of(dataset, self.label), torch.tensor(self.classes)).nonzero()[:, 0].tolist()
        if not index:
            raise MisconfigurationException(f"tasks.classes={self.classes}: the data has no sample of them")
        return Subset(dataset, index)


def permuted_tasks(data: LightningDataModule, num_tasks: int = 5, seed: int = 0) -> list[DerivedTask]:
    """Return the data as it is, and then with its pixels in other orders.

    Args:
        data: As in :class:`PermutedTask`.
        num_tasks: How many.
        seed: Of the orders.

    Raises:
        MisconfigurationException: If there is no task.
    """
    if not is_whole(num_tasks, least=1):
        raise MisconfigurationException(f"tasks.num_tasks={num_tasks!r}: expected at least 1, a whole number")
    seeds = torch.randint(2**31, (num_tasks,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        PermutedTask(data, None if number == 0 else seeds[number], f"permutation {number}")
        for number in range(num_tasks)
    ]


def class_tasks(
    data: LightningDataModule,
    num_classes: int = 10,
    classes_per_task: int = 2,
    seed: int | None = None,
    label: str | int | None = None,
) -> list[DerivedTask]:
    """Return tasks of a few classes each, all of one head: class-incremental learning.

    Args:
        data: As in :class:`ClassTask`.
        num_classes: Labels go from 0 to one less.
        classes_per_task: How many a task has; the last one has what is left.
        seed: Of the order of the classes; ``None`` leaves it as it is.
        label: As in :class:`ClassTask`.

    Raises:
        MisconfigurationException: If a number is below 1.
    """
    for key, value in (("num_classes", num_classes), ("classes_per_task", classes_per_task)):
        if not is_whole(value, least=1):
            raise MisconfigurationException(f"tasks.{key}={value!r}: expected at least 1, a whole number")
    order = list(range(num_classes))
    if seed is not None:
        order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [order[start : start + classes_per_task] for start in range(0, num_classes, classes_per_task)]
    return [ClassTask(data, classes, label) for classes in parts]
