"""What did best in earlier sweeps on the most similar model and data, to be tried first in a new one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_optcore.fingerprints import IGNORED_GROUPS, IGNORED_KEYS
from lightning_optcore.option_values import is_number
from lightning_optcore.search.pareto import crowding_distances, ranks
from lightning_optcore.search.space import Params, Space, SpaceError, key_of
from lightning_optcore.sweeps.journal import Journal, SweepRecord, TrialRecord

log = logging.getLogger(__name__)

# So many of the newest sweeps are looked at: composing a configuration takes some hundredths of a second.
_NEWEST = 100
# What a configuration is compared by, and how much that counts; the rest of it together counts as "".
_WEIGHTS = {"model": 0.4, "data": 0.4, "": 0.2}
# These two say what is asked of a run, or which run it is; they do not change what is good.
_NOT_COMPARED = IGNORED_GROUPS | {"objective", "seed"}

# Returns the configuration of a job from its overrides, or None where it cannot be composed any more.
Compose = Callable[[Sequence[str]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class WarmPoint:
    """A point to try first, and the trial that it comes from.

    Args:
        params: The values.
        sweep_id: Number of the sweep.
        number: Number of the trial in it.
        similarity: Of that sweep's configuration to the new one's, 0 to 1.
    """

    params: Params
    sweep_id: int
    number: int
    similarity: float


def similarity(one: Mapping[str, Any], other: Mapping[str, Any], swept: Sequence[str] = ()) -> float:
    """Return how alike two configurations are, 0 to 1: the model counts 40%, the data 40%, all else 20%.

    Parts that neither has do not count. Of each part this is the mean over the values of both: 1 where they are equal,
    the smaller over the larger of two positive numbers, else 0. A model of another class has another ``_target_`` and
    other options, and one of another size other numbers.

    Args:
        one: A configuration as plain data.
        other: Another one.
        swept: Keys that do not count, nor does what is below them.

    Example:
        >>> similarity({"model": {"name": "mlp", "width": 16}}, {"model": {"name": "mlp", "width": 32}})
        0.75
    """
    leaves = [
        {key: value for key, value in _leaves(config) if not any(_below(key, name) for name in swept)}
        for config in (one, other)
    ]
    by_part: dict[str, list[float]] = {}
    for key in leaves[0].keys() | leaves[1].keys():
        top = key.partition(".")[0]
        alike = _alike(leaves[0][key], leaves[1][key]) if key in leaves[0] and key in leaves[1] else 0.0
        by_part.setdefault(top if top in _WEIGHTS else "", []).append(alike)
    if not by_part:
        return 1.0
    # Sums of floats in an order that does not depend on that of the keys.
    total = sum(_WEIGHTS[part] * math.fsum(values) / len(values) for part, values in sorted(by_part.items()))
    return round(total / sum(_WEIGHTS[part] for part in sorted(by_part)), 6)


def warm_points(
    journal: Journal,
    command: str,
    space: Space,
    directions: Sequence[str],
    compose: Compose,
    fixed: Sequence[str],
    count: int,
) -> list[WarmPoint]:
    """Return the best configurations of the most similar earlier sweeps that are points of a space.

    Taken are finished sweeps of the same application whose jobs return the same objectives and which searched all keys
    of the space. Sweeps that are equally similar are ranked together, by Pareto rank and then by how alone a trial is
    on its front; at most the better half of their trials is taken before the next similar ones have their turn.

    Args:
        journal: Where the sweeps are.
        command: What identifies the new sweep's command, as in :class:`SweepRecord`.
        space: What it searches.
        directions: Of its objectives.
        compose: Returns the configuration of a job from its overrides.
        fixed: Overrides of every job of it.
        count: How many at most.
    """
    own = compose(fixed)
    if own is None:
        return []
    groups: dict[float, list[TrialRecord]] = {}
    for sweep in journal.sweeps(limit=_NEWEST):
        if sweep.status != "done" or not _same_question(sweep, command, space, directions):
            continue
        trials = [one for one in journal.trials(sweep.id) if one.status == "done" and one.feasible]
        theirs = compose(trials[0].overrides) if trials else None
        if theirs is None or theirs.get("objective") != own.get("objective"):
            continue
        alike = similarity(own, theirs, list(space.parameters))
        groups.setdefault(alike, []).extend(trials)
    found: dict[str, WarmPoint] = {}
    for alike in sorted(groups, reverse=True):
        if alike > 0:
            for trial in _best_half(groups[alike], directions):
                point = _point(trial.candidate.params, space)
                if point is not None and len(found) < count:
                    found.setdefault(key_of(point), WarmPoint(point, trial.sweep_id, trial.number, alike))
    return list(found.values())


def log_warm_points(points: Sequence[WarmPoint], count: int) -> None:
    """Say where the first points come from."""
    if not points:
        log.info("hydra.sweeper.warm_start=%d: no finished sweep of the store has points for this one", count)
    for point in points:
        log.info(
            "warm start from trial %d of sweep %d (similarity %.2f): %s",
            point.number,
            point.sweep_id,
            point.similarity,
            " ".join(f"{name}={value}" for name, value in point.params.items()),
        )


def _same_question(sweep: SweepRecord, command: str, space: Space, directions: Sequence[str]) -> bool:
    """Whether a sweep is of the same application, has these directions, and searched all the keys."""
    return (
        json.loads(sweep.command)[:2] == json.loads(command)[:2]
        and list(sweep.directions) == list(directions)
        and space.parameters.keys() <= sweep.space["parameters"].keys()
    )


def _best_half(trials: Sequence[TrialRecord], directions: Sequence[str]) -> list[TrialRecord]:
    trials = sorted(trials, key=lambda one: (one.sweep_id, one.number))
    signs = np.array([1.0 if direction == "minimize" else -1.0 for direction in directions])
    costs = signs * np.array([trial.objectives for trial in trials])
    rank = ranks(costs)
    alone = np.zeros(len(trials))
    for one in np.unique(rank):
        alone[rank == one] = crowding_distances(costs[rank == one])
    order = sorted(range(len(trials)), key=lambda i: (rank[i], -alone[i], trials[i].sweep_id, trials[i].number))
    return [trials[i] for i in order[: math.ceil(len(trials) / 2)]]


def _point(params: Mapping[str, Any], space: Space) -> Params | None:
    """Return the part of an earlier point that the space has, if that is a point of it."""
    point = {name: value for name, value in params.items() if name in space.parameters}
    try:
        space.encode(point)
    except (SpaceError, TypeError):
        return None
    return point if space.is_feasible(point) else None


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in IGNORED_KEYS and (key or name not in _NOT_COMPARED):
                yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _alike(one: Any, other: Any) -> float:
    if one == other:
        return 1.0
    numbers = is_number(one) and is_number(other)
    return min(one, other) / max(one, other) if numbers and min(one, other) > 0 else 0.0
