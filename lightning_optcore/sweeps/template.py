"""The overrides of a sweep's jobs: what is fixed, and what is searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from lightning_optcore.search.grammar import override_text, parameter_of
from lightning_optcore.search.space import Parameter


@dataclass(frozen=True)
class Template:
    """The overrides of a job, in the order of the command line: fixed ones, and parameters of the space.

    Args:
        keys: What stands left of the equals sign, e.g. ``+model.width``.
        fixed: The whole override by its key, where it is not swept.
        space: What is swept, by key without its ``+``.
    """

    keys: list[str]
    fixed: dict[str, str]
    space: dict[str, Parameter]

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a candidate; what is inactive in it is left out."""
        written = []
        for key in self.keys:
            if key in self.fixed:
                written.append(self.fixed[key])
            elif name_of(key) in params:
                written.append(override_text(key, params[name_of(key)]))
        return written


def name_of(key: str) -> str:
    """Return a parameter's name of an override's key.

    Example:
        >>> name_of("+model.width")
        'model.width'
    """
    return key.lstrip("+")


def read_template(params: Mapping[str, Any], arguments: Sequence[str], config_loader: Any = None) -> Template:
    """Read ``hydra.sweeper.params`` and the command line; the command line wins.

    Raises:
        SpaceError: If a sweep cannot be read.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    parsed: dict[str, Override] = {}
    for override in parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *arguments]):
        key = override.get_key_element()
        before = next((known for known in parsed if name_of(known) == name_of(key)), key)
        parsed = {key if known == before else known: one for known, one in parsed.items()} | {key: override}
    swept = {key: one for key, one in parsed.items() if one.is_sweep_override()}
    fixed = {key: one for key, one in parsed.items() if key not in swept}
    return Template(
        keys=list(parsed),
        fixed={
            key: f"{key}={one.get_value_element_as_str()}" if not one.is_delete() else key for key, one in fixed.items()
        },
        space={name_of(key): parameter_of(one, name_of(key)) for key, one in swept.items()},
    )
