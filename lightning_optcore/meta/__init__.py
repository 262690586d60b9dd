"""Meta-learning, continual learning and transfer, on the module that a user already has.

Names are resolved on first use, so that torch is not loaded before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

if TYPE_CHECKING:
    from lightning_optcore.meta.adaptation import adapt
    from lightning_optcore.meta.algorithms import anil, fomaml, maml, meta_sgd, protonet, reptile
    from lightning_optcore.meta.episodes import EpisodicDataModule, TaskDataModule
    from lightning_optcore.meta.meta_gradient import MetaGradient
    from lightning_optcore.meta.task_families import LinearSystems, Rotations, Sinusoids
    from lightning_optcore.meta.tasks import MetaLearningError

_HOME_OF = {
    "EpisodicDataModule": "episodes",
    "LinearSystems": "task_families",
    "MetaGradient": "meta_gradient",
    "MetaLearningError": "tasks",
    "Rotations": "task_families",
    "Sinusoids": "task_families",
    "TaskDataModule": "episodes",
    "adapt": "adaptation",
    "anil": "algorithms",
    "fomaml": "algorithms",
    "maml": "algorithms",
    "meta_sgd": "algorithms",
    "protonet": "algorithms",
    "reptile": "algorithms",
}

__all__ = [
    "EpisodicDataModule",
    "LinearSystems",
    "MetaGradient",
    "MetaLearningError",
    "Rotations",
    "Sinusoids",
    "TaskDataModule",
    "adapt",
    "anil",
    "fomaml",
    "maml",
    "meta_sgd",
    "protonet",
    "reptile",
]


__getattr__ = lazily(__name__, _HOME_OF)
