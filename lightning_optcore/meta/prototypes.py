"""Classification by the distance to the mean embedding of each class.

Source: Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017, https://arxiv.org/abs/1703.05175.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.meta.tasks import MetaLearningError, OnePerTask, TaskBatch


def with_support(batch: TaskBatch) -> TaskBatch:
    """Return tasks whose query sets are ``(support, query)``: a loss that needs no gradient steps sees both."""
    if batch.alike:
        return TaskBatch(batch.supports, (batch.supports, batch.queries), batch.count)
    return TaskBatch(batch.supports, OnePerTask(zip(batch.supports, batch.queries, strict=True)), batch.count)


def num_classes(batch: TaskBatch) -> int:
    """Return how many classes the support sets of ``(x, labels)`` have.

    Raises:
        MetaLearningError: If the sets are not of that form, or a class of a query set has no sample in its support set.
    """
    pairs = [batch.pair(i) for i in range(batch.count)]
    for one in (one for pair in pairs for one in pair):
        if not (isinstance(one, (tuple, list)) and len(one) == 2 and not one[1].is_floating_point()):
            raise MetaLearningError("tasks: prototypes need sets of (inputs, labels), with whole numbers as labels")
    for number, (support, query) in enumerate(pairs):
        missing = sorted(set(query[1].flatten().tolist()) - set(support[1].flatten().tolist()))
        if missing:
            raise MetaLearningError(
                f"tasks: class {missing[0]} of the query set of task {number} has no sample in the support set"
            )
    return 1 + max(int(support[1].max()) for support, _ in pairs)


def prototype_logits(module: nn.Module, support: tuple[Tensor, Tensor], inputs: Tensor, classes: int) -> Tensor:
    """Return the negative squared distances (samples, classes) to the classes' mean embeddings (equation 2).

    A class that the support set lacks is infinitely far away.
    """
    images, labels = support
    member = nn.functional.one_hot(labels, classes)
    counts = member.sum(0)
    embedded = module(images)
    prototypes = member.to(embedded.dtype).T @ embedded / counts.clamp(min=1)[:, None]
    distances = (module(inputs)[:, None] - prototypes[None]).square().sum(-1)
    return torch.where(counts > 0, -distances, -torch.inf)


def prototype_loss(module: nn.Module, pair: Any, classes: int) -> Tensor:
    """Return the cross-entropy of a query set, given ``((x, labels), (x, labels))`` of support and query."""
    support, query = pair
    return nn.functional.cross_entropy(prototype_logits(module, support, query[0], classes), query[1])
