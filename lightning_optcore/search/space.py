"""The space that is searched: parameters, which points of it may be tried, and how a point becomes numbers.

A point has two forms. ``params`` is what a user sees: a value by name, of the active parameters only. A
*genome* is what searchers compute with: one number a parameter, the index of a :class:`Choice` or
:class:`Range`, and the position within 0..1 of an :class:`Interval`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightning_optcore.option_values import is_number
from lightning_optcore.search.expressions import Expression, ExpressionError

Params = dict[str, Any]
Genome = np.ndarray
Rule = str | Callable[[Params], bool]

# Spaces up to this size are listed rather than sampled, so that "there is no such point" is certain.
_LISTED = 20_000
_ATTEMPTS = 5_000


class SpaceError(ValueError):
    """A space that cannot be searched; the message names the parameter or the rule and what would be right."""


@dataclass(frozen=True)
class Choice:
    """One of some values; ordered where all of them are numbers that ascend or descend."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise SpaceError("choice() of nothing: give it at least one value")
        texts = [_text(value) for value in self.values]
        if len(set(texts)) < len(texts):
            raise SpaceError(f"choice({', '.join(texts)}): a value stands there twice")

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    @cached_property
    def ordered(self) -> bool:
        """Whether neighbours in the list are neighbours in effect."""
        if not all(is_number(value) for value in self.values):
            return False
        steps = [b > a for a, b in itertools.pairwise(self.values)]
        return all(steps) or not any(steps)

    def value(self, gene: float) -> Any:
        """Return the value of an index."""
        return self.values[int(gene)]

    def gene(self, value: Any) -> float:
        """Return the index of a value."""
        if isinstance(value, (str, int, float)) and (type(value), value) in self._quick:
            return float(self._quick[type(value), value])
        try:
            return float(self._index[_text(value)])
        except KeyError:
            raise SpaceError(f"{value!r} is not among {list(self.values)}") from None

    @cached_property
    def _index(self) -> dict[str, int]:
        return {_text(value): i for i, value in enumerate(self.values)}

    @cached_property
    def _quick(self) -> dict[tuple[type, Any], int]:
        return {(type(value), value): i for i, value in enumerate(self.values) if isinstance(value, (str, int, float))}


@dataclass(frozen=True)
class Range:
    """Evenly spaced numbers from ``start`` up to, without, ``stop``."""

    start: float
    stop: float
    step: float = 1

    ordered = True

    def __post_init__(self) -> None:
        if self.step == 0 or self.count < 1:
            raise SpaceError(f"range({self.start},{self.stop},{self.step}) is empty")

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return max(0, math.ceil(round((self.stop - self.start) / self.step, 9)))

    def value(self, gene: float) -> int | float:
        """Return the number of an index."""
        return _rounded(self.start + int(gene) * self.step)

    def gene(self, value: Any) -> float:
        """Return the index of a number."""
        index = round((value - self.start) / self.step) if isinstance(value, (int, float)) else -1
        if not 0 <= index < self.count or not math.isclose(self.value(index), value, rel_tol=1e-9, abs_tol=1e-12):
            raise SpaceError(f"{value!r} is not within range({self.start},{self.stop},{self.step})")
        return float(index)


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds, of which the upper one belongs to it only among integers."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    ordered = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low > self.high:
            raise SpaceError(f"interval({self.low},{self.high}): the first bound must be the lower one")
        if self.log and self.low <= 0:
            raise SpaceError(f"tag(log, interval({self.low},{self.high})): a log scale needs bounds above 0")

    @property
    def count(self) -> int | None:
        """How many values there are; ``None`` where they are not to be counted."""
        if self.integer:
            return int(self.high) - int(self.low) + 1
        return 1 if self.low == self.high else None

    def value(self, gene: float) -> int | float:
        """Return the number at a position within 0..1."""
        if self.integer:
            low, high = self._bounds(self.low - 0.5, self.high + 0.5)
            number = math.floor(self._scale(low + gene * (high - low)) + 0.5)
            return int(min(max(number, self.low), self.high))
        low, high = self._bounds(self.low, self.high)
        return _rounded(min(max(self._scale(low + gene * (high - low)), self.low), self.high))

    def gene(self, value: Any) -> float:
        """Return the position of a number."""
        if not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise SpaceError(f"{value!r} is not within interval({self.low},{self.high})")
        if self.integer and value != int(value):
            raise SpaceError(f"{value!r} is no integer")
        widening = 0.5 if self.integer else 0.0
        low, high = self._bounds(self.low - widening, self.high + widening)
        if low == high:
            return 0.0
        return (math.log(value) - low) / (high - low) if self.log else (value - low) / (high - low)

    def _bounds(self, low: float, high: float) -> tuple[float, float]:
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def _scale(self, number: float) -> float:
        return math.exp(number) if self.log else number


