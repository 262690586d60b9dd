"""The space of an architecture search: choices by their labels, and how a network is built from them.

An architecture is a plain dict of label to JSON value, ``{"width": 8, "op": 1}``: what is searched, stored in the
journal, written to a file and built again is one and the same.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_optcore.search.space import Choice, Parameter, Rule, Space, SpaceError, key_of

Architecture = dict[str, Any]
Build = Callable[[Mapping[str, Any]], Any]

# As many combinations of one label are numbered.
_COMBINATIONS = 10_000


class ArchitectureError(SpaceError):
    """An architecture or a space of them that cannot be; the message names the label and what would be right."""


class ArchitectureSpace:
    """What is searched, and how a network is built from a point of it.

    Args:
        choices: The labels with their values, which JSON knows.
        build: Returns the network of an architecture; ``None`` where only a table is searched.
        canonical: Returns the architecture that stands for all that build the same network. Of these only the first
            one is evaluated.
        model_space: The ``ModelSpace`` of NNI whose networks these are, if there is one: supernets are made of it.

    Example:
        >>> from torch import nn
        >>> space = ArchitectureSpace(Space({"width": "choice(8,16)"}), lambda chosen: nn.Linear(4, chosen["width"]))
        >>> space.build({"width": 8})
        Linear(in_features=4, out_features=8, bias=True)
        >>> space.validate({"width": 9})
        Traceback (most recent call last):
        lightning_optcore.nas.space.ArchitectureError: width=9: expected one of 8, 16
    """

    def __init__(
        self,
        choices: Space,
        build: Build | None = None,
        *,
        canonical: Callable[[Architecture], Architecture] | None = None,
        model_space: Any = None,
    ) -> None:
        self.choices = choices
        self.model_space = model_space
        self._build = build
        self._canonical = canonical
        self._around: tuple[Callable[[Any], Any], ...] = ()

    def __repr__(self) -> str:
        return f"ArchitectureSpace({self.to_dict()['parameters']})"

    @property
    def builds(self) -> bool:
        """Whether it can build networks."""
        return self._build is not None

    def build(self, architecture: Mapping[str, Any]) -> Any:
        """Return the network of an architecture, with fresh weights.

        Raises:
            ArchitectureError: If it is not one of this space, or the space builds nothing.
        """
        self.validate(architecture)
        if self._build is None:
            raise ArchitectureError("this space has choices only: give a ModelSpace, or a factory with its choices")
        return self.complete(self._build(dict(architecture)))

    def new_model_space(self) -> Any:
        """Return the ``ModelSpace`` as it was made, with fresh weights: a supernet can be made of it."""
        return _made_again(self.model_space)

    def within(self, around: Callable[[Any], Any]) -> ArchitectureSpace:
        """Return the space of the same choices whose networks are parts of others, as supernets of it are.

        Args:
            around: Returns the whole network from the part that is chosen.

        Example:
            >>> from torch import nn
            >>> space = ArchitectureSpace(Space({"width": "choice(8,16)"}), lambda one: nn.Linear(4, one["width"]))
            >>> space.within(lambda network: nn.Sequential(nn.Flatten(), network)).build({"width": 8})
            Sequential(
              (0): Flatten(start_dim=1, end_dim=-1)
              (1): Linear(in_features=4, out_features=8, bias=True)
            )
        """
        outer = copy.copy(self)
        outer._around = (*self._around, around)
        return outer

    def complete(self, network: Any) -> Any:
        """Return the network of which that of an architecture, or a supernet, is a part; see :meth:`within`."""
        for around in self._around:
            network = around(network)
        return network

    def chosen(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an architecture stands for: the values themselves, where it has their numbers.

        Example:
            >>> ArchitectureSpace(Space({"width": "choice(8,16)"})).chosen({"width": 8})
            {'width': 8}
        """
        decode = getattr(self._build, "sample", None)
        return dict(architecture) if decode is None else dict(decode(architecture))

    def validate(self, architecture: Mapping[str, Any]) -> None:
        """Check that an architecture is one of this space.

        Raises:
            ArchitectureError: If a label is missing or superfluous, a value is none of its choices, or a constraint
                is not met.
        """
        parameters = self.choices.parameters
        unknown = sorted(map(str, architecture.keys() - parameters.keys()))
        if unknown:
            raise ArchitectureError(f"{', '.join(unknown)}: no label of the space; there are {', '.join(parameters)}")
        genes = []
        for label, kind in parameters.items():
            if label not in architecture:
                genes.append(0.0)
                continue
            try:
                genes.append(kind.gene(architecture[label]))
            except SpaceError:
                raise ArchitectureError(f"{label}={architecture[label]!r}: expected one of {_values(kind)}") from None
        active = self.choices.decode(genes)
        missing = [label for label in active if label not in architecture]
        if missing:
            expected = "; ".join(f"{label}: one of {_values(parameters[label])}" for label in missing)
            raise ArchitectureError(f"{', '.join(missing)}: missing from the architecture ({expected})")
        mute = [label for label in architecture if label not in active]
        if mute:
            conditions = ", ".join(f"{label} is there if {self.choices.conditions[label]}" for label in mute)
            raise ArchitectureError(f"{', '.join(mute)}: superfluous in {dict(architecture)} ({conditions})")
        if not self.choices.is_feasible(active):
            raise ArchitectureError(f"{dict(architecture)}: does not meet {self.choices.to_dict()['constraints']}")

    def key(self, architecture: Architecture) -> str:
        """Return a text that architectures share which are known to build the same network."""
        return key_of(architecture if self._canonical is None else self._canonical(architecture))

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as plain data, by which two spaces are compared."""
        return self.choices.to_dict()


def architecture_space(space: Any) -> ArchitectureSpace:
    """Return the space of whatever describes one.

    Args:
        space: An :class:`ArchitectureSpace`, a ``ModelSpace`` of NNI, a :class:`~lightning_optcore.search.Space`, or a
            mapping of labels to lists of values or to Hydra's choices. The last two build no networks: their
            architectures are looked up in a table, or built by the function that evaluates them.

    Raises:
        ArchitectureError: If it is none of these, or labels contradict each other.

    Example:
        >>> architecture_space({"op": ["conv", "pool"], "width": "choice(8,16)"}).choices.size
        4
    """
    if isinstance(space, ArchitectureSpace):
        return space
    if isinstance(space, Space):
        return ArchitectureSpace(space)
    if isinstance(space, Mapping):
        return ArchitectureSpace(Space({str(label): _choice(str(label), one) for label, one in space.items()}))
    if callable(getattr(space, "simplify", None)) and callable(getattr(space, "freeze", None)):
        return _of_model_space(space)
    raise ArchitectureError(
        f"space: {type(space).__name__}: expected a ModelSpace, a Space, or a mapping of labels to their values; a "
        "plain factory takes its choices by factory_space(factory, {'width': 'choice(16,32)'})"
    )


def factory_space(
    factory: Callable[..., Any],
    choices: Mapping[str, str | Sequence[Any] | Parameter],
    *,
    constraints: Sequence[Rule] = (),
    conditions: Mapping[str, str] | None = None,
) -> ArchitectureSpace:
    """Return the space of a plain factory: a function or class whose keyword arguments are chosen.

    Args:
        factory: Returns a network. It gets those arguments alone that are active.
        choices: By argument, Hydra's choices as text (``"choice(16,32)"``, ``"range(1,4)"``) or a list of values.
        constraints: Expressions over the arguments that every architecture meets.
        conditions: By argument, the expression under which it is chosen at all.

    Example:
        >>> from torch import nn
        >>> space = factory_space(lambda width: nn.Linear(4, width), {"width": "choice(16,32)"})
        >>> space.build({"width": 32}).out_features
        32
    """
    parameters = {str(label): _choice(str(label), one) for label, one in choices.items()}
    space = Space(parameters, constraints=constraints, conditions=conditions)
    return ArchitectureSpace(space, _Factory(factory))


class _Factory:
    """Calls a factory with an architecture; picklable if that one is."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory

    def __call__(self, architecture: Mapping[str, Any]) -> Any:
        return self._factory(**architecture)


