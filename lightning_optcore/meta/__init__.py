"""Meta-learning, continual learning and transfer, on the module that a user already has.

Names are resolved on first use, so that torch is not loaded before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_optcore.meta.adaptation import adapt
    from lightning_optcore.meta.algorithms import anil, fomaml, maml, meta_sgd, protonet, reptile
    from lightning_optcore.meta.meta_gradient import MetaGradient, MetaLearningError

_HOME_OF = {
    "MetaGradient": "meta_gradient",
    "MetaLearningError": "meta_gradient",
    "adapt": "adaptation",
    "anil": "algorithms",
    "fomaml": "algorithms",
    "maml": "algorithms",
    "meta_sgd": "algorithms",
    "protonet": "algorithms",
    "reptile": "algorithms",
}

__all__ = [
    "MetaGradient",
    "MetaLearningError",
    "adapt",
    "anil",
    "fomaml",
    "maml",
    "meta_sgd",
    "protonet",
    "reptile",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_optcore.meta' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lightning_optcore.meta.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
