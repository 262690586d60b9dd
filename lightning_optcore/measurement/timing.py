"""Timing of alternatives in turns, so that the ratio between them holds on a noisy machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from lightning_optcore.measurement.measurement import Latency

_ROUND_SECONDS = 0.02
_MAX_CALLS_PER_ROUND = 50


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Limit torch to ``num_threads`` intra-op threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turns(calls: Mapping[str, Callable[[], object]], *, rounds: int = 30) -> dict[str, Latency]:
    """Time several functions in shuffled turns (A B, B A, ...).

    A turn is a burst of calls of one function (about 20 ms, at least 2 and at most 50 calls): long
    enough that caches and clock speed settle, short enough that a slow moment of the machine hits all
    alternatives alike. The first call of every burst is not counted, because it pays for the caches
    that the other alternatives left.

    Args:
        calls: Functions by name; each returns only when its work is done.
        rounds: Number of turns of each function.

    Returns:
        Latency in ms by name.
    """
    medians, samples = _timed_in_turns(calls, rounds)
    return {name: _latency(samples[name], medians[name]) for name in calls}


def rounds_in_turns(calls: Mapping[str, Callable[[], object]], *, rounds: int = 30) -> dict[str, list[float]]:
    """Time several functions as :func:`time_in_turns` does.

    Returns:
        The median of each round's burst, in ms, by name: ratios within a round do not know the machine's slow moments.
    """
    medians, _ = _timed_in_turns(calls, rounds)
    return {name: [1e3 * seconds for seconds in values] for name, values in medians.items()}


def _timed_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the rounds' medians and all samples, in seconds, by name."""
    bursts = {name: _warm_up(call) for name, call in calls.items()}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            call = calls[name]
            call()
            seconds = []
            for _ in range(bursts[name]):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            medians[name].append(float(np.median(seconds)))
            samples[name].extend(seconds)
    return medians, samples


def fastest_burst(call: Callable[[], object], *, bursts: int = 7) -> float:
    """Return the smallest median of several bursts of calls, in ms: the machine's noise only ever adds.

    It is for tables whose figures are taken minutes or days apart; alternatives are compared in turns.
    """
    count = _warm_up(call)
    medians = []
    for _ in range(bursts):
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        medians.append(float(np.median(seconds)))
    return min(medians) * 1e3


def _warm_up(call: Callable[[], object]) -> int:
    """Run a function until its time settles; return how many calls make a burst."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    seconds = max(time.perf_counter() - start, 1e-7)
    return max(2, min(_MAX_CALLS_PER_ROUND, int(_ROUND_SECONDS / seconds)))


def _latency(seconds: list[float], medians: list[float]) -> Latency:
    milliseconds = np.asarray(seconds) * 1e3
    low, high = np.percentile(np.asarray(medians) * 1e3, [25, 75])
    p50, p90 = np.percentile(milliseconds, [50, 90])
    return Latency(p50=float(p50), p90=float(p90), spread=float(high - low), calls=len(seconds))
