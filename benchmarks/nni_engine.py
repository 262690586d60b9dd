"""NNI's RegularizedEvolution in this process, without its server, for the benchmarks of architecture search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_optcore.nas._nni_compat import nni_nas

Sample = dict[str, Any]


def quieten() -> None:
    """Let NNI say nothing but errors; it sets its own level when it is imported."""
    nni_nas()
    logging.getLogger("nni").setLevel(logging.ERROR)


def regularized_evolution(
    choices: Mapping[str, Sequence[Any]],
    evaluate: Callable[[Sample], float],
    goes_on: Callable[[int], bool],
    *,
    seed: int,
    mutation_prob: float,
) -> None:
    """Let the strategy search.

    Args:
        choices: The values of every choice.
        evaluate: Returns, of a sample, the objective: the more the better.
        goes_on: Says, of how many were evaluated, whether another one may be.
        seed: Of the strategy.
        mutation_prob: Of the strategy.
    """
    nas = nni_nas()
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.execution import ExecutionEngine
    from nni.nas.execution.event import FinalMetricEvent, TrainingEndEvent
    from nni.nas.space import ModelStatus, RawFormatModelSpace
    from torch import nn

    class Choices(nas.nn.ModelSpace):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            for name, values in choices.items():
                self.add_mutable(nas.nni.choice(name, list(values)))

        def freeze(self, sample: Sample) -> nn.Module:
            self.validate(sample)
            return nn.Identity()

    class Engine(ExecutionEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.submitted: list[Any] = []

        def submit_models(self, *models: Any) -> None:
            for model in models:
                if not self.budget_available():
                    return
                self.submitted.append(model)
                self.dispatch_model_event(FinalMetricEvent(model, evaluate(model.sample)))
                self.dispatch_model_event(TrainingEndEvent(model, ModelStatus.Trained))

        def list_models(self, status: Any = None) -> list[Any]:
            return [model for model in self.submitted if status is None or model.status == status]

        def idle_worker_available(self) -> bool:
            return True

        def budget_available(self) -> bool:
            return goes_on(len(self.submitted))

        def wait_models(self, *models: Any) -> None:
            """Every model is done when it was submitted."""

    strategy = nas.strategy.RegularizedEvolution(
        population_size=20, sample_size=5, mutation_prob=mutation_prob, seed=seed
    )
    strategy(RawFormatModelSpace(Choices(), FunctionalEvaluator(print)), Engine())
