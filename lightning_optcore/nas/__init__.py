"""Architecture search: spaces of networks, how they are searched, and what a network costs before it is trained.

Names are resolved on first use, so that neither torch nor NNI is loaded before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_optcore.nas import spaces
    from lightning_optcore.nas.adaptive_evolution import AdaptiveEvolution
    from lightning_optcore.nas.constraints import Constraints
    from lightning_optcore.nas.evaluator import LightningEvaluator
    from lightning_optcore.nas.inheritance import inherit
    from lightning_optcore.nas.latency_table import LatencyTable
    from lightning_optcore.nas.loop import search
    from lightning_optcore.nas.once_for_all import inherited_evaluator
    from lightning_optcore.nas.one_shot import OneShot
    from lightning_optcore.nas.result import ArchitectureTrial, SearchResult
    from lightning_optcore.nas.retraining import load_architecture, retrain, save_architecture
    from lightning_optcore.nas.space import ArchitectureError, ArchitectureSpace, architecture_space, factory_space
    from lightning_optcore.nas.strategies import RegularizedEvolution, nsga2
    from lightning_optcore.nas.supernet import sub_network

_HOME_OF = {
    "AdaptiveEvolution": "adaptive_evolution",
    "ArchitectureError": "space",
    "ArchitectureSpace": "space",
    "ArchitectureTrial": "result",
    "Constraints": "constraints",
    "LatencyTable": "latency_table",
    "LightningEvaluator": "evaluator",
    "OneShot": "one_shot",
    "RegularizedEvolution": "strategies",
    "SearchResult": "result",
    "architecture_space": "space",
    "factory_space": "space",
    "inherit": "inheritance",
    "inherited_evaluator": "once_for_all",
    "load_architecture": "retraining",
    "nsga2": "strategies",
    "retrain": "retraining",
    "save_architecture": "retraining",
    "search": "loop",
    "sub_network": "supernet",
}

__all__ = [
    "AdaptiveEvolution",
    "ArchitectureError",
    "ArchitectureSpace",
    "ArchitectureTrial",
    "Constraints",
    "LatencyTable",
    "LightningEvaluator",
    "OneShot",
    "RegularizedEvolution",
    "SearchResult",
    "architecture_space",
    "factory_space",
    "inherit",
    "inherited_evaluator",
    "load_architecture",
    "nsga2",
    "retrain",
    "save_architecture",
    "search",
    "spaces",
    "sub_network",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lightning_optcore.nas' has no attribute '{name}'")
    module = importlib.import_module(f"lightning_optcore.nas.{_HOME_OF.get(name, name)}")
    value = module if name == "spaces" else getattr(module, name)
    globals()[name] = value
    return value
