"""Modes that a model is in for a while, and left in as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and each back into its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(net):
        ...     net[1].training
        False
        >>> net[1].training
        True
    """
    modes = [(child, child.training) for module in modules for child in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def fused_attention_off() -> Iterator[None]:
    """Let ``nn.TransformerEncoder`` compute layer by layer inside the context, in evaluation as in training.

    Its fused kernel calls no layer, and packs padded inputs into nested tensors, which neither hooks nor exporters,
    counters of operations nor autocast on a CPU can take.

    Example:
        >>> with fused_attention_off():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
