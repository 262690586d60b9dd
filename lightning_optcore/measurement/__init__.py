"""The yardstick: one way to measure every model, and the plain data that comes out of it.

Names are resolved on first use, so that readers of measurements (the store, the report) load no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_optcore.lazy import lazily

if TYPE_CHECKING:
    from lightning_optcore.measurement.comparison import Comparison, compare
    from lightning_optcore.measurement.directions import direction_of
    from lightning_optcore.measurement.inputs import Inputs
    from lightning_optcore.measurement.measurement import Latency, Measurement
    from lightning_optcore.measurement.yardstick import measure, measure_alternatives

_HOME_OF = {
    "Comparison": "comparison",
    "Inputs": "inputs",
    "Latency": "measurement",
    "Measurement": "measurement",
    "compare": "comparison",
    "direction_of": "directions",
    "measure": "yardstick",
    "measure_alternatives": "yardstick",
}

__all__ = [
    "Comparison",
    "Inputs",
    "Latency",
    "Measurement",
    "compare",
    "direction_of",
    "measure",
    "measure_alternatives",
]


__getattr__ = lazily(__name__, _HOME_OF)
