"""Which channels to remove: by criterion, by what they cost, until the targets are met.

Criteria: ``reconstruction`` as in ``reconstruction.py``; ``l2`` sums squared weights (Li et al., ICLR 2017,
arXiv:1608.08710); ``taylor`` estimates the change of the loss, (gradient x weight)^2 per weight (Molchanov et al., CVPR
2019, arXiv:1906.10771, equation 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optcore.compression.channel_costs import ChannelCosts
from lightning_optcore.compression.channel_groups import ChannelGroups, Ranking, rank_by_saliency
from lightning_optcore.compression.reconstruction import rank_by_reconstruction
from lightning_optcore.compression.schedule import cubic
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.option_values import is_number

STEP = "structured_pruning"
CRITERIA = ("reconstruction", "taylor", "l2", "random")
Criterion = Callable[[str, Tensor, "Tensor | None"], Tensor]

# No layer is cut below this share of its channels.
_FLOOR = 0.125


def fewest_units(units: int) -> int:
    """Return how many units a group of so many keeps at least."""
    return max(1, ceil(_FLOOR * units))


@dataclass(frozen=True)
class Targets:
    """What is to be left of the original, as fractions; ``None`` sets no bound.

    Args:
        flops: Of the FLOPs (and MACs).
        params: Of the parameters.
        latency: Of the summed latency of the layers.
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None

    def given(self) -> dict[str, float]:
        """Return the targets that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def at(self, progress: float) -> Targets:
        """Return the targets of the cubic schedule at a progress from 0 to 1."""
        return Targets(**{name: 1 - (1 - value) * cubic(progress) for name, value in self.given().items()})


def rankings_of(
    criterion: str | Criterion, module: nn.Module, inputs: Inputs, found: ChannelGroups, saliency: Mapping[str, Tensor]
) -> dict[str, Ranking]:
    """Rank the units of every group by a criterion."""
    rankings = rank_by_saliency(found, saliency, normalised=criterion != "taylor")
    if criterion == "reconstruction":
        rankings.update(rank_by_reconstruction(module, inputs, found))
    return rankings


def saliency_of(criterion: str | Criterion, name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Return how much each weight matters."""
    if callable(criterion):
        return criterion(name, weight, gradient)
    if criterion in ("l2", "reconstruction"):
        return weight.square()
    if criterion == "random":
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return torch.rand(weight.shape, generator=generator)
    if gradient is None:
        return torch.zeros_like(weight)
    return (weight * gradient).square()


