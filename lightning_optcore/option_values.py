"""Whether the value of an option is a number: a configuration, or an override, may hold anything.

NumPy's own scalars are none: what they are written into, JSON and checkpoints, does not take them.
"""

from __future__ import annotations

from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number; ``True`` and ``"1"`` are none.

    Example:
        >>> is_number(0.5), is_number(True), is_number("0.5"), is_number(None)
        (True, False, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object, least: int | None = None) -> TypeGuard[int]:
    """Return whether a value is a whole number, of at least ``least``; ``2.0`` is none.

    Example:
        >>> is_whole(2), is_whole(2.0), is_whole(0, least=1), is_whole("2")
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
