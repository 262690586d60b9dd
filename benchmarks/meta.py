"""Meta-learning against higher and TorchOpt: gradients, time of a step, memory, and what is learned; one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/meta.py gradients|speed|memory|sinusoid

``gradients`` prints the greatest difference of any number of the outer gradient. ``speed`` lets all take turns: read
the ratios, not the milliseconds; what ``torch.compile`` takes for its first call stands apart. ``memory`` measures each
alternative in a process of its own, above what the process had before. ``sinusoid`` is the regression of Finn et al.
(2017): a network of 40-40 is trained for so many seconds of the processor, and adapts to 1,000 tasks that are the same
for all; the mean squared error is that of 100 other points of each.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import higher
import torch
import torchopt
from rich.console import Console
from rich.table import Table
from sinusoid import Batch, Tasks, mlp, sinusoid, sinusoids, squared_error
from torch import Tensor, nn

from lightning_optcore.meta import MetaGradient

Step = Callable[[nn.Module, Tasks], None]
PARTS = ("gradients", "speed", "memory", "sinusoid")
# Shapes of conv4: images of a class in the support set, channels, side of the images.
SHAPES = ((1, 32, 28), (5, 32, 28), (1, 64, 28))


def main() -> None:
    """Print the table of one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=15, help="of the turns of speed")
    parser.add_argument("--seeds", type=int, default=5, help="of the sinusoid")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=100.0, help="of the processor, for a training")
    parser.add_argument("--only", nargs="*", help="names of rows of the sinusoid")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.measure:
        print(json.dumps(peak_bytes(options.measure)))
        return
    {"gradients": gradients, "speed": speed, "memory": memory, "sinusoid": sinusoid}[options.part](options)
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "higher", "torchopt")))


