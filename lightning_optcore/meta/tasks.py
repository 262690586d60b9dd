"""Tasks of few samples: what is stacked, and what cannot be learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

# (support, query), or a mapping of these names: pytrees of tensors with the tasks along the first axis; or a list of
# such pairs, one for each task.
Tasks = Any


class MetaLearningError(ValueError):
    """Tasks that cannot be learned from, or a loss that cannot be; the message says what would be right."""


class OnePerTask(list):
    """Sets of tasks whose shapes differ. A plain list may be one pytree, as loaders make lists of tuples."""


@dataclass(frozen=True)
class TaskBatch:
    """Support and query sets of some tasks.

    Args:
        supports: A pytree with the tasks along the first axis of its tensors; or one for each task.
        queries: The same of the query sets.
        count: How many tasks there are.
    """

    supports: Any
    queries: Any
    count: int

    @property
    def alike(self) -> bool:
        """Whether all have the same shapes."""
        return not isinstance(self.supports, OnePerTask)

    def pair(self, index: int) -> tuple[Any, Any]:
        """Return the support and the query set of one task."""
        return part(self.supports, index), part(self.queries, index)


def task_batch(tasks: Tasks) -> TaskBatch:
    """Return tasks stacked where their shapes allow it.

    Raises:
        MetaLearningError: If there is none, their numbers differ or a set is empty.

    Example:
        >>> x = torch.zeros(4, 10, 1)
        >>> task_batch(((x, x), (x, x))).count
        4
        >>> task_batch([(x[0], x[0]), (x[1, :3], x[1])]).alike
        False
    """
    if isinstance(tasks, list):
        if not tasks:
            raise MetaLearningError("tasks: empty, expected at least one (support, query)")
        supports, queries = [support for support, _ in tasks], [query for _, query in tasks]
        _check_sets(supports, queries)
        if len({_form(task) for task in tasks}) == 1:
            return TaskBatch(stacked(supports), stacked(queries), len(tasks))
        return TaskBatch(OnePerTask(supports), OnePerTask(queries), len(tasks))
    support, query = (tasks["support"], tasks["query"]) if _is_named(tasks) else tasks
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in tree_leaves((support, query)) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or 0 in sizes:
        raise MetaLearningError(
            f"tasks: the first axes have {sorted(sizes)} tasks; expected as many, at least one, everywhere"
        )
    _check_sets([part(support, 0)], [part(query, 0)])
    return TaskBatch(support, query, sizes.pop())


def _is_named(tasks: Any) -> bool:
    """Whether tasks are as EpisodicDataModule and MetaLearning have them."""
    return isinstance(tasks, Mapping) and {"support", "query"} <= tasks.keys()


def stacked(sets: Sequence[Any]) -> Any:
    """Return pytrees of the same shapes as one, with a new first axis; what is no tensor is that of the first."""
    return tree_map(lambda *one: torch.stack(one) if isinstance(one[0], Tensor) else one[0], *sets)


def part(sets: Any, which: int | slice) -> Any:
    """Return one of the sets, or some of them."""
    if isinstance(sets, OnePerTask):
        return sets[which]
    return tree_map(lambda leaf: leaf[which] if isinstance(leaf, Tensor) else leaf, sets)


def _form(task: Any) -> str:
    leaves, structure = tree_flatten(task)
    shapes = [(tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    return f"{structure} {shapes}"


def _check_sets(supports: Sequence[Any], queries: Sequence[Any]) -> None:
    for what, sets in (("support", supports), ("query", queries)):
        for number, one in enumerate(sets):
            tensors = [leaf for leaf in tree_leaves(one) if isinstance(leaf, Tensor)]
            if not tensors or any(tensor.numel() == 0 for tensor in tensors):
                raise MetaLearningError(f"tasks: the {what} set of task {number} is empty")
