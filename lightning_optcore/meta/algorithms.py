"""Meta-learning algorithms as functions: a module, a loss and tasks give a loss and gradients for any optimizer.

Sources: MAML and its first-order form (Finn et al., 2017, https://arxiv.org/abs/1703.03400), ANIL (Raghu et al., 2020,
https://arxiv.org/abs/1909.09157), Reptile (Nichol et al., 2018, https://arxiv.org/abs/1803.02999), Meta-SGD (Li et al.,
2017, https://arxiv.org/abs/1707.09835), prototypical networks (Snell et al., 2017, https://arxiv.org/abs/1703.05175).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_optcore.meta.functional import (
    FunctionalLoss,
    LossFunction,
    Parameters,
    descend,
    functional_loss,
    learned_parameters,
)
from lightning_optcore.meta.meta_gradient import Backend, MetaGradient, MetaLearningError, Tasks


def maml(
    module: nn.Module,
    loss_fn: LossFunction,
    tasks: Tasks,
    inner_lr: float = 0.01,
    num_inner_steps: int = 1,
    first_order: bool = False,
    backend: Backend = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Parameters]:
    """Return the loss of the query sets after adaptation, and its gradient.

    For many steps on one module, :class:`~lightning_optcore.meta.MetaGradient` keeps which backend is faster.

    Args:
        module: Any module; it and its ``.grad`` stay as they are.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar.
        tasks: ``(support, query)``, pytrees of tensors with the tasks along the first axis; or a list of such pairs,
            one for each task.
        inner_lr: Learning rate of the adaptation.
        num_inner_steps: Its gradient steps, each on the whole support set.
        first_order: Whether to leave out that the inner gradients depend on the parameters.
        backend: ``"auto"``, ``"vmap"`` or ``"loop"``.
        chunk_size: Tasks that are computed together; ``None``: all.

    Returns:
        The mean loss over the tasks and, by the name of the parameter, its gradient.

    Raises:
        MetaLearningError: If the tasks or an argument make no sense.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> tasks = ((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))
        >>> loss, grads = maml(net, lambda module, batch: (module(batch[0]) - batch[1]).square().mean(), tasks)
        >>> grads["weight"].shape
        torch.Size([1, 1])
    """
    step = MetaGradient(
        module,
        loss_fn,
        inner_lr=inner_lr,
        num_inner_steps=num_inner_steps,
        first_order=first_order,
        backend=backend,
        chunk_size=chunk_size,
    )
    found = step(tasks)
    return found.loss, found.gradients


def fomaml(module: nn.Module, loss_fn: LossFunction, tasks: Tasks, **options: Any) -> tuple[Tensor, Parameters]:
    """Return what :func:`maml` does, of first order: cheaper, and often as good."""
    return maml(module, loss_fn, tasks, first_order=True, **options)


def anil(
    module: nn.Module, loss_fn: LossFunction, tasks: Tasks, head: str | Sequence[str], **options: Any
) -> tuple[Tensor, Parameters]:
    """Return what :func:`maml` does where only the head is adapted; every parameter is meta-learned.

    Args:
        module: Any module.
        loss_fn: As in :func:`maml`.
        tasks: As in :func:`maml`.
        head: Names of the modules or parameters that are adapted, ``*`` allowed.
        options: As in :func:`maml`.

    Raises:
        MetaLearningError: If no parameter has such a name.
    """
    patterns = (head,) if isinstance(head, str) else tuple(head)
    adapts = in_head(module, patterns)
    found = MetaGradient(module, loss_fn, adapts=adapts, **options)(tasks)
    return found.loss, found.gradients


def in_head(module: nn.Module, patterns: Sequence[str]) -> Any:
    """Return what says by its name whether a parameter belongs to a head.

    Raises:
        MetaLearningError: If no parameter does.
    """
    names = [
        name
        for name in learned_parameters(module)
        if any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*") for pattern in patterns)
    ]
    if not names:
        raise MetaLearningError(
            f"head={list(patterns)}: matches none of {', '.join(learned_parameters(module)) or 'no parameters'}"
        )
    return set(names).__contains__


def meta_sgd(
    module: nn.Module, loss_fn: LossFunction, tasks: Tasks, rates: Mapping[str, Tensor], **options: Any
) -> tuple[Tensor, Parameters, Parameters]:
    """Return what :func:`maml` does with an inner learning rate for every number, and the gradient of these rates.

    Args:
        module: Any module.
        loss_fn: As in :func:`maml`.
        tasks: As in :func:`maml`.
        rates: By the name of the parameter, its learning rates, of its shape (or of one that broadcasts to it).
        options: As in :func:`maml`, but for ``inner_lr``.

    Returns:
        The loss, the gradient of the parameters, and that of the rates.
    """
    missing = learned_parameters(module).keys() - rates.keys()
    if missing:
        raise MetaLearningError(f"rates: none for {', '.join(sorted(missing))}")
    found = MetaGradient(module, loss_fn, **options)(tasks, rates)
    return found.loss, found.gradients, found.rate_gradients


def reptile(
    module: nn.Module, loss_fn: LossFunction, tasks: Tasks, inner_lr: float = 0.01, num_inner_steps: int = 5
) -> tuple[Tensor, Parameters]:
    """Return the loss of the query sets after adaptation, and where adaptation came from less where it led to.

    Stepping along the negative of the second is Reptile's interpolation: with plain SGD the learning rate is its
    step size. Adaptation is on the support and query sets in turn, as Reptile knows no difference.

    Args:
        module: Any module.
        loss_fn: As in :func:`maml`.
        tasks: As in :func:`maml`.
        inner_lr: Learning rate of the adaptation.
        num_inner_steps: Its gradient steps.
    """
    counter = MetaGradient(module, loss_fn, inner_lr=inner_lr, num_inner_steps=num_inner_steps, backend="loop")
    supports, queries, count = counter._stacked(tasks)
    loss = functional_loss(module, loss_fn)
    start = {name: value.detach() for name, value in learned_parameters(module).items()}
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    losses, moved = [], {name: torch.zeros_like(value) for name, value in start.items()}
    for i in range(count):
        pair = [sets[i] if isinstance(sets, list) else _task_of(sets, i) for sets in (supports, queries)]
        fast = start
        for number in range(num_inner_steps):
            batch = pair[number % 2]
            fast = descend(partial(_loss_on, loss, buffers, batch), fast, inner_lr, 1, first_order=True)
        with torch.no_grad():
            losses.append(loss(fast, dict(buffers), pair[1]))
        for name, value in fast.items():
            moved[name] += (start[name] - value.detach()) / count
    return torch.stack(losses).mean(), moved


def _loss_on(loss: FunctionalLoss, buffers: Parameters, batch: Any, parameters: Parameters) -> Tensor:
    return loss(parameters, {name: value.clone() for name, value in buffers.items()}, batch)


def protonet(module: nn.Module, tasks: Tasks) -> tuple[Tensor, Parameters]:
    """Return the loss of the query sets by the distance to the mean embedding of each class, and its gradient.

    Args:
        module: Returns embeddings (samples, features) of inputs.
        tasks: ``((x, labels), (x, labels))`` with the tasks along the first axis; labels are whole numbers from 0.

    Raises:
        MetaLearningError: If a class of the query set has no sample in the support set.
    """

    def loss_fn(network: nn.Module, pair: Any) -> Tensor:
        return prototype_loss(network, *pair)

    paired = [(task, task) for task in _pairs(tasks)]
    found = MetaGradient(module, loss_fn, num_inner_steps=0, backend="loop")(paired)
    return found.loss, found.gradients


def prototype_loss(module: nn.Module, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of the negative squared distances to the classes' mean embeddings (equation 2)."""
    images, labels = support
    classes = int(labels.max()) + 1
    member = nn.functional.one_hot(labels, classes).to(images.dtype)
    counts = member.sum(0)
    if bool((counts == 0).any()) or int(query[1].max()) >= classes:
        raise MetaLearningError("tasks: a class of the query set has no sample in the support set")
    prototypes = member.T @ module(images) / counts[:, None]
    return nn.functional.cross_entropy(-torch.cdist(module(query[0]), prototypes).square(), query[1])


def _pairs(tasks: Tasks) -> list[Any]:
    if isinstance(tasks, list):
        return tasks
    support, query = tasks
    return [(_task_of(support, i), _task_of(query, i)) for i in range(len(support[0]))]


def _task_of(sets: Any, index: int) -> Any:
    return tree_map(lambda tensor: tensor[index], sets)
