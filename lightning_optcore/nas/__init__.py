"""Architecture search: spaces of networks, how they are searched, and what a network costs before it is trained.

Names are resolved on first use, so that neither torch nor NNI is loaded before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_optcore.nas.loop import search
    from lightning_optcore.nas.result import ArchitectureTrial, SearchResult
    from lightning_optcore.nas.space import ArchitectureError, ArchitectureSpace, architecture_space, factory_space
    from lightning_optcore.nas.strategies import RegularizedEvolution, nsga2

_HOME_OF = {
    "ArchitectureError": "space",
    "ArchitectureSpace": "space",
    "ArchitectureTrial": "result",
    "RegularizedEvolution": "strategies",
    "SearchResult": "result",
    "architecture_space": "space",
    "factory_space": "space",
    "nsga2": "strategies",
    "search": "loop",
}

__all__ = [
    "ArchitectureError",
    "ArchitectureSpace",
    "ArchitectureTrial",
    "RegularizedEvolution",
    "SearchResult",
    "architecture_space",
    "factory_space",
    "nsga2",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_optcore.nas' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lightning_optcore.nas.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
