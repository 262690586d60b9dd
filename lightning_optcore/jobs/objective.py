"""What a run returns to a Hydra sweeper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.measurement.directions import Direction, direction_of


def parse_objective(value: Any) -> dict[str, Direction]:
    """Read ``objective``: a mapping of names to directions, a list of names, or one name.

    Raises:
        ConfigurationError: If a direction is neither minimize nor maximize.

    Example:
        >>> parse_objective(["val/acc", "latency_ms"])
        {'val/acc': 'maximize', 'latency_ms': 'minimize'}
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if value is None:
        return {}
    if isinstance(value, str):
        return {value: direction_of(value)}
    if isinstance(value, Mapping):
        for name, direction in value.items():
            if direction not in ("minimize", "maximize"):
                raise ConfigurationError(f"objective.{name}={direction!r}: expected minimize or maximize")
        return dict(value)
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        return {name: direction_of(name) for name in value}
    raise ConfigurationError(
        f"objective={value!r}: expected {{val/acc: maximize, latency_ms: minimize}} or [val/acc, latency_ms]"
    )


def objective_values(
    objective: Mapping[str, Direction], known: Mapping[str, float]
) -> float | tuple[float, ...] | None:
    """Return what ``objective`` names: one number, a tuple in its order, or ``None`` if it is empty.

    Raises:
        ConfigurationError: If a name was never measured or logged.
    """
    for name in objective:
        if name not in known:
            raise ConfigurationError(
                f"objective={name!r} was never logged or measured: expected one of {', '.join(sorted(known))}"
            )
    values = tuple(known[name] for name in objective)
    return values[0] if len(values) == 1 else values or None