def conv4(channels: int, side: int = 28, n_way: int = 5, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Four blocks of convolution, batch norm of the batch's own statistics, ReLU and pooling (Vinyals et al., 2016)."""
    layers: list[nn.Module] = []
    for block in range(4):
        layers += [
            nn.Conv2d(1 if block == 0 else channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (side // 16) ** 2, n_way)).to(dtype)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    """The loss of images."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def images(count: int, shots: int, side: int, dtype: torch.dtype = torch.float32, n_way: int = 5) -> Tasks:
    """Tasks of noise, whose shapes are those of few-shot images; 15 of each class are in the query set."""
    generator = torch.Generator().manual_seed(0)

    def some(each: int) -> Batch:
        labels = torch.arange(n_way).repeat_interleave(each).expand(count, -1)
        return torch.randn(count, n_way * each, 1, side, side, generator=generator).to(dtype), labels

    return some(shots), some(15)


def task_of(tasks: Tasks, index: int) -> Tasks:
    """One of the tasks."""
    (x, y), (queried, wanted) = tasks
    return (x[index], y[index]), (queried[index], wanted[index])


class Peer:
    """A library's meta-step: gradients go to ``.grad``, task by task, as its documentation shows."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        *,
        lr: float,
        steps: int,
        first_order: bool = False,
        head: nn.Module | None = None,
        rates: list[Tensor] | None = None,
    ) -> None:
        self.module, self.loss_fn, self.lr, self.steps = module, loss_fn, lr, steps
        self.first_order, self.head, self.rates = first_order, head, rates

    def __call__(self, tasks: Tasks) -> None:
        """Add the mean gradient of the tasks to ``.grad``."""
        count = len(tasks[0][0])
        for index in range(count):
            support, query = task_of(tasks, index)
            (self.query_loss(support, query) / count).backward()

    def query_loss(self, support: Batch, query: Batch) -> Tensor:
        """Return the loss after adaptation, with its graph."""
        raise NotImplementedError


class Higher(Peer):
    """The ``higher`` library (Grefenstette et al., 2019)."""

    def query_loss(self, support: Batch, query: Batch) -> Tensor:
        """Return the loss after adaptation, with its graph."""
        adapted = list((self.head or self.module).parameters())
        groups: Any = adapted if self.rates is None else [{"params": [one]} for one in adapted]
        override = None if self.rates is None else {"lr": self.rates}
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        with higher.innerloop_ctx(
            self.module, optimizer, copy_initial_weights=False, track_higher_grads=True, override=override
        ) as (fast, inner):
            for _ in range(self.steps):
                if self.first_order:
                    inner.step(self.loss_fn(fast, support), grad_callback=lambda gs: [_detached(g) for g in gs])
                else:
                    inner.step(self.loss_fn(fast, support))
            return self.loss_fn(fast, query)


class TorchOpt(Peer):
    """``torchopt.MetaSGD``, or a transformation of its own where the rates are learned (Ren et al., 2022)."""

    def query_loss(self, support: Batch, query: Batch) -> Tensor:
        """Return the loss after adaptation, with its graph."""
        adapted = self.head or self.module
        if self.rates is None:
            optimizer: Any = torchopt.MetaSGD(adapted, lr=self.lr)
        else:
            # TorchOpt takes the parameters of a module by the alphabet.
            listed = dict(zip(dict(adapted.named_parameters()), self.rates, strict=True))
            order = [f"{owner}.{one}" for owner, m in adapted.named_modules() for one in sorted(m._parameters)]
            optimizer = torchopt.MetaOptimizer(adapted, _scaled_by([listed[one] for one in order]))
        start = torchopt.extract_state_dict(adapted, by="reference")
        try:
            for _ in range(self.steps):
                loss = self.loss_fn(self.module, support)
                optimizer.step(loss) if not self.first_order else _first_order_step(adapted, loss, self.lr)
            return self.loss_fn(self.module, query)
        finally:
            torchopt.recover_state_dict(adapted, start)


def _detached(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach()


def _first_order_step(module: nn.Module, loss: Tensor, lr: float) -> None:
    """TorchOpt's MetaSGD has no first order: the same update with gradients that are constants."""
    names = [(owner, name) for owner in module.modules() for name in owner._parameters]
    values = [getattr(owner, name) for owner, name in names]
    for (owner, name), value, gradient in zip(names, values, torch.autograd.grad(loss, values), strict=True):
        owner._parameters[name] = value - lr * gradient


def _scaled_by(rates: list[Tensor]) -> Any:
    from torchopt.base import GradientTransformation
    from torchopt.utils import pytree

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        leaves, structure = pytree.tree_flatten(updates)
        scaled = [-rate * leaf for rate, leaf in zip(rates, leaves, strict=True)]
        return pytree.tree_unflatten(structure, scaled), state

    return GradientTransformation(lambda params: (), update)


def gradients(options: argparse.Namespace) -> None:
    """Compare outer gradients."""
    table = Table(title="greatest difference of the outer gradient")
    for title in ("network", "algorithm", "type", "higher", "TorchOpt", "greatest gradient"):
        table.add_column(title)
    networks = {
        "MLP 40-40, 5 steps": (mlp, sinusoids, squared_error, "4", 5),
        "conv4, 2 steps": (
            lambda dtype: conv4(8, dtype=dtype),
            lambda **o: images(3, 1, 28, **o),
            cross_entropy,
            "17",
            2,
        ),
    }
    for name, (make, tasks_of, loss_fn, head, steps) in networks.items():
        for algorithm in ("MAML", "ANIL", "Meta-SGD"):
            for dtype in (torch.float32, torch.float64):
                torch.manual_seed(0)
                module, tasks = make(dtype=dtype), tasks_of(dtype=dtype)
                rates = {key: 0.005 + 0.01 * torch.rand_like(one) for key, one in module.named_parameters()}
                adapts = (lambda key, head=head: key.startswith(f"{head}.")) if algorithm == "ANIL" else None
                step = MetaGradient(module, loss_fn, inner_lr=0.01, num_inner_steps=steps, adapts=adapts)
                learned = rates if algorithm == "Meta-SGD" else None
                found = step(tasks, learned)
                ours = [*found.gradients.values(), *found.rate_gradients.values()]
                differences = []
                for peer in (Higher, TorchOpt):
                    given = None if learned is None else [one.clone().requires_grad_() for one in learned.values()]
                    module.zero_grad()
                    part = module.get_submodule(head) if algorithm == "ANIL" else None
                    peer(module, loss_fn, lr=0.01, steps=steps, head=part, rates=given)(tasks)
                    theirs = [one.grad for one in (*module.parameters(), *(given or ()))]
                    differences.append(max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)))
                greatest = max(float(one.abs().max()) for one in ours)
                kind = str(dtype).removeprefix("torch.")
                table.add_row(name, algorithm, kind, *(f"{one:.1e}" for one in differences), f"{greatest:.2g}")
    Console(width=120).print(table)


def speed(options: argparse.Namespace) -> None:
    """Time a meta-step of each library in turns."""
    table = Table(title=f"ms of a meta-step, median of {options.rounds} turns (times the fastest peer's)")
    titles = ("tasks", "order", "here", "here, compiled", "first call", "higher", "TorchOpt", "backend")
    for title in titles:
        table.add_column(title)
    cases: list[tuple[str, nn.Module, Tasks, Any, int, bool]] = [
        ("sinusoid, 25 tasks, 1 step", mlp(), sinusoids(), squared_error, 1, False),
        ("sinusoid, 25 tasks, 5 steps", mlp(), sinusoids(), squared_error, 5, False),
    ]
    for shots, channels, side in SHAPES:
        for first_order in (False, True):
            name = f"conv4 of {channels}, 4 tasks, {shots} shot, 1 step"
            tasks = images(4, shots, side)
            cases.append((name, conv4(channels, side), tasks, cross_entropy, 1, first_order))
    for name, module, tasks, loss_fn, steps, first_order in cases:
        shared = {"inner_lr": 0.01, "num_inner_steps": steps, "first_order": first_order}
        here = MetaGradient(module, loss_fn, **shared)
        alternatives: dict[str, Callable[[], Any]] = {"here": lambda here=here, tasks=tasks: here(tasks)}
        first_call = "-"
        if name.startswith("sinusoid"):
            compiled = MetaGradient(module, loss_fn, backend="vmap", compile=True, **shared)
            start = time.perf_counter()
            compiled(tasks)
            first_call = f"{time.perf_counter() - start:.0f} s"
            alternatives["here, compiled"] = lambda compiled=compiled, tasks=tasks: compiled(tasks)
        for label, peer in (("higher", Higher), ("TorchOpt", TorchOpt)):
            step = peer(module, loss_fn, lr=0.01, steps=steps, first_order=first_order)
            alternatives[label] = lambda step=step, tasks=tasks: step(tasks)
        taken = in_turns(alternatives, options.rounds)
        fastest = min(taken["higher"], taken["TorchOpt"])
        cells = {label: f"{1e3 * value:.2f} ({fastest / value:.2f}x)" for label, value in taken.items()}
        cells |= {"first call": first_call, "tasks": name, "order": "1st" if first_order else "2nd"}
        table.add_row(*(cells.get(title, here.chosen if title == "backend" else "-") for title in titles))
    Console(width=160).print(table)


def in_turns(alternatives: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each; all have a turn in every round, in another order."""
    taken: dict[str, list[float]] = {name: [] for name in alternatives}
    order = list(alternatives)
    for number in range(rounds + 2):
        random.Random(number).shuffle(order)
        for name in order:
            start = time.perf_counter()
            alternatives[name]()
            if number >= 2:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


MEMORY = {
    "plain loop, backward for each task": None,
    "here, auto": {},
    "here, loop": {"backend": "loop"},
    "here, vmap": {"backend": "vmap"},
    "here, vmap, chunks of 1": {"backend": "vmap", "chunk_size": 1},
    "here, vmap, chunks of 4": {"backend": "vmap", "chunk_size": 4},
}


def memory(options: argparse.Namespace) -> None:
    """Measure the peak memory of MAML with 5 inner steps on 16 tasks."""
    table = Table(title="MAML, conv4 of 32, 5 steps, 16 tasks of 5-way 1-shot: peak memory of a step")
    for title in ("", "MB", "times the plain loop"):
        table.add_column(title)
    found = {}
    for name in MEMORY:
        command = [sys.executable, Path(__file__), "memory", "--measure", name]
        found[name] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    plain = next(iter(found.values()))
    for name, value in found.items():
        table.add_row(name, f"{value / 1e6:.0f}", f"{value / plain:.2f}")
    Console(width=120).print(table)


def peak_bytes(name: str) -> int:
    """Return how much more memory this process had at its peak than before the step."""
    torch.manual_seed(0)
    module, tasks, given = conv4(32), images(16, 1, 28), MEMORY[name]

    def step_of(network: nn.Module) -> Callable[[Tasks], Any]:
        if given is None:
            return Plain(network, cross_entropy, lr=0.01, steps=5)
        return MetaGradient(network, cross_entropy, num_inner_steps=5, **given)

    # What torch loads for its first step is no matter of the step.
    step_of(conv4(2))(images(1, 1, 28))
    step = step_of(module)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(tasks)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


class Plain(Peer):
    """MAML by ``torch.autograd`` alone."""

    def query_loss(self, support: Batch, query: Batch) -> Tensor:
        """Return the loss after adaptation, with its graph."""
        fast = dict(self.module.named_parameters())
        call = torch.func.functional_call
        for _ in range(self.steps):
            loss = self.loss_fn(lambda x: call(self.module, fast, (x,)), support)  # type: ignore[arg-type] # noqa: B023
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: one - self.lr * slope for (name, one), slope in zip(fast.items(), slopes, strict=True)}
        return self.loss_fn(lambda x: call(self.module, fast, (x,)), query)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
