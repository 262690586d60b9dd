"""Arithmetic of several objectives. Every objective here is a cost: less is better.

Sources: non-dominated sorting and crowding distance are those of Deb et al., "A Fast and Elitist
Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 6(2), 2002; the hypervolume is Zitzler and Thiele's (1999),
computed by slicing.
"""

from __future__ import annotations

import numpy as np

# With how many random points a volume is estimated: one after the other, and those of many points at once.
_SAMPLES = 16_384
FEW_SAMPLES = 4096


def dominates(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether the first is nowhere worse and somewhere better.

    Example:
        >>> dominates(np.array([1.0, 2.0]), np.array([1.0, 3.0]))
        True
    """
    return bool(np.all(first <= second) and np.any(first < second))


def non_dominated(costs: np.ndarray) -> np.ndarray:
    """Return a mask of the points that no other one dominates; of equal points all stay.

    Args:
        costs: Shape (points, objectives).
    """
    count = len(costs)
    mask = np.ones(count, dtype=bool)
    for i in range(count):
        if mask[i]:
            beaten = np.all(costs[i] <= costs, axis=1) & np.any(costs[i] < costs, axis=1)
            mask &= ~beaten
    return mask


def ranks(costs: np.ndarray) -> np.ndarray:
    """Return the front of every point, 0 being the best: NSGA-II's non-dominated sorting."""
    result = np.zeros(len(costs), dtype=int)
    left = np.arange(len(costs))
    front = 0
    while len(left):
        best = non_dominated(costs[left])
        result[left[best]] = front
        left = left[~best]
        front += 1
    return result


def crowding_distances(costs: np.ndarray) -> np.ndarray:
    """Return how far a point's neighbours are, summed over the objectives; infinite at the ends of the front."""
    count, objectives = costs.shape
    distances = np.zeros(count)
    for j in range(objectives):
        order = np.argsort(costs[:, j], kind="stable")
        values = costs[order, j]
        span = values[-1] - values[0]
        distances[order[[0, -1]]] = np.inf
        if span > 0 and count > 2:
            distances[order[1:-1]] += (values[2:] - values[:-2]) / span
    return distances


def survivors(costs: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of NSGA-II's best ``count`` points: by front, then the least crowded.

    The least crowded one by one: whoever goes makes room for its neighbours, as Kukkonen and Deb proposed (2006).
    """
    if len(costs) <= count:
        return np.arange(len(costs))
    order = ranks(costs)
    kept: list[int] = []
    for front in range(order.max() + 1):
        members = np.flatnonzero(order == front)
        if len(kept) + len(members) <= count:
            kept.extend(members)
            continue
        while len(members) > count - len(kept):
            members = np.delete(members, np.argmin(crowding_distances(costs[members])))
        kept.extend(members)
        break
    return np.array(kept, dtype=int)


def hypervolume(costs: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume between the front and a reference point that is worse than all that counts.

    Args:
        costs: Shape (points, objectives); points that are not better than the reference add nothing.
        reference: Shape (objectives,).

    Example:
        >>> hypervolume(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([2.0, 2.0]))
        3.0
    """
    costs = np.asarray(costs, dtype=float)
    costs = costs[np.all(costs < reference, axis=1)] if len(costs) else costs
    if not len(costs):
        return 0.0
    return _volume(np.unique(costs[non_dominated(costs)], axis=0), np.asarray(reference, dtype=float))


def hypervolume_gains(costs: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return what each point, alone, would add to the hypervolume of a front.

    Args:
        costs: Shape (points, objectives).
        front: Shape (members, objectives).
        reference: Shape (objectives,).
    """
    if costs.shape[1] == 2:
        return _plane_gains(costs, front, reference)
    before = hypervolume(front, reference)
    return np.array([hypervolume(np.vstack([front, point]), reference) - before for point in costs])


def reference_of(costs: np.ndarray) -> np.ndarray:
    """Return a reference point for the hypervolume of trials: the worst of their front, and a tenth of its range more.

    Every member of the front counts then, its ends included, and bad trials do not set the scale (Ishibuchi et al.,
    "How to Specify a Reference Point in Hypervolume Calculation for Fair Performance Comparison", Evolutionary
    Computation 26(3), 2018). An objective in which the front has no range takes that of all trials.

    Args:
        costs: Shape (points, objectives), at least one point.

    Example:
        >>> reference_of(np.array([[0.0, 10.0], [1.0, 0.0], [900.0, 900.0]])).round(2).tolist()
        [1.1, 11.0]
    """
    front = costs[non_dominated(costs)]
    best, worst = front.min(0), front.max(0)
    worst = np.where(worst > best, worst, costs.max(0))
    return worst + np.where(worst > best, 0.1 * (worst - best), 1.0)


def hypervolume_history(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the hypervolume after each point, as a share of that after the last one.

    Two objectives are computed exactly. Of more the exact volume takes too long: it is the share that is dominated of
    16,384 random points between the best of every objective and the reference.

    Args:
        costs: Shape (points, objectives), in the order of time.
        reference: Shape (objectives,).

    Returns:
        Shape (points,), within 0..1; all zero if no point is better than the reference in every objective.

    Example:
        >>> hypervolume_history(np.array([[0.0, 1.0], [3.0, 3.0], [1.0, 0.0]]), np.array([2.0, 2.0])).round(3).tolist()
        [0.667, 0.667, 1.0]
    """
    volumes = np.zeros(len(costs))
    if costs.shape[1] <= 2:
        front = np.empty((0, costs.shape[1]))
        for i, point in enumerate(costs):
            volumes[i] = volumes[i - 1] if i else 0.0
            if np.all(point < reference) and not np.any(np.all(front <= point, axis=1)):
                front = np.vstack([front[~np.all(point <= front, axis=1)], point])
                volumes[i] = hypervolume(front, reference)
    else:
        low = costs.min(0)
        samples = low + (reference - low) * np.random.default_rng(0).random((_SAMPLES, costs.shape[1]))
        covered = np.zeros(_SAMPLES, dtype=bool)
        for i, point in enumerate(costs):
            covered |= np.all(point <= samples, axis=1)
            volumes[i] = covered.mean()
    return volumes / volumes[-1] if volumes[-1] > 0 else volumes


def contributions(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return what the hypervolume would lose without each member of a front; equal members lose nothing.

    Args:
        costs: Shape (members, objectives), none of them dominated; beyond two objectives it is an estimate from
            random points.
        reference: Shape (objectives,); members that are not better than it contribute nothing.

    Example:
        >>> contributions(np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]), np.array([4.0, 3.0])).tolist()
        [1.0, 1.0, 2.0]
    """
    costs = np.minimum(costs, reference)
    if costs.shape[1] == 1:
        return np.zeros(len(costs)) if len(costs) > 1 else reference - costs[0]
    if costs.shape[1] == 2:
        order = np.lexsort((costs[:, 1], costs[:, 0]))
        first, second = costs[order].T
        result = np.empty(len(costs))
        result[order] = (np.append(first[1:], reference[0]) - first) * (np.append(reference[1], second[:-1]) - second)
        return result
    low = costs.min(0)
    covering = covered(costs, low + (reference - low) * np.random.default_rng(0).random((FEW_SAMPLES, len(reference))))
    return np.prod(reference - low) * covering[:, covering.sum(0) == 1].sum(1) / FEW_SAMPLES


def covered(costs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return which samples each point dominates, of shape (points, samples)."""
    result = np.ones((len(costs), len(samples)), dtype=bool)
    for j in range(costs.shape[1]):
        result &= costs[:, j, None] <= samples[:, j]
    return result


def _plane_gains(costs: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    front = front[np.all(front < reference, axis=1)]
    front = front[non_dominated(front)] if len(front) else front
    front = front[np.argsort(front[:, 0])]
    # The free plane falls into strips between the members' first costs; within each its height is the last member's.
    edges = np.concatenate([[-np.inf], front[:, 0], [reference[0]]])
    heights = np.concatenate([[reference[1]], front[:, 1]])
    left = np.maximum(costs[:, :1], edges[:-1])
    widths = np.clip(np.minimum(edges[1:], reference[0]) - left, 0.0, None)
    return (widths * np.clip(heights - costs[:, 1:], 0.0, None)).sum(axis=1)


def _volume(front: np.ndarray, reference: np.ndarray) -> float:
    if front.shape[1] == 1:
        return float(reference[0] - front.min())
    order = np.argsort(front[:, -1])
    front = front[order]
    uppers = np.append(front[1:, -1], reference[-1])
    if front.shape[1] == 2:
        lowest = np.minimum.accumulate(front[:, 0])
        return float(np.sum((uppers - front[:, 1]) * (reference[0] - lowest)))
    total = 0.0
    for i, upper in enumerate(uppers):
        height = upper - front[i, -1]
        if height > 0:
            slab = front[: i + 1, :-1]
            total += height * _volume(slab[non_dominated(slab)], reference[:-1])
    return total
