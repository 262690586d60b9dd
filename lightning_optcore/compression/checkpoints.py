"""Checkpoints of a model whose shape changed: the recipe travels in them, and the model follows it.

Lightning restores the weights before any Callback can act, so the module's own checkpoint hooks are wrapped on the
instance: one writes the recipe, the other brings the live module to the recipe's shape before the weights come.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optcore.compression._compat import allow_instantiator
from lightning_optcore.compression.attention import HeadPrunedAttention, allow_all_heads
from lightning_optcore.compression.execution import run_plainly
from lightning_optcore.compression.fake_quantization import remove_fake_quantization
from lightning_optcore.compression.structure import Structure, resize
from lightning_optcore.recipe import Recipe, RecipeError, Step, rebuild

RECIPE_KEY = "lightning_optcore_recipe"
_LEDGER = "_optcore_ledger"
_HOOKS = ("on_save_checkpoint", "on_load_checkpoint")
INSTANTIATOR = f"{__name__}.instantiate"

allow_instantiator(INSTANTIATOR)

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Ledger:
    """What was done to a live module, by whom.

    Args:
        original: The structure that the module was made with.
        steps: Steps of the recipe, by the key of the technique that did them, in order.
        users: Techniques that are using it.
        replaced: Submodules, without their weights, in whose places techniques put others, by name.
    """

    original: Structure
    steps: dict[str, Step] = field(default_factory=dict)
    users: int = 0
    replaced: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe so far."""
        return Recipe(tuple(self.steps.values()))

    def record(self, key: str, step: Step) -> None:
        """Write what a technique did; a later step of the same technique takes the place of its earlier one.

        It goes to the end where another technique acted in between: its shapes are those after that.
        """
        later = list(self.steps)[list(self.steps).index(key) :] if key in self.steps else []
        if any(self.steps[other].name != step.name for other in later):
            del self.steps[key]
        self.steps[key] = step

    @contextmanager
    def replacing(self, module: nn.Module) -> Iterator[None]:
        """Remember which submodules are replaced inside the context."""
        before = dict(module.named_modules())
        yield
        after = dict(module.named_modules())
        for name, child in before.items():
            inside = any(name == known or name.startswith(f"{known}.") for known in self.replaced)
            if after.get(name) is not child and not inside:
                self.replaced[name] = copy.deepcopy(child).to("meta")

    def restore(self, module: nn.Module) -> None:
        """Put the replaced submodules back into the module, or a copy of it, with weights of no meaning."""
        for name, skeleton in self.replaced.items():
            present = module.get_submodule(name)
            device = next((tensor.device for tensor in present.parameters()), torch.device("cpu"))
            module.set_submodule(name, copy.deepcopy(skeleton).to_empty(device=device).train(present.training))


def recipe_of(module: nn.Module) -> Recipe:
    """Return what was done to a live module so far."""
    ledger = module.__dict__.get(_LEDGER)
    return ledger.recipe if ledger is not None else Recipe()


def open_ledger(pl_module: Any, trainer: Any) -> Ledger:
    """Begin to keep the recipe of a LightningModule in its checkpoints; every opening needs a closing."""
    ledger = pl_module.__dict__.get(_LEDGER)
    if ledger is None:
        ledger = Ledger(Structure.of(pl_module))
        pl_module.__dict__[_LEDGER] = ledger
    if ledger.users == 0:
        _wrap_hooks(pl_module, trainer, ledger)
    ledger.users += 1
    return ledger


def ledger_of(pl_module: Any) -> Ledger:
    """Return the ledger of a module, which was opened for it."""
    ledger: Ledger = pl_module.__dict__[_LEDGER]
    return ledger


def close_ledger(pl_module: Any) -> None:
    """Leave the hooks as they were once nobody needs them; the ledger stays with the module."""
    ledger = pl_module.__dict__.get(_LEDGER)
    if ledger is None or ledger.users == 0:
        return
    ledger.users -= 1
    if ledger.users == 0:
        for name in _HOOKS:
            pl_module.__dict__.pop(name, None)


def _wrap_hooks(pl_module: Any, trainer: Any, ledger: Ledger) -> None:
    save, load = (getattr(pl_module, name) for name in _HOOKS)

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        save(checkpoint)
        write_recipe(pl_module, checkpoint)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        recipe = _recipe_in(checkpoint)
        _follow(pl_module, ledger, recipe)
        for average in averaged_models(trainer):
            _bring_to(average, ledger, recipe)
        load(checkpoint)

    pl_module.on_save_checkpoint = on_save_checkpoint
    pl_module.on_load_checkpoint = on_load_checkpoint


def write_recipe(pl_module: Any, checkpoint: dict[str, Any]) -> None:
    """Put what was done to a module into a checkpoint of it."""
    recipe = recipe_of(pl_module)
    if recipe.steps:
        checkpoint[RECIPE_KEY] = recipe.to_dict()
        parameters = dict(checkpoint.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY) or {})
        checkpoint[pl_module.CHECKPOINT_HYPER_PARAMS_KEY] = {**parameters, "_instantiator": INSTANTIATOR}


