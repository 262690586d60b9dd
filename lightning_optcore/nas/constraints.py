"""Limits on what a network costs, checked on the built network before it is trained.

Parameters, bytes and FLOPs are counted as the yardstick counts them; the latency is predicted, by
:class:`~lightning_optcore.nas.latency_table.LatencyTable` or any function of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_optcore.measurement.yardstick import static_costs
from lightning_optcore.option_values import is_number
from lightning_optcore.search.searcher import SearchError
from lightning_optcore.search.space import Params, key_of

Build = Callable[[Params], nn.Module]
# Milliseconds of a network for an example of its inputs.
PredictLatency = Callable[[nn.Module, Any], float]

LIMITED = ("params", "flops", "size_bytes", "latency_ms")


class Constraints:
    """Says of an architecture what it costs and which limits that exceeds, without training it.

    It is what ``search(constraints=...)`` takes. The costs of an architecture are computed once.

    Args:
        limits: The most that is allowed: ``params``, ``flops`` (of one sample), ``size_bytes`` (of the serialised
            weights) and ``latency_ms`` (of the example's batch).
        build: Returns the network of an architecture.
        example_inputs: What the network's ``forward`` takes.
        latency: Predicts the milliseconds of a network; needed by ``latency_ms``.
        count_flops: Whether FLOPs are counted, which takes half of the time.

    Raises:
        SearchError: If a limit is unknown or not positive, or there is nothing that predicts ``latency_ms`` or counts
            ``flops``.

    Example:
        >>> def build(architecture):
        ...     return nn.Linear(4, architecture["width"])
        >>> constraints = Constraints({"params": 50}, build, torch.zeros(1, 4))
        >>> constraints({"width": 20}), constraints.violation({"width": 20})
        ({'params': (100.0, 50.0)}, 1.0)
        >>> constraints({"width": 8})
        {}
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        build: Build,
        example_inputs: Any,
        latency: PredictLatency | None = None,
        *,
        count_flops: bool = True,
    ) -> None:
        for name, limit in limits.items():
            if name not in LIMITED:
                raise SearchError(f"constraints.{name}: expected one of {', '.join(LIMITED)}")
            if not is_number(limit) or not math.isfinite(limit) or limit <= 0:
                raise SearchError(f"constraints.{name}={limit!r}: expected a number above 0")
        if "latency_ms" in limits and latency is None:
            raise SearchError("constraints.latency_ms: nothing predicts it; give latency, e.g. LatencyTable().predict")
        if "flops" in limits and not count_flops:
            raise SearchError("constraints.flops: nothing counts them; expected count_flops=True")
        self.limits = {name: float(limit) for name, limit in limits.items()}
        self._build = build
        self._example_inputs = example_inputs
        self._latency = latency
        self._count_flops = count_flops
        self._costs: dict[str, dict[str, float]] = {}
        self._smallest: dict[str, tuple[float, Params]] = {}
        self._met = False

    def __call__(self, architecture: Params) -> dict[str, tuple[float, float]]:
        """Return the value and the limit of what an architecture exceeds."""
        costs = self.costs(architecture)
        missing = sorted(self.limits.keys() - costs.keys())
        if missing:
            raise SearchError(f"constraints.{missing[0]}: cannot be counted for {architecture}")
        exceeded = {name: (costs[name], limit) for name, limit in self.limits.items() if costs[name] > limit}
        self._met = self._met or not exceeded
        for name in self.limits:
            if name not in self._smallest or costs[name] < self._smallest[name][0]:
                self._smallest[name] = (costs[name], dict(architecture))
        return exceeded

    def costs(self, architecture: Params) -> dict[str, float]:
        """Return ``params``, ``size_bytes``, ``flops`` where they can be counted, and the predicted ``latency_ms``.

        These are costs that need no training: :class:`~lightning_optcore.nas.adaptive_evolution.AdaptiveEvolution`
        takes them as ``known_costs``.
        """
        key = key_of(architecture)
        if key not in self._costs:
            # Weights of no meaning are drawn here, which a training must not notice.
            with torch.random.fork_rng(devices=[]):
                network = self._build(dict(architecture))
            self._costs[key] = static_costs(network, self._example_inputs, count_flops=self._count_flops)
            if self._latency is not None:
                self._costs[key]["latency_ms"] = float(self._latency(network, self._example_inputs))
        return dict(self._costs[key])

    def violation(self, architecture: Params) -> float:
        """Return the sum of the relative excesses: 0.5 if one limit is exceeded by half, 0 if all are kept."""
        return sum(value / limit - 1 for value, limit in self(architecture).values())

    def check_met(self) -> None:
        """Check that an architecture met all limits.

        Raises:
            SearchError: If none of those that were asked about did; it says the smallest that was found.
        """
        if self._met or not self._costs:
            return
        found = "; ".join(
            f"constraints.{name}={self.limits[name]:g}: the smallest found is {value:g} ({architecture})"
            for name, (value, architecture) in self._smallest.items()
        )
        raise SearchError(f"no architecture of {len(self._costs)} meets the limits. {found}")
