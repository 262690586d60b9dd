"""Optuna's samplers behind the protocol of all searchers.

Source: Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019; for the samplers'
own papers see Optuna's documentation.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_optcore.search.replay import Replayed
from lightning_optcore.search.searcher import Candidate, Direction, SearchError, Trial
from lightning_optcore.search.space import Interval, Parameter, Params, Space, key_of

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

_CLASSES = {
    "tpe": "TPESampler",
    "multivariate_tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "nsga2": "NSGAIISampler",
    "nsga3": "NSGAIIISampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
}
# All that these know is in the study: a new one for every candidate proposes as well, and nothing has to be replayed.
_STATELESS = ("tpe", "multivariate_tpe", "random", "gp")
_CONSTRAINED = ("tpe", "multivariate_tpe", "gp", "nsga2", "nsga3")
# How often a sampler is asked for what was not asked for yet and meets the rules; a Gaussian process takes its time.
_ATTEMPTS = {"gp": 3}
_VIOLATION = "violation"


class Optuna(Replayed):
    """Any sampler of Optuna; needs the extra ``optuna``.

    An interval is Optuna's float or integer, with its scale; ranges and choices of ascending numbers are integers (the
    index of the value), other choices are categorical. Parameters that are not active are not suggested. What a sampler
    proposes twice, or against the rules, it is told as failed, and asked again; after some attempts a random point
    takes its place.

    A limit that is exceeded is told as Optuna's constraint to the samplers that know constraints, and as a failure to
    ``"cmaes"``, ``"qmc"`` and ``"random"``. A sampler of your own finds it in ``trial.user_attrs["violation"]``.

    Restoring costs little for ``"tpe"``, ``"multivariate_tpe"``, ``"random"`` and ``"gp"``. Other samplers are asked
    all over again, and what they propose is compared with what they had proposed.

    Args:
        space: What is searched.
        directions: ``"minimize"`` or ``"maximize"`` for every objective.
        seed: Makes the candidates repeatable.
        initial: Points to try first, e.g. the default configuration.
        sampler: ``"tpe"``, ``"multivariate_tpe"`` (with groups where there are conditions), ``"gp"``, ``"nsga2"``,
            ``"nsga3"``, ``"cmaes"`` (one objective; needs the package ``cmaes``), ``"qmc"``, ``"random"``, a sampler of
            Optuna with a seed, or a function that makes one of a seed.
        options: Arguments of the named sampler, e.g. ``{"n_startup_trials": 20}``.

    Raises:
        SearchError: If Optuna is not installed, the sampler is unknown, or an option is.

    Example:
        >>> space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)"})
        >>> searcher = Optuna(space, seed=0, options={"n_startup_trials": 5})
        >>> for _ in range(30):
        ...     (candidate,) = searcher.ask()
        ...     trial = searcher.tell(candidate, candidate.params["x"] ** 2 + candidate.params["y"] ** 2)
        >>> searcher.best().objectives[0] < 0.05
        True
    """

    def __init__(
        self,
        space: Space,
        directions: Sequence[Direction] = ("minimize",),
        *,
        seed: int = 0,
        initial: Sequence[Mapping[str, Any]] = (),
        sampler: str | BaseSampler | Callable[[int], BaseSampler] = "tpe",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, directions, seed=seed, initial=initial)
        self._optuna = _imported("optuna", "Optuna is not installed: pip install lightning-optcore[optuna]")
        if isinstance(sampler, str) and sampler not in _CLASSES:
            raise SearchError(f"sampler={sampler!r}: expected one of {', '.join(_CLASSES)}, or a sampler of Optuna")
        if options and not isinstance(sampler, str):
            raise SearchError(f"options={dict(options)}: belong to a sampler's name; give them to {sampler!r} itself")
        if options and "seed" in options:
            raise SearchError(f"options.seed={options['seed']}: give it as seed={options['seed']} to the searcher")
        if sampler == "cmaes" and len(self.directions) > 1:
            raise SearchError(f"sampler='cmaes': takes one objective, not {len(self.directions)}; e.g. 'nsga2' does")
        if sampler == "cmaes":
            _imported("cmaes", "sampler='cmaes': needs the package cmaes: pip install cmaes")
        self.sampler = sampler if isinstance(sampler, str) else "own"
        self.options = dict(options or {})
        # A sampler that was handed over is copied before it draws anything, so that it can begin again.
        self._given: Any = None if isinstance(sampler, str) else copy.deepcopy(sampler)
        self._stateless = self.sampler in _STATELESS
        self._counts = []
        self._begin()

    def _begin(self) -> None:
        with _quietly(self._optuna):
            self._study = self._optuna.create_study(directions=self.directions, sampler=self._sampler(self.seed))
        self._asked: dict[str, Any] = {}

    def _sampler(self, seed: int) -> BaseSampler:
        if self._given is not None:
            is_sampler = isinstance(self._given, self._optuna.samplers.BaseSampler)
            return copy.deepcopy(self._given) if is_sampler else self._given(seed)
        kind = getattr(self._optuna.samplers, _CLASSES[self.sampler])
        options: dict[str, Any] = {"seed": seed}
        if self.sampler == "multivariate_tpe":
            options |= {"multivariate": True, "group": bool(self.space.conditions)}
        if self.sampler == "qmc":
            options |= {"scramble": True}
        if self.sampler in ("gp", "cmaes", "qmc") and "warn_independent_sampling" in signature(kind).parameters:
            options |= {"warn_independent_sampling": False}
        if self._knows_limits and not self._has_constraints:
            options |= {"constraints_func": _constraints}
        try:
            return kind(**options | copy.deepcopy(self.options))
        except (TypeError, ValueError, ImportError) as error:
            raise SearchError(f"sampler={self.sampler!r}, options={self.options}: {error}") from error

    @property
    def _has_constraints(self) -> bool:
        """Whether this Optuna (5) tells constraints by trial, not by function."""
        return hasattr(self._optuna.trial.Trial, "set_constraint")

    @property
    def _knows_limits(self) -> bool:
        """Whether the named sampler takes constraints; in Optuna 4.0, the Gaussian process does not."""
        if self.sampler not in _CONSTRAINED:
            return False
        kind = getattr(self._optuna.samplers, _CLASSES[self.sampler])
        return self._has_constraints or "constraints_func" in signature(kind).parameters

    def _propose(self, n: int) -> list[tuple[Params, str]]:
        for attempt in range(_ATTEMPTS.get(self.sampler, 20)):
            with _quietly(self._optuna):
                if self._stateless:
                    words = np.random.SeedSequence([self.seed, len(self._seen), attempt])
                    self._study.sampler = self._sampler(int(words.generate_state(1)[0]))
                trial = self._study.ask()
                params = self._suggested(trial)
                is_new = key_of(params) not in self._seen and self.space.is_feasible(params)
                if not is_new or self._stateless:
                    self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                if is_new:
                    # What a sampler notes in a trial beside the point would not be there after a restore.
                    self._asked[key_of(params)] = self._placed(params) if self._stateless else trial
                    return [(params, self.sampler)]
        point = self._new_point()
        return [] if point is None else [(point, "random")]

    def _ask_again(self, candidate: Candidate) -> None:
        if not self._stateless:
            super()._ask_again(candidate)
        elif candidate.origin != "random" or self.sampler == "random":
            self._asked[key_of(candidate.params)] = self._placed(candidate.params)

    def _suggested(self, trial: Any) -> Params:
        genes: dict[str, float] = dict.fromkeys(self.space.parameters, 0.0)
        values: Params = {}
        conditions = self.space._conditions
        # The conditions are ordered: one comes after those of the parameters that it names.
        for name in [*(name for name in genes if name not in conditions), *conditions]:
            if name not in conditions or conditions[name](values):
                kind = self.space.parameters[name]
                genes[name] = _gene(trial, name, kind)
                values[name] = kind.value(genes[name])
        return self.space.decode(list(genes.values()))

    def _placed(self, params: Params) -> Any:
        """Return a running trial of the study at a point that was not sampled."""
        kinds = self.space.parameters
        self._study.enqueue_trial({name: _told(kinds[name], value) for name, value in params.items()})
        trial = self._study.ask()
        if not self._stateless:
            # Samplers of generations note here which one a trial belongs to.
            _ = trial.relative_params
        self._suggested(trial)
        return trial

    def _learn(self, trial: Trial) -> None:
        with _quietly(self._optuna):
            asked = self._asked.pop(key_of(trial.params), None)
            asked = self._placed(trial.params) if asked is None else asked
            is_beyond = trial.violation > 0 and not (self._knows_limits or self.sampler == "own")
            if trial.objectives is None or is_beyond:
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
                return
            asked.set_user_attr(_VIOLATION, trial.violation)
            if self._has_constraints and self._knows_limits:
                asked.set_constraint(_VIOLATION, trial.violation)
            self._study.tell(asked, list(trial.objectives))


def _gene(trial: Any, name: str, kind: Parameter) -> float:
    if isinstance(kind, Interval):
        if kind.integer:
            return kind.gene(trial.suggest_int(name, int(kind.low), int(kind.high), log=kind.log))
        return kind.gene(trial.suggest_float(name, kind.low, kind.high, log=kind.log))
    if kind.ordered:
        return float(trial.suggest_int(name, 0, kind.count - 1))
    # The index stands for the value, which may be a list or a dictionary.
    return float(trial.suggest_categorical(name, list(range(kind.count))))


def _told(kind: Parameter, value: Any) -> float:
    """Return what Optuna calls a value."""
    return min(max(value, kind.low), kind.high) if isinstance(kind, Interval) else int(kind.gene(value))


def _constraints(trial: Any) -> tuple[float, ...]:
    return (trial.user_attrs[_VIOLATION],)


@contextmanager
def _quietly(optuna: Any) -> Iterator[None]:
    """Keep Optuna from announcing studies, and what of it is experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _imported(name: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SearchError(otherwise) from error
