"""The regression of Finn et al. (2017): its network and tasks, and what each algorithm learns; a part of meta.py."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from lightning_optcore.meta import MetaGradient, Sinusoids

Batch = tuple[Tensor, Tensor]
Tasks = tuple[Batch, Batch]


@dataclass(frozen=True)
class Trained:
    """How a row of the sinusoid is trained.

    Args:
        shots: Points of the support set.
        steps: Inner steps.
        options: Others of MetaGradient.
        rates: Inner learning rates that are learned: none, one for every number, or these for every step.
        tasks: Tasks of an iteration.
        validated: Keep the state that was best after 5 steps on tasks that are neither trained on nor judged by. What
            is trained for one step is at times led away by five, and nothing in its own loss says so.
    """

    shots: int = 10
    steps: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: Literal["none", "shared", "of each step"] = "none"
    tasks: int = 25
    validated: bool = False


FIRST_AND_LAST = {"query_loss_weights": (1.0, 0.0, 0.0, 0.0, 1.0)}
SINUSOID = {
    "MAML, 1 step, K=10": Trained(tasks=40, validated=True),
    "MAML, 1 step, K=10, not validated": Trained(),
    "MAML, 1 step, K=5, not validated": Trained(shots=5),
    "FOMAML, 1 step, K=10": Trained(options={"first_order": True}),
    "ANIL, 1 step, K=10": Trained(options={"adapts": lambda name: name.startswith("4.")}),
    "Meta-SGD, 1 step, K=10": Trained(rates="shared"),
    "MAML, 5 steps, K=10": Trained(steps=5),
    "MAML, after 1 and 5 steps, K=10": Trained(steps=5, options=FIRST_AND_LAST),
    "Meta-SGD, after 1 and 5 steps, K=10": Trained(steps=5, options=FIRST_AND_LAST, rates="shared"),
    "Meta-SGD of each step, after 1 and 5, K=10": Trained(steps=5, options=FIRST_AND_LAST, rates="of each step"),
    "Reptile, 5 steps, K=10": Trained(steps=5, options={"direction": "displacement"}),
}
JUDGED_AFTER = (0, 1, 5, 10)
# Of the parameters, and of inner rates of .01, which a larger one drives to where several steps diverge.
LR, RATES_LR = 3e-3, 3e-4
CLIP = 10.0
DIVERGED = 1e3
# Validation: tasks, points of each, from which share of the training on, and how often.
VALIDATION_TASKS, VALIDATION_POINTS, VALIDATED_FROM, VALIDATED_EVERY = 2000, 20, 0.3, 0.015


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of the sinusoid."""
    layers = (nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return nn.Sequential(*layers).to(dtype)


def squared_error(module: nn.Module, batch: Batch) -> Tensor:
    """The loss of the sinusoid."""
    return (module(batch[0]) - batch[1]).square().mean()


def sinusoids(count: int = 25, seed: int = 0, dtype: torch.dtype = torch.float32, **family: int) -> Tasks:
    """Tasks of Finn et al. (2017)."""
    support, query = Sinusoids(**family).batch(count, torch.Generator().manual_seed(seed))
    return tuple(one.to(dtype) for one in support), tuple(one.to(dtype) for one in query)  # type: ignore[return-value]


def sinusoid(options: argparse.Namespace) -> None:
    """Train each algorithm for so many seconds of the processor, and adapt to the same tasks."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    table = Table(title=f"sinusoid: mean squared error of 1,000 tasks after {options.seconds:.0f} s of training")
    for title in ("", *(f"{steps} steps" for steps in JUDGED_AFTER), "iterations", "seeds"):
        table.add_column(title)
    for name, row in SINUSOID.items():
        if options.only and name not in options.only:
            continue
        given: dict[str, Any] = {"backend": "vmap", "compile": True, **row.options}
        step = MetaGradient(mlp(), squared_error, num_inner_steps=row.steps, **given)
        # What the compiler takes is paid once for a network, and not counted.
        step(sinusoids(row.tasks, k_shot=row.shots), inner_rates(step.module, row))
        runs = []
        for seed in seeds:
            runs.append(trained(step, row, seed, options.seconds))
            print(f"{name}, seed {seed}:", *(f"{error:.3f}" for error in runs[-1][0]), flush=True)
        cells = [_summary([run[0][i] for run in runs]) for i in range(len(JUDGED_AFTER))]
        iterations = statistics.mean(run[1] for run in runs)
        table.add_row(name, *cells, f"{iterations:.0f}", f"{seeds.start}..{seeds.stop - 1}")
        print(name, *cells, flush=True)
    Console(width=140).print(table)


def inner_rates(module: nn.Module, row: Trained) -> dict[str, Tensor] | None:
    """Return the first inner learning rates, where they are learned."""
    if row.rates == "none":
        return None
    steps = (row.steps,) if row.rates == "of each step" else ()
    return {name: one.new_full((*steps, *one.shape), 0.01).requires_grad_() for name, one in module.named_parameters()}


def trained(step: MetaGradient, row: Trained, seed: int, seconds: float) -> tuple[list[float], int]:
    """Return the errors after adaptation, and how many iterations there were."""
    torch.manual_seed(seed)
    module = step.module
    module.load_state_dict(mlp().state_dict())
    rates = inner_rates(module, row)
    outer = [*module.parameters(), *(rates or {}).values()]
    reptile = row.options.get("direction") == "displacement"
    groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "lr": 1.0 if reptile else LR}]
    if rates is not None:
        groups.append({"params": list(rates.values()), "lr": RATES_LR})
    optimizer = torch.optim.SGD(groups) if reptile else torch.optim.Adam(groups, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    family, generator = Sinusoids(k_shot=row.shots, num_query=10), torch.Generator().manual_seed(seed)
    kept = _Kept(module, row, seed) if row.validated else None
    start, iterations = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        found = step(family.batch(row.tasks, generator), rates)
        for name, parameter in module.named_parameters():
            parameter.grad = found.gradients[name]
        for name, gradient in found.rate_gradients.items():
            rates[name].grad = gradient  # type: ignore[index]
        # Constant for the first half, then to zero.
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, 2 * (1 - done))
        # One task that several inner steps lead away may make the gradient of the others infinite.
        if torch.nn.utils.clip_grad_norm_(outer, CLIP, foreach=True).isfinite():
            optimizer.step()
        iterations += 1
        if kept is not None and done >= kept.due:
            kept.look(done)
    if kept is not None:
        module.load_state_dict(kept.best)
    return list(_errors(module, row, rates)), iterations


class _Kept:
    """The parameters that were best on tasks of their own; what it costs to find them counts as training."""

    def __init__(self, module: nn.Module, row: Trained, seed: int) -> None:
        given = {"k_shot": row.shots, "num_query": VALIDATION_POINTS}
        self.tasks = sinusoids(VALIDATION_TASKS, seed=10**5 + seed, **given)
        self.judge = MetaGradient(module, squared_error, num_inner_steps=5, backend="vmap")
        self.error, self.due = float("inf"), VALIDATED_FROM
        self.best: dict[str, Tensor] = {}

    def look(self, done: float) -> None:
        """Keep the parameters, if they are better; ``done`` is the share of the training."""
        module, (_, (inputs, wanted)) = self.judge.module, self.tasks
        adapted = self.judge.adapted(self.tasks)
        stacked = {name: torch.stack([one[name] for one in adapted]) for name in adapted[0]}
        with torch.no_grad():
            found = torch.vmap(lambda own, points: functional_call(module, own, (points,)))(stacked, inputs)
            error = float((found - wanted).square().mean())
        if error < self.error or not self.best:
            self.error, self.best = error, {name: value.clone() for name, value in module.state_dict().items()}
        self.due = done + VALIDATED_EVERY


def _errors(module: nn.Module, row: Trained, rates: dict[str, Tensor] | None) -> Iterator[float]:
    test = sinusoids(1000, seed=10**6, k_shot=row.shots, num_query=100)
    shared: dict[str, Any] = {"adapts": row.options.get("adapts"), "backend": "vmap", "chunk_size": 100}
    for steps in JUDGED_AFTER:
        yield float(MetaGradient(module, squared_error, num_inner_steps=steps, **shared)(test, rates).loss)


def _summary(values: list[float]) -> str:
    # Steps that are longer than those of the training may lead away.
    far = sum(not value < DIVERGED for value in values)
    if far:
        return f"diverged, {far} of {len(values)}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"
