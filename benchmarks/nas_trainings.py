"""Architecture search with real trainings on FashionMNIST, against a hand-made network and NNI's RegularizedEvolution.

    OMP_NUM_THREADS=1 python benchmarks/nas_trainings.py --output trainings.json

A space of convolutional networks (``fashion_networks.py``) is searched twice for each seed with the same seconds of the
processor: by ``nas.search`` with AdaptiveEvolution, whose networks inherit weights, and of which one trial in three
trains a network of the front on, and by NNI's RegularizedEvolution. All that a search does counts: trainings,
proposals, and what it takes to know the costs of networks. Both train a network alike; ours with other images in every
trial, as weights remember, NNI's with the same ones, so that trials compare. The latency is predicted by one
LatencyTable, the bytes are counted.

Our objectives are accuracy, latency and bytes. NNI's strategy, which has one objective, gets their equally weighted
sum: the accuracy scaled from ``LEAST`` to ``BEST``, the logarithms of both costs from a small network's to the CNN's.

The networks that compete are then trained with more images, alike: ours from the weights that the search left, and
beside it anew; the CNN and NNI's anew, as NNI leaves none. From each side ``FINALISTS`` are trained, and one of them
counts, chosen on the validation images after the first training: of NNI's search the best sums, of which again the best
sum counts; of our front, against the CNN, the most accurate points that cost at most half of it, and, against NNI's
network, those that cost less than it, in milliseconds measured in turns and in bytes, or are the same network; of these
the most accurate one counts. A network dominates another if it is at least as accurate on the 10,000 test images, at
most as slow and at most as large, and better in one. Latencies are measured once more, in turns; the test images choose
nothing.

Killed, it continues with ``--output``: what is finished is in that file, and the weights are beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_networks import (
    Architecture,
    Images,
    Known,
    OtherImages,
    Recipe,
    half_of_cnn,
    latency_table,
    measured,
    networks,
    trained,
    trial_training,
)
from nni_engine import quieten, regularized_evolution
from rich.console import Console
from rich.table import Table

from lightning_optcore import nas
from lightning_optcore.files import write_atomically
from lightning_optcore.nas.evaluator import trial_directory
from lightning_optcore.nas.parents import WEIGHTS_FILE
from lightning_optcore.search import hypervolume

# A trial's architecture, accuracy, costs and file of weights, if there is one.
Trial = Sequence[Any]

# A training of the searches, and one of what competes: images, epochs, images a batch.
TRIAL, FINAL = (6_000, 1, 64), (15_000, 5, 128)
SECONDS, TRAINING_SEEDS, FINALISTS = 300.0, (0, 1), 3
# So many points of the front are measured, and are to take at most such a part of a rival's milliseconds: the same
# network, measured again in the same turns, takes .997 to 1.003 of them.
MEASURED, FASTER = 10, 0.99
# Accuracies of a trial: one that is worth nothing, and about the best.
LEAST, BEST = 0.78, 0.88
# Milliseconds and bytes of a small network, and about those of the CNN: more than these is worth nothing.
LEAST_COSTS, CNN_COSTS = (0.2, 1e4), (1.3, 1.2e6)


def main() -> None:
    """Search and compare for every seed, one after the other; print a line for each and a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, for each search")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(tempfile.mkdtemp()) / "trainings.json",
        help="file of all figures, as JSON; what is in it is not done again",
    )
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
        path: The file; the folders of our searches are beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def folder(self, seed: int) -> Path:
        """Return the folder of a seed's search."""
        return self.path.with_suffix(f".seed{seed}")

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a figure, which is computed if it is not there."""
        if name not in self.content:
            self.content[name] = json.loads(json.dumps(compute()))
            write_atomically(self.path, json.dumps(self.content))
        return self.content[name]


def scalarised(accuracy: float, costs: Sequence[float]) -> float:
    """Return NNI's objective: the more the better."""
    scaled = [
        (cost - math.log10(low)) / math.log10(high / low)
        for cost, low, high in zip(costs, LEAST_COSTS, CNN_COSTS, strict=True)
    ]
    return (accuracy - LEAST) / (BEST - LEAST) - sum(scaled)


