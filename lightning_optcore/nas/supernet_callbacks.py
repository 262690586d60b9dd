"""What those who run the steps of a LightningModule with a supernet share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

from lightning_optcore.nas.supernet import Architecture, SupernetError, choose, find_supernet, kind_of


def supernet_in(pl_module: LightningModule, kinds: Sequence[str], other: str) -> nn.Module:
    """Return the supernet of a module, which is one of these kinds; ``other`` trains the rest."""
    try:
        name, network = find_supernet(pl_module)
    except SupernetError as error:
        raise MisconfigurationException(str(error)) from error
    if kind_of(network) not in kinds:
        raise MisconfigurationException(
            f"{name} is a supernet of kind={kind_of(network)}: expected {', '.join(kinds)}; {other} trains it"
        )
    return network


def choose_in(pl_module: LightningModule, kind: str, which: Callable[[nn.Module], Architecture]) -> None:
    """Choose what is forwarded; a module without such a supernet, e.g. with what was found, is as good."""
    for module in pl_module.modules():
        if getattr(module, "supernet_kind", None) == kind:
            choose(module, which(module))


@contextmanager
def unobserved(pl_module: LightningModule) -> Iterator[None]:
    """Let a step leave no trace in the log, nor in running metrics."""
    running = [(one, _running(one)) for one in pl_module.modules() if isinstance(one, Metric)]
    silenced = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        pl_module.__dict__[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name, theirs in silenced.items():
            del pl_module.__dict__[name]
            if theirs is not None:
                pl_module.__dict__[name] = theirs
        for one, state in running:
            one.__dict__.update(state)


def _running(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed")
    return {name: copy.deepcopy(getattr(metric, name)) for name in names}
