"""The weights that a trial of a search leaves in its folder, and which earlier trial's a new one begins with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lightning_optcore.files import replacing
from lightning_optcore.nas.inheritance import inherit
from lightning_optcore.nas.space import Architecture, ArchitectureError
from lightning_optcore.sweeps.journal import TrialRecord

log = logging.getLogger(__name__)

# What a trial leaves in its folder.
WEIGHTS_FILE = "weights.pt"


@dataclass(frozen=True)
class Inherited:
    """What a trial's network began with.

    Args:
        trial: Number of the parent.
        share: Which part of the network's numbers came from it, 0 to 1.
    """

    trial: int
    share: float


def parent_of(trial: TrialRecord, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the trial whose weights another one begins with: its candidate's own parent, or the nearest one.

    Only trials of earlier batches are asked, so that a search in several processes, or one that is continued, takes
    the same parents again.

    Args:
        trial: The one that begins.
        trials: Those of its search. A parent has a result of its own training.

    Returns:
        ``candidate.parent`` if it can be one, else the trial with most equal choices, of several the latest; ``None``
        if there is none yet.
    """
    finished = [
        one
        for one in trials
        if one.batch < trial.batch and one.status == "done" and one.cached_from is None and one.directory is not None
    ]
    own = [one for one in finished if one.number == trial.candidate.parent]
    wanted = trial.candidate.params

    def nearness(other: TrialRecord) -> tuple[int, int]:
        return equal_choices(wanted, other.candidate.params), other.number

    return own[0] if own else max(finished, key=nearness, default=None)


def equal_choices(one: Architecture, other: Architecture) -> int:
    """Return how many labels have the same value in both architectures.

    Example:
        >>> equal_choices({"depth": 2, "width_1": 8, "width_2": 16}, {"depth": 1, "width_1": 8})
        1
    """
    return sum(label in other and other[label] == value for label, value in one.items())


def with_weights_of(
    parent: TrialRecord, network: nn.Module, build: Callable[[Architecture], nn.Module]
) -> tuple[nn.Module, Inherited | None]:
    """Return a network that begins with a parent's weights; where these cannot be read, the network as it is.

    Args:
        parent: The trial that left them.
        network: Of the new architecture, initialised.
        build: Returns the network of an architecture.
    """
    path = Path(str(parent.directory)) / WEIGHTS_FILE
    try:
        # Weights that are overwritten are drawn here, which the training must not notice.
        with torch.random.fork_rng(devices=[]):
            before = build(parent.candidate.params)
        before.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        log.warning(
            "no weights of trial %d, the network begins anew: %s: %s: %s",
            parent.number, path, type(error).__name__, reason,
        )  # fmt: skip
        return network, None
    child = inherit(network, before)
    return child.network, Inherited(parent.number, child.share)


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Give a network of the same architecture the weights that a trial left, and return it.

    The file is read with ``weights_only=True``.

    Raises:
        ArchitectureError: If it holds none, or those of another architecture.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArchitectureError(
            f"weights={path}: {error.strerror}; name the {WEIGHTS_FILE} of a trial, which a search with inherit=true "
            "leaves in its folder"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArchitectureError(f"weights={path}: does not load with weights_only=True ({reason})") from error
    shapes = {name: getattr(one, "shape", None) for name, one in weights.items()} if isinstance(weights, dict) else {}
    changed = sorted({str(name) for name, _ in shapes.items() ^ shapes_of(network).items()})
    if changed:
        raise ArchitectureError(
            f"weights={path}: not those of this architecture, they differ in {', '.join(changed[:5])}; name the "
            f"{WEIGHTS_FILE} in the folder of the same trial"
        )
    network.load_state_dict(weights)
    return network


def keep_weights(network: nn.Module, built: dict[str, torch.Size], directory: Path) -> bool:
    """Write the weights of a trained network into its trial's folder, whole or not at all.

    Args:
        network: The trained one.
        built: :func:`shapes_of` the network as it was built.
        directory: The folder.

    Returns:
        Whether it was done: tensors of other names or shapes fit no network that is built of an architecture.

    Raises:
        OSError: If the file cannot be written.
    """
    changed = sorted({name for name, _ in shapes_of(network).items() ^ built.items()})
    if changed:
        log.warning("no weights are kept: the fit left other tensors than were built: %s", ", ".join(changed[:5]))
        return False
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS_FILE) as temporary:
        torch.save({name: tensor.detach().cpu() for name, tensor in _tensors(network).items()}, temporary)
    return True


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a network's state by name."""
    return {name: tensor.shape for name, tensor in _tensors(network).items()}


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
