"""Evolution that predicts only what has to be trained: costs that are known beforehand are computed.

Operations, bytes and parameters of a network are exact before it is trained, and its latency follows from a table; only
its quality is learned, by the Gaussian process of :mod:`~lightning_optcore.search.surrogate`. Who is trained is chosen
by the gain in hypervolume of the optimistic quality at the exact cost, over the front as the model smooths it; every
fifth is the one of the greatest optimistic quality.

How often a value stands in an architecture is a feature (White et al., "A Study on Encodings for Neural Architecture
Search", NeurIPS 2020), and so are zero-cost proxies (White et al., "How Powerful are Performance Predictors in Neural
Architecture Search?", NeurIPS 2021).

Successive halving over the epochs is not done here: ``TrialPruning(method="halving")`` ends the bad trainings of any
searcher early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from lightning_optcore.search.evolutionary import Evolutionary
from lightning_optcore.search.searcher import Candidate, Direction, SearchError
from lightning_optcore.search.space import Choice, Params, Space, key_of
from lightning_optcore.search.surrogate import Surrogate, most_promising

KnownCosts = Callable[[Params], Mapping[int, float] | None]
Proxies = Callable[[Params], Sequence[float]]
KnownProxies = Mapping[str, Callable[[Params], float]]

# Of so many random points for each one that is needed, the first trials are those that differ most.
_SPREAD = 20
# One in so many candidates is the one of the best quality, whatever it costs: the end of the front adds little volume.
_END_OF_FRONT = 5


class AdaptiveEvolution(Evolutionary):
    """Evolutionary search for networks whose costs are known before they are trained.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration.
        known_costs: Returns, of a point, the objectives that are known before it is tried, by their number and in
            their own direction: ``{1: flops}``. It must return the same numbers whenever it is asked; ``None``, where
            a network cannot be built, stands for the worst.
        proxies: Returns, of a point, figures that hint at its quality, always as many: features of the model, by rank.
            Or names of ``known_proxies``.
        known_proxies: Functions of a point by name; ``search`` has those of its evaluation.
        pool_size: How many children are screened at a time.
        random_points: How many random points are screened with them.
        exploration: How many standard deviations better than its mean a quality is taken to be.
        options: What else :class:`~lightning_optcore.search.Evolutionary` takes.

    Raises:
        SearchError: If an argument is out of range, a proxy is not known, or ``known_costs`` returns other objectives
            than there are, or what is no number.

    Example:
        >>> space = Space({"width": "choice(8,16,32,64)", "kernel": "choice(3,5,7)", "act": "relu,gelu,tanh"})
        >>> def cost(params):
        ...     return params["width"] * params["kernel"] ** 2
        >>> searcher = AdaptiveEvolution(space, ["maximize", "minimize"], known_costs=lambda params: {1: cost(params)})
        >>> for _ in range(15):
        ...     (candidate,) = searcher.ask()
        ...     quality = candidate.params["width"] ** 0.5 - (candidate.params["act"] == "tanh")
        ...     trial = searcher.tell(candidate, [quality, cost(candidate.params)])
        >>> searcher.best(1).params["width"]
        8
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        known_costs: KnownCosts | None = None,
        proxies: Proxies | Sequence[str] | None = None,
        known_proxies: KnownProxies | None = None,
        pool_size: int = 200,
        random_points: int = 200,
        exploration: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(
            space, directions, seed=seed, initial=initial, pool_size=pool_size, exploration=exploration, **options
        )
        if not self.surrogate:
            raise SearchError("surrogate=False: AdaptiveEvolution without its model is Evolutionary; use that")
        if random_points < 0:
            raise SearchError(f"random_points={random_points}: expected 0 or more")
        self.known_costs = known_costs
        self.proxies = _computed(proxies, known_proxies or {})
        self.random_points = random_points
        self._known_by_key: dict[str, dict[int, float]] = {}
        self._proxies_by_key: dict[str, list[float]] = {}
        self._counted = _counted(space)
        # What the ask that is running drew so far.
        self._drawn: list[Params] = []

    def ask(self, n: int = 1) -> list[Candidate]:
        """Return up to ``n`` candidates; fewer, or none, where the searcher is at its end.

        Raises:
            SearchError: If ``n`` is not positive, or what was given to compute costs returned something else.
        """
        self._drawn = []
        return super().ask(n)

    def _new_point(self) -> Params | None:
        """Return, of some random points, the one that is least like all that were asked for."""
        drawn = [Evolutionary._new_point(self) for _ in range(_SPREAD)]
        points = [point for point in drawn if point is not None]
        asked = [*(one.params for one in self.trials), *(one.params for one in self.pending), *self._drawn]
        if points and asked:
            unlike = np.abs(self._features(points)[:, None] - self._features(asked)).sum(2).min(1)
            points = [points[int(np.argmax(unlike))]]
        self._drawn += points[:1]
        return points[0] if points else None

    def _children(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        children, operators = super()._children(count)
        anywhere = self.space.random_genomes(self.random_points, self._rng)
        return np.vstack([children, anywhere]), np.append(operators, ["random"] * self.random_points)

    def _screened(self, children: np.ndarray, count: int) -> list[int]:
        """Return the children that would add most hypervolume, the best first."""
        good = [trial for trial in self.trials if trial.objectives is not None and not trial.violation]
        bad = [trial.params for trial in self.trials if trial.objectives is None or trial.violation]
        if len(good) < 2:
            return list(range(min(count, len(children))))
        tried = [trial.params for trial in good]
        waiting = [candidate.params for candidate in self.pending]
        points = [*tried, *waiting, *bad, *(self.space.decode(genome) for genome in children)]
        costs = np.array([self.costs_of(trial) for trial in good])
        known = sorted(next((one for params in tried if (one := self._known(params))), {}))
        exact = np.array([[self._known(params).get(j, np.nan) for j in known] for params in points])
        exact = np.where(np.isnan(exact), np.nanmax(exact, axis=0, initial=-np.inf), exact)
        low, high = _scale(costs)
        if known:
            low[known], high[known] = exact.min(0), np.maximum(exact.max(0), exact.min(0) + 1e-12)

        mean, deviation = np.zeros((2, len(points), costs.shape[1]))
        mean[:, known] = (exact - low[known]) / (high - low)[known]
        learned = [j for j in range(costs.shape[1]) if j not in known]
        if learned:
            # What failed is as bad as the worst that counts.
            units = np.clip((costs - low) / (high - low), 0.0, 1.0)[:, learned]
            units = np.vstack([units, np.ones((len(bad), len(learned)))])
            features, groups = self._features(points, proxies=True), self._feature_groups
            first_bad = len(good) + len(waiting)
            rows = np.r_[: len(good), first_bad : first_bad + len(bad)]
            model = Surrogate(groups).fit(features[rows], units, self._logs)
            self._logs = model.logs
            mean[:, learned], deviation[:, learned] = model.predict(features)
        # The front as the model smooths it, so that a lucky training does not hide its neighbours; whoever is being
        # trained is taken to reach its mean.
        reached = mean[: len(good) + len(waiting)]
        bounds = (mean - self.exploration * deviation)[-len(children) :]
        chosen = most_promising(bounds, reached, count)
        if learned and self._next_id % _END_OF_FRONT == 0:
            quality = learned[self._next_id // _END_OF_FRONT % len(learned)]
            best = int(np.argmin(bounds[:, quality]))
            chosen = [best, *(i for i in chosen if i != best)][:count]
        return chosen

    def _known(self, params: Params) -> dict[int, float]:
        """Return the costs of a point that need no training; less is better."""
        if self.known_costs is None:
            return {}
        key = key_of(params)
        if key not in self._known_by_key:
            told = {int(j): float(value) for j, value in (self.known_costs(params) or {}).items()}
            numbers = set(range(len(self.directions)))
            first = next((costs for costs in self._known_by_key.values() if costs), told)
            if told and (not told.keys() <= numbers or told.keys() != first.keys()):
                raise SearchError(
                    f"known_costs returned the objectives {sorted(told)} of {params}: expected numbers of objectives "
                    f"within 0 to {max(numbers)}, the same for every point"
                )
            if not np.isfinite(list(told.values())).all():
                raise SearchError(f"known_costs returned {told} of {params}: expected finite numbers")
            self._known_by_key[key] = {j: float(self._signs[j]) * value for j, value in told.items()}
        return self._known_by_key[key]

    def _features(self, points: Sequence[Params], *, proxies: bool = False) -> np.ndarray:
        """Return the parameters' features, how often each value stands in those that are alike, and the proxies."""
        genomes = np.array([self.space.encode(params) for params in points])
        active = np.array([[name in params for name in self.space.parameters] for params in points])
        standing = np.where(active, genomes, -1)
        counts = [(standing[:, alike] == value).sum(1) / len(alike) ** 0.5 for alike, value in self._counted]
        blocks = [self.space.features(genomes), *(column[:, None] for column in counts)]
        if proxies and self.proxies is not None:
            blocks.append(_shares_of_ranks(np.array([self._proxies(params) for params in points])))
        return np.hstack(blocks)

    @property
    def _feature_groups(self) -> list[int]:
        proxies = len(next(iter(self._proxies_by_key.values()), ()))
        first = self._groups[-1] + 1
        return [*self._groups, *range(first, first + len(self._counted) + proxies)]

    def _proxies(self, params: Params) -> list[float]:
        assert self.proxies is not None
        key = key_of(params)
        if key not in self._proxies_by_key:
            self._proxies_by_key[key] = [float(value) for value in self.proxies(params)]
            first = next(iter(self._proxies_by_key.values()))
            if len(self._proxies_by_key[key]) != len(first):
                raise SearchError(f"proxies returned {self._proxies_by_key[key]} of {params}: expected {len(first)}")
        return self._proxies_by_key[key]


def _computed(proxies: Proxies | Sequence[str] | None, known: KnownProxies) -> Proxies | None:
    """Return what computes the proxies that were given, or named."""
    if proxies is None or callable(proxies):
        return proxies
    names = list(proxies) if isinstance(proxies, Sequence) and not isinstance(proxies, str) else [proxies]
    if names and not known:
        raise SearchError(
            f"proxies={names}: nothing computes them; give a function of an architecture, or search with an evaluation "
            "that has proxies, such as LightningEvaluator"
        )
    for name in names:
        if name not in known:
            raise SearchError(f"proxies={names}: {name!r}: expected names among {', '.join(known)}")
    return partial(_figures, [known[name] for name in names]) if names else None


def _figures(functions: Sequence[Callable[[Params], float]], params: Params) -> list[float]:
    return [function(params) for function in functions]


def _counted(space: Space) -> list[tuple[list[int], int]]:
    """Return, for every value of choices that share all their values, unordered ones, their places and its index."""
    places: dict[str, list[int]] = {}
    for i, (name, kind) in enumerate(space.parameters.items()):
        if isinstance(kind, Choice) and not kind.ordered:
            places.setdefault(space.to_dict()["parameters"][name], []).append(i)
    return [(alike, v) for alike in places.values() if len(alike) > 1 for v in range(int(space.gene_counts[alike[0]]))]


def _scale(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the costs that become 0 and 1: what was trained badly, or failed, must not set the scale."""
    low, middle = costs.min(0), np.median(costs, 0)
    high = np.minimum(costs.max(0), middle + np.maximum(middle - low, 1e-12))
    return low, np.maximum(high, low + 1e-12)


def _shares_of_ranks(figures: np.ndarray) -> np.ndarray:
    """Return the rank of each point's figures within 0..1: proxies differ by orders of magnitude."""
    figures = np.nan_to_num(figures, nan=-np.inf, posinf=np.finfo(float).max)
    below = (figures[:, None] > figures[None]).sum(1)
    return below / max(1, len(figures) - 1)
