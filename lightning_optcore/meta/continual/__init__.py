"""Continual learning: what keeps a model from forgetting earlier tasks, and the plan that drives a sequence of them.

Names are resolved on first use, so that torch is not loaded before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

if TYPE_CHECKING:
    from lightning_optcore.meta.continual.accuracy_matrix import AccuracyMatrix
    from lightning_optcore.meta.continual.averaged_gem import AveragedGEM
    from lightning_optcore.meta.continual.elastic_weight_consolidation import ElasticWeightConsolidation
    from lightning_optcore.meta.continual.experience_replay import ExperienceReplay
    from lightning_optcore.meta.continual.learning_without_forgetting import LearningWithoutForgetting
    from lightning_optcore.meta.continual.plan import ContinualPlan
    from lightning_optcore.meta.continual.synaptic_intelligence import SynapticIntelligence
    from lightning_optcore.meta.continual.tasks import ClassTask, PermutedTask, class_tasks, permuted_tasks

_HOME_OF = {
    "AccuracyMatrix": "accuracy_matrix",
    "AveragedGEM": "averaged_gem",
    "ClassTask": "tasks",
    "ContinualPlan": "plan",
    "ElasticWeightConsolidation": "elastic_weight_consolidation",
    "ExperienceReplay": "experience_replay",
    "LearningWithoutForgetting": "learning_without_forgetting",
    "PermutedTask": "tasks",
    "SynapticIntelligence": "synaptic_intelligence",
    "class_tasks": "tasks",
    "permuted_tasks": "tasks",
}

__all__ = [
    "AccuracyMatrix",
    "AveragedGEM",
    "ClassTask",
    "ContinualPlan",
    "ElasticWeightConsolidation",
    "ExperienceReplay",
    "LearningWithoutForgetting",
    "PermutedTask",
    "SynapticIntelligence",
    "class_tasks",
    "permuted_tasks",
]


__getattr__ = lazily(__name__, _HOME_OF)
