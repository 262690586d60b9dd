"""Architecture search with real trainings on FashionMNIST, against a hand-made network and NNI's RegularizedEvolution.

    OMP_NUM_THREADS=1 python benchmarks/nas_trainings.py --output trainings.json

A space of convolutional networks, which holds the hand-made ``CNN`` at its defaults, is searched twice for each seed
with the same seconds of the processor: by ``nas.search`` with AdaptiveEvolution, and by NNI's RegularizedEvolution. All
that a search does counts: trainings, proposals, and what it takes to know the costs of networks. Both train a network
alike, with few images and epochs; the latency is predicted by one LatencyTable, the bytes are counted.

Our objectives are accuracy, latency and bytes. NNI's strategy, which has one objective, gets their equally weighted
sum: the accuracy scaled from ``LEAST`` to ``BEST``, the logarithms of both costs from the least of the space to the
CNN's; its result is the network with the greatest sum.

The networks that compete are then trained anew, alike, with more images, and compared on the 10,000 test images.
Against the CNN compete the ``FINALISTS`` most accurate points of the front among those that cost at most half of it,
in milliseconds and in bytes; against NNI's network those that cost at most as much as it. Of these the one counts that
is best on the validation images after that training. A network dominates another if it is at least as accurate, at most
as slow and at most as large, and better in one. Latencies are measured in turns; the test images choose nothing.

Killed, it continues with ``--output``: what is finished is in that file.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from nni_engine import quieten, regularized_evolution
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from lightning_optcore import measure_alternatives, nas
from lightning_optcore.data import FashionMNIST
from lightning_optcore.files import write_atomically
from lightning_optcore.models import CNN, Classifier
from lightning_optcore.search import hypervolume

Architecture = dict[str, Any]
Costs = tuple[float, float]

# A training of the searches, and one of the networks that compete: images, epochs, images a batch.
TRIAL, FINAL = (6_000, 2, 64), (15_000, 5, 128)
# So many validation images judge a trial.
JUDGED = 2_500
SECONDS, TRAINING_SEEDS, FINALISTS, ROUNDS = 240.0, (0, 1), 3, 200
# Accuracies of a trial: one that is worth nothing, and about the best.
LEAST, BEST = 0.82, 0.89
# What is less accurate in a trial of ours, or costs more than half of the CNN, is worth nothing.
LEAST_OF_OURS = 0.85
# The least milliseconds and bytes of the space, and about those of the CNN: more than these is worth nothing.
LEAST_COSTS, CNN_COSTS = (0.08, 4e3), (1.3, 1.2e6)
EXAMPLE = torch.zeros(1, 1, 28, 28)


def main() -> None:
    """Search and compare for every seed, one after the other; print a line for each and a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, for each search")
    parser.add_argument("--output", type=Path, help="file of all figures, as JSON; what is in it is not done again")
    parser.add_argument("--quick", action="store_true", help="one seed, and hardly any training: does it run?")
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quieten()
    final = FINAL
    if options.quick:
        options.seeds, options.seconds, final = 1, 12.0, (1_000, 1, 64)

    results = Results(options.output)
    console = Console(width=150)
    outcomes = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        outcomes[seed] = compared(seed, options.seconds, final, results)
    console.print(printed(outcomes))
    packages = ("lightning-optcore", "torch", "lightning", "nni", "numpy", "scipy")
    print("versions:", ", ".join(f"{package} {version(package)}" for package in packages))


class Results:
    """Figures by name, each of which is in a file as soon as it is known.

    Args:
        path: The file; ``None`` keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a figure, which is computed if it is not there."""
        if name not in self.content:
            self.content[name] = json.loads(json.dumps(compute()))
            if self.path is not None:
                write_atomically(self.path, json.dumps(self.content))
        return self.content[name]


