"""Transfer: what a trained network knows, used for another task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_optcore.meta.transfer.backbone import Loaded, load_backbone
    from lightning_optcore.meta.transfer.layers import LayerGroup, TransferError, layer_groups, replace_head
    from lightning_optcore.meta.transfer.similarity import layer_similarity, linear_cka, stable_groups

_HOME_OF = {
    "LayerGroup": "layers",
    "Loaded": "backbone",
    "TransferError": "layers",
    "layer_groups": "layers",
    "layer_similarity": "similarity",
    "linear_cka": "similarity",
    "load_backbone": "backbone",
    "replace_head": "layers",
    "stable_groups": "similarity",
}

__all__ = [
    "LayerGroup",
    "Loaded",
    "TransferError",
    "layer_groups",
    "layer_similarity",
    "linear_cka",
    "load_backbone",
    "replace_head",
    "stable_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_optcore.meta.transfer' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lightning_optcore.meta.transfer.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
