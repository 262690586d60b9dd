"""Everything that can be handed to ``Trainer(callbacks=[...])``."""

from lightning_optcore.compression.quantization import PostTrainingQuantization

__all__ = ["PostTrainingQuantization"]
