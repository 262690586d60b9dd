"""Public names that are resolved on first use (PEP 562), so that a package loads no torch before it is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, home_of: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: Its ``__name__``.
        home_of: By public name, the module inside the package that defines it.

    Example:
        >>> get = lazily("lightning_optcore", {"Store": "store"})
        >>> get("Store").__name__
        'Store'
    """

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