def ours(seed: int, seconds: float, folder: Path) -> list[Trial]:
    """Return the trials of our search: architecture, accuracy, costs and the file of its weights."""
    where = networks()
    trials: list[Trial] = []
    known = Known(where, latency_table())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train = trial_training(where, partial(OtherImages, seed), TRIAL, seed, inherit=True)

    class Evaluation:
        inherits = True

        def __call__(self, architecture: Architecture) -> dict[str, float]:
            quality, costs, left = train(architecture)["val/acc"], known(architecture), trial_directory()
            assert left is not None
            trials.append((architecture, quality, costs, str(left / WEIGHTS_FILE)))
            return {"accuracy": quality, "log_latency": costs[0], "log_bytes": costs[1]}

    strategy = partial(
        nas.AdaptiveEvolution,
        known_costs=lambda architecture: dict(enumerate(known(architecture), start=1)),
        worst=[LEAST, *half_of_cnn()],
        counted=20,
        generations=10_000,
    )
    nas.search(
        where,
        Evaluation(),
        objectives={"accuracy": "maximize", "log_latency": "minimize", "log_bytes": "minimize"},
        strategy=strategy,
        max_trials=10_000,
        max_seconds=seconds,
        clock=time.process_time,
        seed=seed,
        store=folder / "store.db",
        show=False,
    )
    return trials


