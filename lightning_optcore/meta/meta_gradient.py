"""The gradient of what is left of a loss after adaptation, averaged over tasks.

Source: Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
https://arxiv.org/abs/1703.03400; the loss after every step: Antoniou, Edwards and Storkey, "How to train your MAML",
ICLR 2019, https://arxiv.org/abs/1810.09502. The transforms are those of ``torch.func``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optcore.meta.functional import (
    Gradient,
    LossFunction,
    Parameters,
    batch_statistics,
    by_autograd,
    by_transform,
    descend,
    functional,
    learned_parameters,
)
from lightning_optcore.meta.outer_gradient import (
    CallRecorder,
    by_outer_autograd,
    by_outer_transform,
    forked_random_numbers,
    judged_steps,
)
from lightning_optcore.meta.tasks import MetaLearningError, OnePerTask, TaskBatch, Tasks, part, stacked, task_batch
from lightning_optcore.option_values import is_number, is_whole

log = logging.getLogger(__name__)

Backend = Literal["auto", "vmap", "loop"]
BACKENDS = ("auto", "vmap", "loop")
Direction = Literal["gradient", "displacement"]
DIRECTIONS = ("gradient", "displacement")
_TIMED = 3
# Of the greatest gradient: rounding in single precision, amplified by several steps, is below.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class MetaStep:
    """What the tasks say.

    Args:
        loss: Mean over the tasks of the loss of the query set after adaptation; the weighted sum of those after its
            steps, where several count.
        gradients: Its gradient, by the name of the parameter; or what adaptation took away from the parameters, on
            average, where that is the direction.
        rate_gradients: The gradient with respect to the inner learning rates, where these are learned.
        losses: (tasks,) the loss of each task.
        aux: What the loss returned beside the scalar for each query set after the last step, with the tasks along the
            first axis; a list, one for each task, where the shapes differ.
    """

    loss: Tensor
    gradients: Parameters
    rate_gradients: Parameters
    losses: Tensor
    aux: Any = None


@dataclass
class _Totals:
    """Sums over the chunks of tasks, and what each of them left."""

    gradients: Any = None
    losses: list[Tensor] = field(default_factory=list)
    buffers: list[Parameters] = field(default_factory=list)
    aux: list[Any] = field(default_factory=list)


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
        direction: ``"gradient"`` of the loss after adaptation; or ``"displacement"``: where adaptation came from less
            where it led to, on the support and query sets in turn (Reptile).
        has_aux: Whether the loss returns ``(scalar, aux)``, with ``aux`` a pytree of tensors.
        query_loss_weights: What the loss of the query set after each inner step counts, one for each step: of a start
            that is to be good after few steps and after many. ``None``: only what is left after the last step counts.

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
        direction: Direction = "gradient",
        has_aux: bool = False,
        query_loss_weights: Sequence[float] | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise MetaLearningError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
        if direction not in DIRECTIONS:
            raise MetaLearningError(f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
        if not (is_number(inner_lr) and inner_lr >= 0):
            raise MetaLearningError(f"inner_lr={inner_lr!r}: expected at least 0")
        if not is_whole(num_inner_steps, least=0):
            raise MetaLearningError(f"num_inner_steps={num_inner_steps!r}: expected at least 0, a whole number")
        if chunk_size is not None and not is_whole(chunk_size, least=1):
            raise MetaLearningError(f"chunk_size={chunk_size!r}: expected at least 1, a whole number, or null")
        if query_loss_weights is not None and direction == "displacement":
            raise MetaLearningError("query_loss_weights: no loss counts for direction='displacement'; expected None")
        self.module = module
        self.inner_lr = inner_lr
        self.num_inner_steps = num_inner_steps
        self.first_order = first_order
        self.backend = backend
        self.chunk_size = chunk_size
        self.direction = direction
        self.chosen: Literal["vmap", "loop"] | None = None if backend == "auto" else backend
        self.reason = "" if backend == "auto" else "as configured"
        self._judged = judged_steps(num_inner_steps, query_loss_weights)
        self._adapts = adapts or (lambda name: True)
        self._with_aux = functional(module, loss_fn if has_aux else lambda one, batch: (loss_fn(one, batch), ()))
        self._compile = compile
        self._steps: dict[str, Callable[..., Any]] = {}
        self._has_norms: bool | None = None

    def __call__(self, tasks: Tasks, rates: Mapping[str, Tensor] | None = None) -> MetaStep:
        """Return the loss after adaptation and its gradients.

        Args:
            tasks: ``(support, query)``, pytrees of tensors with the tasks along the first axis; or a list of such
                pairs, one for each task, where their shapes differ.
            rates: Inner learning rates of every number of the parameters that are adapted, to be differentiated too;
                with one more axis in front those of each step, of which the last goes on where there are more steps.

        Raises:
            MetaLearningError: If there is no task, a support set is empty, or the loss cannot be differentiated.
        """
        batch = tasks if isinstance(tasks, TaskBatch) else task_batch(tasks)
        parameters, buffers = learned_parameters(self.module), dict(self.module.named_buffers())
        given = dict(rates or {})
        if not batch.alike and self.chosen != "loop":
            self.keep("loop", "the shapes of the tasks differ")
        if self._has_norms is None and self.chosen != "loop":
            self._look(parameters, buffers, batch)
        if self.chosen is None:
            self._choose(parameters, buffers, given, batch)
        with _errors_named():
            return self._run(self.chosen or "loop", parameters, buffers, given, batch)

    def adapted(self, tasks: Tasks, rates: Mapping[str, Tensor] | None = None) -> list[Parameters]:
        """Return, of every task, the parameters and buffers after adaptation to its support set, without a graph.

        Batch norm normalizes by the support set's statistics, and keeps these, so that the adapted module can be
        evaluated, and deployed. It works in inference mode, too.

        Args:
            tasks: As for a call.
            rates: As for a call.
        """
        batch = tasks if isinstance(tasks, TaskBatch) else task_batch(tasks)
        parameters = {name: value.detach() for name, value in learned_parameters(self.module).items()}
        buffers = {name: value.detach().clone() for name, value in self.module.named_buffers()}
        given = {name: rate.detach() for name, rate in (rates or {}).items()}

        def after(support: Any) -> Parameters:
            fast = self._after(parameters, buffers, given, [support], self._all_steps, first_order=True)
            kept = _own(buffers, support)
            if tracking:
                with torch.no_grad():
                    self._with_aux(fast, kept, support)
            return {**fast, **kept}

        with _errors_named(), sdpa_kernel(SDPBackend.MATH), batch_statistics(self.module) as tracking:
            if batch.alike and self.chosen != "loop":
                try:
                    together = torch.vmap(after, randomness="different")(batch.supports)
                    return [part(together, i) for i in range(batch.count)]
                except MetaLearningError:
                    raise
                except (RuntimeError, ValueError) as error:
                    self.keep("loop", _why_no_vmap(error))
            return [after(part(batch.supports, i)) for i in range(batch.count)]

    def _run(
        self,
        backend: Literal["vmap", "loop"],
        parameters: Parameters,
        buffers: Parameters,
        rates: Parameters,
        batch: TaskBatch,
        *,
        keep_buffers: bool = True,
    ) -> MetaStep:
        size = 1 if backend == "loop" else min(self.chunk_size or batch.count, batch.count)
        step, totals = self._step(backend), _Totals()
        # Flash attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for start in range(0, batch.count, size):
                which = start if backend == "loop" else slice(start, start + size)
                gradients, (losses, after, aux) = step(
                    parameters, rates, buffers, part(batch.supports, which), part(batch.queries, which)
                )
                earlier = totals.gradients
                totals.gradients = gradients if earlier is None else tree_map(torch.add, earlier, gradients)
                totals.losses.append(losses.detach().reshape(-1))
                totals.buffers.append(after)
                totals.aux.append(aux)
        if keep_buffers and self.module.training:
            self._follow(buffers, totals.buffers, backend)
        losses = torch.cat(totals.losses)
        of_parameters, of_rates = tree_map(lambda total: total.detach() / batch.count, totals.gradients)
        return MetaStep(losses.mean(), of_parameters, of_rates, losses, _joined(totals.aux, backend))

    def _step(self, backend: Literal["vmap", "loop"]) -> Callable[..., Any]:
        """Return what computes a chunk: ((of the parameters, of the rates), (losses, buffers, aux)), the first sums."""
        if backend not in self._steps:
            make = self._gradients if self.direction == "gradient" else self._displacements
            step = make(backend)
            self._steps[backend] = torch.compile(step, dynamic=False) if self._compile else step
        return self._steps[backend]

    def _gradients(self, backend: str) -> Callable[..., Any]:
        # A compiler follows the transforms only; autograd keeps no graph of the next order.
        outer = by_outer_transform if self._compile else by_outer_autograd
        if backend == "loop":
            return outer(self._task if self._compile else partial(self._task, gradient=by_autograd))
        across: dict[str, Any] = {"in_dims": (None, None, None, 0, 0), "randomness": "different"}
        if not self._has_norms:
            return outer(torch.vmap(self._task, **across))
        # The gradient of the sum would be wrong.
        of_tasks = torch.vmap(by_outer_transform(self._task), **across)

        def total(*arguments: Any) -> Any:
            gradients, found = of_tasks(*arguments)
            return tree_map(lambda one: one.sum(0), gradients), found

        return total

    def _displacements(self, backend: str) -> Callable[..., Any]:
        def task(parameters: Parameters, rates: Parameters, buffers: Parameters, support: Any, query: Any) -> Any:
            fast = self._after(parameters, buffers, rates, [support, query], self._all_steps, first_order=True)
            after = _own(buffers, query)
            loss, aux = self._with_aux(fast, after, query)
            return {name: parameters[name] - fast[name] for name in parameters}, (loss, after, aux)

        many = torch.vmap(task, in_dims=(None, None, None, 0, 0), randomness="different")

        def total(parameters: Parameters, rates: Parameters, buffers: Parameters, support: Any, query: Any) -> Any:
            with torch.no_grad():
                moved, found = (task if backend == "loop" else many)(parameters, rates, buffers, support, query)
            return (moved if backend == "loop" else tree_map(lambda one: one.sum(0), moved), {}), found

        return total

    def _task(
        self,
        parameters: Parameters,
        rates: Parameters,
        buffers: Parameters,
        support: Any,
        query: Any,
        *,
        gradient: Gradient = by_transform,
    ) -> tuple[Tensor, Parameters, Any]:
        """Return the loss of one task's query set after adaptation, the buffers that it left, and what else it gave."""
        options: dict[str, Any] = {"first_order": self.first_order, "gradient": gradient}
        fast, taken, losses = parameters, 0, []
        for number, weight in self._judged:
            fast = self._after(fast, buffers, rates, [support], range(taken, number), **options)
            after = _own(buffers, query)
            loss, aux = self._with_aux(fast, after, query)
            losses.append(weight * loss)
            taken = number
        return sum(losses[1:], losses[0]), after, aux

    def _after(
        self,
        parameters: Parameters,
        buffers: Parameters,
        rates: Parameters,
        sets: Sequence[Any],
        steps: range,
        *,
        first_order: bool,
        gradient: Gradient = by_transform,
    ) -> Parameters:
        """Return all parameters after the steps, each of which is on the next of the sets."""
        adapted = {name: value for name, value in parameters.items() if self._adapts(name)}
        fixed = {name: value for name, value in parameters.items() if name not in adapted}

        def loss_of(batch: Any) -> Callable[[Parameters], Tensor]:
            # Statistics that a pass writes belong to that pass.
            return lambda fast: self._with_aux({**fixed, **fast}, _own(buffers, batch), batch)[0]

        losses = [loss_of(batch) for batch in sets]
        given = rates or self.inner_lr
        return {**fixed, **descend(losses, adapted, given, steps, first_order=first_order, gradient=gradient)}

    @property
    def _all_steps(self) -> range:
        return range(self.num_inner_steps)

    def _look(self, parameters: Parameters, buffers: Parameters, batch: TaskBatch) -> None:
        """Find out what the loss computes."""
        query = part(batch.queries, 0)
        with torch.no_grad(), forked_random_numbers(parameters), CallRecorder() as called:
            self._with_aux(parameters, _own(buffers, query), query)
        self._has_norms = called.norms
        on_cpu = next(iter(parameters.values())).device.type == "cpu"
        if self.chosen is None and called.convolutions and on_cpu:
            self.keep("loop", "convolutions by vmap take many times the memory on a CPU")

    def _choose(self, parameters: Parameters, buffers: Parameters, rates: Parameters, batch: TaskBatch) -> None:
        device = next(iter(parameters.values())).device
        seconds: dict[str, float] = {}
        steps: dict[str, MetaStep] = {}
        # What is drawn while it is timed must not be missed by the training.
        with forked_random_numbers(parameters):
            before = torch.get_rng_state()
            for backend in ("vmap", "loop"):
                try:
                    seconds[backend], steps[backend] = self._timed(backend, parameters, buffers, rates, batch)
                except MetaLearningError:
                    raise
                except (RuntimeError, ValueError) as error:
                    # A ValueError is of vmap where a task holds what is no tensor.
                    if backend == "vmap":
                        return self.keep("loop", _why_no_vmap(error))
                    raise (_named(error) if isinstance(error, RuntimeError) else error) from error
            is_random = device.type == "cuda" or not torch.equal(before, torch.get_rng_state())
        difference = _difference(steps["vmap"].gradients, steps["loop"].gradients)
        if not is_random and not difference < _TOLERANCE:
            return self.keep("loop", f"the gradient by vmap differs from it by {difference:.2g} of the greatest")
        faster: Any = min(seconds, key=lambda one: seconds[one])
        times = ", ".join(f"{1e3 * taken:.3g} ms by {backend}" for backend, taken in seconds.items())
        return self.keep(faster, f"a step takes {times}")

    def keep(self, backend: Literal["vmap", "loop"], reason: str) -> None:
        """Use a backend from now on."""
        self.chosen, self.reason = backend, reason
        log.info("meta-learning: backend=%s; %s", backend, reason)

    def _timed(self, backend: Any, *arguments: Any) -> tuple[float, MetaStep]:
        device, taken = next(iter(arguments[0].values())).device, []
        for _ in range(_TIMED):
            start = time.perf_counter()
            step = self._run(backend, *arguments, keep_buffers=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken), step

    def _follow(self, buffers: Parameters, chunks: Sequence[Parameters], backend: str) -> None:
        """Bring running statistics to the mean of what the tasks left."""
        for name, buffer in buffers.items():
            left = torch.cat([chunk[name] if backend == "vmap" else chunk[name][None] for chunk in chunks])
            with torch.no_grad():
                buffer.copy_(left.mean(0) if left.is_floating_point() else left.amax(0))


