"""What Lightning prints beside our own lines."""

from __future__ import annotations

import logging
import sys
import warnings


def quieten_lightning() -> None:
    """Print Lightning's messages once, without advertisements; in a pipe only its warnings."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        # Hydra's root logger prints them already.
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
        logger.addFilter(_no_tips)
    # Lightning 2.6 calls a function that torch 2.13 deprecates; its users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")


def _no_tips(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
