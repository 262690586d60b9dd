"""What five techniques keep of earlier tasks: FashionMNIST permuted and split, one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/continual.py

Five tasks of 10,000 images (2,000 of two classes each where split), an MLP 256-256 of one head with dropout, plain
SGD with a cosine schedule that begins anew with each task. Every row of a seed starts from the same weights and is
given the same batches in the same order; accuracy and forgetting are those of the 10,000 test images after the last
task. This training and the strength of ``ElasticWeightConsolidation`` were chosen on the seeds 100 to 102, the other
strengths were not tuned; ``--tune --first-seed 100`` runs one grid for all, and as many strengths of Avalanche's EWC.
Avalanche, where it is installed, learns the same tasks with the same network and optimizer in turn with ours, in
batches that it shuffles itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore.callbacks import (
    AveragedGEM,
    ElasticWeightConsolidation,
    ExperienceReplay,
    LearningWithoutForgetting,
    SynapticIntelligence,
)
from lightning_optcore.data import FashionMNIST
from lightning_optcore.files import write_atomically
from lightning_optcore.meta.continual import AccuracyMatrix, ContinualPlan

IMAGES, BATCH, EPOCHS, LR, TASKS = 10_000, 64, 10, 0.08, 5
DROPOUT = 0.2
# Mean and standard deviation of the training pixels.
PIXELS = (0.286, 0.353)
# Of ours; and of Avalanche's EWC, whose importance is of another scale.
GRIDS = {"LearningWithoutForgetting": (0.125, 0.25, 0.625, 1.25, 2.5, 7.5)}
GRID, AVALANCHE_GRID = (5.0, 10.0, 25.0, 50.0, 100.0, 300.0), (1.0, 10.0, 1e2, 1e3, 1e4, 1e5)
Make = Callable[[], list[Callback]]
AVALANCHE_EWC, AVALANCHE_SI = 100.0, 100.0

ROWS: dict[str, Make] = {
    "ElasticWeightConsolidation": lambda: [ElasticWeightConsolidation(strength=50.0)],
    "ExperienceReplay, 500, with logits": lambda: [_replay(0.5)],
    "ExperienceReplay, 500, with logits + ElasticWeightConsolidation": lambda: [
        _replay(0.5),
        ElasticWeightConsolidation(strength=10.0),
    ],
    "SynapticIntelligence": lambda: [SynapticIntelligence(strength=50.0)],
    "nothing done": list,
    "ExperienceReplay, 500": lambda: [_replay(0.0)],
    "AveragedGEM, 500": lambda: [AveragedGEM(size=500)],
    "LearningWithoutForgetting": lambda: [LearningWithoutForgetting(strength=1.0)],
}
STRENGTHS: dict[str, Callable[[float], list[Callback]]] = {
    "ElasticWeightConsolidation": lambda s: [ElasticWeightConsolidation(strength=s)],
    "ElasticWeightConsolidation, as in the paper": lambda s: [
        ElasticWeightConsolidation(strength=s, power=1.0, normalize=False)
    ],
    "SynapticIntelligence": lambda s: [SynapticIntelligence(strength=s)],
    "ExperienceReplay, 500, with logits + ElasticWeightConsolidation": lambda s: [
        _replay(0.5),
        ElasticWeightConsolidation(strength=s),
    ],
    "LearningWithoutForgetting": lambda s: [LearningWithoutForgetting(strength=s)],
}


def _replay(logits_weight: float) -> ExperienceReplay:
    return ExperienceReplay(size=500, balance="class", logits_weight=logits_weight)


class Batches:
    """Batches of tensors, in an order that depends on the seed and on how often it was gone through."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int | None) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // self.size if self.generator else -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        number = len(self.labels)
        order = torch.randperm(number, generator=self.generator) if self.generator else torch.arange(number)
        for index in order.split(self.size)[: len(self)]:
            yield self.images[index], self.labels[index]