def _own(buffers: Parameters, batch: Any) -> Parameters:
    """Return copies of buffers that a forward may write to, under ``vmap`` one for every task."""
    if not buffers:
        return {}
    like = next(tensor for tensor in tree_leaves(batch) if isinstance(tensor, Tensor))
    # Zero of the batch makes the copy as batched as the batch.
    zero = like.reshape(-1)[0].detach().nan_to_num() * 0
    return {name: (value + zero.to(value.dtype)).to(value.dtype) for name, value in buffers.items()}


def _difference(one: Parameters, other: Parameters) -> float:
    """Return the greatest difference of any number, as a share of the greatest number."""
    greatest = max(float(value.abs().max()) for value in other.values())
    return max(float((one[name] - value).abs().max()) for name, value in other.items()) / max(greatest, 1e-30)


def _joined(parts: Sequence[Any], backend: str) -> Any:
    """Return what chunks gave beside their losses, with the tasks along the first axis."""
    if not tree_leaves(parts[0]):
        return None
    if backend == "vmap":
        return tree_map(lambda *one: torch.cat(one).detach(), *parts)
    try:
        return tree_map(Tensor.detach, stacked(parts))
    except (RuntimeError, ValueError):
        return OnePerTask(tree_map(Tensor.detach, one) for one in parts)


@contextmanager
def _errors_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _named(error) from error


def _named(error: RuntimeError) -> Exception:
    """Return what an error of the transforms means."""
    text = " ".join(str(error).split())[:300]
    if "derivative" in text and ("not implemented" in text or "not differentiable" in text):
        return MetaLearningError(
            f"the loss cannot be differentiated twice ({text}); its first derivative is enough for "
            "first_order=True, which is algorithm=fomaml of MetaLearning"
        )
    if "inplace" in text or "in-place" in text:
        return MetaLearningError(f"the module writes in place where gradients have to flow ({text}); write x = x + y")
    return error


def _why_no_vmap(error: Exception) -> str:
    return f"vmap: {' '.join(str(error).split())[:200]}"
