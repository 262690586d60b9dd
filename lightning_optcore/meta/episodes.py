"""Tasks of few samples (episodes) from labelled data, from families of functions, or from what a user has.

Source: Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016, https://arxiv.org/abs/1606.04080.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_optcore.meta.labels import labels_of
from lightning_optcore.meta.tasks import MetaLearningError, stacked
from lightning_optcore.option_values import is_whole

# (support, query)
Task = tuple[Any, Any]
TaskFamily = Callable[[torch.Generator], Task]
TaskTransform = Callable[[Task, torch.Generator], Task]
STAGES = ("train", "val", "test")


class LabelledEpisodes(Dataset[Task]):
    """N-way K-shot tasks of a labelled data set, each determined by the seed and its number alone.

    Args:
        dataset: Gives ``(input, label)``.
        n_way: Classes of a task; within it they are called 0 to ``n_way - 1``.
        k_shot: Samples of each class in the support set.
        num_query: Samples of each class in the query set, of which none is in the support set.
        classes: Labels to choose from; ``None``: all.
        seed: Of the tasks.
        task_transform: Called with a task and a generator, e.g. :class:`~lightning_optcore.meta.Rotations`.
        count: The length, for those that ask for one; there are tasks beyond it.

    Raises:
        MetaLearningError: If there are not so many classes, or not so many samples of one.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 6)
        >>> (x, labels), query = LabelledEpisodes(data, n_way=3, k_shot=2, num_query=4)[7]
        >>> x.shape, labels.tolist(), query[0].shape
        (torch.Size([6, 4]), [0, 0, 1, 1, 2, 2], torch.Size([12, 4]))
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        n_way: int = 5,
        k_shot: int = 1,
        num_query: int = 15,
        classes: Sequence[int] | None = None,
        seed: int = 0,
        task_transform: TaskTransform | None = None,
        count: int = 1000,
    ) -> None:
        self.count = count
        for name, value in (("n_way", n_way), ("k_shot", k_shot), ("num_query", num_query)):
            if not is_whole(value, least=1):
                raise MetaLearningError(f"{name}={value!r}: expected at least 1, a whole number")
        self.dataset, self.n_way, self.k_shot, self.num_query, self.seed = dataset, n_way, k_shot, num_query, seed
        self.task_transform = task_transform
        labels = labels_of(dataset)
        self.classes = sorted(set(labels.tolist())) if classes is None else list(classes)
        if len(self.classes) < n_way:
            raise MetaLearningError(f"n_way={n_way}: the data have {len(self.classes)} classes to choose from")
        self._members = {one: (labels == one).nonzero().flatten() for one in self.classes}
        needed = k_shot + num_query
        for one, members in self._members.items():
            if len(members) < needed:
                raise MetaLearningError(
                    f"k_shot={k_shot}, num_query={num_query}: class {one} has {len(members)} samples, not {needed}"
                )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Task:
        """Return one task."""
        generator = generator_of(self.seed, index)
        chosen = torch.randperm(len(self.classes), generator=generator)[: self.n_way].tolist()
        support: list[int] = []
        query: list[int] = []
        for one in chosen:
            members = self._members[self.classes[one]]
            order = members[torch.randperm(len(members), generator=generator)[: self.k_shot + self.num_query]].tolist()
            support += order[: self.k_shot]
            query += order[self.k_shot :]
        task = self._set(support, self.k_shot), self._set(query, self.num_query)
        return task if self.task_transform is None else self.task_transform(task, generator)

    def _set(self, indices: Sequence[int], each: int) -> tuple[Any, Tensor]:
        return stacked([self.dataset[i][0] for i in indices]), torch.arange(self.n_way).repeat_interleave(each)


class FunctionEpisodes(Dataset[Task]):
    """Tasks of a family of functions, each determined by the seed and its number alone.

    Args:
        family: Returns ``(support, query)``, drawn with the generator that it is given.
        seed: Of the tasks.
        count: The length, for those that ask for one; there are tasks beyond it.

    Example:
        >>> from lightning_optcore.meta import Sinusoids
        >>> (x, y), _ = FunctionEpisodes(Sinusoids(k_shot=10))[3]
        >>> x.shape
        torch.Size([10, 1])
    """

    def __init__(self, family: TaskFamily, seed: int = 0, count: int = 1000) -> None:
        self.family, self.seed, self.count = family, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Task:
        """Return one task."""
        return self.family(generator_of(self.seed, index))


