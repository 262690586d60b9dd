"""An architecture as a file, and the LightningModule that trains it again.

The file is JSON and holds choices only. What is built of them, and by which code, comes from the configuration: no
class that a file names is ever made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_optcore.files import write_atomically
from lightning_optcore.nas.space import Architecture, ArchitectureError, ArchitectureSpace, architecture_space
from lightning_optcore.nas.space import factory_space as _factory_space

FILE_VERSION = 1


def save_architecture(path: str | Path, architecture: Mapping[str, Any], **known: Any) -> Path:
    """Write an architecture into a JSON file.

    Args:
        path: The file.
        architecture: The chosen value of every label.
        known: What else is to be read there, e.g. its objectives.

    Example:
        >>> import tempfile
        >>> path = save_architecture(tempfile.mkdtemp() + "/one.json", {"width": 16}, objectives={"val/acc": 0.9})
        >>> load_architecture(path)
        {'width': 16}
    """
    content = {"version": FILE_VERSION, "architecture": dict(architecture), **known}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), json.dumps(content, indent=2) + "\n")
    return Path(path)


def load_architecture(path: str | Path) -> Architecture:
    """Return the architecture in a file of :func:`save_architecture`.

    Raises:
        ArchitectureError: If it holds none.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ArchitectureError(f"{path}: {error.strerror}; name a file that a search wrote") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArchitectureError(f"{path}: no JSON ({error}); name a file that a search wrote") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), dict):
        raise ArchitectureError(f'{path}: expected {{"version": 1, "architecture": {{label: value}}}}')
    if content.get("version") != FILE_VERSION:
        raise ArchitectureError(f"{path}: version {content.get('version')!r}: expected {FILE_VERSION}")
    return dict(content["architecture"])


def configured_space(node: Any) -> ArchitectureSpace:
    """Return the space of a configuration: ``_target_`` makes a space, or with ``choices`` a network.

    Args:
        node: With ``choices``, ``_target_`` is a plain factory, whose arguments of these names are searched; beside
            them there may be ``constraints`` and ``conditions`` as :func:`~lightning_optcore.nas.factory_space` has
            them, and fixed arguments.

    Raises:
        ArchitectureError: If there is no ``_target_``, or it makes no space.

    Example:
        >>> space = configured_space({"_target_": "torch.nn.Linear", "in_features": 4,
        ...                           "choices": {"out_features": "choice(2,3)"}})
        >>> space.build({"out_features": 3})
        Linear(in_features=4, out_features=3, bias=True)
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(plain, Mapping) or "_target_" not in plain:
        raise ArchitectureError(f"nas.space={plain!r}: has no _target_, the ModelSpace or the factory of networks")
    arguments = dict(plain)
    choices = arguments.pop("choices", None)
    if choices is None:
        return architecture_space(instantiate(arguments, _convert_="all"))
    constraints, conditions = arguments.pop("constraints", ()), arguments.pop("conditions", None)
    factory = instantiate(arguments, _partial_=True, _convert_="all")
    return _factory_space(factory, choices, constraints=constraints, conditions=conditions)


def retrain(path: str | None = None, space: Any = None, module: Any = None, weights: str | None = None) -> Any:
    """Return the LightningModule of an architecture: ``model=architecture``.

    Args:
        path: File of the architecture.
        space: Configuration of the space that it is of.
        module: Configuration of the LightningModule that takes the network.
        weights: What it begins with; ``None``: fresh weights. The ``weights.pt`` that its trial left, in a search whose
            networks inherit. Or, with any other ending, the file of a search's supernet: its share of that. Statistics
            of batch norm are then the supernet's, of all its sub-networks together, until some batches were trained.

    Raises:
        ArchitectureError: If the file is none, its architecture is not of this space, or the weights are of another
            one.
        SupernetError: If the weights are none, or of another space or module.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    if path is None:
        raise ArchitectureError("path=null: name a file that a search wrote, e.g. model.path=front/trial-7.json")
    architecture = load_architecture(path)
    # A space may have weights of its own; with the same seed the network begins as it did in the search.
    with isolate_rng():
        where = configured_space(space)
    build = instantiate(module, _partial_=True)
    try:
        where.validate(architecture)
    except ArchitectureError as error:
        raise ArchitectureError(
            f"path={path}: {error}; name the space that was searched: nas/space@model.space=..."
        ) from error
    if weights is None:
        return build(where.build(architecture))
    if Path(weights).suffix == ".pt":
        from lightning_optcore.nas.parents import load_weights

        return build(load_weights(where.build(architecture), weights))
    from lightning_optcore.nas.supernet_file import inheriting_modules, load_supernet

    return inheriting_modules(load_supernet(weights), where, build)(architecture)
