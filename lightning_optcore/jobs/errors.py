"""Which errors a user can mend, and what to tell them."""

from __future__ import annotations

from hydra.errors import HydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lightning_optcore.compression.artifact import ArtifactError
from lightning_optcore.compression.export import ExportError
from lightning_optcore.data import DataError
from lightning_optcore.recipe import RecipeError
from lightning_optcore.store import StoreError


class ConfigurationError(ValueError):
    """A configuration that asks for what cannot be; the message names key, value and remedy."""


_MENDABLE = (
    ArtifactError,
    ConfigurationError,
    DataError,
    ExportError,
    HydraException,
    MisconfigurationException,
    OmegaConfBaseException,
    RecipeError,
    StoreError,
)


def user_message(error: BaseException) -> str | None:
    """Return one line for an error that a user can mend; ``None`` for one that needs its traceback."""
    if isinstance(error, InstantiationException):
        # Hydra's own message names the class and key; the cause says what was wrong with it.
        cause = f": {_first_line(error.__cause__)}" if error.__cause__ is not None else ""
        where = " ".join(line.strip() for line in str(error).splitlines() if "full_key" in line)
        return f"{where or _first_line(error)}{cause}" if cause or where else _first_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return _first_line(error) if isinstance(error, _MENDABLE) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
