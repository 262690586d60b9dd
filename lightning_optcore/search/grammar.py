"""Hydra's grammar of sweeps, read by Hydra's own parser."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException

from lightning_optcore.search.space import Choice, Interval, Parameter, Range, SpaceError


def parse_parameter(name: str, text: Any) -> Parameter:
    """Read one parameter: ``choice(...)``, ``range(...)``, ``interval(...)``, ``a,b,c`` or one fixed value.

    Raises:
        SpaceError: If Hydra's parser does not know it.
    """
    try:
        override = OverridesParser.create().parse_override(f"x={text}")
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise SpaceError(
            f"{name}={text}: {reason}; expected choice(a,b), range(1,5), interval(0.0,1.0), "
            "tag(log, interval(1e-4,1e-1)) or int(interval(1,8))"
        ) from error
    return parameter_of(override, name)


def parameter_of(override: Override, name: str | None = None) -> Parameter:
    """Return the parameter of a parsed override; a value that is no sweep is a choice of one.

    Raises:
        SpaceError: If it is empty, or a tag is unknown.
    """
    name = name or override.get_key_element()
    sweep = override.value()
    tags = set(getattr(sweep, "tags", ()))
    try:
        if isinstance(sweep, IntervalSweep):
            return _interval(sweep, tags)
        if tags:
            raise SpaceError(f"tags {', '.join(sorted(tags))} belong to interval() alone")
        if isinstance(sweep, RangeSweep) and not sweep.shuffle:
            assert sweep.start is not None and sweep.stop is not None
            return Range(sweep.start, sweep.stop, sweep.step)
        if isinstance(sweep, (ChoiceSweep, RangeSweep)):
            values = override.sweep_iterator(Transformer.identity)
            return Choice(tuple(Override._convert_value(value) for value in values))
        return Choice((sweep,))
    except SpaceError as error:
        raise SpaceError(f"{name}: {error}") from None


def override_text(key: str, value: Any) -> str:
    """Return ``key=value`` as Hydra reads it back: strings are quoted where they would be read as something else.

    Example:
        >>> override_text("model.name", "a,b"), override_text("model.width", 16)
        ("model.name='a,b'", 'model.width=16')
    """
    return f"{key}={Override._get_value_element_as_str(_element(value))}"


def _element(value: Any) -> Any:
    if isinstance(value, str):
        return value if _reads_back(value) else QuotedString(value, Quote.single)
    if isinstance(value, dict):
        return {key: _element(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_element(item) for item in value]
    return value


@lru_cache(maxsize=1024)
def _reads_back(text: str) -> bool:
    try:
        override = OverridesParser.create().parse_override(f"x={text}")
    except HydraException:
        return False
    return not override.is_sweep_override() and override.value() == text


def _interval(sweep: IntervalSweep, tags: set[str]) -> Interval:
    unknown = tags - {"log", "int"}
    if unknown:
        raise SpaceError(f"tag {', '.join(sorted(unknown))}: expected log or int")
    assert sweep.start is not None and sweep.end is not None
    integer = "int" in tags or (isinstance(sweep.start, int) and isinstance(sweep.end, int))
    low, high = (int(sweep.start), int(sweep.end)) if integer else (float(sweep.start), float(sweep.end))
    return Interval(low, high, log="log" in tags, integer=integer)