def convolution(inputs: int, width: int, kernel: int, stride: int, kind: str, norm: bool) -> list[nn.Module]:
    """Return the layers of one convolution with ReLU."""
    layers: list[nn.Module] = []
    if kind == "separable" and inputs > 1:
        layers.append(nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False))
        layers.append(nn.Conv2d(inputs, width, 1, bias=not norm))
    else:
        layers.append(nn.Conv2d(inputs, width, kernel, stride, kernel // 2, bias=not norm))
    return [*layers, *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]


def network(stages: int, norm: bool, head: str, hidden: int, **chosen: Any) -> nn.Sequential:
    """Return a network for images of 28 x 28: a stem, ``stages`` more convolutions and a classifier.

    Args:
        stages: How many convolutions follow the stem.
        norm: Whether each is followed by batch norm.
        head: What the classifier sees: the ``average`` of every channel, all of it (``flatten``), or that after
            another pooling (``pooled``).
        hidden: Units of a hidden layer; 0 for none.
        chosen: Of every convolution its ``width``, ``kernel``, ``kind`` and how it makes the image smaller
            (``reduce``), with the number at the end of the name; the stem is 0.
    """
    layers: list[nn.Module] = []
    channels, side = 1, 28
    for i in range(stages + 1):
        reduce = chosen[f"reduce{i}"] if side > 3 else "none"
        stride, kind = 2 if reduce == "stride" else 1, chosen.get(f"kind{i}", "plain")
        layers += convolution(channels, chosen[f"width{i}"], chosen[f"kernel{i}"], stride, kind, norm)
        channels = chosen[f"width{i}"]
        if reduce == "pool":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        side = side if reduce == "none" else (side + 1) // 2
    if head == "average":
        layers.append(nn.AdaptiveAvgPool2d(1))
        side = 1
    elif head == "pooled" and side > 3:
        layers.append(nn.AvgPool2d(2, ceil_mode=True))
        side = (side + 1) // 2
    layers.append(nn.Flatten())
    inputs = channels * side**2
    if hidden:
        layers += [nn.Linear(inputs, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden or inputs, 10))


def networks() -> nas.ArchitectureSpace:
    """Return the space that both searches have."""
    choices: dict[str, Any] = {
        "stages": [2, 3, 4, 5],
        "norm": [True, False],
        "head": ["average", "pooled", "flatten"],
        "hidden": [0, 16, 32, 64],
    }
    widths = [
        "choice(4,8,12,16,24,32)",
        *["choice(4,8,12,16,24,32,48,64)"] * 2,
        *["choice(8,16,24,32,48,64,96,128)"] * 3,
    ]
    conditions = {}
    for i, width in enumerate(widths):
        chosen: dict[str, Any] = {"width": width, "kernel": [3, 5], "reduce": ["stride", "pool", "none"]}
        if i > 0:
            chosen["kind"] = ["plain", "separable"]
        choices |= {f"{name}{i}": values for name, values in chosen.items()}
        if i > 2:
            conditions |= {f"{name}{i}": f"stages > {i - 1}" for name in chosen}
    return nas.factory_space(network, choices, conditions=conditions)


@cache
def images() -> FashionMNIST:
    """Return the images, read once."""
    data = FashionMNIST()
    data.prepare_data()
    data.setup()
    return data


class Images(FashionMNIST):
    """The first training and validation images, from memory."""

    def setup(self, stage: str | None = None) -> None:
        """Take as many as are asked for."""
        every = images()
        self.train_set = _first(every.train_set, self.train_size)
        self.val_set = _first(every.val_set, self.val_size)
        self.test_set = every.test_set


def _first(data: TensorDataset | None, count: int | None) -> TensorDataset:
    assert data is not None
    return TensorDataset(*(tensor[:count] for tensor in data.tensors))


class Known:
    """The logarithms of the predicted milliseconds and of the bytes of networks, each computed once.

    Args:
        where: The space.
        table: Predicts latencies.
    """

    def __init__(self, where: nas.ArchitectureSpace, table: nas.LatencyTable) -> None:
        self._counted = nas.Constraints({}, where.build, EXAMPLE, latency=table.predict, count_flops=False)

    def __call__(self, architecture: Mapping[str, Any]) -> Costs:
        """Return both."""
        costs = self._counted.costs(dict(architecture))
        return math.log10(costs["latency_ms"]), math.log10(costs["size_bytes"])


@cache
def latency_table() -> nas.LatencyTable:
    """Return this machine's table, fitted to twelve random networks, before any search begins."""
    table, rng = nas.LatencyTable(rounds=10), np.random.default_rng(0)
    where = networks()
    table.fit([where.build(where.choices.sample(rng)) for _ in range(12)], EXAMPLE)
    return table


def trainer(epochs: int) -> Callable[..., Trainer]:
    """Return what makes a Trainer of so many epochs, which validates after the last one."""
    return partial(
        Trainer,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )


def trial_accuracy(where: nas.ArchitectureSpace, seed: int) -> Callable[[Architecture], float]:
    """Return the training of a trial, the same one for both searches."""
    count, epochs, batch = TRIAL
    data = partial(Images, train_size=count, val_size=JUDGED, batch_size=batch)
    once = {"batch_sizes": (1,), "rounds": 1}
    evaluator = nas.LightningEvaluator(where, Classifier, data, trainer=trainer(epochs), seed=seed, measure=once)
    return lambda architecture: evaluator(architecture)["val/acc"]


def scalarised(accuracy: float, costs: Sequence[float]) -> float:
    """Return NNI's objective: the more the better."""
    scaled = [
        (cost - math.log10(low)) / math.log10(high / low)
        for cost, low, high in zip(costs, LEAST_COSTS, CNN_COSTS, strict=True)
    ]
    return (accuracy - LEAST) / (BEST - LEAST) - sum(scaled)


def ours(seed: int, seconds: float) -> list[Any]:
    """Return the trials of our search: architecture, accuracy, costs."""
    where, trials = networks(), []
    known, accuracy = Known(where, latency_table()), trial_accuracy(where, seed)

    def evaluate(architecture: Architecture) -> dict[str, float]:
        quality, costs = accuracy(architecture), known(architecture)
        trials.append((architecture, quality, costs))
        return {"accuracy": quality, "log_latency": costs[0], "log_bytes": costs[1]}

    strategy = partial(
        nas.AdaptiveEvolution,
        known_costs=lambda architecture: dict(enumerate(known(architecture), start=1)),
        worst=[LEAST_OF_OURS, *half_of_cnn()],
        counted=20,
        generations=10_000,
    )
    nas.search(
        where,
        evaluate,
        objectives={"accuracy": "maximize", "log_latency": "minimize", "log_bytes": "minimize"},
        strategy=strategy,
        max_trials=10_000,
        max_seconds=seconds,
        clock=time.process_time,
        seed=seed,
        show=False,
    )
    return trials


def of_nni(seed: int, seconds: float) -> list[Any]:
    """Return the trials of NNI's RegularizedEvolution."""
    where, trials = networks(), []
    known, accuracy = Known(where, latency_table()), trial_accuracy(where, seed)
    values: dict[str, float] = {}
    end = time.process_time() + seconds

    def objective(sample: dict[str, Any]) -> float:
        # Without the choices that build nothing; what was trained before is not trained again.
        architecture = where.choices.decode(where.choices.encode(sample))
        key = where.key(architecture)
        if key not in values:
            quality, costs = accuracy(architecture), known(architecture)
            trials.append((architecture, quality, costs))
            values[key] = scalarised(quality, costs)
        return values[key]

    choices = {name: list(kind.values) for name, kind in where.choices.parameters.items()}  # type: ignore[union-attr]
    regularized_evolution(choices, objective, lambda _: time.process_time() < end, seed=seed, mutation_prob=0.15)
    return trials


def trained(architecture: Architecture | None, seed: int, recipe: tuple[int, int, int]) -> dict[str, float]:
    """Train a network, or the CNN, anew, and return its accuracies on validation and test images."""
    count, epochs, batch = recipe
    seed_everything(seed, verbose=False)
    module = CNN() if architecture is None else Classifier(networks().build(architecture))
    data, fit = Images(train_size=count, batch_size=batch), trainer(epochs)()
    fit.fit(module, datamodule=data)
    accuracies = {"validation": float(fit.callback_metrics["val/acc"])}
    fit.test(module, datamodule=data, verbose=False)
    return accuracies | {"test": float(fit.callback_metrics["test/acc"])}


def front_of(trials: Sequence[Any]) -> list[Any]:
    """Return the trials that no other one beats in accuracy and both costs, the most accurate first."""

    def beats(one: Any, other: Any) -> bool:
        mine, theirs = (-one[1], *one[2]), (-other[1], *other[2])
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs

    front = [trial for trial in trials if not any(beats(other, trial) for other in trials)]
    return sorted(front, key=lambda trial: -trial[1])


def within(front: Sequence[Any], costs: Sequence[float]) -> list[Any]:
    """Return the points that are predicted to cost at most so much."""
    return [one for one in front if all(mine <= limit for mine, limit in zip(one[2], costs, strict=True))]


def volume(trials: Sequence[Any]) -> float:
    """Return the hypervolume of trials, of the box between what is worth nothing and the best: 0 to 1."""
    low = np.array([-BEST, *map(math.log10, LEAST_COSTS)])
    worst = np.array([-LEAST, *map(math.log10, CNN_COSTS)])
    points = (np.array([[-accuracy, *costs] for _, accuracy, costs in trials]) - low) / (worst - low)
    points = points[(points < 1).all(1)]
    return float(hypervolume(points, np.ones(3))) if len(points) else 0.0


def compared(seed: int, seconds: float, recipe: tuple[int, int, int], results: Results) -> dict[str, Any]:
    """Search twice, train what competes and return the figures of one seed."""
    searches: dict[str, list[Any]] = {}
    for name, search in (("ours", ours), ("NNI", of_nni)):
        searches[name] = results.get(f"seed {seed}: search {name}", partial(search, seed, seconds))
        print(f"seed {seed}: {name}: {len(searches[name])} networks, volume {volume(searches[name]):.3f}", flush=True)
    nets = results.get(f"seed {seed}: competing", partial(competing, searches))
    figures = results.get(f"seed {seed}: costs", partial(measured, nets))
    for name, one in nets.items():
        runs = [results.get(f"{json.dumps(one)} {run}", partial(trained, one, run, recipe)) for run in TRAINING_SEEDS]
        figures[name] |= {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        print(f"seed {seed}: {name}: {described(figures[name])}", flush=True)
    outcome: dict[str, Any] = {"volume": {name: volume(trials) for name, trials in searches.items()}}
    outcome["trained"] = {name: len(trials) for name, trials in searches.items()}
    for rival in ("CNN", "NNI"):
        against = [figures[name] for name in nets if name.startswith(f"{rival} ")]
        ours_ = max(against, key=lambda one: one["validation"], default=None)
        outcome[rival] = {"theirs": figures[rival], "ours": ours_}
    return outcome


def competing(searches: Mapping[str, Sequence[Any]]) -> dict[str, Architecture | None]:
    """Return what competes: both rivals by name, and what of our front does against each, with a number."""
    best = max(searches["NNI"], key=lambda trial: scalarised(trial[1], trial[2]))
    front = front_of(searches["ours"])
    nets: dict[str, Architecture | None] = {"CNN": None, "NNI": best[0]}
    for rival, limits in (("CNN", half_of_cnn()), ("NNI", best[2])):
        nets |= {f"{rival} {i}": one[0] for i, one in enumerate(within(front, limits)[:FINALISTS])}
    return nets


def costs_of_cnn() -> Costs:
    """Return the logarithms of what the hand-made network is predicted to cost, and of its bytes."""
    known = nas.Constraints({}, lambda _: CNN(), EXAMPLE, latency=latency_table().predict).costs({})
    return math.log10(known["latency_ms"]), math.log10(known["size_bytes"])


def half_of_cnn() -> list[float]:
    """Return the logarithms of half of that."""
    return [cost - math.log10(2) for cost in costs_of_cnn()]


def measured(nets: Mapping[str, Architecture | None]) -> dict[str, dict[str, float]]:
    """Return milliseconds, measured in turns, and bytes of some networks by name."""
    where = networks()
    built = {name: CNN() if one is None else where.build(one) for name, one in nets.items()}
    costs = measure_alternatives(built, EXAMPLE, batch_sizes=(1,), rounds=ROUNDS)
    return {name: {"ms": one.latency_ms[1].p50, "bytes": one.size_bytes} for name, one in costs.items()}


def dominates(mine: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Return whether a network is nowhere worse on the test images, in milliseconds and bytes, and better in one."""
    pairs = [(-mine["test"], -theirs["test"]), *((mine[name], theirs[name]) for name in ("ms", "bytes"))]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def described(figures: Mapping[str, float] | None) -> str:
    """Return a network's figures as text."""
    if figures is None:
        return "-"
    return f"{100 * figures['test']:.2f}% {figures['ms']:.3f} ms {figures['bytes'] / 1e3:.0f} kB"


def printed(outcomes: Mapping[int, Mapping[str, Any]]) -> Table:
    """Return the table of all seeds."""
    table = Table(title=f"accuracy on the test images, mean of {len(TRAINING_SEEDS)} trainings; ms; bytes")
    titles = (
        "seed",
        "networks\nours / NNI",
        "volume\nours / NNI",
        "CNN",
        "ours",
        "dominates",
        "NNI's",
        "ours",
        "dominates",
    )
    for title in titles:
        table.add_column(title, justify="right")
    differences: dict[str, list[float]] = {"CNN": [], "NNI": []}
    won = dict.fromkeys(differences, 0)
    for seed, one in outcomes.items():
        cells = [str(seed)]
        cells += [f"{one['trained']['ours']} / {one['trained']['NNI']}"]
        cells += [f"{one['volume']['ours']:.3f} / {one['volume']['NNI']:.3f}"]
        for rival, gaps in differences.items():
            mine, theirs = one[rival]["ours"], one[rival]["theirs"]
            yes = mine is not None and dominates(mine, theirs)
            won[rival] += yes
            if mine is not None:
                gaps.append(100 * (mine["test"] - theirs["test"]))
            cells += [described(theirs), described(mine), "yes" if yes else "no"]
        table.add_row(*cells)
    for rival, gaps in differences.items():
        if gaps:
            spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
            print(
                f"against {rival}: dominates in {won[rival]} of {len(outcomes)} seeds; ours minus theirs "
                f"{statistics.fmean(gaps):+.2f} ± {spread:.2f} points (mean, standard deviation)"
            )
    return table


if __name__ == "__main__":
    main()
