"""Which channels the others can stand in for, and how they do it.

A removed channel is predicted from the remaining ones by least squares over some data, and the prediction is folded
into the weights of the layers that read it (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks",
ICCV 2017, arXiv:1707.06168, equation 2). The order of removal is that of the optimal brain surgeon for whole channels
(Hassibi and Stork, 1993; for structures Kurtic et al., "ZipLM", NeurIPS 2023, arXiv:2302.04089): each time the channel
whose loss, made up for by all that are left, changes the readers' outputs least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.compression.channel_groups import ChannelGroup, ChannelGroups, Member, Ranking
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.modes import evaluating, fused_attention_off

# Share of the mean variance that is added to the diagonal: channels may be copies of each other.
_RIDGE = 1e-3
_MOST_ROUNDS = 512
_READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def rank_by_reconstruction(module: nn.Module, inputs: Inputs, found: ChannelGroups) -> dict[str, Ranking]:
    """Return in which order the units of each group go, and what share of the readers' output goes with them.

    Groups that no convolution or linear layer reads (the heads of fused attention) are left out.

    Args:
        module: The module, whole.
        inputs: Some tens of samples.
        found: The groups.
    """
    everything = {name: range(group.units) for name, group in found.groups.items()}
    moments = _second_moments(module, inputs, _lost_inputs(module, everything, found))
    rankings = {}
    for name, group in found.groups.items():
        readers = [
            _Reader.of(module.get_submodule(layer).weight, moments[layer][0], member)
            for member in group.members
            for layer, _, key in [member.tensor.rpartition(".")]
            if key == "weight" and member.axis == 1 and layer in moments
        ]
        if readers:
            rankings[name] = _eliminated(group, readers)
    return rankings


@dataclass
class _Reader:
    """A layer that reads channels, while they are taken from it one by one.

    Args:
        inverse: Inverse of the second moments of its inputs.
        weight: Its weight, (input channels, everything else).
        energy: Mean square of its output, whole.
        member: Which of its inputs are whose.
    """

    inverse: Tensor
    weight: Tensor
    energy: float
    member: Member

    @classmethod
    def of(cls, weight: Any, moments: Tensor, member: Member) -> _Reader:
        second = moments[:-1, :-1].cpu()
        matrix = weight.detach().cpu().double().movedim(1, 0).flatten(1)
        ridge = _RIDGE * second.diagonal().mean().clamp_min(1e-30) * torch.eye(len(second), dtype=second.dtype)
        energy = float((matrix * (second @ matrix)).sum())
        return cls(torch.linalg.inv(second + ridge), matrix, max(energy, 1e-30), member)

    def costs(self) -> Tensor:
        """Return the change of the output, as a share of it, for the loss of each single channel."""
        return self.weight.square().sum(dim=1) / self.inverse.diagonal().clamp_min(1e-30) / self.energy

    def remove(self, channels: Tensor) -> None:
        """Take channels away; the others make up for them."""
        columns = self.inverse[:, channels].clone()
        pivots = torch.linalg.pinv(columns[channels], hermitian=True)
        self.weight -= columns @ (pivots @ self.weight[channels])
        self.inverse -= columns @ pivots @ columns.T
        self.weight[channels] = 0
        self.inverse[channels] = 0
        self.inverse[:, channels] = 0
        self.inverse[channels, channels] = 1


def _eliminated(group: ChannelGroup, readers: Sequence[_Reader]) -> Ranking:
    order: list[int] = []
    lost: list[float] = []
    gone = torch.zeros(group.units, dtype=torch.bool)
    # One by one in layers of usual width; several at once in very wide ones.
    at_once = max(1, group.units // _MOST_ROUNDS)
    while len(order) < group.units:
        costs = torch.zeros(group.units, dtype=torch.float64)
        for reader in readers:
            costs.index_add_(0, reader.member.unit, reader.costs()[reader.member.index])
        count = min(at_once, group.units - len(order))
        units = torch.argsort(costs.masked_fill(gone, float("inf")), stable=True)[:count]
        gone[units] = True
        for unit in units.tolist():
            order.append(unit)
            lost.append((lost[-1] if lost else 0.0) + float(costs[unit]))
        for reader in readers:
            reader.remove(reader.member.index[torch.isin(reader.member.unit, units)])
    return Ranking(order, lost)


def compensate(module: nn.Module, inputs: Inputs, removed: Mapping[str, Sequence[int]], found: ChannelGroups) -> None:
    """Prepare the layers that read channels for the loss of some of them, in place. Call it before the cut.

    Args:
        module: The module, whole.
        inputs: Data to predict on: some tens of samples.
        removed: Units that are about to be removed, by group.
        found: The groups.
    """
    lost = _lost_inputs(module, removed, found)
    for name, (second_moments, index) in _second_moments(module, inputs, lost).items():
        _fold(module.get_submodule(name), second_moments, index)


def _lost_inputs(module: nn.Module, removed: Mapping[str, Sequence[int]], found: ChannelGroups) -> dict[str, Tensor]:
    """Return the input channels that each reading layer is about to lose."""
    lost: dict[str, list[Tensor]] = {}
    for group, units in removed.items():
        for member in found.groups[group].members:
            name, _, key = member.tensor.rpartition(".")
            layer = module.get_submodule(name)
            reads = key == "weight" and member.axis == 1 and isinstance(layer, _READERS)
            if reads and getattr(layer, "groups", 1) == 1:
                gone = torch.isin(member.unit, torch.as_tensor(list(units)))
                lost.setdefault(name, []).append(member.index[gone])
    return {name: torch.unique(torch.cat(parts)) for name, parts in lost.items()}


def _second_moments(module: nn.Module, inputs: Inputs, lost: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each layer, the second moments of its input channels and a constant, with what it loses."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: Any, arguments: tuple[Any, ...], output: Any) -> None:
            x = arguments[0].detach()
            axis = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - len(layer.kernel_size) - 1
            rows = x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
            sums[name] = sums.get(name, 0) + rows.T @ rows / len(rows)

        return hook

    hooks = [module.get_submodule(name).register_forward_hook(watch(name)) for name in lost]
    try:
        with evaluating(module), fused_attention_off(), torch.no_grad():
            inputs.call(module)
    finally:
        for handle in hooks:
            handle.remove()
    # A training that diverged has nothing to teach.
    return {name: (moments, lost[name]) for name, moments in sums.items() if bool(torch.isfinite(moments).all())}


def _fold(layer: Any, moments: Tensor, gone: Tensor) -> None:
    channels = len(moments) - 1
    gone = gone.to(moments.device)
    kept = torch.tensor([c for c in range(channels) if c not in set(gone.tolist())], device=moments.device)
    # The last row and column are those of the constant.
    known = torch.cat([kept, kept.new_tensor([channels])])
    ridge = _RIDGE * moments.diagonal()[:-1].mean() * torch.eye(len(known), dtype=moments.dtype, device=moments.device)
    ridge[-1, -1] = 0
    prediction = torch.linalg.lstsq(moments[known][:, known] + ridge, moments[known][:, gone]).solution.T
    weight = layer.weight.data.double()
    weight[:, kept] += torch.einsum("or...,rk->ok...", weight[:, gone], prediction[:, :-1])
    if not torch.isfinite(weight).all():
        return
    if layer.bias is not None:
        constant = torch.einsum("or...,r->o", weight[:, gone], prediction[:, -1])
        layer.bias.data += constant.to(layer.bias.dtype)
    layer.weight.data.copy_(weight)
