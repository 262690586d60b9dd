"""NNI's tuners behind the protocol of all searchers, in this process and without NNI's server.

Sources: NNI, Microsoft, https://github.com/microsoft/nni (3.0); TPE: Bergstra et al., "Algorithms for Hyper-Parameter
Optimization", NeurIPS 2011; Evolution: Real et al., "Large-Scale Evolution of Image Classifiers", ICML 2017.
"""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lightning_optcore.search.replay import Replayed
from lightning_optcore.search.searcher import Direction, SearchError, Trial
from lightning_optcore.search.space import Choice, Interval, Parameter, Params, Space, key_of

_TUNERS = {
    "TPE": ("tpe_tuner", "TpeTuner"),
    "Evolution": ("evolution_tuner", "EvolutionTuner"),
    "GridSearch": ("gridsearch_tuner", "GridSearchTuner"),
    "Random": ("random_tuner", "RandomTuner"),
}
# How often a tuner is asked for what was not asked for yet and meets the rules.
_ATTEMPTS = {"GridSearch": 2000}
# With several objectives, how many values are told together, once they give a scale.
_SCALED_BY = 10
# By a parameter's name, the choice that alone decides whether it is active, and the indices of its values where it is.
_Nested = dict[str, tuple[str, set[int]]]
# The cost of a trial that exceeds a limit: the tuners compare costs, and do no more with them.
_EXCEEDED = 1e12


