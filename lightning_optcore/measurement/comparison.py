"""`compare`: the table that sets one measurement against another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_optcore.measurement.measurement import Measurement

_UNITS = {1e9: "G", 1e6: "M", 1e3: "k"}


@dataclass(frozen=True)
class Row:
    """One quantity before and after.

    Args:
        name: The quantity, with its unit.
        before: Value before, ``None`` if unknown.
        after: Value after, ``None`` if unknown.
        kind: ``"cost"`` is compared by ratio, ``"quality"`` by difference.
    """

    name: str
    before: float | None
    after: float | None
    kind: Literal["cost", "quality"]

    @property
    def ratio(self) -> float | None:
        """``after / before``."""
        if self.before is None or self.after is None or self.before == 0:
            return None
        return self.after / self.before

    @property
    def difference(self) -> float | None:
        """``after - before``."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before

    @property
    def change(self) -> str:
        """The change as text: a ratio for a cost, a difference for a quality."""
        if self.kind == "quality":
            return "" if self.difference is None else f"{self.difference:+.4f}"
        return "" if self.ratio is None else f"{self.ratio:.3g}x"


@dataclass(frozen=True)
class Comparison:
    """The rows of :func:`compare`; prints itself as a table.

    Args:
        rows: One per quantity.
        note: What a reader must know before trusting the ratios, or ``""``.
    """

    rows: tuple[Row, ...]
    note: str = ""

    def __getitem__(self, name: str) -> Row:
        """Return the row of a quantity, e.g. ``"latency_ms/1"`` or ``"val/acc"``."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name}: expected one of {', '.join(row.name for row in self.rows)}")

    def table(self) -> Table:
        """Return a table for rich."""
        table = Table(caption=self.note or None)
        table.add_column("quantity", no_wrap=True)
        for title in ("before", "after", "change"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            quality = row.kind == "quality"
            table.add_row(row.name, _text(row.before, quality), _text(row.after, quality), row.change)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def compare(before: Measurement, after: Measurement) -> Comparison:
    """Set two measurements side by side.

    Args:
        before: Measurement of the original.
        after: Measurement of what was made of it.

    Returns:
        Rows for parameters, FLOPs, bytes, peak memory, latency and throughput per batch size (costs,
        by ratio) and for every quality metric (by difference).

    Example:
        >>> from lightning_optcore import Latency
        >>> def taken(ms, bytes_):
        ...     return Measurement(10, 20, bytes_, {1: Latency(ms, ms)}, {1: 1e3 / ms}, None,
        ...                        {"val/acc": 0.9}, "cpu", 1)
        >>> compare(taken(2.0, 40), taken(0.5, 10))["latency_ms/1"].change
        '0.25x'
    """
    for name, given in (("before", before), ("after", after)):
        if not isinstance(given, Measurement):
            raise TypeError(
                f"{name} is {given!r}, no Measurement; where a technique made no artifact, its `error` says why"
            )
    first, second = _costs(before), _costs(after)
    rows = [Row(name, first.get(name), second.get(name), "cost") for name in {**first, **second}]
    rows += [
        Row(name, before.quality.get(name), after.quality.get(name), "quality")
        for name in {**before.quality, **after.quality}
    ]
    return Comparison(tuple(rows), _note(before, after))


def summary_table(measurement: Measurement) -> Table:
    """Return a table of one measurement for rich."""
    table = Table()
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in _costs(measurement).items():
        table.add_row(name, _text(value, quality=False))
    for name, value in measurement.quality.items():
        table.add_row(name, _text(value, quality=True))
    return table


def _costs(measurement: Measurement) -> dict[str, float]:
    values: dict[str, float | None] = {
        "params": measurement.params,
        "flops": measurement.flops,
        "size_bytes": measurement.size_bytes,
        "peak_memory_bytes": measurement.peak_memory_bytes,
    }
    for size, latency in measurement.latency_ms.items():
        values[f"latency_ms/{size}"] = latency.p50
        values[f"latency_ms_p90/{size}"] = latency.p90
    for size, samples_per_second in measurement.throughput.items():
        values[f"throughput/{size}"] = samples_per_second
    return {name: float(value) for name, value in values.items() if value is not None}


def _note(before: Measurement, after: Measurement) -> str:
    differing = [
        f"{name}: {first} / {second}"
        for name, first, second in (
            ("hardware", before.hardware, after.hardware),
            ("device", before.device, after.device),
            ("num_threads", before.num_threads, after.num_threads),
        )
        if first != second
    ]
    return "taken on different terms - " + "; ".join(differing) if differing else ""


def _text(value: float | None, quality: bool) -> str:
    if value is None:
        return "-"
    if quality:
        return f"{value:.4f}"
    for scale, unit in _UNITS.items():
        if value >= 10 * scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"
