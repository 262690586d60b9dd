"""What a fit came to: the measurements that its callbacks made, or one of the trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_optcore.measurement.forward_calls import ForwardRecorder, submodule
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.measurement.quality import validate
from lightning_optcore.measurement.yardstick import measure

log = logging.getLogger(__name__)


def measured_fit(
    model: Any, data: Any, callbacks: Iterable[Any], quality: Mapping[str, float], **options: Any
) -> dict[str, Measurement]:
    """Return before and after of the techniques, the first one's original and the last one's artifact.

    Where no callback measured, it is the trained model, as ``"before"``.

    Args:
        model: The LightningModule.
        data: Its datamodule.
        callbacks: Those of the Trainer.
        quality: Metrics that are known already.
        options: What :func:`measure` takes.

    Returns:
        Measurements by role; empty where the validation calls no module with parameters.
    """
    callbacks = list(callbacks)
    done = [callback for callback in callbacks if getattr(callback, "after", None) is not None]
    if done:
        return {"before": done[0].before, "after": done[-1].after}
    # Without them the module's validation would not understand its batches.
    needed = [callback for callback in callbacks if getattr(callback, "changes_steps", False)]
    with ForwardRecorder(model) as recorder:
        validate(model, datamodule=data, limit_batches=1, callbacks=needed)
    name = recorder.target()
    if name is None:
        log.warning("nothing to measure: validation_step calls no module with parameters")
        return {}
    target = submodule(model, name).to("cpu")
    return {"before": measure(target, recorder.inputs[name][0], quality=quality, **options)}