class NNITuner(Replayed):
    """A tuner of NNI 3; needs the extra ``nas``.

    Intervals are NNI's ``uniform``, ``loguniform``, ``quniform`` or ``qloguniform``, ranges and choices of ascending
    numbers ``quniform`` (the index of the value), other choices ``choice``. A parameter that depends on one choice is
    nested in it; other conditional ones are always proposed, and left out where they are not active.

    NNI's tuners minimise one number. Several objectives become the augmented Chebyshev norm of the costs, each scaled
    to 0..1 by the least and the greatest seen so far, and weighted: one search so finds one region of the front. The
    first ten values are told together. What an earlier value is on a later scale, a tuner is not told.

    What a tuner proposes twice, or against the rules, it is told as failed, and asked again; after some attempts a
    random point takes its place. Only TPE learns from points that it did not propose, and that a rule was broken.

    NNI's Anneal (hyperopt 0.1.2), GP, Metis, SMAC and DNGO do not run with today's NumPy and are not offered.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration.
        tuner: ``"TPE"``, ``"Evolution"``, ``"GridSearch"`` (intervals are halved again and again) or ``"Random"``.
        options: Arguments of the tuner, e.g. ``{"population_size": 16}`` or ``{"tpe_args": {"n_startup_jobs": 10}}``.
        weights: Of the objectives; equal by default.

    Raises:
        SearchError: If NNI 3 is not installed, the tuner or an option is unknown, or the weights do not fit.

    Example:
        >>> searcher = NNITuner(Space({"x": "interval(-1.0,1.0)"}), tuner="TPE", seed=0)  # doctest: +SKIP
        >>> for _ in range(40):  # doctest: +SKIP
        ...     (candidate,) = searcher.ask()
        ...     trial = searcher.tell(candidate, candidate.params["x"] ** 2)
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        tuner: str = "TPE",
        options: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        if tuner not in _TUNERS:
            raise SearchError(f"tuner={tuner!r}: expected one of {', '.join(_TUNERS)}")
        count = len(self.directions)
        self.weights = np.array([1 / count] * count if weights is None else weights, dtype=float)
        if self.weights.shape != (count,) or not np.all(self.weights > 0):
            raise SearchError(f"weights={weights}: expected a positive number for each of {count} objectives")
        self.tuner = tuner
        self.options = dict(options or {})
        self._nni, self._class = nni_algorithm(*_TUNERS[tuner])
        self._nested = _nested(space)
        self._counts = []
        self._begin()

    def _begin(self) -> None:
        self._chance = random.Random(self.seed).getstate()
        self._asked: dict[str, tuple[int, Any]] = {}
        self._calls = 0
        self._low = np.full(len(self.directions), np.inf)
        self._high = -self._low
        self._worst = 0.0
        self._untold: list[Trial] = []
        self._has_scale = len(self.directions) == 1
        described = _described(self.space, self._nested)
        self._is_empty = not described
        with self._apart():
            self._tuner = self._new_tuner()
            if described:
                self._tuner.update_search_space(described)
        if described and self.tuner == "Evolution":
            # Its first population came of a generator without a seed.
            self._tuner.random_state = np.random.RandomState(self.seed)
            self._tuner.population = []
            for _ in range(self._tuner.population_size):
                self._tuner._random_generate_individual()

    def _new_tuner(self) -> Any:
        arguments = {"seed": self.seed} if self.tuner in ("TPE", "Random") else {}
        try:
            return self._class(optimize_mode="minimize", **arguments, **self.options)
        except (TypeError, ValueError) as error:
            raise SearchError(f"tuner={self.tuner!r}, options={self.options}: {error}") from error

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        for _ in range(0 if self._is_empty else _ATTEMPTS.get(self.tuner, 50)):
            number, self._calls = self._calls, self._calls + 1
            with self._apart():
                try:
                    generated = self._tuner.generate_parameters(number)
                except (self._nni.NoMoreTrialError, RuntimeError):
                    # It is at its end, or (Evolution) all of its population is being tried.
                    break
            params = self._params(generated)
            is_feasible = self.space.is_feasible(params)
            if is_feasible and key_of(params) not in self._seen:
                self._asked[key_of(params)] = (number, generated)
                return [(params, self.tuner)]
            self._give(number, generated, self._worst if self.tuner == "TPE" and not is_feasible else None)
        point = self._new_point()
        return [] if point is None else [(point, "random")]

    def _params(self, generated: Mapping[str, Any]) -> Params:
        genes: dict[str, float] = dict.fromkeys(self.space.parameters, 0.0)

        def read(values: Mapping[str, Any]) -> None:
            for name, value in values.items():
                if name != "_name":
                    genes[name] = _gene(self.space.parameters[name], value)
                    if isinstance(value, Mapping):
                        read(value)

        read(generated)
        return self.space.decode(list(genes.values()))

    def _learn(self, trial: Trial) -> None:
        if trial.objectives is not None and not trial.violation:
            costs = self.costs_of(trial)
            self._low, self._high = np.minimum(self._low, costs), np.maximum(self._high, costs)
        if trial.objectives is None:
            self._tell(trial)
            return
        self._untold.append(trial)
        self._has_scale |= len(self._untold) >= _SCALED_BY
        if self._has_scale:
            for one in self._untold:
                self._tell(one)
            self._untold = []

    def _tell(self, trial: Trial) -> None:
        value = None if trial.objectives is None else self._value(trial)
        if value is not None:
            self._worst = max(self._worst, value)
        if key_of(trial.params) in self._asked:
            self._give(*self._asked.pop(key_of(trial.params)), value)
        elif self.tuner == "TPE" and value is not None and not self._is_empty:
            with self._apart():
                self._tuner.import_data([{"parameter": self._as_generated(trial.params), "value": value}])

    def _value(self, trial: Trial) -> float:
        """Return what a trial is worth in one number, less being better."""
        if trial.violation:
            return _EXCEEDED * (1 + trial.violation)
        costs = self.costs_of(trial)
        if len(costs) == 1:
            return float(costs[0])
        weighted = self.weights * (costs - self._low) / np.maximum(self._high - self._low, 1e-12)
        return float(weighted.max() + 0.05 * weighted.sum())

    def _give(self, number: int, generated: Any, value: float | None) -> None:
        with self._apart():
            if value is not None:
                self._tuner.receive_trial_result(number, generated, value)
            self._tuner.trial_end(number, value is not None)

    def _as_generated(self, params: Params) -> dict[str, Any]:
        """Return a point in NNI's form."""
        genes = dict(zip(self.space.parameters, self.space.encode(params), strict=True))

        def written(parent: str | None, index: int) -> dict[str, Any]:
            values: dict[str, Any] = {}
            for name in _children(self.space, self._nested, parent, index):
                kind = self.space.parameters[name]
                if name in {one for one, _ in self._nested.values()}:
                    values[name] = {"_name": str(int(genes[name])), **written(name, int(genes[name]))}
                elif isinstance(kind, Interval):
                    values[name] = params.get(name, kind.value(genes[name]))
                else:
                    values[name] = int(genes[name])
            return values

        return written(None, 0)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Lend Evolution, which draws from the process's generator, one of its own, and let NNI announce nothing."""
        logger, outside = logging.getLogger("nni"), random.getstate()
        level = logger.level
        logger.setLevel(logging.WARNING)
        random.setstate(self._chance)
        try:
            yield
        finally:
            self._chance = random.getstate()
            random.setstate(outside)
            logger.setLevel(level)


