"""How much each parameter decides an objective, from the trials of a search.

Permutation importance (Breiman, "Random Forests", Machine Learning 45, 2001; Fisher, Rudin and Dominici, "All Models
are Wrong, but Many are Useful", JMLR 20, 2019): a forest of extremely randomized trees (Geurts, Ernst and Wehenkel,
Machine Learning 63, 2006) predicts the objective of trials that it has not seen; then one parameter's values are
shuffled among them, and its importance is by how much the error grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from lightning_optcore.search.searcher import SearchError
from lightning_optcore.search.space import Choice, Interval, Parameter

# With fewer trials even a forest that has learned much cannot be told from one that has learned nothing.
FEWEST_TRIALS = 20
_MOST_TRIALS = 2_000
_FOLDS = 5
_SHUFFLES = 5
_TREES = 100


@dataclass(frozen=True)
class Importance:
    """What :func:`parameter_importance` found.

    Args:
        values: By parameter, by how much the squared error grows without it, as a share of the objective's variance.
            About 0 means that it decides nothing; below 0 is noise.
        errors: The standard error of each value, over the trials.
        explained: Share of the variance that the forest explains in trials that it has not seen (R²). Near or below
            0 the values say nothing.
        trials: How many trials were looked at.
    """

    values: dict[str, float]
    errors: dict[str, float]
    explained: float
    trials: int


def parameter_importance(
    parameters: Mapping[str, Parameter],
    points: Sequence[Mapping[str, Any]],
    objective: Sequence[float],
    *,
    seed: int = 0,
) -> Importance:
    """Return how much each parameter decides one objective, and how sure that is.

    The objective is taken by its rank, so that a few extreme trials, or a logarithm, do not change the answer.
    Parameters that were tried together in only some combinations share what they decide. A parameter that is there
    under a condition counts with whether it is there.

    Args:
        parameters: The parameters of the space, by name.
        points: The values that were tried; an inactive parameter is left out.
        objective: Of each point; finite.
        seed: Of the forest and of the shuffling.

    Raises:
        SearchError: If there are fewer than 20 trials, or all are worth the same. Of more than 2,000 trials, as many
            are looked at, evenly spread.

    Example:
        >>> from lightning_optcore.search import Space
        >>> space = Space({"width": "choice(16,32,64)", "lr": "tag(log, interval(1e-4, 1e-1))"})
        >>> rng = np.random.default_rng(0)
        >>> points = [space.sample(rng) for _ in range(60)]
        >>> found = parameter_importance(space.parameters, points, [point["width"] for point in points])
        >>> found.values["width"] > 0.5, abs(found.values["lr"]) < 0.1, found.explained > 0.9
        (True, True, True)
    """
    if len(points) < FEWEST_TRIALS:
        raise SearchError(f"importance needs at least {FEWEST_TRIALS} finished trials, there are {len(points)}")
    if len(set(objective)) < 2:
        raise SearchError("importance needs trials that differ, all have the same value")
    from sklearn.ensemble import ExtraTreesRegressor

    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MOST_TRIALS)).astype(int))
    ranks = rankdata(np.asarray(objective, dtype=float)[chosen])
    target = (ranks - ranks.mean()) / max(float(ranks.std()), 1e-12)
    kept = [points[i] for i in chosen]
    blocks = {name: _columns(kind, name, kept) for name, kind in parameters.items()}
    features = np.concatenate(list(blocks.values()), axis=1)
    owners = np.repeat(np.arange(len(blocks)), [block.shape[1] for block in blocks.values()])

    rng = np.random.default_rng(seed)
    folds = np.array_split(rng.permutation(len(target)), _FOLDS)
    losses = np.zeros(len(target))
    growths = np.zeros((len(blocks), len(target)))
    for held_out in folds:
        known = np.setdiff1d(np.arange(len(target)), held_out)
        forest = ExtraTreesRegressor(_TREES, min_samples_leaf=2, random_state=seed).fit(features[known], target[known])
        # All shuffles in one call: a forest is slow to call and quick to answer.
        shuffled = np.tile(features[held_out], (1 + len(blocks) * _SHUFFLES, 1, 1))
        for i in range(len(blocks)):
            for j in range(_SHUFFLES):
                order = rng.permutation(len(held_out))
                shuffled[1 + i * _SHUFFLES + j][:, owners == i] = features[held_out][order][:, owners == i]
        predicted = forest.predict(shuffled.reshape(-1, features.shape[1])).reshape(len(shuffled), -1)
        errors = (predicted - target[held_out]) ** 2
        losses[held_out] = errors[0]
        growths[:, held_out] = errors[1:].reshape(len(blocks), _SHUFFLES, -1).mean(1) - errors[0]
    deviations = growths.std(1, ddof=1) / len(target) ** 0.5
    return Importance(
        values=dict(zip(blocks, growths.mean(1).tolist(), strict=True)),
        errors=dict(zip(blocks, deviations.tolist(), strict=True)),
        explained=1.0 - float(losses.mean()),
        trials=len(target),
    )


def _columns(kind: Parameter, name: str, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return what the forest sees of a parameter: an ordered one in one column, another in one column a value."""
    genes = np.array([kind.gene(point[name]) if name in point else np.nan for point in points])
    if isinstance(kind, Choice) and not kind.ordered and kind.count > 2:
        columns = (genes[:, None] == np.arange(kind.count)).astype(float)
    else:
        columns = genes[:, None] / (1 if isinstance(kind, Interval) else max(1, kind.count - 1))
    columns[np.isnan(genes)] = -1.0
    return columns
