"""What each option of a choice costs, from networks that were counted whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lightning_optcore.nas.supernet import Architecture, SupernetError, probabilities, random_architecture, sample_of

# Networks that are counted for every option.
_PER_OPTION = 4


@dataclass(frozen=True)
class CostTable:
    """What the options cost.

    Args:
        costs: By label and option; the costs of an architecture's options add up to about its own.
        explained: Which part of the variance among the counted networks that sum has, 0 to 1.
        networks: How many were counted.
    """

    costs: dict[str, dict[str, float]]
    explained: float
    networks: int


def fitted_cost_table(network: nn.Module, cost: Callable[[Architecture], float], seed: int = 0) -> CostTable:
    """Return what the options of a differentiable supernet cost, fitted to random architectures by least squares.

    How choices act together is not in such a sum. NNI's own expectation has it
    (:func:`lightning_optcore.nas.differentiable_search.expected_cost`), but knows few layers.

    Args:
        network: The supernet.
        cost: What an architecture costs, e.g. counted FLOPs; four architectures for every option are asked for.
        seed: Of the architectures.

    Raises:
        SupernetError: If the supernet weighs no choice, as those of cells, which weigh edges.

    Example:
        >>> from lightning_optcore.nas._nni_compat import nni_nas
        >>> from lightning_optcore.nas.supernet import supernet
        >>> class Space(nni_nas().nn.ModelSpace):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nni_nas().nn.MutableLinear(2, nni_nas().nni.choice("width", [2, 4]))
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> table = fitted_cost_table(supernet(Space(), "darts"), lambda one: 10.0 * one["width"])
        >>> {option: round(cost) for option, cost in table.costs["width"].items()}
        {'2': 20, '4': 40}
    """
    options = {label: [str(option) for option in odds] for label, odds in probabilities(network).items()}
    if not options:
        raise SupernetError("cost: the supernet weighs edges of cells rather than choices, so that none has a cost")
    pairs = [(label, option) for label, listed in options.items() for option in listed]
    columns = {pair: i for i, pair in enumerate(pairs)}
    rng = random.Random(seed)
    drawn = [random_architecture(network, rng) for _ in range(_PER_OPTION * len(columns))]
    chosen = np.zeros((len(drawn), len(columns)))
    for row, architecture in zip(chosen, drawn, strict=True):
        for label, option in _named(sample_of(network, architecture)).items():
            if (label, option) in columns:
                row[columns[label, option]] = 1.0
    values = np.array([cost(architecture) for architecture in drawn], dtype=float)
    # Of all that fit as well, the least: what was never drawn, or makes no difference, is the mean.
    mean = values.mean()
    effects, *_ = np.linalg.lstsq(chosen, values - mean, rcond=None)
    left = float(np.sum((values - mean - chosen @ effects) ** 2))
    spread = float(np.sum((values - mean) ** 2))
    costs = {
        label: {one: float(mean / len(options) + effects[columns[label, one]]) for one in options[label]}
        for label in options
    }
    return CostTable(costs, 1.0 - left / spread if spread > 0 else 1.0, len(drawn))


def _named(sample: Mapping[str, Any]) -> dict[str, str]:
    """Return the option of each choice of one thing."""
    single = {label: value for label, value in sample.items() if not isinstance(value, list) or len(value) == 1}
    return {label: str(value[0] if isinstance(value, list) else value) for label, value in single.items()}
