"""`Recipe`: what was done to a model, in order, as plain data; and how to do it to a fresh module."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_optcore.option_values import is_whole

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 1

# Where the built-in steps register themselves; imported when a recipe names one of them.
_BUILT_IN = {
    "fast_adaptation": "lightning_optcore.meta.fast_adaptation",
    "layerwise_allocation": "lightning_optcore.compression.allocation",
    "kernel_fusion": "lightning_optcore.compression.kernel_fusion",
    "mixed_precision": "lightning_optcore.compression.mixed_precision",
    "low_rank_factorization": "lightning_optcore.compression.low_rank",
    "post_training_quantization": "lightning_optcore.compression.quantization",
    "magnitude_pruning": "lightning_optcore.compression.magnitude_pruning",
    "quantization_aware_training": "lightning_optcore.compression.quantization_aware_training",
    "structured_pruning": "lightning_optcore.compression.structured_pruning",
}


class RecipeError(ValueError):
    """A recipe that cannot be read or rebuilt."""


@dataclass(frozen=True)
class Step:
    """One thing that was done.

    Args:
        name: Name under which the step is registered.
        parameters: Its parameters, JSON types only.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The ordered list of what was done to a model.

    Args:
        steps: The steps, first one first.

    Example:
        >>> recipe = Recipe().then("post_training_quantization", scheme="static", weight_bits=8)
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    steps: tuple[Step, ...] = ()

    def then(self, name: str, **parameters: Any) -> Recipe:
        """Return a recipe with one more step."""
        return Recipe((*self.steps, Step(name, parameters)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (JSON types only)."""
        steps = [{"step": step.name, "parameters": step.parameters} for step in self.steps]
        return {"schema_version": SCHEMA_VERSION, "steps": steps}

    def to_json(self, indent: int | None = None) -> str:
        """Return the recipe as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Read and check what :meth:`to_dict` wrote.

        Raises:
            RecipeError: If the data is no recipe, was written by a newer version, names an unknown
                step, or a parameter is unknown or has a wrong type.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("steps"), list):
            raise RecipeError("not a recipe: expected an object with schema_version and a list of steps")
        version = data.get("schema_version")
        if not is_whole(version, least=1):
            raise RecipeError(f"schema_version={version!r} of the recipe: expected a positive integer")
        if version > SCHEMA_VERSION:
            raise RecipeError(
                f"schema_version={version} of the recipe: this version of lightning_optcore reads up to "
                f"{SCHEMA_VERSION}; upgrade lightning-optcore"
            )
        return cls(tuple(_read_step(number, step) for number, step in enumerate(data["steps"])))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what :meth:`to_json` wrote; raises :class:`RecipeError` as :meth:`from_dict` does."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"not a recipe: {error}") from error
        return cls.from_dict(data)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


Rebuild = Callable[["nn.Module", Any], "nn.Module"]


@dataclass(frozen=True)
class _StepType:
    parameters: type
    rebuild: Rebuild


_REGISTRY: dict[str, _StepType] = {}


def register_step(name: str, parameters: type) -> Callable[[Rebuild], Rebuild]:
    """Register the function that repeats a step's change of shape on a fresh module.

    Args:
        name: The step's name in recipes.
        parameters: A dataclass: the parameters with their types.

    Returns:
        A decorator for ``rebuild(module, parameters) -> module``.

    Raises:
        ValueError: If another function is registered under the name.
    """

    def decorate(rebuild: Rebuild) -> Rebuild:
        known = _REGISTRY.get(name)
        if known is not None and known.rebuild.__qualname__ != rebuild.__qualname__:
            raise ValueError(f"step {name!r} is registered already, by {known.rebuild.__qualname__}")
        _REGISTRY[name] = _StepType(parameters, rebuild)
        return rebuild

    return decorate


def rebuild(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Bring a fresh module to the shape that a recipe left, ready for ``load_state_dict``.

    Args:
        model: A module as its class makes it.
        recipe: What was done to its like.

    Returns:
        The module (changed in place, or a replacement).

    Raises:
        RecipeError: If a step is unknown or its parameters are wrong.

    Example:
        >>> import torch
        >>> recipe = Recipe().then("post_training_quantization", scheme="static", weight_bits=8)
        >>> rebuild(torch.nn.Linear(4, 2), recipe)
        Linear(in_features=4, out_features=2, bias=True)
    """
    for number, step in enumerate(recipe.steps):
        step_type = _step_type(number, step.name)
        model = step_type.rebuild(model, _checked(number, step, step_type))
    return model


def _read_step(number: int, data: Any) -> Step:
    if not isinstance(data, Mapping) or set(data) != {"step", "parameters"}:
        raise RecipeError(f"steps[{number}]={data!r}: expected an object with 'step' and 'parameters'")
    if not isinstance(data["step"], str) or not isinstance(data["parameters"], Mapping):
        raise RecipeError(f"steps[{number}]: expected a name in 'step' and an object in 'parameters'")
    step = Step(data["step"], dict(data["parameters"]))
    _checked(number, step, _step_type(number, step.name))
    return step


def _step_type(number: int, name: str) -> _StepType:
    if name not in _REGISTRY and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _REGISTRY:
        known = ", ".join(sorted({*_BUILT_IN, *_REGISTRY}))
        raise RecipeError(f"steps[{number}].step={name!r} is unknown: expected one of {known}")
    return _REGISTRY[name]


def _checked(number: int, step: Step, step_type: _StepType) -> Any:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(step_type.parameters), step.parameters)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"steps[{number}] ({step.name}).{error.key or 'parameters'}: {reason}") from error