def choose_channels(
    found: ChannelGroups,
    costs: ChannelCosts,
    rankings: Mapping[str, Ranking],
    targets: Targets,
    *,
    original: Mapping[str, float] | None = None,
    floors: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Choose the units to remove: the least loss per saved cost first, until every target is met.

    Args:
        found: The groups.
        costs: What the network costs.
        rankings: The order of removal in each group, with the loss.
        targets: What to leave of the original.
        original: Costs of the original where ``found`` is of a network that was pruned before.
        floors: Fewest units that a group keeps.

    Raises:
        MisconfigurationException: If the targets cannot be reached.
    """
    original = dict(original) if original is not None else whole_costs(costs)
    kept = costs.whole
    least = {name: fewest_units(units) for name, units in kept.items()}
    least.update({name: floor for name, floor in (floors or {}).items() if name in least})

    def unmet() -> list[str]:
        return [
            name for name, value in targets.given().items() if _cost(costs, name, kept) > value * original[name] + 1e-9
        ]

    def loss(name: str, count: int) -> float:
        return rankings[name].lost[count - 1] if count else 0.0

    while names := unmet():
        best: tuple[float, str, int] | None = None
        for group, present in kept.items():
            units = found.groups[group].units
            for after in _smaller(present, _stride(units), least[group]):
                trial = {**kept, group: after}
                saved = sum(_saving(costs, name, group, kept, trial) / original[name] for name in names)
                if "latency" in original and "latency" not in names:
                    # A bonus alone: a table that was measured is not monotone everywhere.
                    saved += max(0.0, _saving(costs, "latency", group, kept, trial) / original["latency"])
                if saved <= 0:
                    continue
                price = (loss(group, units - after) - loss(group, units - present)) / saved
                if best is None or price < best[0]:
                    best = (price, group, after)
        if best is None:
            raise MisconfigurationException(_unreachable(targets, costs, kept, original))
        kept[best[1]] = best[2]
    while regained := _worth_giving_back(found, kept, loss, unmet):
        kept[regained] += _stride(found.groups[regained].units)
    return {
        name: sorted(rankings[name].order[: found.groups[name].units - count])
        for name, count in kept.items()
        if count < found.groups[name].units
    }


def _worth_giving_back(
    found: ChannelGroups, kept: dict[str, int], loss: Callable[[str, int], float], unmet: Callable[[], list[str]]
) -> str | None:
    """Return the group that gains most from some of its units back without a target being missed."""
    gains: dict[str, float] = {}
    for group, present in list(kept.items()):
        units, stride = found.groups[group].units, _stride(found.groups[group].units)
        if present + stride > units:
            continue
        kept[group] = present + stride
        if not unmet():
            gains[group] = loss(group, units - present) - loss(group, units - present - stride)
        kept[group] = present
    return max(gains, key=lambda name: gains[name], default=None)


def _smaller(present: int, stride: int, least: int) -> list[int]:
    """Return sizes to try: some strides down, and the smallest, which is beyond any plateau of a measured table."""
    below = (present - 1) // stride * stride
    tried = [below - (strides - 1) * stride for strides in (1, 2, 4, 8)]
    return sorted({*(after for after in tried if after >= least), *([least] if least < present else [])})


def _stride(units: int) -> int:
    """Remove channels in multiples that vector instructions like, single ones where there are few."""
    return 8 if units >= 64 else 4 if units >= 32 else 1


def _cost(costs: ChannelCosts, name: str, kept: Mapping[str, int]) -> float:
    return float(getattr(costs, name)(kept))


def _saving(costs: ChannelCosts, name: str, group: str, kept: Mapping[str, int], trial: Mapping[str, int]) -> float:
    if name == "latency":
        return costs.latency_of(group, kept) - costs.latency_of(group, trial)
    return _cost(costs, name, kept) - _cost(costs, name, trial)


def whole_costs(costs: ChannelCosts) -> dict[str, float]:
    """Return what the whole network costs."""
    names = ("flops", "params", "latency") if costs.timed else ("flops", "params")
    return {name: _cost(costs, name, costs.whole) for name in names}


def fractions_left(costs: ChannelCosts, kept: Mapping[str, int], original: Mapping[str, float]) -> dict[str, float]:
    """Return what is left of the original, by quantity."""
    return {name: _cost(costs, name, kept) / value for name, value in original.items() if value}


def units_kept(found: ChannelGroups, removed: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return how many units each group keeps."""
    return {name: group.units - len(removed.get(name, ())) for name, group in found.groups.items()}


def _unreachable(targets: Targets, costs: ChannelCosts, kept: Mapping[str, int], original: Mapping[str, float]) -> str:
    left = fractions_left(costs, kept, original)
    short = {name: value for name, value in targets.given().items() if left[name] > value}
    asked = ", ".join(f"target_{name}={value}" for name, value in short.items())
    floor = ", ".join(f"{left[name]:.3f} of the {name}" for name in short)
    holders = ", ".join(f"{name} ({share:.0%})" for name, share in costs.shares(kept)[:4])
    return f"{STEP}.{asked} cannot be reached: at least {floor} stay, most of it in {holders}"


def check_targets(targets: Targets) -> None:
    """Raise :class:`MisconfigurationException` if there is no target, or one that makes no sense."""
    if not targets.given():
        raise MisconfigurationException(
            f"{STEP}: give target_flops, target_params or target_latency, e.g. target_flops=0.5"
        )
    check_fractions(targets)


def check_fractions(targets: Targets) -> None:
    """Raise :class:`MisconfigurationException` if a target is no fraction."""
    for name, value in targets.given().items():
        if not is_number(value) or not 0 < value <= 1:
            raise MisconfigurationException(
                f"{STEP}.target_{name}={value!r}: expected the fraction of the original to leave, above 0, at most 1"
            )
