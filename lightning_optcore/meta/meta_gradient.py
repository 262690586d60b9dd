"""The gradient of what is left of a loss after adaptation, averaged over tasks.

Source: Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
https://arxiv.org/abs/1703.03400. The transforms are those of ``torch.func``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lightning_optcore.meta.functional import (
    LossFunction,
    Parameters,
    descend,
    functional_loss,
    learned_parameters,
)

log = logging.getLogger(__name__)

Backend = Literal["auto", "vmap", "loop"]
BACKENDS = ("auto", "vmap", "loop")
# (support, query): pytrees of tensors with the tasks along the first axis; or a list of such pairs, one for each task.
Tasks = Any
_TIMED = 3


class MetaLearningError(ValueError):
    """Tasks that cannot be learned from, or a loss that cannot be; the message says what would be right."""


@dataclass(frozen=True)
class MetaStep:
    """What the tasks say.

    Args:
        loss: Mean over the tasks of the loss of the query set after adaptation.
        gradients: Its gradient, by the name of the parameter.
        rate_gradients: The gradient with respect to the inner learning rates, where these are learned.
        losses: (tasks,) the loss of each task.
    """

    loss: Tensor
    gradients: Parameters
    rate_gradients: Parameters
    losses: Tensor


class MetaGradient:
    """Computes meta-gradients of one module, step after step; what it finds out about the module it keeps.

    Args:
        module: Any module. Its parameters and their ``.grad`` stay as they are; running statistics of batch norm
            become those of the mean of the tasks where the module is in training mode.
        loss_fn: ``loss_fn(module, batch)`` returns a scalar.
        inner_lr: Learning rate of the adaptation.
        num_inner_steps: Its gradient steps, each on the whole support set.
        first_order: Whether the outer gradient leaves out that the inner gradients depend on the parameters.
        adapts: Says by its name whether a parameter is adapted; by default all are.
        backend: ``"vmap"`` computes all tasks of a chunk at once, ``"loop"`` one after the other, ``"auto"`` times
            both once and keeps the faster.
        chunk_size: Tasks that are computed, and differentiated, together: memory grows with it. ``None``: all.
        compile: Whether ``torch.compile`` compiles the step, which takes seconds once.

    Attributes:
        chosen: The backend that is used, once that is known.
        reason: Why it is.

    Raises:
        MetaLearningError: If an argument is out of its range.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> step = MetaGradient(net, lambda module, batch: (module(batch[0]) - batch[1]).square().mean(), inner_lr=0.1)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> found = step(((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:])))
        >>> sorted(found.gradients), found.losses.shape
        (['bias', 'weight'], torch.Size([4]))
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction,
        *,
        inner_lr: float = 0.01,
        num_inner_steps: int = 1,
        first_order: bool = False,
        adapts: Callable[[str], bool] | None = None,
        backend: Backend = "auto",
        chunk_size: int | None = None,
        compile: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise MetaLearningError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
        if num_inner_steps < 0:
            raise MetaLearningError(f"num_inner_steps={num_inner_steps}: expected at least 0")
        if chunk_size is not None and chunk_size < 1:
            raise MetaLearningError(f"chunk_size={chunk_size}: expected at least 1, or null")
        self.module = module
        self.inner_lr = inner_lr
        self.num_inner_steps = num_inner_steps
        self.first_order = first_order
        self.backend = backend
        self.chunk_size = chunk_size
        self._adapts = adapts or (lambda name: True)
        self._loss = functional_loss(module, loss_fn)
        self._compile = compile
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.chosen: Literal["vmap", "loop"] | None = None if backend == "auto" else backend
        self.reason = "" if backend == "auto" else "as configured"

    def __call__(self, tasks: Tasks, rates: Mapping[str, Tensor] | None = None) -> MetaStep:
        """Return the loss after adaptation and its gradients.

        Args:
            tasks: ``(support, query)``, pytrees of tensors with the tasks along the first axis; or a list of such
                pairs, one for each task, where their shapes differ.
            rates: Inner learning rates of every number of the parameters that are adapted, to be differentiated too.

        Raises:
            MetaLearningError: If there is no task, a support set is empty, or the loss cannot be differentiated.
        """
        supports, queries, count = self._stacked(tasks)
        parameters = learned_parameters(self.module)
        buffers = dict(self.module.named_buffers())
        given = dict(rates or {})
        if self.chosen is None:
            self._choose(parameters, buffers, given, supports, queries, count)
        if self.chosen == "vmap" and isinstance(supports, list):
            self.chosen, self.reason = "loop", "the shapes of the tasks differ"
            log.info("meta-learning: backend=loop, as %s", self.reason)
        try:
            return self._run(self.chosen or "loop", parameters, buffers, given, supports, queries, count)
        except RuntimeError as error:
            raise _named(error) from error

    def _run(
        self,
        backend: Literal["vmap", "loop"],
        parameters: Parameters,
        buffers: Parameters,
        rates: Parameters,
        supports: Any,
        queries: Any,
        count: int,
        *,
        keep_buffers: bool = True,
    ) -> MetaStep:
        size = count if self.chunk_size is None else min(self.chunk_size, count)
        size = 1 if backend == "loop" else size
        step = self._step(backend)
        totals: list[Any] = []
        losses, statistics = [], []
        # Flash attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for start in range(0, count, size):
                support, query = (_part(sets, start, min(start + size, count), backend) for sets in (supports, queries))
                (gradients, rate_gradients), (chunk_losses, chunk_buffers) = step(
                    parameters, rates, buffers, support, query
                )
                totals.append(gradients if not totals else tree_map(torch.add, totals.pop(), gradients))
                losses.append(chunk_losses.detach().reshape(-1))
                statistics.append((chunk_buffers, rate_gradients))
        rate_sum = _summed([rate_gradients for _, rate_gradients in statistics])
        if keep_buffers and self.module.training:
            self._follow(buffers, [chunk for chunk, _ in statistics], backend)
        all_losses = torch.cat(losses)
        return MetaStep(
            loss=all_losses.mean(),
            gradients={name: value.detach() / count for name, value in totals[0].items()},
            rate_gradients={name: value.detach() / count for name, value in rate_sum.items()},
            losses=all_losses,
        )

    def _step(self, backend: Literal["vmap", "loop"]) -> Callable[..., Any]:
        """Return what computes the summed gradients of a chunk: ((parameters, rates), (losses, buffers))."""
        if backend not in self._compiled:
            task = self._task
            many = torch.vmap(task, in_dims=(None, None, None, 0, 0), randomness="different")

            def total(parameters: Parameters, rates: Parameters, buffers: Parameters, support: Any, query: Any) -> Any:
                if backend == "loop":
                    loss, after = task(parameters, rates, buffers, support, query)
                    return loss, (loss, after)
                losses, after = many(parameters, rates, buffers, support, query)
                return losses.sum(), (losses, after)

            step: Callable[..., Any] = torch.func.grad(total, argnums=(0, 1), has_aux=True)
            self._compiled[backend] = torch.compile(step, dynamic=False) if self._compile else step
        return self._compiled[backend]

    def _task(
        self, parameters: Parameters, rates: Parameters, buffers: Parameters, support: Any, query: Any
    ) -> tuple[Tensor, Parameters]:
        """Return the loss of one task's query set after adaptation, and the buffers that it left."""
        adapted = {name: value for name, value in parameters.items() if self._adapts(name)}
        fixed = {name: value for name, value in parameters.items() if name not in adapted}

        def support_loss(fast: Parameters) -> Tensor:
            # Statistics that a pass writes belong to that pass.
            return self._loss({**fixed, **fast}, _own(buffers, support), support)

        fast = descend(
            support_loss, adapted, rates or self.inner_lr, self.num_inner_steps, first_order=self.first_order
        )
        after = _own(buffers, query)
        return self._loss({**fixed, **fast}, after, query), after

    def _choose(self, *arguments: Any) -> None:
        parameters, _, _, supports, _, _ = arguments
        if isinstance(supports, list):
            self.chosen, self.reason = "loop", "the shapes of the tasks differ"
            log.info("meta-learning: backend=loop, as %s", self.reason)
            return
        device = next(iter(parameters.values())).device
        seconds: dict[str, float] = {}
        # What is drawn while it is timed must not be missed by the training.
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for backend in ("vmap", "loop"):
                try:
                    seconds[backend] = self._timed(backend, arguments, device)
                except RuntimeError as error:
                    if backend == "loop":
                        raise _named(error) from error
                    self.chosen, self.reason = "loop", f"vmap: {' '.join(str(error).split())[:200]}"
                    log.info("meta-learning: backend=loop; %s", self.reason)
                    return
        self.chosen = "vmap" if seconds["vmap"] <= seconds["loop"] else "loop"
        self.reason = f"a step takes {1e3 * seconds['vmap']:.3g} ms by vmap, {1e3 * seconds['loop']:.3g} ms by loop"
        log.info("meta-learning: backend=%s, as %s", self.chosen, self.reason)

    def _timed(self, backend: Any, arguments: Sequence[Any], device: torch.device) -> float:
        taken = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            self._run(backend, *arguments, keep_buffers=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def _stacked(self, tasks: Tasks) -> tuple[Any, Any, int]:
        """Return support and query sets, stacked where their shapes allow it, and how many tasks there are."""
        if isinstance(tasks, list):
            if not tasks:
                raise MetaLearningError("tasks: empty, expected at least one (support, query)")
            supports, queries = [support for support, _ in tasks], [query for _, query in tasks]
            _check_sets(supports, queries)
            if len({_form(task) for task in tasks}) == 1:
                stack = (tree_map(lambda *one: torch.stack(one), *sets) for sets in (supports, queries))
                return (*stack, len(tasks))
            return supports, queries, len(tasks)
        support, query = tasks
        sizes = {len(tensor) for tensor in tree_leaves((support, query)) if isinstance(tensor, Tensor)}
        if len(sizes) != 1 or 0 in sizes:
            raise MetaLearningError(
                f"tasks: the first axes have {sorted(sizes)} tasks; expected as many, at least one, everywhere"
            )
        _check_sets([tree_map(lambda one: one[0], support)], [tree_map(lambda one: one[0], query)])
        return support, query, sizes.pop()

    def _follow(self, buffers: Parameters, chunks: Sequence[Parameters], backend: str) -> None:
        """Bring running statistics to the mean of what the tasks left."""
        for name, buffer in buffers.items():
            left = torch.cat([chunk[name] if backend == "vmap" else chunk[name][None] for chunk in chunks])
            with torch.no_grad():
                buffer.copy_(left.mean(0) if left.is_floating_point() else left.amax(0))


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether a module keeps statistics of its batches."""
    return any(isinstance(one, _BatchNorm) and one.track_running_stats for one in module.modules())


def _own(buffers: Parameters, batch: Any) -> Parameters:
    """Return copies of buffers that a forward may write to, under ``vmap`` one for every task."""
    if not buffers:
        return {}
    like = next(tensor for tensor in tree_leaves(batch) if isinstance(tensor, Tensor))
    # Zero of the batch makes the copy as batched as the batch.
    zero = like.reshape(-1)[0].detach().nan_to_num() * 0
    return {name: (value + zero.to(value.dtype)).to(value.dtype) for name, value in buffers.items()}


def _part(sets: Any, start: int, stop: int, backend: str) -> Any:
    if isinstance(sets, list):
        return sets[start]
    if backend == "loop":
        return tree_map(lambda tensor: tensor[start], sets)
    return tree_map(lambda tensor: tensor[start:stop], sets)


def _summed(parts: Sequence[Parameters]) -> Parameters:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]} if parts else {}


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


def _named(error: RuntimeError) -> Exception:
    """Return what an error of the transforms means."""
    text = " ".join(str(error).split())[:300]
    if "derivative" in text and ("not implemented" in text or "not differentiable" in text):
        return MetaLearningError(
            f"the loss cannot be differentiated twice ({text}); first_order=True needs its first derivative only"
        )
    if "inplace" in text or "in-place" in text:
        return MetaLearningError(f"the module writes in place where gradients have to flow ({text}); write x = x + y")
    if isinstance(error, MetaLearningError):
        return error
    return error
