"""What a job runs: a function with its arguments, or a command of ``optcore``.

What can be told by name goes into the store, so that another driver can start it. Anything else is pickled, by and for
the program that submits it, and never leaves memory and the connection to the worker.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


class WorkError(ValueError):
    """Something that no job can run."""


class NotHereError(Exception):
    """What a job runs is not to be found on the node; it may be on another one."""


@dataclass(frozen=True)
class Work:
    """What a job runs.

    Args:
        kind: In a word: jobs of a kind are expected to need alike.
        named: By name, as it is stored: ``{"call": "package.module:function", "args": [], "kwargs": {}}`` or
            ``{"command": ["train", "model.width=8"], "directory": "/home/me"}``.
        pickled: What has no name.
    """

    kind: str
    named: dict[str, Any] | None = None
    pickled: bytes | None = None

    def load(self) -> Callable[[], Any]:
        """Return what is to be called.

        Raises:
            NotHereError: If a module or a function of that name is not here, or a folder.
        """
        try:
            if self.pickled is not None:
                return _unpickled(self.pickled)
            assert self.named is not None
            if "command" in self.named:
                return _command(self.named)
            module, _, name = self.named["call"].partition(":")
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise NotHereError(f"{self.kind}: {type(error).__name__}: {error}") from error
        return partial(found, *self.named["args"], **self.named["kwargs"])


def work_of(given: Callable[..., Any] | Sequence[str], kind: str | None = None) -> Work:
    """Return what a user wants run.

    Args:
        given: A function, also a ``functools.partial``, or the words of an ``optcore`` command.
        kind: Its kind; by default the function's name, or the job with the groups of configuration it chooses.

    Raises:
        WorkError: If it is neither, or cannot be pickled where it has no name.

    Example:
        >>> from functools import partial
        >>> work_of(partial(round, 2.567, 1)).named
        {'call': 'builtins:round', 'args': [2.567, 1], 'kwargs': {}}
        >>> work_of(["train", "model=mlp", "model.width=8"]).kind
        'train model=mlp'
    """
    if isinstance(given, Sequence) and not isinstance(given, str) and given and all(isinstance(w, str) for w in given):
        words = list(given)
        return Work(kind or kind_of_command(words), {"command": words, "directory": os.getcwd()})  # noqa: PTH109
    if not callable(given):
        raise WorkError(f"{given!r:.100}: expected a function, or the words of a command: ['train', 'model.width=8']")
    function, args, kwargs = given, [], {}
    if isinstance(given, partial):
        function, args, kwargs = given.func, list(given.args), dict(given.keywords)
    name = _name_of(function)
    kind = kind or name or f"{getattr(function, '__qualname__', type(function).__name__)}"
    if name is not None and same_in_json([args, kwargs]):
        return Work(kind, {"call": name, "args": args, "kwargs": kwargs})
    return Work(kind, pickled=pickled(given))


def kind_of_command(words: Sequence[str]) -> str:
    """Return the job and the groups that a command chooses: what its needs hang on most."""
    return " ".join(word for i, word in enumerate(words) if i == 0 or ("=" in word and "." not in word.split("=")[0]))


def same_in_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it was."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value) and not _has_tuples(value)
    except (TypeError, ValueError, RecursionError):
        return False


def pickled(value: Any) -> bytes:
    """Return a value, also a function without a name, as bytes.

    Raises:
        WorkError: If it cannot be pickled.
    """
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise WorkError(f"{value!r:.100} cannot be sent to a worker: {type(error).__name__}: {error}") from error


def _unpickled(data: bytes) -> Any:
    import pickle

    return pickle.loads(data)


def _name_of(function: Any) -> str | None:
    """Return the name by which any process finds a function, if there is one."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return f"{module}:{name}" if found is function else None


def _has_tuples(value: Any) -> bool:
    # In JSON equal to nothing, but (1,) == [1] is false only where no list hides it.
    if isinstance(value, Mapping):
        return any(not isinstance(key, str) or _has_tuples(one) for key, one in value.items())
    return isinstance(value, tuple) or (isinstance(value, list) and any(_has_tuples(one) for one in value))


def _command(named: Mapping[str, Any]) -> Callable[[], Any]:
    from lightning_optcore.executor.command import run_command

    if not os.path.isdir(named["directory"]):  # noqa: PTH112
        raise NotHereError(f"the folder {named['directory']}, in which the command was submitted, is not here")
    return partial(run_command, named["command"], named["directory"])
