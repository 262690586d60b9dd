"""Meta-learning algorithms as functions: a module, a loss and tasks give a loss and gradients for any optimizer.

Sources: MAML and its first-order form (Finn et al., 2017, https://arxiv.org/abs/1703.03400), ANIL (Raghu et al., 2020,
https://arxiv.org/abs/1909.09157), Reptile (Nichol et al., 2018, https://arxiv.org/abs/1803.02999), Meta-SGD (Li et al.,
2017, https://arxiv.org/abs/1707.09835), prototypical networks (Snell et al., 2017, https://arxiv.org/abs/1703.05175);
the loss after every step, and rates of each step, MAML++ (Antoniou et al., 2019, https://arxiv.org/abs/1810.09502).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_optcore.meta.functional import LossFunction, Parameters, learned_parameters
from lightning_optcore.meta.meta_gradient import Backend, MetaGradient
from lightning_optcore.meta.prototypes import num_classes, prototype_loss, with_support
from lightning_optcore.meta.tasks import MetaLearningError, Tasks, task_batch


def maml(
    module: nn.Module,
    loss_fn: LossFunction,
    tasks: Tasks,
    inner_lr: float = 0.01,
    num_inner_steps: int = 1,
    first_order: bool = False,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    query_loss_weights: Sequence[float] | None = None,
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
        query_loss_weights: What the loss after each inner step counts; ``None``: only what is left after the last one.

    Returns:
        The mean loss over the tasks and, by the name of the parameter, its gradient.

    Raises:
        MetaLearningError: If the tasks or an argument make no sense.

    Example:
        >>> import torch
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
        query_loss_weights=query_loss_weights,
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
    found = MetaGradient(module, loss_fn, adapts=in_head(module, head), **options)(tasks)
    return found.loss, found.gradients


def in_head(module: nn.Module, head: str | Sequence[str]) -> Callable[[str], bool]:
    """Return what says by its name whether a parameter belongs to a head.

    Raises:
        MetaLearningError: If no parameter does.
    """
    patterns = (head,) if isinstance(head, str) else tuple(head)
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


def last_layer(module: nn.Module) -> str:
    """Return the name of the last module, in the order of definition, that has parameters of its own."""
    names = [name for name, one in module.named_modules() if any(True for _ in one.parameters(recurse=False))]
    if not names:
        raise MetaLearningError("head: the module has no parameters")
    return names[-1]


def meta_sgd(
    module: nn.Module, loss_fn: LossFunction, tasks: Tasks, rates: Mapping[str, Tensor], **options: Any
) -> tuple[Tensor, Parameters, Parameters]:
    """Return what :func:`maml` does with an inner learning rate for every number, and the gradient of these rates.

    Args:
        module: Any module.
        loss_fn: As in :func:`maml`.
        tasks: As in :func:`maml`.
        rates: By the name of the parameter, its learning rates, of its shape (or of one that broadcasts to it); with
            one more axis in front those of each step, of which the last goes on where there are more steps.
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
    module: nn.Module,
    loss_fn: LossFunction,
    tasks: Tasks,
    inner_lr: float = 0.01,
    num_inner_steps: int = 5,
    **options: Any,
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
        options: ``backend`` and ``chunk_size`` as in :func:`maml`.

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 1)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> tasks = ((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))
        >>> loss, moved = reptile(net, lambda module, batch: (module(batch[0]) - batch[1]).square().mean(), tasks)
        >>> moved["weight"].shape
        torch.Size([1, 1])
    """
    step = MetaGradient(
        module, loss_fn, inner_lr=inner_lr, num_inner_steps=num_inner_steps, direction="displacement", **options
    )
    found = step(tasks)
    return found.loss, found.gradients


def protonet(module: nn.Module, tasks: Tasks, **options: Any) -> tuple[Tensor, Parameters]:
    """Return the loss of the query sets by the distance to the mean embedding of each class, and its gradient.

    Args:
        module: Returns embeddings (samples, features) of inputs.
        tasks: ``((x, labels), (x, labels))`` with the tasks along the first axis; labels are whole numbers from 0.
        options: ``backend`` and ``chunk_size`` as in :func:`maml`.

    Raises:
        MetaLearningError: If a class of the query set has no sample in the support set.

    Example:
        >>> import torch
        >>> x, labels = torch.randn(3, 4, 5), torch.tensor([[0, 0, 1, 1]] * 3)
        >>> loss, gradients = protonet(nn.Linear(5, 2), ((x, labels), (x, labels)))
        >>> gradients["weight"].shape
        torch.Size([2, 5])
    """
    batch = task_batch(tasks)
    classes = num_classes(batch)
    step = MetaGradient(module, partial(prototype_loss, classes=classes), num_inner_steps=0, **options)
    found = step(with_support(batch))
    return found.loss, found.gradients
