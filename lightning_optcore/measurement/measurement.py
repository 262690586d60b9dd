"""`Measurement`: what one model costs and how good it is, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Latency:
    """Latency of one call.

    Args:
        p50: Median, in ms.
        p90: 90th percentile, in ms.
        spread: Interquartile range of the medians of the rounds, in ms: how far the machine's
            noise moved the figure while it was taken.
        calls: Number of timed calls.
    """

    p50: float
    p90: float
    spread: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class Measurement:
    """One model on the yardstick.

    Args:
        params: Number of parameters.
        flops: Floating point operations of one forward pass of one sample (a multiply-add is two);
            ``None`` where they cannot be counted.
        size_bytes: Bytes of the serialised weights (a module) or of the artifact's model file.
        latency_ms: Latency in ms of one call, per batch size.
        throughput: Samples per second at the median latency, per batch size.
        peak_memory_bytes: Bytes that the weights and one forward pass at the largest batch size
            hold at their peak; ``None`` where the platform does not tell.
        quality: Metrics by name, as the user's own validation logged them.
        device: ``"cpu"`` or ``"cuda:0"``.
        num_threads: Intra-op threads that were allowed.
        hardware: Name of the processor (and accelerator).
        versions: Versions of the libraries that took part.
        measured_at: Time of the measurement (ISO 8601, UTC).

    Example:
        >>> m = Measurement(params=10, flops=20, size_bytes=40, latency_ms={1: Latency(0.5, 0.6)},
        ...                 throughput={1: 2000.0}, peak_memory_bytes=None, quality={"val/acc": 0.9},
        ...                 device="cpu", num_threads=1)
        >>> Measurement.from_json(m.to_json()) == m
        True
    """

    params: int
    flops: int | None
    size_bytes: int
    latency_ms: dict[int, Latency]
    throughput: dict[int, float]
    peak_memory_bytes: int | None
    quality: dict[str, float]
    device: str
    num_threads: int
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    measured_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (JSON types only)."""
        data = asdict(self)
        data["latency_ms"] = {str(size): asdict(value) for size, value in self.latency_ms.items()}
        data["throughput"] = {str(size): value for size, value in self.throughput.items()}
        return {"schema_version": SCHEMA_VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If the data was written by a newer version, or a field is missing or unknown.
        """
        data = dict(data)
        version = data.pop("schema_version", None)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={version!r} of this measurement is not readable: this version of "
                f"lightning_optcore reads up to {SCHEMA_VERSION}; upgrade lightning-optcore"
            )
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ValueError(
                f"not a measurement: missing {sorted(names - set(data))}, unknown {sorted(set(data) - names)}"
            )
        data["latency_ms"] = {int(size): Latency(**value) for size, value in data["latency_ms"].items()}
        data["throughput"] = {int(size): float(value) for size, value in data["throughput"].items()}
        return cls(**data)

    def to_json(self, indent: int | None = None) -> str:
        """Return the measurement as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Read what :meth:`to_json` wrote; raises :class:`ValueError` as :meth:`from_dict` does."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("not a measurement: the JSON text is no object")
        return cls.from_dict(data)

    def scalars(self) -> dict[str, float]:
        """Return every quantity as one number by name.

        ``latency_ms`` is the p50 at the first batch size and ``throughput`` the value there;
        ``latency_ms/32`` names one batch size and ``latency_ms_p90/32`` its 90th percentile. Quality
        metrics keep their names. What could not be measured is absent.

        Example:
            >>> m = Measurement(1, None, 4, {1: Latency(0.5, 0.6)}, {1: 2000.0}, None, {"val/acc": 0.9},
            ...                 "cpu", 1)
            >>> sorted(m.scalars())  # doctest: +NORMALIZE_WHITESPACE
            ['latency_ms', 'latency_ms/1', 'latency_ms_p90/1', 'params', 'size_bytes',
             'throughput', 'throughput/1', 'val/acc']
        """
        values: dict[str, float | None] = {
            "params": self.params,
            "flops": self.flops,
            "size_bytes": self.size_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        for size, latency in self.latency_ms.items():
            values.setdefault("latency_ms", latency.p50)
            values[f"latency_ms/{size}"] = latency.p50
            values[f"latency_ms_p90/{size}"] = latency.p90
        for size, samples_per_second in self.throughput.items():
            values.setdefault("throughput", samples_per_second)
            values[f"throughput/{size}"] = samples_per_second
        values.update(self.quality)
        return {name: float(value) for name, value in values.items() if value is not None}
