"""What a search does for a one-shot strategy: what it trains first, proposes, and evaluates with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_optcore.nas.cost_table import fitted_cost_table
from lightning_optcore.nas.differentiable_search import DifferentiableSearch, expected_cost_of_table
from lightning_optcore.nas.evaluator import LightningEvaluator, changes_networks
from lightning_optcore.nas.inherited_evaluation import InheritedEvaluation
from lightning_optcore.nas.one_shot import COSTS, OneShot, Prepare
from lightning_optcore.nas.sampled_training import SampledTraining
from lightning_optcore.nas.space import Architecture
from lightning_optcore.nas.strategies import STRATEGIES, Strategy
from lightning_optcore.nas.supernet import SupernetError, largest, probabilities, smallest, sub_network, supernet
from lightning_optcore.nas.supernet_file import SUPERNET_FILE, TrainedSupernet
from lightning_optcore.nas.supernet_training import train_supernet
from lightning_optcore.search.searcher import Proposal, Searcher, SearchError
from lightning_optcore.search.space import key_of

log = logging.getLogger(__name__)


class LearnedArchitecture(Searcher):
    """Proposes the one architecture that a supernet learned, after those that are to be tried first."""

    learned: Architecture | None = None

    @property
    def done(self) -> bool:
        """Whether it was proposed."""
        return self.learned is not None and not self._initial and key_of(self.learned) in self._seen

    def _propose(self, n: int) -> Sequence[Proposal]:
        return [] if self.learned is None or self.done else [(self.learned, "learned")]


def plan(strategy: OneShot, evaluate: Any) -> tuple[Strategy, Any, Prepare]:
    """Return what makes the searcher of a one-shot strategy, what evaluates, and what trains the supernet before.

    Args:
        strategy: The strategy.
        evaluate: What the search was given to evaluate with.

    Raises:
        SearchError: If that is no ``LightningEvaluator``, its space has no ``ModelSpace``, or its callbacks do what
            cannot be done to a supernet's share of weights.
        SupernetError: If there is no such supernet of the space, or nothing inherits its weights.
    """
    evaluator = _checked(strategy, evaluate)
    network = supernet(evaluator.space.new_model_space(), strategy.supernet_kind)
    if strategy.samples:
        try:
            for architecture in (largest(network), smallest(network)):
                sub_network(network, architecture)
        except SupernetError as error:
            serving = ", ".join(("darts", "gumbel_darts", *STRATEGIES))
            raise SupernetError(f"strategy={strategy.kind}: {error}; one of {serving} trains it alone") from error
        inherited = InheritedEvaluation(evaluator, strategy.calibration_batches)
        return strategy.sub_network_strategy, inherited, partial(_prepare_sampled, strategy, inherited)
    if isinstance(strategy.cost, Mapping):
        expected_cost_of_table(strategy.cost, probabilities(network))
    return LearnedArchitecture, evaluator, partial(_prepare_learned, strategy, evaluator)


def _checked(strategy: OneShot, evaluate: Any) -> LightningEvaluator:
    what = f"strategy={strategy.kind}"
    if not isinstance(evaluate, LightningEvaluator):
        raise SearchError(
            f"{what}: trains a supernet by your LightningModule, data and Trainer: expected a LightningEvaluator to "
            f"evaluate with, got {getattr(evaluate, '__qualname__', type(evaluate).__qualname__)}"
        )
    if evaluate.space.model_space is None:
        raise SearchError(
            f"{what}: a supernet holds the layers of a ModelSpace of NNI all at once, and a plain factory builds one "
            f"network at a time; expected a ModelSpace, or a strategy that trains each: {', '.join(STRATEGIES)}"
        )
    callbacks = list(evaluate.callbacks())
    for one in callbacks:
        if isinstance(one, (SampledTraining, DifferentiableSearch)):
            raise SearchError(f"callbacks: {what} trains its supernet by itself; leave out {type(one).__name__}")
        if strategy.samples and changes_networks(one):
            raise SearchError(
                f"callbacks: {type(one).__name__} acts on a network that is trained, and of {what} none is but the "
                "supernet; leave it out, and train a point of the front with it"
            )
    return evaluate


def _prepare_sampled(strategy: OneShot, evaluate: InheritedEvaluation, directory: Path, searcher: Searcher) -> None:
    _train(strategy, evaluate.evaluator, directory, None)
    evaluate.path = directory / SUPERNET_FILE


def _prepare_learned(
    strategy: OneShot, evaluator: LightningEvaluator, directory: Path, searcher: LearnedArchitecture
) -> None:
    cost = strategy.cost
    if isinstance(cost, str) and not (directory / SUPERNET_FILE).exists():
        cost = _counted(strategy, evaluator)
    learned = _train(strategy, evaluator, directory, cost).architecture
    searcher.space.encode(learned or {})
    searcher.learned = learned
    log.info("%s found %s", strategy.kind, learned)


def _train(strategy: OneShot, evaluator: LightningEvaluator, directory: Path, cost: Any) -> TrainedSupernet:
    return train_supernet(
        evaluator,
        strategy.supernet_kind,
        strategy.callback(evaluator.seed, {} if isinstance(cost, str) else cost),
        directory,
        options=strategy.described(),
        max_epochs=strategy.max_epochs,
        accumulate=strategy.accumulated,
    )


def _counted(strategy: OneShot, evaluator: LightningEvaluator) -> Any:
    """Return what each option costs of what is counted."""
    name = COSTS[str(strategy.cost)]

    def cost(architecture: Architecture) -> float:
        known = evaluator.costs(architecture)
        if name not in known:
            raise SearchError(
                f"cost={strategy.cost}: the evaluator knows {', '.join(known)}; give it latency=LatencyTable()"
            )
        return known[name]

    table = fitted_cost_table(supernet(evaluator.space.new_model_space(), strategy.supernet_kind), cost, evaluator.seed)
    log.info(
        "cost=%s: counted of %d networks; what each option costs explains %.0f%% of the variance",
        strategy.cost, table.networks, 100 * table.explained,
    )  # fmt: skip
    return table.costs
