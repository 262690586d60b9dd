"""Evolution that predicts only what has to be trained: costs that are known beforehand are computed.

Operations, bytes and parameters of a network are exact before it is trained, and its latency follows from a table; only
its quality is learned, by the Gaussian process of :mod:`~lightning_optcore.search.surrogate`. Who is trained is chosen
by the gain in hypervolume of the optimistic quality at the exact cost, over the front as the model smooths it, for the
effort of its training where that is known. Where there are several objectives, every fifth is the one of whose quality
most may be hoped.

What a network costs hints at its quality, and is a feature of the model. How often a value stands in an architecture is
one (White et al., "A Study on Encodings for Neural Architecture Search", NeurIPS 2020), and so are zero-cost proxies
(White et al., "How Powerful are Performance Predictors in Neural Architecture Search?", NeurIPS 2021).

Successive halving over the epochs is not done here: ``TrialPruning(method="halving")`` ends the bad trainings of any
searcher early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from lightning_optcore.search.evolutionary import Evolutionary
from lightning_optcore.search.pareto import non_dominated
from lightning_optcore.search.searcher import Candidate, Direction, Proposal, SearchError, Trial
from lightning_optcore.search.space import Choice, Params, Space, key_of
from lightning_optcore.search.surrogate import Surrogate, most_promising, promise

KnownCosts = Callable[[Params], Mapping[int, float] | None]
Proxies = Callable[[Params], Sequence[float]]
Effort = Callable[[Params], float]
KnownProxies = Mapping[str, Callable[[Params], float]]

_TRAINED_ON = "trained on"
# Of so many random points for each one that is needed, the first trials are those that differ most.
_SPREAD = 20
# One in so many candidates is the one of the best quality, whatever it costs: the end of the front adds little volume.
_END_OF_FRONT = 5
# So many times the optimism of the others is its own: else a search stays with a best one that is not the best.
_HOPE = 3.0
# How the costs of what is not counted are expected: steps of the fit. One in so many places is for the best quality.
_COST_STEPS, _QUALITY_SHARE = 10, 6
# So many times as far from the best as what is worth nothing, qualities are told apart.
_FAR_BELOW = 2.0
# One in so many random points is cheap enough to be among the first trials.
_CHEAP = 3
# Where hypervolume ends, of costs that are scaled to 0..1.
_REFERENCE = 1.1


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
        effort: Returns, of a point, what its training costs, in any unit above 0: the gain is divided by it.
        worst: Of every objective the value that is worth nothing, e.g. what the network costs that is to be replaced;
            ``None`` where that follows from the trials. What is known to cost more is not tried.
        train_on: One in so many candidates is an architecture of the front again, that whose last training is longest
            ago, and continues from its weights; ``None`` or 0: none is. For an evaluation that inherits weights, where
            an early trial has less training behind it than a late one; for such a one ``search`` offers it.
        counted: At most so many children have their costs computed for a candidate, those that promise most at the
            costs that are expected of them; ``None`` for all. For networks that take long to build.
        pool_size: How many children are screened at a time.
        random_points: How many random points are screened with them.
        exploration: How many standard deviations better than its mean a quality is taken to be; three times as many for
            every fifth.
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
        effort: Effort | None = None,
        worst: Sequence[float | None] | None = None,
        train_on: int | None = None,
        counted: int | None = None,
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
        if counted is not None and counted < 1:
            raise SearchError(f"counted={counted}: expected at least 1, or None for all")
        if train_on is not None and (train_on < 0 or train_on == 1):
            raise SearchError(f"train_on={train_on}: expected at least 2, or 0 for no architecture again")
        if worst is not None and len(worst) != len(directions):
            raise SearchError(f"worst={list(worst)}: expected a value or None for each of {len(directions)} objectives")
        self.known_costs = known_costs
        self.proxies = _computed(proxies, known_proxies or {})
        self.effort = effort
        self.counted = counted
        self.train_on = train_on
        self.continues = bool(train_on)
        self.worst = (
            None if worst is None else self._signs * np.array([np.nan if one is None else one for one in worst])
        )
        self.random_points = random_points
        self._known_by_key: dict[str, dict[int, float]] = {}
        self._proxies_by_key: dict[str, list[float]] = {}
        self._counted = _counted(space)
        # What the ask that is running drew so far, and the keys of what it trains on.
        self._drawn: list[Params] = []
        self._again: list[str] = []

    def ask(self, n: int = 1) -> list[Candidate]:
        """Return up to ``n`` candidates; fewer, or none, where the searcher is at its end.

        Raises:
            SearchError: If ``n`` is not positive, or what was given to compute costs returned something else.
        """
        self._drawn, self._again = [], []
        return super().ask(n)

    def _propose(self, n: int) -> list[Proposal]:
        again = self._to_train_on()
        if again is None:
            return list(super()._propose(n))
        self._again.append(key_of(again.params))
        return [(again.params, _TRAINED_ON, again.candidate.id)]

    def _to_train_on(self) -> Trial | None:
        """Return, if it is time, the newest trial of that architecture on the front which was trained longest ago."""
        if not self.train_on or self._next_id < self.initial_trials:
            return None
        waiting = [one for one in self._pending.values() if one.origin == _TRAINED_ON]
        done = sum(trial.candidate.origin == _TRAINED_ON for trial in self.trials)
        if (done + len(waiting) + len(self._again)) * self.train_on > self._next_id - self.initial_trials:
            return None
        busy = {*self._again, *(key_of(one.params) for one in waiting)}
        front = {key_of(self.trials[i].params) for i in self._front if self._is_worth_something(self.trials[i])}
        # A training on that failed is one as well: else it would be tried for ever.
        last = {key_of(trial.params): trial.candidate.id for trial in self.trials}
        chosen = min(front - busy, key=last.__getitem__, default=None)
        return None if chosen is None else self._newest()[chosen]

    def _learn(self, trial: Trial) -> None:
        if trial.candidate.origin != _TRAINED_ON:
            super()._learn(trial)
        elif trial.objectives is not None:
            # It takes the place of what it was; how children are made has no part in it.
            key, index = key_of(trial.params), len(self.trials) - 1
            self._population = [index if key_of(self.trials[i].params) == key else i for i in self._population]

    def _newest(self) -> dict[str, Trial]:
        """Return the newest trial of each architecture that has one which counts, by its key."""
        good = [trial for trial in self.trials if trial.objectives is not None and not trial.violation]
        return {key_of(trial.params): trial for trial in sorted(good, key=lambda trial: trial.candidate.id)}

    def _is_worth_something(self, trial: Trial) -> bool:
        return self.worst is None or not bool((self.costs_of(trial) >= self.worst).any())

    def _new_point(self) -> Params | None:
        """Return, of some random points, the one that is least like all that were asked for."""
        drawn = [Evolutionary._new_point(self) for _ in range(_SPREAD)]
        points = self._affordable([point for point in drawn if point is not None])
        asked = [*(one.params for one in self.trials), *(one.params for one in self.pending), *self._drawn]
        if points and asked:
            unlike = np.abs(self._features(points)[:, None] - self._features(asked)).sum(2).min(1)
            points = [points[int(np.argmax(unlike))]]
        self._drawn += points[:1]
        return points[0] if points else None

    def _affordable(self, points: list[Params]) -> list[Params]:
        """Return the points that cost less than what is worth nothing, and of these those of the least effort."""
        points = [points[i] for i in self._worth_trying(points)]
        if self.effort is not None:
            points = sorted(points, key=self.effort)[: -(-len(points) // _CHEAP)]
        return points

    def _worth_trying(self, points: Sequence[Params]) -> list[int]:
        """Return which points are known to cost less than what is worth nothing; all, where none does."""
        everyone = list(range(len(points)))
        if self.worst is None:
            return everyone
        worst = self.worst
        return [
            i for i in everyone if all(not value >= worst[j] for j, value in self._known(points[i]).items())
        ] or everyone

    def _children(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        children, operators = super()._children(count)
        anywhere = self.space.random_genomes(self.random_points, self._rng)
        return np.vstack([children, anywhere]), np.append(operators, ["random"] * self.random_points)

    def _screened(self, children: np.ndarray, count: int) -> list[int]:
        """Return the children that would add most hypervolume, the best first."""
        if sum(trial.objectives is not None and not trial.violation for trial in self.trials) < 2:
            return list(range(min(count, len(children))))
        waiting = [candidate.params for candidate in self.pending]
        listed = [self.space.decode(genome) for genome in children]
        rows = self._counted_rows(waiting, listed, count)
        rows = rows[self._worth_trying([listed[i] for i in rows])]
        listed = [listed[i] for i in rows]
        reached, mean, deviation, learned = self._judged(waiting, listed)
        bounds = mean - self.exploration * deviation
        efforts = np.ones(len(listed)) if self.effort is None else np.array([self.effort(one) for one in listed])
        chosen = most_promising(bounds, reached, count, efforts)
        if learned and len(self.directions) > 1 and self._next_id % _END_OF_FRONT == 0:
            quality = learned[self._next_id // _END_OF_FRONT % len(learned)]
            hopes = mean - _HOPE * self.exploration * deviation
            best = self._of_best_quality(hopes, quality, np.delete(bounds, learned, axis=1), reached, efforts)
            chosen = [best, *(i for i in chosen if i != best)][:count]
        return [int(rows[i]) for i in chosen]

    @staticmethod
    def _of_best_quality(
        bounds: np.ndarray, quality: int, known: np.ndarray, reached: np.ndarray, efforts: np.ndarray
    ) -> int:
        """Return the one that would be better than the best by most, for its effort, if it costs what it may."""
        better = reached[:, quality].min() - bounds[:, quality]
        worth = np.where(better > 0, better / efforts, better)
        return int(np.argmax(np.where(known.max(1, initial=0.0) <= _REFERENCE, worth, worth - 1e9)))

    def _counted_rows(self, waiting: Sequence[Params], listed: Sequence[Params], count: int) -> np.ndarray:
        """Return which children are looked at closely: those that promise most at the costs that are expected."""
        everyone = np.arange(len(listed))
        if self.counted is None or len(listed) <= max(self.counted, count):
            return everyone
        # Only what any continued search knows as well: the costs of what was asked for.
        told = [params for params in (*(trial.params for trial in self.trials), *waiting) if self._known(params)]
        if not told:
            return everyone
        costs = np.array([[one for _, one in sorted(self._known(params).items())] for params in told])
        efforts = np.array([1.0 if self.effort is None else self.effort(params) for params in told])
        logs = (costs > 0).all(0)
        targets = np.column_stack([np.where(logs, np.log(np.where(logs, costs, 1.0)), costs), np.log(efforts)])
        features = self._features([*told, *listed])
        model = Surrogate(self._groups_of_features()).fit(features[: len(told)], targets, steps=_COST_STEPS)
        expected = model.predict(features[len(told) :])[0]
        expected[:, :-1] = np.where(logs, np.exp(np.where(logs, expected[:, :-1], 0.0)), expected[:, :-1])
        reached, mean, deviation, learned = self._judged(waiting, listed, expected[:, :-1])
        bounds = mean - self.exploration * deviation
        worth = promise(bounds, reached[non_dominated(reached)], np.exp(expected[:, -1]))
        if learned:
            quality = np.argsort(bounds[:, learned[0]])[: self.counted // _QUALITY_SHARE]
            worth[quality] = np.inf
        return np.sort(np.argsort(-worth, kind="stable")[: max(self.counted, count)])

    def _judged(
        self, waiting: Sequence[Params], listed: Sequence[Params], expected: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """Return what the trials and those that wait reached, and mean and deviation of others.

        All are costs from 0 to what is worth nothing, 1.1. The fourth are the objectives that were learned. The known
        costs of the others are counted, if they are not said.
        """
        newest = self._newest()
        good = list(newest.values())
        bad = [trial.params for trial in self.trials if key_of(trial.params) not in newest]
        points = [*(trial.params for trial in good), *waiting, *bad, *listed]
        costs = np.array([self.costs_of(trial) for trial in good])
        known = sorted(next((one for trial in good if (one := self._known(trial.params))), {}))
        counted = points if expected is None else points[: -len(listed)]
        exact = np.array([[self._known(params).get(j, np.nan) for j in known] for params in counted])
        exact = exact if expected is None else np.vstack([exact, expected])
        exact = np.where(np.isnan(exact), np.nanmax(exact, axis=0, initial=-np.inf), exact)
        low, high = _scale(costs)
        if known:
            low[known], high[known] = exact.min(0), np.maximum(exact.max(0), exact.min(0) + 1e-12)
        if self.worst is not None:
            high = np.fmax(high, self.worst)
        mean, deviation = np.zeros((2, len(points), costs.shape[1]))
        mean[:, known] = (exact - low[known]) / (high - low)[known]
        learned = [j for j in range(costs.shape[1]) if j not in known]
        if learned:
            # What failed is as bad as the worst that counts. Where it is said what is worth nothing, what is far below
            # that is to be learned as far below: taken for just below, optimism makes it worth a training.
            said = np.zeros(len(high), bool) if self.worst is None else ~np.isnan(self.worst)
            last = np.where(said, _FAR_BELOW, 1.0)
            units = np.clip((costs - low) / (high - low), 0.0, last)
            units = np.vstack([units, np.tile(last, (len(bad), 1))])[:, learned]
            features = np.hstack([self._features(points, proxies=True), _spread(exact)])
            groups = self._groups_of_features(proxies=True, costs=len(known))
            first_bad = len(good) + len(waiting)
            rows = np.r_[: len(good), first_bad : first_bad + len(bad)]
            model = Surrogate(groups).fit(features[rows], units, self._logs)
            self._logs = model.logs
            mean[:, learned], deviation[:, learned] = model.predict(features)
        if self.worst is not None:
            # The model's own scale is another one: it learns from what is worth nothing, too.
            limit = np.where(np.isnan(self.worst), high, self.worst)
            stretch = _REFERENCE * (high - low) / np.maximum(limit - low, 1e-12)
            mean, deviation = mean * stretch, deviation * stretch
        # The front as the model smooths it, so that a lucky training does not hide its neighbours; whoever is being
        # trained is taken to reach its mean.
        return mean[: len(good) + len(waiting)], mean[-len(listed) :], deviation[-len(listed) :], learned

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

    def _groups_of_features(self, *, proxies: bool = False, costs: int = 0) -> list[int]:
        more = len(self._counted) + costs
        if proxies:
            more += len(next(iter(self._proxies_by_key.values()), ()))
        first = self._groups[-1] + 1
        return [*self._groups, *range(first, first + more)]

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


def _spread(costs: np.ndarray) -> np.ndarray:
    """Return known costs within 0..1 as features of the model, by their logarithms where these exist."""
    logs = np.where((costs > 0).all(0), np.log(np.maximum(costs, 1e-300)), costs)
    return (logs - logs.min(0)) / np.maximum(np.ptp(logs, axis=0), 1e-12)


def _shares_of_ranks(figures: np.ndarray) -> np.ndarray:
    """Return the rank of each point's figures within 0..1: proxies differ by orders of magnitude."""
    figures = np.nan_to_num(figures, nan=-np.inf, posinf=np.finfo(float).max)
    below = (figures[:, None] > figures[None]).sum(1)
    return below / max(1, len(figures) - 1)