class ListedEpisodes(Dataset[Task]):
    """Tasks that a user has listed, in an order for each round that the seed determines.

    Args:
        tasks: ``(support, query)`` of every task.
        shuffle: Whether each round has another order.
        seed: Of the orders.
    """

    def __init__(self, tasks: Sequence[Task], shuffle: bool = False, seed: int = 0) -> None:
        if not len(tasks):
            raise MetaLearningError("tasks: empty, expected at least one (support, query)")
        self.tasks, self.shuffle, self.seed = tasks, shuffle, seed

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        """Return one task; numbers beyond the last are those of later rounds."""
        round_, place = divmod(index, len(self.tasks))
        if self.shuffle:
            place = int(torch.randperm(len(self.tasks), generator=generator_of(self.seed, round_))[place])
        support, query = self.tasks[place]
        return support, query


class StreamedEpisodes(IterableDataset[Task]):
    """Tasks that come out of an iterable, of which each rank takes its share in turn.

    Args:
        tasks: Any iterable of ``(support, query)``; one that can be iterated again where there are several epochs.
        num_ranks: How many ranks there are.
        rank: Which of them this is.
    """

    def __init__(self, tasks: Iterable[Task], num_ranks: int = 1, rank: int = 0) -> None:
        self.tasks, self.num_ranks, self.rank = tasks, num_ranks, rank

    def __iter__(self) -> Iterator[Task]:
        return itertools.islice(iter(self.tasks), self.rank, None, self.num_ranks)