Parameter = Choice | Range | Interval


class Space:
    """Named parameters and the rules that a point of them has to meet.

    Args:
        parameters: By name, a parameter or text in Hydra's grammar: ``"choice(16,32,64)"``, ``"range(1,5)"``,
            ``"interval(0.0,1.0)"``, ``"tag(log, interval(1e-4, 1e-1))"``, ``"int(interval(1,8))"``, ``"16,32"``.
        constraints: Expressions over the parameters, or functions of the values, that must be true.
        conditions: By the name of a parameter, the expression under which it is there at all, e.g.
            ``{"model.depth": "model == 'mlp'"}``.

    Raises:
        SpaceError: If there is no parameter, one cannot be read, or no point meets the constraints.

    Example:
        >>> space = Space({"width": "choice(16,32,64)", "depth": "range(1,5)"}, constraints=["width * depth <= 64"])
        >>> space.size
        7
        >>> space.is_feasible({"width": 64, "depth": 2})
        False
    """

    def __init__(
        self,
        parameters: Mapping[str, str | Parameter],
        constraints: Sequence[Rule] = (),
        conditions: Mapping[str, str] | None = None,
    ) -> None:
        if not parameters:
            raise SpaceError("the space has no parameter; e.g. {'model.width': 'choice(16,32,64)'}")
        self.parameters: dict[str, Parameter] = {name: _parameter(name, text) for name, text in parameters.items()}
        self.constraints = tuple(constraints)
        self.conditions = dict(conditions or {})
        self._names = list(self.parameters)
        self._kinds = list(self.parameters.values())
        self._rules: list[Callable[[Params], bool]] = [
            Expression(rule, self._names) if isinstance(rule, str) else rule for rule in self.constraints
        ]
        for name in self.conditions:
            if name not in self.parameters:
                raise SpaceError(f"conditions.{name}: is no parameter; there are {', '.join(self._names)}")
        self._conditions = _in_order({name: Expression(text, self._names) for name, text in self.conditions.items()})
        self._counts = [kind.count for kind in self._kinds]
        self._check()

    def __len__(self) -> int:
        return len(self._kinds)

    def __repr__(self) -> str:
        return f"Space({self.to_dict()})"

    @cached_property
    def size(self) -> float:
        """How many distinct points meet the rules: infinite with a continuous parameter, and an upper bound
        (the constraints left out) beyond 20,000."""
        return len(self._listed) if self._listed is not None else self._unruled

    def points(self) -> list[Params] | None:
        """Return every point of a small space, in the order of the parameters; ``None`` for a large one."""
        return None if self._listed is None else [dict(point) for point in self._listed]

    def sample(self, rng: np.random.Generator) -> Params:
        """Return a point at random, each parameter uniform in its own scale, among those that meet the rules.

        Raises:
            SpaceError: If 5,000 attempts met no point.
        """
        for _ in range(_ATTEMPTS):
            params = self.decode(self.random_genomes(1, rng)[0])
            if self.is_feasible(params):
                return params
        if self._listed is not None:
            return dict(self._listed[rng.integers(len(self._listed))])
        raise SpaceError(f"constraints {self._rule_texts()} were met by none of {_ATTEMPTS:,} random points")

    def random_genomes(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return genomes at random, whatever the rules say, of shape (count, parameters)."""
        genes = rng.random((count, len(self)))
        indices = np.floor(genes * self.gene_counts)
        return np.where(self.gene_counts > 0, indices, genes)

    @cached_property
    def gene_counts(self) -> np.ndarray:
        """How many values the gene of each parameter has; 0 for an interval's."""
        return np.array([0 if isinstance(kind, Interval) else kind.count for kind in self._kinds])

    @cached_property
    def ordered(self) -> np.ndarray:
        """Of each parameter, whether its genes are near to each other where its values are."""
        return np.array([kind.ordered for kind in self._kinds])

    def decode(self, genome: Sequence[float] | Genome) -> Params:
        """Return the values of a genome; inactive parameters are left out."""
        params = {name: kind.value(gene) for name, kind, gene in zip(self._names, self._kinds, genome, strict=True)}
        for name, condition in self._conditions.items():
            if not condition(params):
                del params[name]
        return params

    def encode(self, params: Mapping[str, Any]) -> Genome:
        """Return the genome of a point; an inactive parameter has its first value.

        Raises:
            SpaceError: If a value is not within its parameter, or one is missing or unknown.
        """
        genes = []
        for name, kind in self.parameters.items():
            if name not in params:
                if name not in self._conditions:
                    raise SpaceError(f"{name} is missing from {dict(params)}")
                genes.append(0.0)
                continue
            try:
                genes.append(kind.gene(params[name]))
            except SpaceError as error:
                raise SpaceError(f"{name}: {error}") from None
        unknown = params.keys() - self.parameters.keys()
        if unknown:
            raise SpaceError(f"{', '.join(sorted(unknown))}: no parameter of the space; there are {self._names}")
        return np.array(genes)

    def features(self, genomes: np.ndarray) -> np.ndarray:
        """Return what a regressor sees: ordered parameters scaled to 0..1, the others one column a value.

        An inactive parameter is -1 in its columns.

        Args:
            genomes: Shape (points, parameters).

        Returns:
            Array of shape (points, columns).
        """
        blocks = []
        for i, (kind, width) in enumerate(zip(self._kinds, self._widths, strict=True)):
            genes = genomes[:, i]
            if width > 1:
                block = (genes[:, None] == np.arange(width)).astype(float)
            elif isinstance(kind, Interval):
                block = genes[:, None].astype(float)
            else:
                block = genes[:, None] / max(1, kind.count - 1)
            name = self._names[i]
            if name in self._conditions:
                inactive = [name not in self.decode(genome) for genome in genomes]
                block[np.array(inactive, dtype=bool)] = -1.0
            blocks.append(block)
        return np.concatenate(blocks, axis=1)

    def is_feasible(self, params: Params) -> bool:
        """Return whether a point meets every constraint; one that cannot be computed there is not met."""
        for rule in self._rules:
            try:
                if not rule(params):
                    return False
            except (TypeError, ArithmeticError, ValueError):
                # An inactive parameter is None, and None is no number.
                return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the space as plain data, by which two of them are compared."""
        return {
            "parameters": {name: _described(kind) for name, kind in self.parameters.items()},
            "constraints": self._rule_texts(),
            "conditions": self.conditions,
        }

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return what differs from another space's :meth:`to_dict`, a line each."""
        mine, lines = self.to_dict(), []
        for name in sorted(mine["parameters"].keys() | other["parameters"].keys()):
            now, then = mine["parameters"].get(name), other["parameters"].get(name)
            if now != then:
                lines.append(f"{name}: was {then or 'not there'}, is {now or 'not there'}")
        for part in ("constraints", "conditions"):
            if mine[part] != other[part]:
                lines.append(f"{part}: were {other[part]}, are {mine[part]}")
        return lines

    @cached_property
    def _widths(self) -> list[int]:
        return [
            kind.count if isinstance(kind, Choice) and not kind.ordered and kind.count > 2 else 1
            for kind in self._kinds
        ]

    @property
    def _unruled(self) -> float:
        return math.prod(math.inf if count is None else count for count in self._counts)

    @cached_property
    def _listed(self) -> list[Params] | None:
        if self._unruled > _LISTED:
            return None
        seen: dict[str, Params] = {}
        for genome in self._genomes():
            params = self.decode(genome)
            if self.is_feasible(params):
                seen.setdefault(key_of(params), params)
        return list(seen.values())

    def _genomes(self) -> Iterator[tuple[float, ...]]:
        """Yield one genome for every combination of values."""
        axes = []
        for kind in self._kinds:
            if isinstance(kind, Interval):
                axes.append([kind.gene(kind.low + i) for i in range(kind.count or 1)])
            else:
                axes.append([float(i) for i in range(kind.count)])
        return itertools.product(*axes)

    def _rule_texts(self) -> list[str]:
        return [
            rule if isinstance(rule, str) else getattr(rule, "__qualname__", repr(rule)) for rule in self.constraints
        ]

    def _check(self) -> None:
        if self._listed is not None and not self._listed:
            raise SpaceError(f"constraints {self._rule_texts()} are met by no point of the space")
        if self._listed is None:
            self.sample(np.random.default_rng(0))


def key_of(params: Mapping[str, Any]) -> str:
    """Return a text that equal points share."""
    return json.dumps(params, sort_keys=True, default=str)


def _parameter(name: str, value: str | Parameter) -> Parameter:
    if isinstance(value, (Choice, Range, Interval)):
        return value
    from lightning_optcore.search.grammar import parse_parameter

    return parse_parameter(name, value)


def _in_order(conditions: dict[str, Expression]) -> dict[str, Expression]:
    """Return the conditions so that one comes after those of the parameters that it names."""
    ordered: dict[str, Expression] = {}
    waiting = dict(conditions)
    while waiting:
        ready = [name for name, condition in waiting.items() if not (condition.names & waiting.keys())]
        if not ready:
            raise SpaceError(f"conditions: {', '.join(waiting)} depend on each other in a circle")
        for name in ready:
            ordered[name] = waiting.pop(name)
    return ordered


def _described(kind: Parameter) -> str:
    if isinstance(kind, Choice):
        return f"choice({','.join(_text(value) for value in kind.values)})"
    if isinstance(kind, Range):
        return f"range({kind.start},{kind.stop},{kind.step})"
    text = f"interval({kind.low},{kind.high})"
    if kind.integer:
        text = f"int({text})"
    return f"tag(log, {text})" if kind.log else text


def described_parameter(name: str, text: str) -> Parameter:
    """Return the parameter that :meth:`Space.to_dict` describes; what JSON does not know became text there.

    Raises:
        SpaceError: If the text describes none.

    Example:
        >>> space = Space({"width": "choice(16,32)", "act": "choice(relu,'a,b')", "lr": "tag(log, interval(1e-4, 1))"})
        >>> described = space.to_dict()["parameters"]
        >>> {name: described_parameter(name, text) for name, text in described.items()} == space.parameters
        True
    """
    if text.startswith("choice(") and text.endswith(")"):
        try:
            return Choice(tuple(json.loads(f"[{text[len('choice(') : -1]}]")))
        except json.JSONDecodeError as error:
            raise SpaceError(f"{name}: {text} is no choice of JSON values") from error
    return _parameter(name, text)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _rounded(number: float) -> int | float:
    """Return a number of 12 digits, so that a value that became a gene comes back as itself."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


__all__ = ["Choice", "ExpressionError", "Interval", "Params", "Range", "Space", "SpaceError", "key_of"]
