"""Which errors a user can mend, and what to tell them."""

from __future__ import annotations

from hydra.errors import HydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lightning_optcore.compression.artifact import ArtifactError
from lightning_optcore.compression.export import ExportError
from lightning_optcore.data import DataError
from lightning_optcore.executor.executor import ExecutorError, JobError
from lightning_optcore.executor.nodes import NodesError
from lightning_optcore.executor.resources import ResourcesError
from lightning_optcore.executor.work import WorkError
from lightning_optcore.meta.tasks import MetaLearningError
from lightning_optcore.nas._nni_compat import NNIError
from lightning_optcore.nas.supernet import SupernetError
from lightning_optcore.recipe import RecipeError
from lightning_optcore.search.searcher import SearchError
from lightning_optcore.search.space import SpaceError
from lightning_optcore.store import StoreError
from lightning_optcore.sweeps.journal import SweepError


class ConfigurationError(ValueError):
    """A configuration that asks for what cannot be; the message names key, value and remedy."""


_MENDABLE = (
    ArtifactError,
    ConfigurationError,
    DataError,
    ExecutorError,
    ExportError,
    HydraException,
    JobError,
    MetaLearningError,
    MisconfigurationException,
    NNIError,
    NodesError,
    OmegaConfBaseException,
    RecipeError,
    ResourcesError,
    SearchError,
    SpaceError,
    StoreError,
    SupernetError,
    SweepError,
    WorkError,
)


def user_message(error: BaseException) -> str | None:
    """Return one line for an error that a user can mend; ``None`` for one that needs its traceback."""
    if isinstance(error, InstantiationException):
        return _instantiation_message(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return f"ckpt_path: does not fit the model: {' '.join(str(error).split())[:300]}"
    return _first_line(error) if isinstance(error, _MENDABLE) else None


def _instantiation_message(error: InstantiationException) -> str:
    """Return ``key: reason``; the key is left out where the reason names it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    known = isinstance(error.__cause__, (*_MENDABLE, ValueError, TypeError))
    reason = (
        _first_line(error.__cause__)
        if known and error.__cause__ is not None
        else " ".join(line for line in lines if not line.startswith("full_key: "))
    )
    group, _, name = key.rpartition(".")
    if name and reason.startswith(f"{name}."):
        return f"{group}.{reason}" if group else reason
    return f"{key}: {reason}" if key else reason


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