def of_nni(seed: int, seconds: float) -> list[Trial]:
    """Return the trials of NNI's RegularizedEvolution."""
    where = networks()
    trials: list[Trial] = []
    known, train = Known(where, latency_table()), trial_training(where, Images, TRIAL, seed)
    values: dict[str, float] = {}
    end = time.process_time() + seconds

    def objective(sample: dict[str, Any]) -> float:
        # Without the choices that build nothing; what was trained before is not trained again.
        architecture = where.choices.decode(where.choices.encode(sample))
        key = where.key(architecture)
        if key not in values:
            quality, costs = train(architecture)["val/acc"], known(architecture)
            trials.append((architecture, quality, costs, None))
            values[key] = scalarised(quality, costs)
        return values[key]

    choices = {name: list(kind.values) for name, kind in where.choices.parameters.items()}  # type: ignore[union-attr]
    regularized_evolution(choices, objective, lambda _: time.process_time() < end, seed=seed, mutation_prob=0.15)
    return trials


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other one beats in accuracy and both costs, the most accurate first."""

    def beats(one: Trial, other: Trial) -> bool:
        mine, theirs = (-one[1], *one[2]), (-other[1], *other[2])
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs

    front = [trial for trial in trials if not any(beats(other, trial) for other in trials)]
    return sorted(front, key=lambda trial: -trial[1])


def volume(trials: Sequence[Trial]) -> float:
    """Return the hypervolume of trials; 1 is the box between what is worth nothing and about the best."""
    low = np.array([-BEST, *map(math.log10, LEAST_COSTS)])
    worst = np.array([-LEAST, *map(math.log10, CNN_COSTS)])
    points = (np.array([[-accuracy, *costs] for _, accuracy, costs, _ in trials]) - low) / (worst - low)
    points = points[(points < 1).all(1)]
    return float(hypervolume(points, np.ones(3))) if len(points) else 0.0


def compared(seed: int, seconds: float, recipe: Recipe, results: Results) -> dict[str, Any]:
    """Search twice, train what competes and return the figures of one seed."""
    search = {"ours": partial(ours, seed, seconds, results.folder(seed)), "NNI": partial(of_nni, seed, seconds)}
    searches = {name: results.get(f"seed {seed}: search {name}", one) for name, one in search.items()}
    for name, trials in searches.items():
        print(f"seed {seed}: {name}: {len(trials)} networks, volume {volume(trials):.3f}", flush=True)

    def training(trial: Trial, run: int, inherits: bool) -> dict[str, float]:
        weights = trial[3] if inherits else None
        key = f"{json.dumps(trial[0])}, run {run}, " + (f"from seed {seed}" if weights else "anew")
        return results.get(key, partial(trained, trial[0], run, recipe, weights))

    def figures(trial: Trial, inherits: bool) -> dict[str, float]:
        runs = [training(trial, run, inherits) for run in TRAINING_SEEDS]
        return {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}

    def validated(trial: Trial) -> float:
        return training(trial, TRAINING_SEEDS[0], True)["validation"]

    by_sum = sorted(searches["NNI"], key=lambda trial: -scalarised(trial[1], trial[2]))[:FINALISTS]
    rivals: dict[str, Trial] = {
        "CNN": (None, None, half_of_cnn(), None),
        "NNI": max(by_sum, key=lambda trial: scalarised(validated(trial), trial[2])),
    }
    outcome: dict[str, Any] = {
        "volume": {name: volume(trials) for name, trials in searches.items()},
        "trained": {name: len({json.dumps(one[0]) for one in trials}) for name, trials in searches.items()},
    }
    for name, rival in rivals.items():
        part = 0.5 if rival[0] is None else 1.0
        against = results.get(f"seed {seed}: against {name}", partial(cheaper, front_of(searches["ours"]), rival, part))
        theirs, mine = figures(rival, False), None
        chosen = max(against, key=validated, default=None)
        nets = {"theirs": rival[0]} | ({} if chosen is None else {"ours": chosen[0]})
        costs = results.get(f"seed {seed}: costs, {name}", partial(measured, nets))
        theirs |= costs["theirs"]
        print(f"seed {seed}: {name}: {described(theirs)}", flush=True)
        if chosen is not None:
            mine = figures(chosen, True) | costs["ours"] | {"anew": figures(chosen, False)["test"]}
            print(f"seed {seed}: against {name}: {described(mine)}", flush=True)
        outcome[name] = {"theirs": theirs, "ours": mine}
    return outcome


def cheaper(front: Sequence[Trial], rival: Trial, part: float) -> list[Trial]:
    """Return the most accurate points that cost at most such a part of a rival, in measured milliseconds and bytes."""
    room = [math.log10(1.1), 0.0]
    points = [
        one
        for one in front
        if all(mine <= limit + more for mine, limit, more in zip(one[2], rival[2], room, strict=True))
    ][:MEASURED]
    costs = measured({"rival": rival[0]} | {str(i): one[0] for i, one in enumerate(points)})
    limit = part * FASTER * costs["rival"]["ms"]
    return [one for i, one in enumerate(points) if one[0] == rival[0] or costs[str(i)]["ms"] <= limit][:FINALISTS]


def dominates(mine: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Return whether a network is nowhere worse on the test images, in milliseconds and bytes, and better in one."""
    pairs = [(-mine["test"], -theirs["test"]), *((mine[name], theirs[name]) for name in ("ms", "bytes"))]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def described(figures: Mapping[str, float] | None) -> str:
    """Return a network's figures as text."""
    if figures is None:
        return "-"
    anew = f" (anew {100 * figures['anew']:.2f}%)" if "anew" in figures else ""
    return f"{100 * figures['test']:.2f}%{anew} {figures['ms']:.3f} ms {figures['bytes'] / 1e3:.0f} kB"


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
    won, won_anew = dict.fromkeys(differences, 0), dict.fromkeys(differences, 0)
    for seed, one in outcomes.items():
        cells = [str(seed)]
        cells += [f"{one['trained']['ours']} / {one['trained']['NNI']}"]
        cells += [f"{one['volume']['ours']:.3f} / {one['volume']['NNI']:.3f}"]
        for rival, gaps in differences.items():
            mine, theirs = one[rival]["ours"], one[rival]["theirs"]
            yes = mine is not None and dominates(mine, theirs)
            if mine is not None:
                won[rival] += yes
                won_anew[rival] += dominates(mine | {"test": mine["anew"]}, theirs)
                gaps.append(100 * (mine["test"] - theirs["test"]))
            cells += [described(theirs), described(mine), "yes" if yes else "no"]
        table.add_row(*cells)
    for rival, gaps in differences.items():
        if gaps:
            spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
            print(
                f"against {rival}: dominates in {won[rival]} of {len(outcomes)} seeds, trained anew in "
                f"{won_anew[rival]}; ours minus theirs {statistics.fmean(gaps):+.2f} ± {spread:.2f} points (mean, "
                "standard deviation)"
            )
    return table


if __name__ == "__main__":
    main()