def averaged_models(trainer: Any) -> list[nn.Module]:
    """Return the copies of the module that weight-averaging callbacks keep."""
    averages = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
    return [average.module for average in averages if average is not None]


def _follow(pl_module: Any, ledger: Ledger, recipe: Recipe) -> None:
    if recipe != ledger.recipe:
        _bring_to(pl_module, ledger, recipe)
    # The keys of techniques are their step's names, numbered where one is used twice.
    ledger.steps.clear()
    for step in recipe.steps:
        ledger.steps[free_key(ledger, step.name)] = step


def free_key(ledger: Ledger, name: str) -> str:
    """Return ``name``, or ``name`` with a number if it is taken."""
    number = sum(1 for step in ledger.steps.values() if step.name == name)
    return name if number == 0 else f"{name}.{number}"


def _bring_to(module: nn.Module, ledger: Ledger, recipe: Recipe) -> None:
    """Give a module the shape of a recipe, whatever its present one."""
    run_plainly(module)
    ledger.restore(module)
    for child in module.modules():
        if isinstance(child, HeadPrunedAttention):
            allow_all_heads(child)
    remove_fake_quantization(module)
    resize(module, ledger.original)
    with ledger.replacing(module):
        rebuild(module, recipe)


def copy_with_recipe(pl_module: Any) -> Any:
    """Return a copy of a LightningModule, without its Trainer and hooks of ours, in its present shape."""
    trainer = pl_module.__dict__.get("_trainer")
    copied = copy.deepcopy(pl_module, {id(trainer): None} if trainer is not None else {})
    for name in (*_HOOKS, "training_step", "manual_backward"):
        copied.__dict__.pop(name, None)
    return copied


def load_weights(pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Bring a live module to the shape of a checkpoint and load its weights; no hook of the user's runs.

    Raises:
        RecipeError: If the recipe cannot be read.
        RuntimeError: If the weights do not fit.
    """
    ledger = pl_module.__dict__.get(_LEDGER) or Ledger(Structure.of(pl_module))
    _bring_to(pl_module, ledger, _recipe_in(checkpoint))
    pl_module.load_state_dict(checkpoint["state_dict"])


def snapshot(pl_module: Any) -> dict[str, Any]:
    """Return the weights of a live module with its recipe, as :func:`load_weights` takes them."""
    weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
    return {"state_dict": weights, RECIPE_KEY: recipe_of(pl_module).to_dict()}


def _recipe_in(checkpoint: Mapping[str, Any]) -> Recipe:
    data = checkpoint.get(RECIPE_KEY)
    return Recipe.from_dict(data) if data is not None else Recipe()


def instantiate(cls: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Make a module that takes the shape of the checkpoint's recipe before its weights are loaded.

    Lightning calls it from ``load_from_checkpoint``; it is given the class by the caller, not by the file.
    """
    module = cls(**arguments)
    load = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        del module.__dict__["on_load_checkpoint"]
        ledger = Ledger(Structure.of(module))
        module.__dict__[_LEDGER] = ledger
        _follow(module, ledger, _recipe_in(checkpoint))
        load(checkpoint)

    module.on_load_checkpoint = on_load_checkpoint
    return module


def load_from_checkpoint(cls: type[Module], path: str | Path, *, strict: bool = True, **arguments: Any) -> Module:
    """Load a checkpoint of a compressed model: rebuild its shape from the recipe, then load the weights.

    Args:
        cls: A LightningModule, or any ``nn.Module`` class that the weights are of.
        path: A Lightning checkpoint; it is read with ``weights_only=True``.
        strict: Whether every weight must be there.
        arguments: Arguments of ``cls`` that the checkpoint does not have, or other values for those it has.

    Raises:
        MisconfigurationException: If the file is no checkpoint, or does not fit the class.

    Example:
        ``load_from_checkpoint(LitModel, "last.ckpt")``
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint["state_dict"]
    except Exception as error:
        raise MisconfigurationException(
            f"path={path}: no Lightning checkpoint that loads with weights_only=True ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        ) from error
    saved = dict(checkpoint.get("hyper_parameters") or {})
    saved.pop("_instantiator", None)
    nested = checkpoint.get("hparams_name")
    if nested and nested != "kwargs":
        saved = {nested: saved}
    try:
        module = cls(**{**_accepted_by(cls, saved), **arguments})
        ledger = Ledger(Structure.of(module))
        module.__dict__[_LEDGER] = ledger
        _follow(module, ledger, _recipe_in(checkpoint))
        if hasattr(module, "on_load_checkpoint"):
            cast(Any, module).on_load_checkpoint(checkpoint)
        module.load_state_dict(weights, strict=strict)
    except (RecipeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MisconfigurationException(f"path={path}: does not fit {cls.__name__}: {reason}") from error
    return module


def _accepted_by(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}
