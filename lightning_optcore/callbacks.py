"""Everything that can be handed to ``Trainer(callbacks=[...])``."""

from lightning_optcore.compression.allocation import LayerwiseAllocation
from lightning_optcore.compression.distillation import KnowledgeDistillation
from lightning_optcore.compression.kernel_fusion import KernelFusion
from lightning_optcore.compression.low_rank import LowRankFactorization
from lightning_optcore.compression.magnitude_pruning import MagnitudePruning
from lightning_optcore.compression.mixed_precision import MixedPrecision
from lightning_optcore.compression.quantization import PostTrainingQuantization
from lightning_optcore.compression.quantization_aware_training import QuantizationAwareTraining
from lightning_optcore.compression.structured_pruning import StructuredPruning
from lightning_optcore.meta.continual.averaged_gem import AveragedGEM
from lightning_optcore.meta.continual.elastic_weight_consolidation import ElasticWeightConsolidation
from lightning_optcore.meta.continual.experience_replay import ExperienceReplay
from lightning_optcore.meta.continual.learning_without_forgetting import LearningWithoutForgetting
from lightning_optcore.meta.continual.synaptic_intelligence import SynapticIntelligence
from lightning_optcore.meta.fast_adaptation import FastAdaptation
from lightning_optcore.meta.meta_learning import MetaLearning
from lightning_optcore.meta.transfer.discriminative_finetuning import DiscriminativeFinetuning
from lightning_optcore.nas.differentiable_search import DifferentiableSearch
from lightning_optcore.nas.sampled_training import SampledTraining
from lightning_optcore.profiling.performance_profiler import PerformanceProfiler
from lightning_optcore.sweeps.population import PopulationMember
from lightning_optcore.sweeps.pruning import TrialPruning

__all__ = [
    "AveragedGEM",
    "DifferentiableSearch",
    "DiscriminativeFinetuning",
    "ElasticWeightConsolidation",
    "ExperienceReplay",
    "FastAdaptation",
    "KernelFusion",
    "KnowledgeDistillation",
    "LayerwiseAllocation",
    "LearningWithoutForgetting",
    "LowRankFactorization",
    "MagnitudePruning",
    "MetaLearning",
    "MixedPrecision",
    "PerformanceProfiler",
    "PopulationMember",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "SampledTraining",
    "StructuredPruning",
    "SynapticIntelligence",
    "TrialPruning",
]
