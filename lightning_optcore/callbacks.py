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
from lightning_optcore.nas.differentiable_search import DifferentiableSearch
from lightning_optcore.nas.sampled_training import SampledTraining
from lightning_optcore.profiling.performance_profiler import PerformanceProfiler
from lightning_optcore.sweeps.population import PopulationMember
from lightning_optcore.sweeps.pruning import TrialPruning

__all__ = [
    "DifferentiableSearch",
    "KernelFusion",
    "KnowledgeDistillation",
    "LayerwiseAllocation",
    "LowRankFactorization",
    "MagnitudePruning",
    "MixedPrecision",
    "PerformanceProfiler",
    "PopulationMember",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "SampledTraining",
    "StructuredPruning",
    "TrialPruning",
]