class _Frozen:
    """Builds the network of an architecture in a ModelSpace."""

    def __init__(self, space: Any, samples: Mapping[str, Sequence[Any]]) -> None:
        self._space = space
        # By label, what stands for the index that the architecture has, where its values are not JSON's.
        self._samples = samples

    def sample(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return what NNI takes for an architecture."""
        return {
            label: self._samples[label][value] if label in self._samples else value
            for label, value in architecture.items()
        }

    def __call__(self, architecture: Mapping[str, Any]) -> Any:
        from lightning_optcore.nas._nni_compat import nni_nas

        nas, sample = nni_nas(), self.sample(architecture)
        # What is frozen shares its fixed layers, and their weights, with the space and so with every other network.
        if type(self._space).freeze is not nas.nn.ModelSpace.freeze:
            return copy.deepcopy(self._space.freeze(sample))
        with nas.space.model_context(sample):
            return _made_again(self._space)


def _made_again(space: Any) -> Any:
    return type(space)(*space.trace_args, **space.trace_kwargs)


class _Constraint:
    """A constraint of NNI as a rule of a space."""

    def __init__(self, label: str, constraint: Any, frozen: _Frozen) -> None:
        self.__qualname__ = f"{label}: {' '.join(str(constraint).split())}"
        self._constraint = constraint
        self._frozen = frozen

    def __call__(self, architecture: Mapping[str, Any]) -> bool:
        return self._constraint.check_contains(self._frozen.sample(architecture)) is None


class _Heard:
    """Leaves the choices that change no network out of an architecture."""

    def __init__(self, space: Any, frozen: _Frozen) -> None:
        self._space = space
        self._frozen = frozen

    def __call__(self, architecture: Architecture) -> Architecture:
        from lightning_optcore.nas.mute_choices import mute_labels

        mute = mute_labels(self._space, self._frozen.sample(architecture))
        return {label: value for label, value in architecture.items() if label not in mute}


def _of_model_space(space: Any) -> ArchitectureSpace:
    try:
        mutables = dict(space.simplify())
    except ValueError as error:
        raise _contradiction(space, error) from error
    parameters: dict[str, Parameter] = {}
    samples: dict[str, Sequence[Any]] = {}
    rules = {}
    for label, mutable in mutables.items():
        if hasattr(mutable, "n_chosen"):
            samples[label] = _combinations(label, mutable)
            parameters[label] = Choice(tuple(range(len(samples[label]))))
        elif hasattr(mutable, "values"):
            values = list(mutable.values)
            if all(isinstance(value, (str, int, float, bool)) for value in values):
                parameters[label] = Choice(tuple(values))
            else:
                samples[label] = values
                parameters[label] = Choice(tuple(range(len(values))))
        elif _is_constraint(mutable):
            rules[label] = mutable
        else:
            raise ArchitectureError(f"{label}: {mutable!r} is no choice of values: expected nni.choice(...)")
    if not parameters:
        raise ArchitectureError(f"{type(space).__name__} has no choice: nothing to search")
    frozen = _Frozen(space, samples)
    constraints = [_Constraint(label, rule, frozen) for label, rule in rules.items()]
    choices = Space(parameters, constraints=constraints)
    return ArchitectureSpace(choices, frozen, canonical=_Heard(space, frozen), model_space=space)


def _combinations(label: str, mutable: Any) -> list[list[Any]]:
    """Return what can be chosen of several: all subsets of the size that is asked for, or of any size but none."""
    values, chosen = list(mutable.values), mutable.n_chosen
    sizes = [chosen] if chosen is not None else range(1, len(values) + 1)
    found = itertools.chain.from_iterable(itertools.combinations(values, size) for size in sizes)
    listed = [list(one) for one in itertools.islice(found, _COMBINATIONS + 1)]
    if len(listed) > _COMBINATIONS:
        raise ArchitectureError(f"{label}: {chosen or 'any number'} of {len(values)}: over {_COMBINATIONS:,} choices")
    return listed


def _is_constraint(mutable: Any) -> bool:
    return any(kind.__name__ == "Constraint" for kind in type(mutable).__mro__)


def _contradiction(space: Any, error: ValueError) -> ArchitectureError:
    """Return the error that shows the values of a label that stands for two choices."""
    known: dict[str, Any] = {}
    for mutable in _leaves(space):
        values, before = getattr(mutable, "values", None), known.get(mutable.label)
        if before is not None and values is not None and list(before) != list(values):
            return ArchitectureError(
                f"label {mutable.label}: stands for two choices, {_listed(before)} and {_listed(values)}; give each a "
                "label of its own, or both the same values"
            )
        if values is not None:
            known[mutable.label] = values
    return ArchitectureError(f"{type(space).__name__}: {error}")


def _leaves(space: Any) -> Iterator[Any]:
    """Yield the labelled choices of a space, as often as they stand in it."""
    yield from space.leaf_mutables(lambda mutable: hasattr(mutable, "values"))


def _listed(values: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, values))}]"


def _choice(label: str, one: Any) -> Any:
    if isinstance(one, (list, tuple)):
        values = tuple(one)
        for value in values:
            try:
                json.dumps(value)
            except TypeError:
                raise ArchitectureError(f"{label}: {value!r} is no JSON value: name it by a text or a number") from None
        return Choice(values)
    if isinstance(one, (int, float, bool)):
        return Choice((one,))
    return one


def _values(kind: Parameter) -> str:
    if isinstance(kind, Choice):
        return ", ".join(map(repr, kind.values))
    return f"{kind}"
