"""What can be seen to be wrong before anything is loaded."""

from __future__ import annotations

import inspect
import pydoc
import types
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, Union

from omegaconf import DictConfig, OmegaConf

from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.measurement.yardstick import check_arguments
from lightning_optcore.option_values import is_whole

_NUMBERS = {int, float, bool, type(None)}
# Lightning finds these checkpoints itself.
_NAMED_CHECKPOINTS = ("last", "best", "hpc", "registry")


def check(config: DictConfig) -> None:
    """Check what every job shares: the seed, the checkpoint, and text where a class asks for a number.

    Raises:
        ConfigurationError: With the key, the value, and what would be right.
    """
    seed, checkpoint = config.get("seed"), config.get("ckpt_path")
    if seed is not None and not is_whole(seed, least=0):
        raise ConfigurationError(f"seed={seed!r}: expected a whole number of at least 0, or null")
    if checkpoint is not None and not _is_known(str(checkpoint)):
        raise ConfigurationError(f"ckpt_path={checkpoint}: no such file")
    if checkpoint is not None and Path(checkpoint).is_file() and not zipfile.is_zipfile(checkpoint):
        raise ConfigurationError(f"ckpt_path={checkpoint}: no checkpoint (torch.save writes another format)")
    if config.get("measure") is not None:
        try:
            check_arguments(**config.measure)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"measure.{error}") from error
    for group in ("model", "data"):
        if isinstance(config.get(group), DictConfig) and "_target_" not in config[group]:
            raise ConfigurationError(f"{group}: has no _target_, the class to make: {group}._target_=package.Class")
    for key, node in _nodes_with_target(config, ""):
        _check_numbers(key, node)


Kind = TypeVar("Kind")


def instance_of(kind: type[Kind], key: str, value: Any) -> Kind:
    """Return ``value`` if it is of the kind that a configuration key must give.

    Raises:
        ConfigurationError: If it is something else.
    """
    if not isinstance(value, kind):
        raise ConfigurationError(f"{key}._target_: made a {type(value).__name__}; expected a {kind.__name__}")
    return value


def _is_known(checkpoint: str) -> bool:
    named = checkpoint.partition(":")[0] in _NAMED_CHECKPOINTS
    return named or "://" in checkpoint or Path(checkpoint).exists()


def _nodes_with_target(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if not isinstance(node, DictConfig) or OmegaConf.is_missing(node, key) or node._is_none():
        return
    if "_target_" in node:
        yield key, node
    for name, child in node.items_ex(resolve=False):
        if isinstance(child, DictConfig):
            yield from _nodes_with_target(child, f"{key}.{name!s}" if key else str(name))


def _check_numbers(key: str, node: DictConfig) -> None:
    for name, annotation in _annotations(_located(key, node._target_)).items():
        value = node.get(name)
        allowed = _types(annotation)
        fraction = isinstance(value, float) and not value.is_integer() and float not in allowed
        if allowed <= _NUMBERS and allowed != {type(None)} and (isinstance(value, str) or fraction):
            expected = " or ".join(sorted({"null" if kind is type(None) else kind.__name__ for kind in allowed}))
            raise ConfigurationError(f"{key}.{name}={value}: expected {expected}")


def _located(key: str, target: str) -> Any:
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise ConfigurationError(f"{key}._target_={target}: {error}") from error
    if found is None:
        raise ConfigurationError(
            f"{key}._target_={target}: no such class; give package.module.Class, importable from here"
        )
    return found


def _annotations(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        # Annotations that cannot be evaluated here: the class itself will tell.
        return {}


def _types(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return {kind for argument in typing.get_args(annotation) for kind in _types(argument)}
    return {annotation}
