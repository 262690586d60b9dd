"""Convolutional networks for FashionMNIST: the space that the benchmark of architecture search searches with trainings.

Its images come from memory, its latencies from one table, its trainings from one Trainer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import TensorDataset

from lightning_optcore import measure_alternatives, nas
from lightning_optcore.data import FashionMNIST
from lightning_optcore.models import CNN, Classifier
from lightning_optcore.sweeps.task import current_trial

Architecture = dict[str, Any]
Costs = tuple[float, float]
Recipe = tuple[int, int, int]

# So many validation images judge a trial.
JUDGED = 2_500
ROUNDS = 200
EXAMPLE = torch.zeros(1, 1, 28, 28)


def convolution(inputs: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return one convolution with batch norm and ReLU."""
    layer = nn.Conv2d(inputs, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


def block(inputs: int, width: int, stride: int, kind: str) -> nn.Sequential:
    """Return a block: ``plain``, or ``separable`` with the kernel at its end."""
    if kind == "plain":
        return nn.Sequential(OrderedDict(plain=convolution(inputs, width, 3, stride)))
    depthwise = convolution(inputs, inputs, int(kind[-1]), stride, inputs)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=convolution(inputs, width, 1)))


def network(stem: str, width0: int, head: str, **chosen: Any) -> nn.Sequential:
    """Return a network for images of 28 x 28: a stem, two stages of blocks and a linear classifier.

    The layers of two architectures have the same names where they have the same place, so that weights are inherited.

    Args:
        stem: How it makes the image smaller: ``pool`` after its convolution, or ``stride`` of it.
        width0: Channels of the stem.
        head: What the classifier sees of a channel: the ``average``, 3 x 3 of these (``pooled``), or all (``flat``).
        chosen: Of the stages 1 and 2 their channels (``width1``), how many blocks they have (``depth1``) and the kind
            of each (``kind1_0``).
    """
    first = [convolution(1, width0, 5, 2)] if stem == "stride" else [convolution(1, width0, 3), nn.MaxPool2d(2)]
    layers: dict[str, nn.Module] = {"stem": nn.Sequential(*first)}
    inputs = width0
    for stage in (1, 2):
        for i in range(chosen[f"depth{stage}"]):
            stride = stage if i == 0 else 1
            layers[f"stage{stage}_{i}"] = block(inputs, chosen[f"width{stage}"], stride, chosen[f"kind{stage}_{i}"])
            inputs = chosen[f"width{stage}"]
    side = {"average": 1, "pooled": 3, "flat": 7}[head]
    layers["pool"] = nn.AvgPool2d(7 // side) if side < 7 else nn.Identity()
    layers |= {"flatten": nn.Flatten(), f"classifier_{head}": nn.Linear(inputs * side**2, 10)}
    return nn.Sequential(OrderedDict(layers))


def networks() -> nas.ArchitectureSpace:
    """Return the space that both searches have."""
    choices: dict[str, Any] = {
        "stem": ["pool", "stride"],
        "head": ["average", "pooled", "flat"],
        "width0": "choice(8,12,16,24,32)",
        "width1": "choice(12,16,24,32,48,64)",
        "width2": "choice(16,24,32,48,64,96,128)",
    }
    conditions = {}
    for stage in (1, 2):
        choices[f"depth{stage}"] = "choice(1,2)"
        for i in (0, 1):
            choices[f"kind{stage}_{i}"] = ["plain", "separable3", "separable5"]
        conditions[f"kind{stage}_1"] = f"depth{stage} > 1"
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


class OtherImages(Images):
    """Other training images in every trial of a search: a network that inherits has seen those of its parent.

    Args:
        seed: Of the search.
        options: Of :class:`Images`.
    """

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Draw as many as are asked for."""
        super().setup(stage)
        trial = current_trial()
        assert trial is not None
        every, rng = images().train_set, np.random.default_rng([self.seed, trial[1]])
        assert every is not None
        drawn = torch.from_numpy(rng.choice(len(every), self.train_size, replace=False))
        self.train_set = TensorDataset(*(tensor[drawn] for tensor in every.tensors))


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


def costs_of_cnn() -> Costs:
    """Return the logarithms of what the hand-made network is predicted to cost, and of its bytes."""
    known = nas.Constraints({}, lambda _: CNN(), EXAMPLE, latency=latency_table().predict).costs({})
    return math.log10(known["latency_ms"]), math.log10(known["size_bytes"])


def half_of_cnn() -> list[float]:
    """Return the logarithms of half of that."""
    return [cost - math.log10(2) for cost in costs_of_cnn()]


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


def trial_training(
    where: nas.ArchitectureSpace,
    data: Callable[..., Images],
    recipe: Recipe,
    seed: int,
    *,
    inherit: bool = False,
) -> nas.LightningEvaluator:
    """Return what trains the network of a trial and validates it.

    Args:
        where: The space.
        data: Makes the images of a trial.
        recipe: Images, epochs and images a batch.
        seed: The same for every trial.
        inherit: Whether a network begins with the weights of an earlier one.
    """
    count, epochs, batch = recipe
    trial = partial(data, train_size=count, val_size=JUDGED, batch_size=batch)
    once = {"batch_sizes": (1,), "rounds": 1}
    return nas.LightningEvaluator(
        where, Classifier, trial, trainer=trainer(epochs), seed=seed, measure=once, inherit=inherit
    )


def trained(
    architecture: Architecture | None, seed: int, recipe: Recipe, weights: str | None = None
) -> dict[str, float]:
    """Train a network and return its accuracies on validation and test images.

    Args:
        architecture: The network; ``None`` for the CNN.
        seed: Of the training.
        recipe: Images, epochs and images a batch.
        weights: File of those that it begins with; ``None``: it is trained anew.
    """
    count, epochs, batch = recipe
    seed_everything(seed, verbose=False)
    module: Any = CNN() if architecture is None else Classifier(networks().build(architecture))
    if weights is not None:
        module.network.load_state_dict(torch.load(weights, weights_only=True))
    data, fit = Images(train_size=count, batch_size=batch), trainer(epochs)()
    fit.fit(module, datamodule=data)
    accuracies = {"validation": float(fit.callback_metrics["val/acc"])}
    fit.test(module, datamodule=data, verbose=False)
    return accuracies | {"test": float(fit.callback_metrics["test/acc"])}


def measured(nets: Mapping[str, Architecture | None]) -> dict[str, dict[str, float]]:
    """Return milliseconds, measured in turns, and bytes of some networks by name; equal ones are measured as one."""
    where = networks()
    keys = {name: "CNN" if one is None else where.key(one) for name, one in nets.items()}
    built = {keys[name]: CNN() if one is None else where.build(one) for name, one in nets.items()}
    costs = measure_alternatives(built, EXAMPLE, batch_sizes=(1,), rounds=ROUNDS)
    return {name: {"ms": costs[key].latency_ms[1].p50, "bytes": costs[key].size_bytes} for name, key in keys.items()}