class Task(LightningDataModule):
    """Tensors of one task."""

    def __init__(self, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> None:
        super().__init__()
        self.name, self.train, self.test, self.seed = name, train, test, seed

    def train_dataloader(self) -> Batches:
        """Shuffled batches."""
        return Batches(*self.train, BATCH, self.seed)

    def test_dataloader(self) -> Batches:
        """Large batches."""
        return Batches(*self.test, 1000, None)


class Net(LightningModule):
    """An MLP 256-256 with plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``acc``."""
        self.log("acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        """Plain SGD, a cosine schedule over the steps of a task."""
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        schedule = cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Return a schedule to 0."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def network() -> nn.Module:
    """Return an MLP 256-256 with ten outputs and dropout, which slows forgetting in itself (Goodfellow et al. 2013)."""
    widths = (784, 256, 256)
    layers: list[nn.Module] = []
    for pair in itertools.pairwise(widths):
        layers += [nn.Linear(*pair), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def permuted(data: FashionMNIST, seed: int) -> list[Task]:
    """The images as they are, and in four other orders of their pixels."""
    (train, labels), (test, test_labels) = _tensors(data)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(784), *(torch.randperm(784, generator=generator) for _ in range(TASKS - 1))]
    return [
        Task(f"order {i}", (train[:, order], labels), (test[:, order], test_labels), 1000 * seed + i)
        for i, order in enumerate(orders)
    ]


def split(data: FashionMNIST, seed: int) -> list[Task]:
    """Two classes after the other two, in an order of the seed, with one head for all ten."""
    (train, labels), (test, test_labels) = _tensors(data)
    tasks = []
    classes = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    for i, pair in enumerate(classes.split(2)):
        mine, theirs = torch.isin(labels, pair), torch.isin(test_labels, pair)
        one, other = (train[mine], labels[mine]), (test[theirs], test_labels[theirs])
        tasks.append(Task(f"classes {pair.tolist()}", one, other, 1000 * seed + i))
    return tasks


def joint(tasks: list[Task], seed: int) -> AccuracyMatrix:
    """All tasks at once: what there is to keep."""
    both = [
        [torch.cat(part) for part in zip(*pairs, strict=True)]
        for pairs in zip(*((t.train, t.test) for t in tasks), strict=True)
    ]
    whole = Task("all", tuple(both[0]), tuple(both[1]), 1000 * seed)  # type: ignore[arg-type]
    return ours([whole], seed, [])


def ours(tasks: list[Task], seed: int, callbacks: list[Callback]) -> AccuracyMatrix:
    """Learn the tasks with callbacks of ours."""
    seed_everything(seed, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, enable_model_summary=False, **quiet)
    return ContinualPlan(tasks, metric="acc", stage="test", seed=seed).run(trainer, Net())


def _tensors(data: FashionMNIST) -> list[tuple[Tensor, Tensor]]:
    assert data.train_set is not None
    assert data.test_set is not None
    mean, deviation = PIXELS
    return [((s.tensors[0].flatten(1) - mean) / deviation, s.tensors[1]) for s in (data.train_set, data.test_set)]


def avalanche(tune: bool) -> dict[str, Callable[[nn.Module, int], Any]] | None:
    """Return Avalanche's strategies by the name of a row, or EWC with every strength, if it is installed."""
    try:
        from avalanche.training.supervised import EWC, Naive, Replay
        from avalanche.training.supervised import SynapticIntelligence as SI
    except ImportError as error:
        print(f"without Avalanche: {error}")
        return None

    from avalanche.training.plugins import LRSchedulerPlugin

    def made(kind: Any, **own: Any) -> Callable[[nn.Module, int], Any]:
        def make(model: nn.Module, steps: int) -> Any:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            schedule = LRSchedulerPlugin(cosine(optimizer, steps), step_granularity="iteration", reset_scheduler=True)
            options = {"train_mb_size": BATCH, "train_epochs": EPOCHS, "eval_mb_size": 1000, "plugins": [schedule]}
            loss = nn.CrossEntropyLoss()
            return kind(model=model, optimizer=optimizer, criterion=loss, evaluator=None, **options, **own)

        return make

    if tune:
        return {f"Avalanche EWC, {strength:g}": made(EWC, ewc_lambda=strength) for strength in AVALANCHE_GRID}
    return {
        "Avalanche Naive": made(Naive),
        "Avalanche EWC": made(EWC, ewc_lambda=AVALANCHE_EWC),
        "Avalanche SynapticIntelligence": made(SI, si_lambda=AVALANCHE_SI),
        "Avalanche Replay, 500": made(Replay, mem_size=500),
    }


def theirs(tasks: list[Task], seed: int, make: Callable[[nn.Module, int], Any]) -> AccuracyMatrix:
    """Learn the tasks with a strategy of Avalanche."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset as made

    def dataset(pair: tuple[Tensor, Tensor]) -> Any:
        return made(*pair, targets=pair[1].tolist(), task_labels=0)

    seed_everything(seed, verbose=False)
    model = network()
    strategy = make(model, EPOCHS * -(-len(tasks[0].train[1]) // BATCH))
    stream = benchmark_from_datasets(train=[dataset(t.train) for t in tasks], test=[dataset(t.test) for t in tasks])
    matrix = AccuracyMatrix([task.name for task in tasks], "acc", "maximize")
    for experience in stream.train_stream:
        strategy.train(experience)
        matrix.rows.append([_accuracy(model, *task.test) for task in tasks])
    return matrix


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


class Results:
    """Figures by row and seed, written after each run: a benchmark that is stopped has what it measured."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, dict[str, dict[str, float]]] = {}

    def add(self, name: str, seed: int, run: Callable[[], AccuracyMatrix]) -> None:
        """Run, print, keep."""
        start = time.process_time()
        matrix = run()
        figures = {**matrix.summary(), "learned": _learned(matrix), "seconds": time.process_time() - start}
        self.found.setdefault(name, {})[str(seed)] = figures
        shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
        print(f"{name}, seed {seed}: {shown}", flush=True)
        if self.path is not None:
            write_atomically(self.path, json.dumps(self.found, indent=1))

    def table(self) -> Table:
        """Means and standard deviations over the seeds."""
        table = Table(
            caption="mean ± standard deviation over the seeds; 'learned': accuracy of a task when it is learned; "
            "seconds of the processor, median"
        )
        for title in ("", "accuracy", "forgetting", "learned", "seeds", "seconds"):
            table.add_column(title, justify="right" if title else "left")
        for name, seeds in self.found.items():
            columns = [[one.get(key) for one in seeds.values()] for key in ("average", "forgetting", "learned")]
            seconds = statistics.median(one["seconds"] for one in seeds.values())
            table.add_row(name, *(_mean(column) for column in columns), str(len(seeds)), f"{seconds:.0f}")
        return table


def _learned(matrix: AccuracyMatrix) -> float:
    return statistics.mean(row[i] for i, row in enumerate(matrix.rows))


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.4f} ± {statistics.stdev(known) if len(known) > 1 else 0:.4f}"


def _runs(
    tasks: list[Task], seed: int, peers: Any, benchmark: str, tune: bool
) -> dict[str, Callable[[], AccuracyMatrix]]:
    """Return what is run, by the name of the row."""
    if tune or benchmark == "strengths":
        wide = (1.0, 1e2, 1e3, 1e4)
        made = {
            f"{name}, {s:g}": (with_strength, s)
            for name, with_strength in STRENGTHS.items()
            for s in (GRIDS.get(name, GRID) if tune else wide)
        }
        runs = {row: partial(_with_strength, tasks, seed, *one) for row, one in made.items()}
        return {**runs, **(_of_peers(tasks, seed, peers) if tune else {})}
    return {
        **{row: partial(_with_callbacks, tasks, seed, make) for row, make in ROWS.items()},
        **_of_peers(tasks, seed, peers),
        "all at once": partial(joint, tasks, seed),
    }


def _of_peers(tasks: list[Task], seed: int, peers: Any) -> dict[str, Callable[[], AccuracyMatrix]]:
    return {row: partial(theirs, tasks, seed, make) for row, make in peers.items()}


def _with_strength(
    tasks: list[Task], seed: int, make: Callable[[float], list[Callback]], strength: float
) -> AccuracyMatrix:
    return ours(tasks, seed, make(strength))


def _with_callbacks(tasks: list[Task], seed: int, make: Make) -> AccuracyMatrix:
    return ours(tasks, seed, make())


def main() -> None:
    """Learn the tasks with every technique for each seed; print one table a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=("permuted", "split", "strengths"))
    parser.add_argument("--rows", nargs="*", help="begin of the names of the rows, e.g. Experience; all by default")
    parser.add_argument("--tune", action="store_true", help="every strength of the grid, instead of the rows")
    parser.add_argument("--out", type=Path, help="a JSON file of all figures, written after each run")
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_optcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = FashionMNIST(train_size=IMAGES)
    data.prepare_data()
    data.setup()
    peers = avalanche(options.tune) or {}

    chosen = [options.only] if options.only else ["permuted", "split", "strengths"]
    for name in chosen if not options.tune else ["permuted"]:
        results = Results(options.out and options.out.with_name(f"{options.out.stem}_{name}.json"))
        for seed in range(options.first_seed, options.first_seed + (1 if name == "strengths" else options.seeds)):
            tasks = (split if name == "split" else permuted)(data, seed)
            for row, run in _runs(tasks, seed, peers, name, options.tune).items():
                if not options.rows or row.startswith(tuple(options.rows)):
                    results.add(row, seed, run)
        print(f"\n{name}")
        Console(width=120).print(results.table())
    names = ("torch", "lightning", *(("avalanche-lib",) if peers else ()))
    print("versions:", ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
