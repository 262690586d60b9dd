"""The ways in which ranks communicate: their names, their options and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.distributed.exchange import Begin, begin_cast, begin_quantized, begin_topk
from lightning_optcore.option_values import is_number, is_whole

Communication = Literal["none", "fp16", "bf16", "int8", "topk", "powersgd", "local_sgd", "diloco", "auto"]

# Of every way the options and their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {},
    "bf16": {},
    "int8": {"start_step": 0},
    "topk": {"ratio": 0.01, "start_step": 0},
    "powersgd": {"rank": 4, "start_step": 0},
    "local_sgd": {"period": 8, "exchange": "fp32", "overlap": 0, "start_step": 0},
    "diloco": {
        "period": 32,
        "outer_lr": 1.0,
        "outer_momentum": 0.6,
        "exchange": "int4",
        "overlap": 8,
        "start_step": 0,
    },
    "auto": {"max_share": 0.1},
}
CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
LOCAL = ("local_sgd", "diloco")
EXCHANGES: dict[str, Begin] = {
    "fp32": begin_cast,
    "bf16": partial(begin_cast, dtype=torch.bfloat16),
    "int8": begin_quantized,
    "int4": partial(begin_quantized, bits=4),
}
# Of every option the least and the greatest that it may be.
_RANGES = {
    "start_step": (0, float("inf")),
    "ratio": (0, 1),
    "rank": (1, float("inf")),
    "period": (1, float("inf")),
    "outer_lr": (0, float("inf")),
    "outer_momentum": (0, 1),
    "overlap": (0, float("inf")),
    "max_share": (0, 1),
}
_WHOLE = ("start_step", "rank", "period", "overlap")


def checked_options(communication: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a way to communicate, with the defaults of those that are not given.

    Raises:
        MisconfigurationException: If the way or an option is unknown, or a value is out of its range.

    Example:
        >>> checked_options("topk", {"ratio": 0.05})
        {'ratio': 0.05, 'start_step': 0}
    """
    if communication not in OPTIONS:
        raise MisconfigurationException(f"communication={communication!r}: expected one of {', '.join(OPTIONS)}")
    known = OPTIONS[communication]
    for name, value in options.items():
        key = f"communication_options.{name}={value!r}"
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise MisconfigurationException(f"{key}: communication={communication!r} takes {expected}")
        if name == "exchange":
            if value not in EXCHANGES:
                raise MisconfigurationException(f"{key}: expected one of {', '.join(EXCHANGES)}")
            continue
        low, high = _RANGES[name]
        fits = is_whole(value) if name in _WHOLE else is_number(value)
        if not fits or not low <= value <= high:
            number = "a whole number" if name in _WHOLE else "a number"
            most = "" if high == float("inf") else f" to {high}"
            raise MisconfigurationException(f"{key}: expected {number}, {low}{most or ' or more'}")
    found = {**known, **options}
    for name in ("ratio", "outer_lr", "max_share"):
        if name in found and found[name] == 0:
            raise MisconfigurationException(f"communication_options.{name}=0: expected more than 0")
    if found.get("outer_momentum") == 1:
        raise MisconfigurationException("communication_options.outer_momentum=1: expected less than 1")
    if "overlap" in found and found["overlap"] >= found["period"]:
        raise MisconfigurationException(
            f"communication_options.overlap={found['overlap']}: expected less than period={found['period']}"
        )
    return found


def begin_of(communication: str, options: Mapping[str, Any]) -> Begin:
    """Return how the gradients of every step, or what ranks learned, are averaged.

    Args:
        communication: One that compresses gradients with an error feedback, or of local updates.
        options: All of its options.
    """
    if communication == "topk":
        return partial(begin_topk, ratio=options["ratio"])
    return EXCHANGES[options["exchange"]] if communication in LOCAL else EXCHANGES[communication]
