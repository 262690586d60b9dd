"""A trained supernet as a file, and LightningModules that begin with their share of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_optcore.files import replacing
from lightning_optcore.fingerprints import fingerprint
from lightning_optcore.nas.space import Architecture, ArchitectureSpace
from lightning_optcore.nas.supernet import Kind, SupernetError, find_supernet, sub_network, supernet

# In the folder of a search.
SUPERNET_FILE = "supernet.ckpt"
FILE_VERSION = 1


@dataclass(frozen=True)
class TrainedSupernet:
    """A supernet whose training has ended.

    Args:
        kind: Of the supernet.
        trained_as: What it is the training of, as plain data.
        state_dict: Of the LightningModule that holds it.
        seconds: How long the training took.
        architecture: What was learned, of a differentiable one.
    """

    kind: Kind
    trained_as: dict[str, Any]
    state_dict: dict[str, Tensor]
    seconds: float
    architecture: Architecture | None = None


def save_supernet(path: str | Path, trained: TrainedSupernet) -> Path:
    """Write a trained supernet into a file, whole or not at all."""
    known = {name: getattr(trained, name) for name in TrainedSupernet.__dataclass_fields__}
    content = {"version": FILE_VERSION, "fingerprint": fingerprint(trained.trained_as), **known}
    with replacing(Path(path)) as file:
        torch.save(content, file)
    return Path(path)


def load_supernet(path: str | Path) -> TrainedSupernet:
    """Return the supernet in a file of :func:`save_supernet`; it is read with ``weights_only=True``.

    Raises:
        SupernetError: If it holds none.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SupernetError(f"{path}: {error.strerror}; name the supernet.ckpt of a search") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SupernetError(f"{path}: does not load with weights_only=True ({reason})") from error
    names = ("version", "fingerprint", *TrainedSupernet.__dataclass_fields__)
    if not isinstance(content, dict) or content.keys() != set(names):
        raise SupernetError(f"{path}: no supernet; name the supernet.ckpt of a search")
    if content["version"] != FILE_VERSION:
        raise SupernetError(f"{path}: version {content['version']!r}: expected {FILE_VERSION}")
    if content["fingerprint"] != fingerprint(content["trained_as"]):
        raise SupernetError(f"{path}: its fingerprint is not that of what it says it was trained as")
    return TrainedSupernet(**{name: content[name] for name in TrainedSupernet.__dataclass_fields__})


def differences(trained_as: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return in what two trainings differ.

    Example:
        >>> differences({"seed": 0, "max_epochs": 5}, {"seed": 1, "max_epochs": 5})
        ['seed: was 0, is 1']
    """
    names = [*expected, *(name for name in trained_as if name not in expected)]
    return [
        f"{name}: was {trained_as.get(name)}, is {expected.get(name)}"
        for name in names
        if trained_as.get(name) != expected.get(name)
    ]


def inheriting_modules(
    trained: TrainedSupernet, space: ArchitectureSpace, module: Callable[[nn.Module], LightningModule]
) -> Callable[[Architecture], LightningModule]:
    """Return what makes the LightningModule of an architecture with its share of a trained supernet's weights.

    What the module holds beside the network has the weights that it was trained with.

    Args:
        trained: The supernet.
        space: The space that it is of.
        module: Returns a LightningModule from a network.

    Raises:
        SupernetError: If the weights are not those of this space and module.
    """
    network = supernet(space.new_model_space(), trained.kind)
    whole = module(space.complete(network))
    try:
        whole.load_state_dict(trained.state_dict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise SupernetError(f"the weights of the supernet are of another space or module: {reason}") from error
    find_supernet(whole)
    # It may be there under several names.
    names = [name for name, one in whole.named_modules(remove_duplicate=False) if one is network]
    prefixes = tuple(f"{name}." for name in names)
    beside = {name: weights for name, weights in whole.state_dict().items() if not name.startswith(prefixes)}

    def inherited(architecture: Architecture) -> LightningModule:
        space.validate(architecture)
        alone = module(space.complete(sub_network(network, architecture)))
        try:
            missing = alone.load_state_dict(beside, strict=False).missing_keys
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            name = type(alone).__name__
            raise SupernetError(f"what {name} has beside its network cannot be inherited: {reason}") from error
        new = [name for name in missing if not name.startswith(prefixes)]
        if new:
            raise SupernetError(f"{type(alone).__name__}.{new[0]}: not in the module that held the supernet")
        return alone

    return inherited
