"""One-shot strategies: those that train one supernet first, and then search what it holds.

Sources: see :mod:`lightning_optcore.nas.supernet`, :mod:`lightning_optcore.nas.sampled_training` and
:mod:`lightning_optcore.nas.once_for_all`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_optcore.nas.strategies import STRATEGIES, Strategy
from lightning_optcore.option_values import is_whole
from lightning_optcore.search.searcher import SearchError

if TYPE_CHECKING:
    from lightning_optcore.nas.differentiable_search import DifferentiableSearch
    from lightning_optcore.nas.sampled_training import SampledTraining
    from lightning_optcore.nas.supernet import Kind

# What is done in the search's folder before the first trial, and told the searcher.
Prepare = Callable[[Path, Any], None]
OneShotKind = Literal["random_one_shot", "once_for_all", "darts", "gumbel_darts", "proxyless"]

_SEARCHERS: dict[str, Strategy] = {"random_one_shot": "random", "once_for_all": "nsga2"}
# What can be counted, or predicted, by its name on the yardstick.
COSTS = {"flops": "flops", "parameters": "params", "latency_ms": "latency_ms"}
_OF_ALL = ("kind", "max_epochs")
_OF_SAMPLED = ("searcher", "calibration_batches")
_OF_DIFFERENTIABLE = (
    "learning_rate", "weight_decay", "validation_fraction", "warmup_epochs", "cost", "cost_weight", "cost_limits",
)  # fmt: skip
_OPTIONS: dict[str, tuple[str, ...]] = {
    "random_one_shot": _OF_SAMPLED,
    "once_for_all": (*_OF_SAMPLED, "num_random"),
    "darts": _OF_DIFFERENTIABLE,
    "gumbel_darts": (*_OF_DIFFERENTIABLE, "temperature"),
    "proxyless": _OF_DIFFERENTIABLE,
}


@dataclass(frozen=True)
class OneShot:
    """A strategy that trains one supernet, by the module, data, Trainer and callbacks of a ``LightningEvaluator``.

    ``random_one_shot`` and ``once_for_all`` then search among its sub-networks, which are validated and measured with
    the weights that they share. ``darts``, ``gumbel_darts`` and ``proxyless`` learn an architecture with the weights,
    and this one is trained alone, as the search's one trial.

    Args:
        kind: Which.
        max_epochs: Of the supernet's training; ``None``: the Trainer's own.
        num_random: Of ``once_for_all``: random architectures beside the largest and the smallest, for every step of
            the weights; so many batches, and the two, are accumulated.
        searcher: Of the first two: the strategy that searches the sub-networks; ``None``: ``"random"`` and
            ``"nsga2"``.
        calibration_batches: Of the first two: batches of the training set by which each sub-network's batch norm is
            recalibrated.
        learning_rate: Of the last three, as all that follow: of the architecture; see
            :class:`~lightning_optcore.callbacks.DifferentiableSearch`.
        weight_decay: Of the architecture.
        validation_fraction: Which part of the training set the architecture learns from.
        warmup_epochs: For how many epochs only the weights learn.
        temperature: Of ``gumbel_darts``.
        cost: What an architecture costs: a table ``{label: {option: cost}}``, or ``"flops"``, ``"parameters"`` or
            ``"latency_ms"`` (where the evaluator predicts it) for one that is fitted to random architectures.
        cost_weight: Weight of the cost in the loss of the architecture.
        cost_limits: Least and greatest cost, outside of which it is punished.

    Raises:
        SearchError: If the kind is unknown, or has no use for an option.
        MisconfigurationException: If an option is out of its range.

    Example:
        >>> OneShot("darts", cost="flops").supernet_kind
        'darts'
    """

    kind: OneShotKind
    max_epochs: int | None = None
    num_random: int = 2
    searcher: Strategy | None = None
    calibration_batches: int = 10
    learning_rate: float = 3e-4
    weight_decay: float = 1e-3
    validation_fraction: float = 0.5
    warmup_epochs: int = 0
    temperature: Sequence[float] = (1.0, 0.33)
    cost: str | Mapping[str, Mapping[Any, float]] | None = None
    cost_weight: float = 0.1
    cost_limits: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _OPTIONS:
            raise SearchError(f"strategy={self.kind!r}: expected one of {', '.join(_OPTIONS)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*_OF_ALL, *_OPTIONS[self.kind]) and value != field.default:
                kinds = ", ".join(kind for kind, options in _OPTIONS.items() if field.name in options)
                raise SearchError(f"{field.name}={value!r}: strategy={self.kind} has no use for it; it is of {kinds}")
        for name, number in (("max_epochs", self.max_epochs), ("calibration_batches", self.calibration_batches)):
            if number is not None and not is_whole(number, least=1):
                raise SearchError(f"{name}={number!r}: expected a positive whole number")
        table = isinstance(self.cost, Mapping) and all(isinstance(one, Mapping) for one in self.cost.values())
        if self.cost is not None and self.cost not in tuple(COSTS) and not table:
            raise SearchError(f"cost={self.cost!r}: expected {', '.join(COSTS)}, or {{label: {{option: cost}}}}")
        if isinstance(self.searcher, str) and self.searcher not in STRATEGIES:
            raise SearchError(f"searcher={self.searcher!r}: expected one of {', '.join(STRATEGIES)}")
        self.callback(0, {} if isinstance(self.cost, str) else self.cost)

    @property
    def samples(self) -> bool:
        """Whether sub-networks are searched with the supernet's weights, rather than an architecture learned."""
        return self.kind in _SEARCHERS

    @property
    def supernet_kind(self) -> Kind:
        """Of which kind the supernet is."""
        return "sampled" if self.samples else self.kind  # type: ignore[return-value]

    @property
    def sub_network_strategy(self) -> Strategy:
        """What searches the sub-networks."""
        return self.searcher if self.searcher is not None else _SEARCHERS[self.kind]

    @property
    def accumulated(self) -> int:
        """How many batches a step of the weights has."""
        return 2 + self.num_random if self.kind == "once_for_all" else 1

    def callback(self, seed: int, cost: Any) -> SampledTraining | DifferentiableSearch:
        """Return what trains the supernet."""
        from lightning_optcore.nas.differentiable_search import DifferentiableSearch
        from lightning_optcore.nas.sampled_training import SampledTraining

        if self.samples:
            rule: Literal["random", "sandwich"] = "sandwich" if self.kind == "once_for_all" else "random"
            return SampledTraining(rule, self.num_random, seed)
        options = {name: getattr(self, name) for name in _OPTIONS[self.kind]}
        return DifferentiableSearch(**{**options, "cost": cost}, seed=seed)

    def described(self) -> dict[str, Any]:
        """Return the options that the supernet's training follows from, as JSON has them."""
        names = [name for name in _OPTIONS[self.kind] if name not in _OF_SAMPLED]
        return json.loads(json.dumps({"strategy": self.kind, **{name: getattr(self, name) for name in names}}))


def one_shot_of(strategy: Any) -> OneShot | None:
    """Return the one-shot strategy that a strategy is, names or makes; ``None`` for that of a searcher.

    Example:
        >>> one_shot_of("darts").kind, one_shot_of("random")
        ('darts', None)
    """
    if isinstance(strategy, str):
        return OneShot(strategy) if strategy in _OPTIONS else None  # type: ignore[arg-type]
    if isinstance(strategy, functools.partial) and strategy.func is OneShot:
        return strategy()
    return strategy if isinstance(strategy, OneShot) else None


def planned(strategy: Strategy | OneShot, evaluate: Any) -> tuple[Strategy, Any, Prepare | None]:
    """Return what makes the searcher, what evaluates, and what is done before: as given, but for a one-shot strategy.

    Raises:
        SearchError: If a one-shot strategy cannot go with what evaluates.
        SupernetError: If there is no such supernet of the space, or nothing inherits its weights.
    """
    one_shot = one_shot_of(strategy)
    if one_shot is None:
        return strategy, evaluate, None  # type: ignore[return-value]
    from lightning_optcore.nas.one_shot_plan import plan

    return plan(one_shot, evaluate)
