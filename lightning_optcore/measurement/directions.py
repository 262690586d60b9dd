"""Which way is better: the yardstick's own quantities, and a guess for a user's metrics by name."""

from __future__ import annotations

from typing import Literal

Direction = Literal["minimize", "maximize"]

YARDSTICK: dict[str, Direction] = {
    "params": "minimize",
    "flops": "minimize",
    "size_bytes": "minimize",
    "latency_ms": "minimize",
    "throughput": "maximize",
    "peak_memory_bytes": "minimize",
}

_LOWER_IS_BETTER = (
    "loss",
    "error",
    "err",
    "mae",
    "mse",
    "rmse",
    "perplexity",
    "ppl",
    "nll",
    "wer",
    "cer",
    "fid",
    "forgetting",
)


def direction_of(name: str) -> Direction:
    """Return whether less or more of the quantity ``name`` is better.

    Quantities of the yardstick (``latency_ms``, also as ``latency_ms/32`` for one batch size) have
    a fixed direction. For other names the words between separators decide: ``val/loss`` and
    ``test_mse`` are minimized, everything else is maximized.

    Example:
        >>> direction_of("latency_ms/32"), direction_of("val/acc"), direction_of("val_loss")
        ('minimize', 'maximize', 'minimize')
    """
    quantity = name.split("/", 1)[0]
    if quantity in YARDSTICK:
        return YARDSTICK[quantity]
    words = name.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_")
    return "minimize" if any(word in _LOWER_IS_BETTER for word in words) else "maximize"
