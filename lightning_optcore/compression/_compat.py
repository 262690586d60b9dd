"""Shims for other libraries, each with what it mends."""

from __future__ import annotations

import sys


def allow_instantiator(path: str) -> None:
    """Let ``LightningModule.load_from_checkpoint`` use our instantiator.

    Lightning 2.6 refuses instantiators that are not on its list: "The instantiator ... from the checkpoint is not
    in the allowlist of trusted instantiators" (Lightning #21822). Earlier versions have no list.
    """

    for name in ("lightning.pytorch.core.saving", "pytorch_lightning.core.saving"):
        allowed = getattr(sys.modules.get(name), "_ALLOWED_INSTANTIATORS", None)
        if allowed is not None:
            allowed.add(path)
