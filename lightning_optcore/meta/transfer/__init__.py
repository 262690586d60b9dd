"""Transfer: what a trained network knows, used for another task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

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


__getattr__ = lazily(__name__, _HOME_OF)