def _nested(space: Space) -> _Nested:
    nested: _Nested = {}
    for name, condition in space._conditions.items():
        parent = next(iter(condition.names), None)
        if parent is None or len(condition.names) > 1:
            continue
        kind = space.parameters[parent]
        if isinstance(kind, Choice) and kind.count > 1:
            nested[name] = (parent, {i for i in range(kind.count) if condition({parent: kind.value(i)})})
    return nested


def _children(space: Space, nested: _Nested, parent: str | None, index: int) -> list[str]:
    """Return the parameters that NNI's space has below a value of a choice, or at the top; fixed ones are left out."""
    return [
        name
        for name, kind in space.parameters.items()
        if kind.count != 1
        and (name not in nested if parent is None else name in nested and nested[name][0] == parent)
        and (parent is None or index in nested[name][1])
    ]


def _described(space: Space, nested: _Nested, parent: str | None = None, index: int = 0) -> dict[str, Any]:
    """Return NNI's form of the space."""
    described: dict[str, Any] = {}
    for name in _children(space, nested, parent, index):
        kind = space.parameters[name]
        if name in {one for one, _ in nested.values()}:
            branches = [{"_name": str(i), **_described(space, nested, name, i)} for i in range(kind.count or 0)]
            described[name] = {"_type": "choice", "_value": branches}
        elif isinstance(kind, Interval):
            distribution = f"{'q' if kind.integer else ''}{'log' if kind.log else ''}uniform"
            described[name] = {"_type": distribution, "_value": [kind.low, kind.high, *([1] if kind.integer else [])]}
        elif kind.ordered:
            described[name] = {"_type": "quniform", "_value": [0, kind.count - 1, 1]}
        else:
            described[name] = {"_type": "choice", "_value": list(range(kind.count))}
    return described


def _gene(kind: Parameter, value: Any) -> float:
    if isinstance(value, Mapping):
        return float(value["_name"])
    number = float(value)
    if not isinstance(kind, Interval):
        return float(round(number))
    return kind.gene(min(max(round(number) if kind.integer else number, kind.low), kind.high))


def nni_algorithm(module: str, name: str) -> tuple[Any, Any]:
    """Return NNI and one class of its ``nni.algorithms.hpo``.

    Args:
        module: Where the class is, below ``nni.algorithms.hpo``.
        name: Its name.

    Raises:
        SearchError: If NNI 3 is not installed.
    """
    try:
        nni = importlib.import_module("nni")
        found = getattr(importlib.import_module(f"nni.algorithms.hpo.{module}"), name)
    except ImportError as error:
        raise SearchError(f"NNI 3 is not installed ({error}): pip install lightning-optcore[nas]") from error
    if int(nni.__version__.split(".")[0]) < 3:
        raise SearchError(f"nni {nni.__version__}: expected 3.0 or later; pip install 'nni>=3.0'")
    return nni, found
