"""Latency of a network from a table of its parts, each measured once on this machine.

Parts are the calls of leaf modules and, between them, of functions (additions, concatenations, pooling), by what they
are and the shapes of their inputs. A network's latency is the scaled sum of its parts and an overhead for each module
that holds others; both factors are fitted to a few networks that are measured as a whole. The table is that of Cai et
al., "ProxylessNAS", ICLR 2019 (appendix B).

Other processes only ever add to a time, so everything is timed in interleaved rounds of which a low percentile counts,
and where one thread works, by its processor time, which stands still while others have the processor: the table holds
the latencies of a quiet machine. Where it is slow for seconds, as what was timed first shows, new parts are timed
again.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from lightning_optcore.fingerprints import hardware_fingerprint
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.timing import torch_threads
from lightning_optcore.store import Store

Call = Callable[[], object]
Clock = Callable[[], float]

# The share of the rounds, in percent, that are taken to be undisturbed.
_QUIET = 10
# A burst of calls lasts about so long: it outlasts the clock's own cost, and is mostly over before it is interrupted.
_BURST_SECONDS = 3e-4
_MAX_CALLS = 100
# So many parts are timed so often at first. The machine is slow when they take so many times what they took.
_FIRST, _SITTINGS, _SLOW = 8, 3, 1.1
# Seconds until a slow machine is tried again, and for how many a table waits in all.
_PAUSE, _PATIENCE = 0.25, 8.0
_FACTORS = ("scale", "overhead")


@dataclass
class Parts:
    """What a network calls.

    Args:
        counts: How often each part is called, by its description.
        calls: A call of each part.
        containers: How many modules were called that hold others.
    """

    counts: Counter[str] = field(default_factory=Counter)
    calls: dict[str, Call] = field(default_factory=dict)
    containers: int = 0

    def add(self, key: str, call: Call) -> None:
        """Count one call."""
        self.counts[key] += 1
        self.calls.setdefault(key, call)


class LatencyTable:
    """Predicts the latency of networks from that of their parts.

    Until :meth:`fit` was called, the prediction is the plain sum of the parts, which is too low.

    Args:
        store: Path of the store that keeps the table for this machine and this version of torch, and the factors of
            every shape of inputs that was fitted; ``None`` keeps them for this process.
        num_threads: Intra-op threads.
        rounds: How often every new part is timed; each is a burst of about 0.3 ms.

    Raises:
        ValueError: If ``num_threads`` or ``rounds`` is not positive.

    Example:
        >>> table = LatencyTable(rounds=5)
        >>> example = torch.randn(1, 64)
        >>> deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        >>> len(table), table.predict(deep, example) > 0, len(table)  # eight times the same part
        (0, True, 1)
    """

    def __init__(self, store: str | Path | None = None, *, num_threads: int = 1, rounds: int = 30) -> None:
        for name, value in (("num_threads", num_threads), ("rounds", rounds)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
        self.num_threads = num_threads
        self.rounds = rounds
        self._store = store
        self._backend = f"torch-modules {torch.__version__}"
        self._known: dict[str, float] = {}
        # The parts that this process timed first, and their least ms: what they take now tells how fast the machine is.
        self._first: dict[str, Call] = {}
        self._first_ms: dict[str, float] = {}
        self._patience = _PATIENCE
        if store is not None:
            with Store(store) as opened:
                self._known = opened.layer_latencies(hardware_fingerprint(), self._backend)

    def __len__(self) -> int:
        return sum("factor" not in json.loads(key) for key in self._known)

    def __getstate__(self) -> dict[str, Any]:
        # Trials may run in processes of their own; calls of this one's networks stay here.
        return {**vars(self), "_first": {}, "_first_ms": {}}

    def predict(self, network: nn.Module, example_inputs: Any) -> float:
        """Return the milliseconds of one forward of the example; parts that are new are measured.

        Args:
            network: A plain module, which is run once.
            example_inputs: What its ``forward`` takes, at the batch size that counts.
        """
        inputs = Inputs.of(example_inputs)
        scale, overhead = self.factors(inputs)
        return float(np.dot(self._row(network, inputs), (scale, overhead)))

    def factors(self, example_inputs: Any) -> tuple[float, float]:
        """Return by what the sum of the parts is multiplied, and the ms of a module that holds others."""
        scale, overhead = (self._known.get(self._factor(name, example_inputs)) for name in _FACTORS)
        return (1.0 if scale is None else scale, 0.0 if overhead is None else overhead)

    def fit(
        self, networks: Sequence[nn.Module], example_inputs: Any, measured: Sequence[float] | None = None
    ) -> list[float]:
        """Fit both factors to networks that are measured as a whole, by least squares of the relative errors.

        Args:
            networks: Some of those that will be searched, e.g. eight at random.
            example_inputs: As in :meth:`predict`.
            measured: Their milliseconds, where these are known; by default they are measured now.

        Returns:
            The measured milliseconds of every network.

        Raises:
            ValueError: If there is no network, or not one measured time for each.
        """
        if not networks:
            raise ValueError("networks=[]: expected some that are measured as a whole, e.g. eight")
        if measured is not None and len(measured) != len(networks):
            raise ValueError(f"measured has {len(measured)} times: expected one for each of {len(networks)} networks")
        inputs = Inputs.of(example_inputs)
        rows = np.array([self._row(network, inputs) for network in networks])
        if measured is None:
            measured = quiet_latencies(networks, inputs, num_threads=self.num_threads, rounds=self.rounds)
        factors, _ = nnls(rows / np.array(measured)[:, None], np.ones(len(networks)))
        self._remember({self._factor(name, inputs): float(v) for name, v in zip(_FACTORS, factors, strict=True)})
        return list(measured)

    def _row(self, network: nn.Module, inputs: Inputs) -> tuple[float, int]:
        """Return the sum of the parts in ms, and how many modules hold others."""
        with _running(network, self.num_threads):
            parts = parts_of(network, inputs)
            threads = json.dumps(self.num_threads)
            keys = {key: f'{{"part": {key}, "threads": {threads}}}' for key in parts.counts}
            new = [key for key in parts.counts if keys[key] not in self._known]
            if new:
                calls = {keys[key]: parts.calls[key] for key in new}
                self._remember(self._timed(calls, _clock(inputs, self.num_threads)))
        return sum(count * self._known[keys[key]] for key, count in parts.counts.items()), parts.containers

    def _timed(self, calls: dict[str, Call], clock: Clock) -> dict[str, float]:
        """Return the ms of new parts.

        Neighbours may slow a processor down for seconds, some parts more than others. As long as what was timed first
        takes longer than it did, all are timed again, and the fastest time counts.
        """
        every = {**calls, **self._first}
        fastest = dict.fromkeys(every, math.inf)
        for sitting in itertools.count(1):
            times = _quiet_times(list(every.values()), self.rounds, clock)
            fastest = {key: min(fastest[key], now) for key, now in zip(every, times, strict=True)}
            slower = [fastest[key] / ms for key, ms in self._first_ms.items()]
            calm = np.median(slower) < _SLOW if slower else sitting >= _SITTINGS
            if calm or self._patience <= 0:
                break
            time.sleep(_PAUSE)
            self._patience -= _PAUSE
        if not self._first:
            self._first = dict(list(calls.items())[:_FIRST])
        # What is in the table stays as it is: a limit is to hold the same networks off all through a search.
        self._first_ms = {key: min(fastest[key], self._first_ms.get(key, math.inf)) for key in self._first}
        return {key: fastest[key] for key in calls}

    def _factor(self, name: str, example_inputs: Any) -> str:
        shapes = _described([Inputs.of(example_inputs).args, Inputs.of(example_inputs).kwargs])
        return json.dumps({"factor": name, "inputs": shapes, "threads": self.num_threads})

    def _remember(self, milliseconds: Mapping[str, float]) -> None:
        self._known.update(milliseconds)
        if self._store is not None and milliseconds:
            with Store(self._store) as opened:
                opened.add_layer_latencies(hardware_fingerprint(), self._backend, milliseconds)


def quiet_latencies(
    networks: Sequence[nn.Module], example_inputs: Any, *, num_threads: int = 1, rounds: int = 30
) -> list[float]:
    """Return the milliseconds of whole networks, timed in interleaved rounds of which the 10th percentile counts.

    Args:
        networks: Plain modules.
        example_inputs: What their ``forward`` takes.
        num_threads: Intra-op threads.
        rounds: How many rounds.
    """
    inputs = Inputs.of(example_inputs)

    def call_of(network: nn.Module) -> Call:
        return lambda: inputs.call(network)

    with _running(nn.ModuleList(networks), num_threads):
        return _quiet_times([call_of(network) for network in networks], rounds, _clock(inputs, num_threads))


def parts_of(network: nn.Module, inputs: Inputs) -> Parts:
    """Run a network once and return its parts.

    A module whose forward calls no other module is one part, whatever it does; of one that calls others, the functions
    that it calls between these are parts.
    """
    parts = Parts()
    # Of every module that is running, what it called so far: functions, and how many modules.
    running: list[tuple[list[tuple[Any, Any, Any]], list[int]]] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            if running and any(True for _ in tensors_in(result)):
                running[-1][0].append((func, args, kwargs))
            return result

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if running:
            running[-1][1].append(1)
        running.append(([], []))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        functions, modules = running.pop()
        if not modules:
            parts.add(_key_of_module(module, args, kwargs), lambda: module(*args, **kwargs))
            return
        parts.containers += 1
        # Described only here: most are within a module that is a part itself.
        for func, positional, named in functions:
            key = {"function": resolve_name(func) or repr(func), "inputs": _described([positional, named])}
            parts.add(json.dumps(key), partial(func, *positional, **named))

    handles = []
    for module in network.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with Functions():
            inputs.call(network)
    finally:
        for handle in handles:
            handle.remove()
    return parts


def _key_of_module(module: nn.Module, args: Any, kwargs: Any) -> str:
    # Many a module's text does not say all that it depends on.
    plain = {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple))
    }
    return json.dumps(
        {
            "module": repr(module),
            "attributes": repr(sorted(plain.items())),
            "weights": [[list(weight.shape), str(weight.dtype)] for weight in module.parameters()],
            "inputs": _described([args, kwargs]),
        }
    )


def _described(value: Any) -> Any:
    """Return what the time of a call depends on: shapes and types of tensors, and all else as text."""
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), str(value.device)]
    if isinstance(value, Mapping):
        return {str(name): _described(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else repr(value)


@contextmanager
def _running(network: nn.Module, num_threads: int) -> Iterator[None]:
    """Evaluate a network without gradients on so many threads; its mode is put back."""
    training = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch_threads(num_threads), torch.inference_mode():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _clock(inputs: Inputs, num_threads: int) -> Clock:
    alone = num_threads == 1 and all(tensor.device.type == "cpu" for tensor in inputs.tensors())
    return time.thread_time if alone else time.perf_counter


def _quiet_times(calls: Sequence[Call], rounds: int, clock: Clock) -> list[float]:
    """Return the milliseconds of every call."""
    bursts = []
    for call in calls:
        for _ in range(2):
            call()
        start = clock()
        call()
        bursts.append(max(1, min(_MAX_CALLS, math.ceil(_BURST_SECONDS / max(clock() - start, 1e-7)))))
    samples: list[list[float]] = [[] for _ in calls]
    order, shuffle = list(range(len(calls))), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for i in order:
            call, count = calls[i], bursts[i]
            # The first call of a burst pays for the caches that the others left.
            call()
            start = clock()
            for _ in range(count):
                call()
            samples[i].append((clock() - start) / count)
    return [float(np.percentile(seconds, _QUIET)) * 1e3 for seconds in samples]