class EpisodeSampler(DistributedSampler[int]):
    """Numbers of tasks: of each rank others, and in each epoch new ones where these are fresh.

    Args:
        num_tasks: Tasks of an epoch, of all ranks together.
        num_ranks: How many ranks there are.
        rank: Which of them this is.
        fresh: Whether an epoch has tasks of its own. Then all ranks have as many; else some are repeated until they do.
        done: Says how many numbers of this epoch a resumed training has used before.
    """

    def __init__(
        self, num_tasks: int, num_ranks: int = 1, rank: int = 0, *, fresh: bool, done: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__(range(num_tasks), num_ranks, rank, shuffle=False, drop_last=fresh)  # type: ignore[arg-type]
        self.num_tasks, self.fresh, self.done = num_tasks, fresh, done

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_tasks if self.fresh else 0
        for number in range(self.done(), self.num_samples):
            yield first + (self.rank + number * self.num_replicas) % self.num_tasks


class EpisodicDataModule(LightningDataModule):
    """Batches of tasks for :class:`~lightning_optcore.callbacks.MetaLearning`.

    A batch is ``{"support": ..., "query": ...}`` with the tasks along the first axis, or a list of such mappings where
    their shapes differ. Which tasks come is determined by the seed, the epoch and the rank, not by what else draws
    random numbers or by the number of workers.

    Args:
        source: Where tasks come from. A LightningDataModule, or a data set of ``(input, label)``: N-way K-shot tasks.
            A function of a generator, e.g. :class:`~lightning_optcore.meta.Sinusoids`: tasks that it draws. Any
            iterable of ``(support, query)``: these. Or a mapping of ``train``, ``val`` and ``test`` to one of them.
        n_way: Classes of a task of labelled data.
        k_shot: Samples of each class in the support set.
        num_query: Samples of each class in the query set.
        tasks_per_batch: Tasks of a batch, on each rank.
        num_train_tasks: Tasks of an epoch; every epoch has new ones.
        num_val_tasks: Tasks of a validation, always the same.
        num_test_tasks: Tasks of a test, always the same.
        classes: Labels for ``train``, ``val`` and ``test``. ``None``: no class of training is in validation or test;
            these two share theirs where there are fewer than three times ``n_way``.
        num_workers: Worker processes of the loaders.
        seed: Of the tasks.
        task_transform: Changes each task of labelled data, e.g. :class:`~lightning_optcore.meta.Rotations`.

    Raises:
        MetaLearningError: If an argument is out of its range, or the data have too few classes or samples.

    Example:
        >>> from lightning_optcore.data import Digits
        >>> data = EpisodicDataModule(Digits(), n_way=3, k_shot=2, num_query=5, num_train_tasks=8)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["support"][0].shape, batch["query"][1].shape
        (torch.Size([4, 6, 1, 8, 8]), torch.Size([4, 15]))
    """

    def __init__(
        self,
        source: Any,
        n_way: int = 5,
        k_shot: int = 1,
        num_query: int = 15,
        tasks_per_batch: int = 4,
        num_train_tasks: int = 1000,
        num_val_tasks: int = 100,
        num_test_tasks: int = 500,
        classes: Mapping[str, Sequence[int]] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        task_transform: TaskTransform | None = None,
    ) -> None:
        super().__init__()
        counts = {"train": num_train_tasks, "val": num_val_tasks, "test": num_test_tasks}
        for name, value in (("tasks_per_batch", tasks_per_batch), *((f"num_{k}_tasks", v) for k, v in counts.items())):
            if not is_whole(value, least=1):
                raise MetaLearningError(f"{name}={value!r}: expected at least 1, a whole number")
        if classes is not None and set(classes) != set(STAGES):
            raise MetaLearningError(f"classes: has {', '.join(classes) or 'nothing'}; expected {', '.join(STAGES)}")
        self.source = source
        self.n_way, self.k_shot, self.num_query = n_way, k_shot, num_query
        self.tasks_per_batch = tasks_per_batch
        self.counts = counts
        self.classes = classes
        self.num_workers = num_workers
        self.seed = seed
        self.task_transform = task_transform
        self._episodes: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Let the source prepare its data."""
        for source in self._sources().values():
            if isinstance(source, LightningDataModule):
                source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Make the tasks of all stages."""
        if self._episodes:
            return
        sources = self._sources()
        labelled = {name: _labelled(one, name) for name, one in sources.items()}
        known = [one for one in labelled.values() if one is not None]
        chosen = self.classes
        if known and chosen is None:
            labels = sorted({label for one in known for label in labels_of(one).tolist()})
            chosen = split_classes(labels, self.n_way)
        for number, (name, source) in enumerate(sources.items()):
            seed = self.seed * len(STAGES) + number
            if (dataset := labelled[name]) is not None:
                assert chosen is not None
                self._episodes[name] = LabelledEpisodes(
                    dataset,
                    self.n_way,
                    self.k_shot,
                    self.num_query,
                    chosen[name],
                    seed,
                    self.task_transform,
                    self.counts[name],
                )
            else:
                self._episodes[name] = self._other_episodes(source, name, seed)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of new tasks."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the tasks of validation."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the tasks of the test."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def test_task(self, index: int) -> Task:
        """Return one of the tasks of the test."""
        if "test" not in self._episodes:
            raise MetaLearningError("source: has no test, or setup() was not called")
        task: Task = self._episodes["test"][index]
        return task

    def _sources(self) -> dict[str, Any]:
        if not isinstance(self.source, Mapping):
            return dict.fromkeys(STAGES, self.source)
        if "train" not in self.source:
            raise MetaLearningError(f"source: has {', '.join(self.source) or 'nothing'}; expected train, val, test")
        return {name: self.source[name] for name in STAGES if name in self.source}

    def _other_episodes(self, source: Any, name: str, seed: int) -> Any:
        if callable(source):
            return FunctionEpisodes(source, seed, self.counts[name])
        if isinstance(source, Sequence):
            self.counts[name] = min(self.counts[name], len(source))
            return ListedEpisodes(source, name == "train", seed)
        if isinstance(source, Iterable):
            if isinstance(source, Iterator):
                rank_zero_warn(
                    f"source={type(source).__name__}: gives its tasks once, and none to what comes after the first "
                    "epoch; expected a list, or an iterable that can be iterated again"
                )
            return StreamedEpisodes(source, *self._ranks())
        raise MetaLearningError(
            f"source={type(source).__name__}: expected a LightningDataModule, a data set, a function of a generator, "
            "or an iterable of (support, query)"
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(self, name: str) -> DataLoader[Any]:
        if name not in self._episodes:
            raise MetaLearningError(f"source: has no {name}, or setup() was not called")
        episodes = self._episodes[name]
        sampler = None
        if not isinstance(episodes, IterableDataset):
            fresh = name == "train"
            done = self._tasks_done if fresh else lambda: 0
            sampler = EpisodeSampler(self.counts[name], *self._ranks(), fresh=fresh, done=done)
        # By its name: Lightning makes the loader anew for a prediction, and could not tell a place from an argument.
        return DataLoader(
            episodes,
            batch_size=self.tasks_per_batch,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate_tasks,
        )

    def _tasks_done(self) -> int:
        """Return how many tasks of the epoch were trained before a checkpoint from its middle was made."""
        if self.trainer is None or not self.trainer.fit_loop.restarting:
            return 0
        epoch = self.trainer.fit_loop.epoch_loop
        batches = -(-(self.counts["train"] // self._ranks()[0]) // self.tasks_per_batch)
        return (epoch.batch_progress.current.completed % batches) * self.tasks_per_batch


class TaskDataModule(LightningDataModule):
    """One task as ordinary data: the support set is the training batch, the query set validates and tests.

    Args:
        episodes: What the task is one of.
        index: Its number among those of the test.

    Example:
        >>> from lightning_optcore.data import Digits
        >>> task = TaskDataModule(EpisodicDataModule(Digits(), k_shot=2, num_query=5), index=3)
        >>> task.setup()
        >>> (x, labels), = task.train_dataloader()
        >>> x.shape
        torch.Size([10, 1, 8, 8])
    """

    def __init__(self, episodes: EpisodicDataModule, index: int = 0) -> None:
        super().__init__()
        if index < 0:
            raise MetaLearningError(f"index={index}: expected 0 or more")
        self.episodes = episodes
        self.index = index
        self._task: Task | None = None

    def prepare_data(self) -> None:
        """Let the source prepare its data."""
        self.episodes.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Draw the task."""
        self.episodes.setup()
        if self._task is None:
            self._task = self.episodes.test_task(self.index)

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch: the support set."""
        return self._loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch: the query set."""
        return self._loader(1)

    test_dataloader = val_dataloader

    def _loader(self, place: int) -> DataLoader[Any]:
        if self._task is None:
            raise MetaLearningError("call setup() before asking for a loader")
        return DataLoader([self._task[place]], batch_size=None)  # type: ignore[arg-type]


def collate_tasks(tasks: Sequence[Task]) -> Any:
    """Return a batch of tasks: stacked where their shapes are alike, else a list.

    Example:
        >>> x = torch.zeros(5, 1)
        >>> collate_tasks([(x, x), (x, x)])["query"].shape, len(collate_tasks([(x, x), (x[:2], x)]))
        (torch.Size([2, 5, 1]), 2)
    """
    try:
        support, query = stacked(tasks)
    except (RuntimeError, ValueError):
        return [{"support": support, "query": query} for support, query in tasks]
    return {"support": support, "query": query}


def split_classes(labels: Sequence[int], n_way: int) -> dict[str, list[int]]:
    """Return the classes of training, validation and test, those of training being in no other.

    Raises:
        MetaLearningError: If there are fewer than twice ``n_way``.

    Example:
        >>> split_classes(range(10), 5)
        {'train': [0, 1, 2, 3, 4], 'val': [5, 6, 7, 8, 9], 'test': [5, 6, 7, 8, 9]}
    """
    count = len(labels)
    if count < 2 * n_way:
        raise MetaLearningError(
            f"n_way={n_way}: {count} classes do not make training and test classes that differ; expected n_way of "
            f"at most {count // 2}, or classes={{train: ..., val: ..., test: ...}}"
        )
    listed = list(labels)
    if count < 3 * n_way:
        return {"train": listed[: count - n_way], "val": listed[count - n_way :], "test": listed[count - n_way :]}
    each = max(n_way, round(0.2 * count))
    first, second = count - 2 * each, count - each
    return {"train": listed[:first], "val": listed[first:second], "test": listed[second:]}


def generator_of(seed: int, index: int) -> torch.Generator:
    """Return a generator that a seed and a number determine; neighbours have nothing in common."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) & 0x7FFFFFFFFFFFFFFF)


def _labelled(source: Any, stage: str) -> Any:
    """Return the labelled data set of a source, ``None`` if it is another kind of source."""
    if isinstance(source, LightningDataModule):
        source.setup("fit" if stage != "test" else "test")
        return getattr(source, f"{stage}_dataloader")().dataset
    return source if isinstance(source, Dataset) and not isinstance(source, IterableDataset) else None
