"""Plug-ins for PyTorch Lightning that make models cheaper to train and to run, and measure it.

Names are resolved on first use (PEP 562), so that ``import lightning_optcore`` loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

if TYPE_CHECKING:
    from lightning_optcore.compression.artifact import Artifact, load_artifact
    from lightning_optcore.compression.checkpoints import load_from_checkpoint
    from lightning_optcore.measurement import (
        Latency,
        Measurement,
        compare,
        measure,
        measure_alternatives,
    )
    from lightning_optcore.recipe import Recipe, rebuild
    from lightning_optcore.store import Store

__version__ = "0.1.0"

_HOME_OF = {
    "Artifact": "compression.artifact",
    "Latency": "measurement",
    "Measurement": "measurement",
    "Recipe": "recipe",
    "Store": "store",
    "compare": "measurement",
    "load_artifact": "compression.artifact",
    "load_from_checkpoint": "compression.checkpoints",
    "measure": "measurement",
    "measure_alternatives": "measurement",
    "rebuild": "recipe",
}

__all__ = [
    "Artifact",
    "Latency",
    "Measurement",
    "Recipe",
    "Store",
    "compare",
    "load_artifact",
    "load_from_checkpoint",
    "measure",
    "measure_alternatives",
    "rebuild",
]

# A wheel carries the configuration inside the package; in a clone `conf` stands beside the package.
if not (Path(__file__).parent / "conf").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


__getattr__ = lazily(__name__, _HOME_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
