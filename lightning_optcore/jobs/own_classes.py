"""``model._target_=my_package.Net`` on the command line: the user's own class, with its own defaults."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

_GROUPS = ("model", "data", "nas.space", "nas.module", "model.space", "model.module")


def with_own_defaults(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration without what belongs to a class that the command line replaced.

    An option such as ``model=cnn`` brings a class and its arguments. Where an override names another
    class, only the arguments that are overridden as well are meant for it.

    Args:
        config: The composed configuration.
        overrides: The command line's overrides, as Hydra lists them.

    Example:
        >>> config = OmegaConf.create({"model": {"_target_": "mine.Net", "width": 8, "depth": 2}})
        >>> with_own_defaults(config, ["model._target_=mine.Net", "model.width=8"]).model
        {'_target_': 'mine.Net', 'width': 8}
    """
    named = {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}
    result = config.copy()
    for group in _GROUPS:
        if f"{group}._target_" not in named:
            continue
        own = {key.removeprefix(f"{group}.").split(".")[0] for key in named if key.startswith(f"{group}.")}
        node = OmegaConf.select(config, group)
        # Whether it is a partial belongs to the place, not to the class.
        kept = {key: value for key, value in node.items_ex(resolve=False) if key in own or key == "_partial_"}
        OmegaConf.update(result, group, kept, merge=False)
    return result
