"""A cheap stand-in for what is searched: it predicts the costs of points from the trials, and how unsure it is.

A Gaussian process an objective (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006). Its kernel is
the product of a Matérn kernel (3/2) of every parameter, each of a rate of its own as in automatic relevance
determination, plus a linear one; two values of an unordered choice are at distance 1. The criterion is the hypervolume
that the lower confidence bounds would add (Ponweiser et al., "Multiobjective Optimization on a Limited Budget of
Evaluations Using Model-Assisted S-Metric Selection", PPSN 2008).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import lapack
from scipy.optimize import minimize

from lightning_optcore.search.pareto import FEW_SAMPLES, covered, hypervolume_gains, non_dominated

# Logarithms of what a process has: a rate for every parameter, and the variances of the product, the linear part and
# the noise. Mean and spread of what is expected before any trial, on costs of variance 1; the bounds, five spreads
# away, keep every covariance well conditioned.
_RATE, _VARIANCES = (-1.0, 1.0), ((-1.0, 1.0), (-1.0, 1.5), (-4.0, 1.5))


class Surrogate:
    """Predicts costs from features.

    Args:
        groups: To which parameter every column of the features belongs, counted from 0.

    Example:
        >>> x = np.linspace(0, 1, 9)[:, None]
        >>> mean, deviation = Surrogate([0]).fit(x, x**2, steps=50).predict(np.array([[0.3]]))
        >>> bool(abs(mean[0, 0] - 0.09) < 0.01)
        True
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self._groups = np.asarray(groups)
        widths = np.bincount(self._groups)
        # Two values of a choice differ in two of its columns.
        self._shares = np.where(widths > 1, 0.5, 1.0)[self._groups]
        prior = np.array([_RATE] * len(widths) + list(_VARIANCES))
        self._expected, self._spread = prior.T
        self.logs: list[list[float]] = []

    def fit(
        self, features: np.ndarray, costs: np.ndarray, start: Sequence[Sequence[float]] = (), steps: int = 4
    ) -> Surrogate:
        """Learn from trials; the likeliest hyperparameters are in ``logs``.

        Args:
            features: Shape (trials, columns).
            costs: Shape (trials, objectives).
            start: Where the hyperparameters begin: the ``logs`` of a fit to fewer trials.
            steps: By how many steps of L-BFGS they are improved; few will do where the next fit begins with them.
        """
        self._features, self._middle = features, features.mean(0)
        self._shift, self._scale = costs.mean(0), np.maximum(costs.std(0), 1e-9)
        distances, products = self._pairs(features)
        self.logs, self._solutions = [], []
        for j, units in enumerate(((costs - self._shift) / self._scale).T):
            found = minimize(
                self._loss,
                np.array(start[j]) if start else self._expected,
                (distances, products, units),
                jac=True,
                method="L-BFGS-B",
                bounds=np.stack([self._expected - 5 * self._spread, self._expected + 5 * self._spread], axis=1),
                options={"maxiter": steps},
            )
            self.logs.append(found.x.tolist())
            self._solutions.append(_solved(_with_noise(found.x, *_kernels(found.x, distances, products)[:2]), units))
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, that of the noise left out, each of shape (points, objectives)."""
        distances, products = self._pairs(features)
        own = ((features - self._middle) ** 2).sum(1)
        means, deviations = [], []
        for logs, (factor, weights) in zip(self.logs, self._solutions, strict=True):
            product, linear, _ = _kernels(np.array(logs), distances, products)
            covariances = product + linear
            explained = (lapack.dtrtrs(factor, covariances.T, lower=1)[0] ** 2).sum(0)
            means.append(covariances @ weights)
            variances = np.exp(logs[-3]) + np.exp(logs[-2]) * own - explained
            deviations.append(np.sqrt(np.maximum(variances, 0.0)))
        return self._shift + self._scale * np.array(means).T, self._scale * np.array(deviations).T

    def _pairs(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return distances of points to the trials in every parameter, and their inner products."""
        distances = np.zeros((self._groups.max() + 1, len(features), len(self._features)))
        for column, group in enumerate(self._groups):
            steps = np.abs(features[:, column, None] - self._features[:, column])
            distances[group] += self._shares[column] * steps
        return distances, (features - self._middle) @ (self._features - self._middle).T

    def _loss(
        self, logs: np.ndarray, distances: np.ndarray, products: np.ndarray, units: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the negative logarithm of the posterior, and its gradient."""
        product, linear, scaled_distances = _kernels(logs, distances, products)
        factor, weights = _solved(_with_noise(logs, product, linear), units)
        lower = np.tril(lapack.dpotri(factor, lower=1)[0])
        slopes = (lower + lower.T - np.diag(lower.diagonal()) - np.outer(weights, weights)) / 2
        by_product = slopes * product
        by_rate = -np.einsum("gij,ij->g", scaled_distances**2 / (1 + scaled_distances), by_product)
        by_variance = [by_product.sum(), (slopes * linear).sum(), np.exp(logs[-1]) * np.trace(slopes)]
        away = (logs - self._expected) / self._spread
        loss = units @ weights / 2 + np.log(factor.diagonal()).sum() + (away**2).sum() / 2
        return float(loss), np.concatenate([by_rate, by_variance]) + away / self._spread


def _kernels(
    logs: np.ndarray, distances: np.ndarray, products: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the product over the parameters, the linear part, and the distances at the parameters' rates."""
    scaled_distances = 3**0.5 * np.exp(logs[:-3, None, None]) * distances
    product = np.exp(logs[-3] - scaled_distances.sum(0)) * np.prod(1 + scaled_distances, axis=0)
    return product, np.exp(logs[-2]) * products, scaled_distances


def _with_noise(logs: np.ndarray, product: np.ndarray, linear: np.ndarray) -> np.ndarray:
    return product + linear + np.exp(logs[-1]) * np.eye(len(product))


def _solved(covariance: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower Cholesky factor of a covariance, and its inverse times ``units``."""
    factor = lapack.dpotrf(covariance, lower=1)[0]
    return factor, lapack.dpotrs(factor, units, lower=1)[0].ravel()


def scaled(costs: np.ndarray) -> np.ndarray:
    """Return costs in 0..1, where 1 is as far above the median as the best is below it, and worse ones are cut off.

    What failed badly must not set the scale: volume that is won there is worth nothing.
    """
    low = costs.min(0)
    middle = np.median(costs, 0)
    high = np.minimum(costs.max(0), middle + np.maximum(middle - low, 1e-12))
    return np.clip((costs - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)


def most_promising(bounds: np.ndarray, costs: np.ndarray, count: int, efforts: np.ndarray | None = None) -> list[int]:
    """Return the points whose bounds would add most hypervolume, one after the other.

    Args:
        bounds: Optimistic costs of the points, of shape (points, objectives), on the scale of ``costs``.
        costs: Costs of the trials, within 0..1.
        count: How many to return.
        efforts: What trying each point costs: the volume is divided by it.
    """
    front = costs[non_dominated(costs)]
    chosen: list[int] = []
    for _ in range(min(count, len(bounds))):
        worth = promise(bounds, front, efforts)
        worth[chosen] = -np.inf
        best = int(np.argmax(worth))
        chosen.append(best)
        front = front[~np.all(bounds[best] <= front, axis=1)]
        if not np.any(np.all(front <= bounds[best], axis=1)):
            front = np.vstack([front, bounds[best]])
    return chosen


def promise(bounds: np.ndarray, front: np.ndarray, efforts: np.ndarray | None = None) -> np.ndarray:
    """Return the hypervolume that each point's bounds would add to a front; below 0, the better the more, where none.

    Args:
        bounds: As in :func:`most_promising`.
        front: Costs that do not dominate each other.
        efforts: As in :func:`most_promising`.
    """
    if bounds.shape[1] == 1:
        return -bounds[:, 0]
    gains = _gains(bounds, front, np.full(bounds.shape[1], 1.1))
    # Where none would add anything, the nearest to the ideal point.
    return np.where(gains > 0, gains if efforts is None else gains / efforts, -1.0 - bounds.sum(1))


def _gains(bounds: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    if len(reference) == 2:
        return hypervolume_gains(bounds, front, reference)
    # Beyond the plane the exact volume of hundreds of points takes seconds: the share of random points, instead.
    low = np.minimum(bounds.min(0), 0.0)
    samples = low + (reference - low) * np.random.default_rng(0).random((FEW_SAMPLES, len(reference)))
    free = samples[~covered(front, samples).any(0)]
    return covered(bounds, free).sum(1) / FEW_SAMPLES
