"""A cheap stand-in for what is searched: it predicts the costs of points from the trials, and how unsure it is.

Extremely randomised trees (Geurts, Ernst and Wehenkel, 2006), one forest for all objectives, as SMAC screens
configurations with random forests (Hutter, Hoos and Leyton-Brown, 2011); the criterion is the hypervolume that the
lower confidence bounds would add.
"""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor

from lightning_optcore.search.pareto import hypervolume_gains, non_dominated


class Surrogate:
    """Predicts costs from features.

    Args:
        trees: Size of the forest.
        seed: Makes it repeatable.
    """

    def __init__(self, trees: int = 60, seed: int = 0) -> None:
        self._forest = ExtraTreesRegressor(trees, min_samples_leaf=1, bootstrap=False, random_state=seed)

    def fit(self, features: np.ndarray, costs: np.ndarray) -> Surrogate:
        """Learn from trials: ``features`` of shape (trials, columns), ``costs`` of shape (trials, objectives)."""
        self._forest.fit(features, costs if costs.shape[1] > 1 else costs[:, 0])
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation over the trees, each of shape (points, objectives)."""
        single = features.astype(np.float32)
        trees = np.stack([tree.tree_.predict(single)[..., 0] for tree in self._forest.estimators_])
        return trees.mean(0).reshape(len(features), -1), trees.std(0).reshape(len(features), -1)


def scaled(costs: np.ndarray) -> np.ndarray:
    """Return costs in 0..1, where 1 is as far above the median as the best is below it, and worse ones are cut off.

    What failed badly must not set the scale: volume that is won there is worth nothing.
    """
    low = costs.min(0)
    middle = np.median(costs, 0)
    high = np.minimum(costs.max(0), middle + np.maximum(middle - low, 1e-12))
    return np.clip((costs - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)


def most_promising(bounds: np.ndarray, costs: np.ndarray, count: int) -> list[int]:
    """Return the points whose bounds would add most hypervolume, one after the other.

    Args:
        bounds: Optimistic costs of the points, of shape (points, objectives), on the scale of ``costs``.
        costs: Costs of the trials, within 0..1.
        count: How many to return.
    """
    reference = np.full(bounds.shape[1], 1.1)
    front = costs[non_dominated(costs)]
    chosen: list[int] = []
    for _ in range(min(count, len(bounds))):
        if bounds.shape[1] == 1:
            gains = -bounds[:, 0].copy()
        else:
            gains = hypervolume_gains(bounds, front, reference)
            # Where none would add anything, the nearest to the ideal point.
            gains = np.where(gains > 0, gains, -1.0 - bounds.sum(1))
        gains[chosen] = -np.inf
        best = int(np.argmax(gains))
        chosen.append(best)
        front = np.vstack([front, bounds[best]])
        front = front[non_dominated(front)]
    return chosen
