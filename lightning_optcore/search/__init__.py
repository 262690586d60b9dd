"""Search: spaces, searchers that are asked and told, and Pareto arithmetic. It knows nothing of what is searched.

Names are resolved on first use, so that a space can be read without scikit-learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

if TYPE_CHECKING:
    from lightning_optcore.search.evolutionary import Evolutionary
    from lightning_optcore.search.expressions import ExpressionError
    from lightning_optcore.search.importance import Importance, parameter_importance
    from lightning_optcore.search.nni_tuner import NNITuner
    from lightning_optcore.search.optuna_sampler import Optuna
    from lightning_optcore.search.pareto import hypervolume
    from lightning_optcore.search.population_based import PopulationBasedTraining
    from lightning_optcore.search.quantum_inspired import QuantumInspired
    from lightning_optcore.search.sampling import Grid, Random
    from lightning_optcore.search.searcher import Candidate, Searcher, SearchError, Trial
    from lightning_optcore.search.space import Space, SpaceError
    from lightning_optcore.search.swarm import Swarm

_HOME_OF = {
    "Candidate": "searcher",
    "Evolutionary": "evolutionary",
    "ExpressionError": "expressions",
    "Grid": "sampling",
    "Importance": "importance",
    "NNITuner": "nni_tuner",
    "Optuna": "optuna_sampler",
    "PopulationBasedTraining": "population_based",
    "QuantumInspired": "quantum_inspired",
    "Random": "sampling",
    "SearchError": "searcher",
    "Searcher": "searcher",
    "Space": "space",
    "SpaceError": "space",
    "Swarm": "swarm",
    "Trial": "searcher",
    "hypervolume": "pareto",
    "parameter_importance": "importance",
}

__all__ = [
    "Candidate",
    "Evolutionary",
    "ExpressionError",
    "Grid",
    "Importance",
    "NNITuner",
    "Optuna",
    "PopulationBasedTraining",
    "QuantumInspired",
    "Random",
    "SearchError",
    "Searcher",
    "Space",
    "SpaceError",
    "Swarm",
    "Trial",
    "hypervolume",
    "parameter_importance",
]


__getattr__ = lazily(__name__, _HOME_OF)
